"""Read what surrounds a run's measurements: recipe, lengths of the data, timelines, attempts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from launcher import run_dir
from launcher.peaks import RankPeaks, peaks_from_json
from launcher.report.check_rank import check_rank
from launcher.report.prediction import prediction_from_plan, read_int, read_text
from launcher.report.run_report import Attempt, Lengths
from launcher.timeline import Timeline, timeline_from_json

ATTEMPTS = "attempts"
RECOVERY_LOG = "recovery.jsonl"
DATA_SUMMARY = "data/summary.json"
_MAX_TIMELINES = 4
_MAX_ATTEMPTS = 50
_MAX_RANKS_OF_AN_ATTEMPT = 64
"""So many rank files of an earlier attempt are read: enough to tell how it ended."""
_LARGEST_RECIPE_BYTES = 2**20


def read_object(path: Path) -> Mapping[str, Any] | None:
    """Return a JSON object, ``None`` when there is none that can be read."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_recipe(path: Path) -> dict[str, object]:
    """Return a recipe's values by dotted key, as far as it can be read."""
    try:
        if path.stat().st_size > _LARGEST_RECIPE_BYTES:
            return {}
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return dict(flatten(value)) if isinstance(value, dict) else {}


def flatten(
    value: Mapping[Any, Any], prefix: str = "", depth: int = 0
) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings by dotted key."""
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, Mapping) and item and depth < 10:
            yield from flatten(item, f"{name}.", depth + 1)
        else:
            yield name, item


def read_lengths(directory: Path) -> Lengths | None:
    """Return how long the training records are, if their summary can be read."""
    summary = read_object(directory / DATA_SUMMARY)
    train = (summary or {}).get("train")
    if summary is None or not isinstance(train, dict):
        return None
    max_seq_len = read_int(summary, "max_seq_len")
    bins = train.get("length_bins")
    if max_seq_len is None or not isinstance(bins, list) or not bins:
        return None
    rows = []
    for row in bins:
        if not isinstance(row, list) or len(row) != 3:
            return None
        if not all(type(item) is int and 0 <= item < 10**12 for item in row) or row[0] > row[1]:
            return None
        rows.append((row[0], row[1], row[2]))
    if rows != sorted(rows) or not any(count for _, _, count in rows):
        return None
    return Lengths(
        bins=tuple(rows),
        max_seq_len=max_seq_len,
        num_truncated=read_int(train, "num_truncated") or 0,
    )


def read_timelines(
    directory: Path, ranks: Sequence[RankPeaks], problems: list[str]
) -> tuple[Timeline, ...]:
    """Return memory over time of a few telling ranks, the fullest first."""
    found = []
    for rank in _telling_ranks(ranks):
        path = directory / run_dir.TIMELINES / run_dir.rank_file(directory, rank).name
        try:
            timeline = timeline_from_json(json.loads(path.read_bytes()))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError, AttributeError) as error:
            name = f"{run_dir.TIMELINES}/{path.name}"
            problems.append(f"{name} was left out: {str(error)[:200] or type(error).__name__}.")
            continue
        if timeline.samples:
            found.append(timeline)
    return tuple(found)


def _telling_ranks(ranks: Sequence[RankPeaks]) -> list[int]:
    """Return the fullest, then the emptiest and the median where there are more than a few."""
    by_size = sorted(ranks, key=lambda rank: (-_peak_bytes(rank), rank.rank))
    if len(by_size) <= _MAX_TIMELINES:
        return [rank.rank for rank in by_size]
    telling = (by_size[0], by_size[-1], by_size[len(by_size) // 2])
    return [rank.rank for rank in telling]


def _peak_bytes(rank: RankPeaks) -> int:
    return max((phase.peak_allocated_bytes for phase in rank.phases.values()), default=0)


def read_attempts(directory: Path) -> tuple[Attempt, ...]:
    """Return the earlier attempts, oldest first, with what was done about each."""
    try:
        folders = sorted(
            (path for path in (directory / ATTEMPTS).iterdir() if path.name.isdecimal()),
            key=lambda path: int(path.name),
        )
    except (OSError, ValueError):
        return ()
    reactions = _reactions(directory / RECOVERY_LOG)
    # Records are written one for each failure that somebody reacted to, so the last belong to
    # the last folders; an attempt that a person resumed by hand has a folder and no record.
    known = dict(zip(reversed(folders), reversed(reactions), strict=False))
    return tuple(_attempt(path, known.get(path)) for path in folders[-_MAX_ATTEMPTS:])


def _reactions(path: Path) -> list[Mapping[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found: list[Mapping[str, Any]] = []
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and value.get("action") != "stop":
            found.append(value)
    return found


def _attempt(folder: Path, record: Mapping[str, Any] | None) -> Attempt:
    status = read_object(folder / run_dir.STATUS) or {}
    ranks = list(_some_ranks(folder / run_dir.RANKS))
    failed = next((rank for rank in ranks if rank.failure), None)
    reason = read_text(status, "reason")
    if reason is None and failed is not None and failed.failure is not None:
        reason = f"rank {failed.rank}: {failed.failure.type}: {failed.failure.message}"
    states = {rank.state for rank in ranks}
    state = read_text(status, "state") or "unknown"
    return Attempt(
        number=int(folder.name),
        state="out_of_memory" if "out_of_memory" in states else state,
        reason=str(record["problem"]) if record and record.get("problem") else reason,
        strategy=prediction_from_plan(read_object(folder / run_dir.PLAN)).strategy,
        steps_done=max((rank.steps_done for rank in ranks), default=None),
        peak_allocated_bytes=max(map(_peak_bytes, ranks), default=None),
        reaction=None if record is None else _reaction(record),
    )


def _reaction(record: Mapping[str, Any]) -> str:
    changes = record.get("changes")
    parts = [str(record.get("reason") or record.get("action") or "")]
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
            peaks = peaks_from_json(json.loads(path.read_bytes()))
            check_rank(peaks)
        except (OSError, ValueError, RecursionError, AttributeError):
            continue
        yield peaks
