"""Memory over time on one rank, in bounded space: ``timeline/00003.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from typing import Any

SCHEMA_VERSION = 1
MAX_SAMPLES = 400
"""About 20 kB of JSON a rank; a curve on a screen shows no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySample:
    """Memory of one rank at one moment, or its highest within one interval of the timeline."""

    seconds: float
    """Since the rank began to measure; clocks of hosts play no part."""
    step: int
    """Optimizer steps that were done."""
    phase: str | None
    allocated_bytes: int | None
    """``None`` on CPU once tensors are not counted any more."""
    reserved_bytes: int | None
    device_used_bytes: int | None
    host_rss_bytes: int


_COLUMNS = tuple(field.name for field in fields(MemorySample))
_BYTES = tuple(name for name in _COLUMNS if name.endswith("_bytes"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The samples of one rank in the order of time."""

    rank: int
    interval_seconds: float
    """Time between two samples; each is the highest of its interval."""
    samples: tuple[MemorySample, ...]


class TimelineRecorder:
    """Keep samples that come at equal intervals; when there are many, two become one.

    So a run of any length needs the space of ``MAX_SAMPLES``, and no peak is lost.
    """

    def __init__(self, *, rank: int, interval_seconds: float) -> None:
        self._rank = rank
        self._interval_seconds = interval_seconds
        self._per_sample = 1
        self._samples: list[MemorySample] = []
        self._num_in_last = 0

    def add(self, sample: MemorySample) -> None:
        """Count a sample."""
        if self._samples and self._num_in_last < self._per_sample:
            self._samples[-1] = _merged(self._samples[-1], sample)
            self._num_in_last += 1
            return
        if len(self._samples) == MAX_SAMPLES:
            pairs = zip(self._samples[::2], self._samples[1::2], strict=True)
            self._samples = [_merged(first, second) for first, second in pairs]
            self._per_sample *= 2
        self._samples.append(sample)
        self._num_in_last = 1

    def timeline(self) -> Timeline:
        """Return what is known now."""
        return Timeline(
            rank=self._rank,
            interval_seconds=self._interval_seconds * self._per_sample,
            samples=tuple(self._samples),
        )


def _merged(first: MemorySample, second: MemorySample) -> MemorySample:
    """Return the highest of both, at the time of the first, named after the fuller."""
    size = [sample.allocated_bytes or sample.host_rss_bytes for sample in (first, second)]
    fuller = second if size[1] > size[0] else first
    highest: dict[str, Any] = {}
    for name in _BYTES:
        known = [size for size in (getattr(first, name), getattr(second, name)) if size is not None]
        highest[name] = max(known, default=None)
    return MemorySample(seconds=first.seconds, step=fuller.step, phase=fuller.phase, **highest)


def timeline_to_json(timeline: Timeline) -> dict[str, Any]:
    """Return a JSON value that :func:`timeline_from_json` reads back."""
    return {
        "schema_version": SCHEMA_VERSION,
        "rank": timeline.rank,
        "interval_seconds": timeline.interval_seconds,
        "columns": _COLUMNS,
        "samples": [astuple(sample) for sample in timeline.samples],
    }


def timeline_from_json(value: Mapping[str, Any]) -> Timeline:
    """Read a rank's timeline; columns that this zerofit does not know are left out.

    Raises:
        ValueError: another schema version, or something is not what it should be.
    """
    version = value.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {version!r}, this zerofit reads {SCHEMA_VERSION}")
    try:
        columns = list(value["columns"])
        indices = {name: columns.index(name) for name in _COLUMNS}
        return Timeline(
            rank=_number(value["rank"], int),
            interval_seconds=_number(value["interval_seconds"], float),
            samples=tuple(
                _sample({name: row[index] for name, index in indices.items()})
                for row in value["samples"]
            ),
        )
    except (TypeError, KeyError, IndexError) as error:
        raise ValueError(f"not a timeline: {error}") from None


def _sample(row: Mapping[str, Any]) -> MemorySample:
    sizes: dict[str, Any] = {
        name: None if row[name] is None else _number(row[name], int) for name in _BYTES
    }
    if sizes["host_rss_bytes"] is None:
        raise ValueError("host_rss_bytes is missing")
    if not isinstance(row["phase"], str | None):
        raise ValueError(f"the phase is {row['phase']!r}")
    return MemorySample(
        seconds=_number(row["seconds"], float),
        step=_number(row["step"], int),
        phase=row["phase"],
        **sizes,
    )


def _number(value: Any, kind: type) -> Any:
    """Return a number of a sane size; JSON has no types to trust."""
    is_one = type(value) is int or (kind is float and type(value) is float)
    if not is_one or not 0 <= value < 1e18:
        raise ValueError(f"{value!r} is no size, count or time")
    return value
