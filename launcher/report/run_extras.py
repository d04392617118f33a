"""Read what surrounds a run's measurements: recipe, lengths of the data, memory over time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from launcher import run_dir
from launcher.peaks import RankPeaks
from launcher.report.prediction import read_int
from launcher.report.run_report import Lengths
from launcher.timeline import Timeline, timeline_from_json

DATA_SUMMARY = "data/summary.json"
_MAX_TIMELINES = 4
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
    by_size = sorted(ranks, key=lambda rank: (-peak_bytes(rank), rank.rank))
    if len(by_size) <= _MAX_TIMELINES:
        return [rank.rank for rank in by_size]
    telling = (by_size[0], by_size[-1], by_size[len(by_size) // 2])
    return [rank.rank for rank in telling]


def peak_bytes(rank: RankPeaks) -> int:
    """Return the highest allocated bytes of any phase."""
    return max((phase.peak_allocated_bytes for phase in rank.phases.values()), default=0)
