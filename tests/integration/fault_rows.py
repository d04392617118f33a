"""Rows of the fault table: what was done to a real run, how soon it was noticed, what it cost.

A row is kept where ``ZEROFIT_FAULT_ROWS`` names a file (``make test-faults``), and its test has
checked it either way. ``benchmarks/make_fault_table.py`` makes the table in docs/reliability.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from launcher import run_dir as rd
from launcher.recovery.record import FailedAttempt, read_failed_attempts

VARIABLE = "ZEROFIT_FAULT_ROWS"


def skip_if_kept(backend: str, zero_stage: int, *faults: str) -> None:
    """Skip a test all of whose rows are kept already, so that the table is made in pieces."""
    path = Path(os.environ.get(VARIABLE, ""))
    if not path.is_file():
        return
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kept = {(row["fault"], row["backend"], row["zero_stage"]) for row in rows}
    if all((fault, backend, zero_stage) in kept for fault in faults):
        pytest.skip(f"{path} has its rows; remove them to measure again")


def add_row(
    *,
    fault: str,
    backend: str,
    zero_stage: int,
    noticed_seconds: float | None,
    steps_lost: int,
    result: str,
) -> None:
    """Keep a row.

    Args:
        fault: what was done to the run.
        backend: what ran it.
        zero_stage: of the run.
        noticed_seconds: from the fault to the moment when its reason was known and no process of
            the attempt was left that could be reached; ``None``: the run went on.
        steps_lost: optimizer steps that were done again.
        result: what became of the run.
    """
    if path := os.environ.get(VARIABLE):
        row = {
            "fault": fault,
            "backend": backend,
            "zero_stage": zero_stage,
            "noticed_seconds": None if noticed_seconds is None else round(noticed_seconds, 1),
            "steps_lost": steps_lost,
            "result": result,
        }
        with Path(path).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")


def failed_attempts(
    run_dir: Path, struck_at: Sequence[float] | None = None
) -> Iterator[tuple[FailedAttempt, float]]:
    """Yield the run's failed attempts, each with the seconds from its fault to its record.

    Args:
        run_dir: of a run whose supervisor has seen faults.
        struck_at: Unix time of each fault; by default those of the injected ones.
    """
    marks = sorted(path.stat().st_mtime for path in (run_dir / ".faults").glob("*"))
    attempts = read_failed_attempts(run_dir)
    for attempt, struck in zip(attempts, struck_at or marks, strict=True):
        yield attempt, datetime.fromisoformat(attempt.failed_at).timestamp() - struck


def steps_lost(attempt: FailedAttempt) -> int:
    """Return the steps that the next attempt did again."""
    return attempt.step - (attempt.resumes_from_step or 0)


def rows_of_steps(run_dir: Path) -> dict[int, list[int]]:
    """Return the examples that each step of a run took on all ranks, sorted.

    Of a step that was lost and done again, what it took the last time.
    """
    by_rank: list[dict[int, dict[str, Any]]] = []
    for path in sorted((run_dir / "batches").glob("*.jsonl")):
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        by_rank.append({entry["step"]: entry for entry in entries})
    taken: dict[int, list[int]] = {}
    for step, first in by_rank[0].items():
        # Further ranks may have done it in an earlier attempt.
        batches = [batch for rank in by_rank[: first["ranks"]] for batch in rank[step]["rows"]]
        taken[step] = sorted(row for batch in batches for row in batch)
    return taken


def losses_of_steps(run_dir: Path) -> Mapping[int, float]:
    """Return the training loss of each step, as it was logged last."""
    lines = (run_dir / rd.TRAINER_LOG).read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}
