"""Read the earlier attempts of a run, what was done about each, and what filled its memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from launcher import run_dir
from launcher.peaks import RankPeaks, peaks_from_text
from launcher.report.check_rank import check_rank
from launcher.report.prediction import prediction_from_plan, read_int, read_text
from launcher.report.run_extras import peak_bytes, read_object
from launcher.report.run_report import Attempt, MemoryAtFailure

# Written by launcher.resume, launcher.recovery.record and launcher.post_mortem.
ATTEMPTS, RECOVERY_LOG, POST_MORTEM = "attempts", "recovery.jsonl", "post_mortem"
_MAX_ATTEMPTS = 50
_MAX_RANKS_OF_AN_ATTEMPT = 64
"""So many rank files of an earlier attempt are read: enough to tell how it ended."""
_MAX_COMPONENTS = 12


def read_attempts(directory: Path) -> tuple[Attempt, ...]:
    """Return the earlier attempts, oldest first, with what was done about each."""
    try:
        folders = sorted(
            (path for path in (directory / ATTEMPTS).iterdir() if path.name.isdecimal()),
            key=lambda path: int(path.name),
        )
    except (OSError, ValueError):
        return ()
    statuses = {path: read_object(path / run_dir.STATUS) or {} for path in folders}
    records = _records(directory, statuses)
    return tuple(
        _attempt(path, statuses[path], records.get(path)) for path in folders[-_MAX_ATTEMPTS:]
    )


def _records(
    directory: Path, statuses: Mapping[Path, Mapping[str, Any]]
) -> dict[Path, Mapping[str, Any]]:
    """Return the record that was written when an attempt had failed, by the attempt's folder.

    A record belongs to the attempt whose state changed last before it, which may be the one
    that is still in the run directory itself.
    """
    try:
        lines = (directory / RECOVERY_LOG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    ends = {path: _time(status.get("changed_at")) for path, status in statuses.items()}
    ends[directory] = _time((read_object(directory / run_dir.STATUS) or {}).get("changed_at"))
    found: dict[Path, Mapping[str, Any]] = {}
    for line in lines.splitlines():
        record = _object(line)
        written = _time(record.get("failed_at"))
        before = {path: end for path, end in ends.items() if end and written and end <= written}
        if before:
            found[max(before, key=lambda path: before[path])] = record
    return found


def _object(line: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _time(text: object) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp() if isinstance(text, str) else None
    except (ValueError, OverflowError):
        return None


def _attempt(folder: Path, status: Mapping[str, Any], record: Mapping[str, Any] | None) -> Attempt:
    ranks = list(_some_ranks(folder / run_dir.RANKS))
    failed = next((rank for rank in ranks if rank.failure), None)
    reason = read_text(status, "reason")
    if reason is None and failed is not None and failed.failure is not None:
        reason = f"rank {failed.rank}: {failed.failure.type}: {failed.failure.message}"
    is_out = "out_of_memory" in {rank.state for rank in ranks}
    return Attempt(
        number=int(folder.name),
        state="out_of_memory" if is_out else read_text(status, "state") or "unknown",
        reason=(read_text(record, "problem") if record else None) or reason,
        strategy=prediction_from_plan(read_object(folder / run_dir.PLAN)).strategy,
        steps_done=max((rank.steps_done for rank in ranks), default=None),
        peak_allocated_bytes=max(map(peak_bytes, ranks), default=None),
        reaction=None if record is None else _reaction(record),
    )


def _reaction(record: Mapping[str, Any]) -> str:
    changes = record.get("changes")
    parts = [read_text(record, "reason") or read_text(record, "action") or ""]
    if isinstance(changes, Mapping):
        for key, pair in list(changes.items())[:8]:
            before, after = pair if isinstance(pair, list) and len(pair) == 2 else ("?", pair)
            parts.append(f"{key}: {before} → {after}")
    return "; ".join(part for part in parts if part)


def _some_ranks(folder: Path) -> Iterator[RankPeaks]:
    try:
        paths = sorted(path for path in folder.iterdir() if path.stem.isdecimal())
    except OSError:
        return
    for path in paths[:_MAX_RANKS_OF_AN_ATTEMPT]:
        try:
            peaks = peaks_from_text(path.read_bytes())
            check_rank(peaks)
        except (OSError, ValueError):
            continue
        yield peaks


def read_memory_at_failure(directory: Path, ranks: Sequence[RankPeaks]) -> MemoryAtFailure | None:
    """Return what filled the memory of the first rank that ran out of it."""
    for rank in ranks:
        if rank.state != "out_of_memory":
            continue
        path = directory / POST_MORTEM / run_dir.rank_file(directory, rank.rank).name
        if (found := read_object(path)) is not None:
            return MemoryAtFailure(
                rank=rank.rank,
                phase=read_text(found, "phase") or "an unknown phase",
                requested_bytes=read_int(found, "requested_bytes"),
                device_free_bytes=read_int(found, "device_free_bytes"),
                predicted=_sizes(found.get("predicted")),
                measured=_sizes(found.get("measured")),
            )
    return None


def _sizes(value: object) -> dict[str, int]:
    if not isinstance(value, dict):
        return {}
    sizes = {str(key): read_int(value, key) for key in list(value)[:_MAX_COMPONENTS]}
    return {key: size for key, size in sizes.items() if size is not None and size >= 0}
