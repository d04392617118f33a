"""Memory over time needs bounded space, loses no peak, and odd files are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from launcher.timeline import (
    MAX_SAMPLES,
    MemorySample,
    Timeline,
    TimelineRecorder,
    timeline_from_json,
    timeline_to_json,
)


def sample(tick: int, allocated: int | None = 5, phase: str = "forward") -> MemorySample:
    return MemorySample(
        seconds=tick / 10,
        step=tick,
        phase=phase,
        allocated_bytes=allocated,
        reserved_bytes=None,
        device_used_bytes=None,
        host_rss_bytes=7,
    )


def recorded(samples: list[MemorySample]) -> Timeline:
    recorder = TimelineRecorder(rank=3, interval_seconds=0.1)
    for item in samples:
        recorder.add(item)
    return recorder.timeline()


def test_a_long_run_needs_no_more_space_and_keeps_its_peak() -> None:
    peak = sample(777, allocated=99, phase="backward")
    timeline = recorded([peak if n == 777 else sample(n) for n in range(10 * MAX_SAMPLES)])
    # By hand: 4000 samples in fours of 16 are 250.
    assert len(timeline.samples) == 250
    assert timeline.interval_seconds == pytest.approx(1.6)
    (found,) = (item for item in timeline.samples if item.allocated_bytes == 99)
    assert (found.phase, found.step) == ("backward", 777)
    assert found.seconds == pytest.approx(76.8)
    assert [item.seconds for item in timeline.samples] == sorted(
        item.seconds for item in timeline.samples
    )


def test_a_timeline_is_read_back_as_it_was_written() -> None:
    timeline = recorded([sample(0), sample(1, allocated=None)])
    assert timeline_from_json(json.loads(json.dumps(timeline_to_json(timeline)))) == timeline


@pytest.mark.parametrize(
    "changes",
    [
        {"schema_version": 2},
        {"columns": ["seconds"]},
        {"samples": [[1, 2]]},
        {"samples": [["soon", 0, None, None, None, None, 1]]},
        {"samples": [[0.0, 0, 5, None, None, None, 1]]},
        {"samples": [[0.0, 0, None, None, None, None, None]]},
        {"samples": 5},
        {"rank": None},
        {"interval_seconds": float("nan")},
    ],
)
def test_another_content_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        timeline_from_json(timeline_to_json(recorded([sample(0)])) | changes)
