"""Earlier attempts stand in the report with what was done about each of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from report_inputs import failure, rank

from launcher import run_dir as rd
from launcher.peaks import RankPeaks, peaks_to_json
from launcher.report.attempts_reader import read_attempts, read_memory_at_failure
from launcher.report.build import build_report
from launcher.report.failure_tables import attempts_table, failure_memory_table
from launcher.report.run_reader import load_run
from launcher.units import GIB

OUT = failure("OutOfMemoryError", "CUDA out of memory")


def at(minute: int) -> str:
    return f"2026-11-22T10:{minute:02d}:00.000+00:00"


def write(folder: Path, *, ended: int, status: str = "failed", **changes: Any) -> RankPeaks:
    (folder / rd.RANKS).mkdir(parents=True)
    peaks = rank(0, **changes)
    rd.write_json(rd.rank_file(folder, 0), peaks_to_json(peaks))
    content = {"schema_version": 1, "state": status, "changed_at": at(ended)}
    rd.write_json(folder / rd.STATUS, content)
    return peaks


def record(failed: int, **content: Any) -> str:
    known = {"schema_version": 1, "failed_at": at(failed), "problem": "rank 0: out of memory"}
    return json.dumps({**known, **content}) + "\n"


def test_each_record_stands_beside_the_attempt_that_it_was_written_after(tmp_path: Path) -> None:
    write(tmp_path / "attempts" / "1", ended=1, state="out_of_memory", failure=OUT)
    # Ctrl-C, and resumed by hand: nobody wrote a record.
    write(tmp_path / "attempts" / "2", ended=5, status="interrupted")
    write(tmp_path / "attempts" / "10", ended=8, steps_done=7)
    write(tmp_path, ended=12)
    (tmp_path / "recovery.jsonl").write_text(
        record(2, reason="the next rung", changes={"strategy.zero_stage": [2, 3]})
        + "half a li\n"
        + record(9, reason="started again", problem="a rank was killed")
        + record(13, action="stop", reason="three attempts failed")
    )
    first, second, third = read_attempts(tmp_path)
    assert (first.number, second.number, third.number) == (1, 2, 10)
    assert first.reaction == "the next rung; strategy.zero_stage: 2 → 3"
    assert first.reason == "rank 0: out of memory"
    assert (second.state, second.reaction) == ("interrupted", None)
    assert (third.reason, third.reaction, third.steps_done) == (
        "a rank was killed", "started again", 7,
    )  # fmt: skip
    table = attempts_table(build_report(load_run(tmp_path)))
    assert [row[0] for row in table.rows] == ["1", "2", "10"]


def test_what_filled_the_memory_is_shown_predicted_beside_measured(tmp_path: Path) -> None:
    peaks = write(tmp_path, ended=1, state="out_of_memory", failure=OUT)
    (tmp_path / "post_mortem").mkdir()
    post_mortem = {
        "schema_version": 1, "rank": 0, "phase": "backward", "requested_bytes": 2 * GIB,
        "device_free_bytes": GIB, "predicted": {"activations": 40 * GIB, "weights": 20 * GIB},
        "measured": {"weights": 21 * GIB, "everything else": 50 * GIB},
    }  # fmt: skip
    rd.write_json(tmp_path / "post_mortem" / "00000.json", post_mortem)
    found = read_memory_at_failure(tmp_path, [peaks])
    assert found is not None
    assert found.measured == {"weights": 21 * GIB, "everything else": 50 * GIB}
    table = failure_memory_table(build_report(load_run(tmp_path)))
    assert table.rows == (
        ("activations", "40.00", "-"),
        ("weights", "20.00", "21.00"),
        ("everything else", "-", "50.00"),
    )
    assert table.note == "It asked for 2.00 GiB more; 1.00 GiB of the device were free."
