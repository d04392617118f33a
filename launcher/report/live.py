"""A run while it goes on, looked at again and again: its ranks, and how far training is."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import run_dir
from launcher.errors import RunDirError
from launcher.peaks import RankPeaks
from launcher.report.check_rank import check_rank
from launcher.report.prediction import Prediction, prediction_from_plan, read_float, read_int

_LOG_TAIL_BYTES = 2**16
_RECENT_STEPS = 5
"""Steps whose median is the present pace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenRank:
    """A rank's file, and for how long it has not changed."""

    peaks: RankPeaks
    age_seconds: float
    """By this machine's clock; a file from the future counts as new."""

    @property
    def step_seconds(self) -> float | None:
        """Median of the last steps; ``None`` before the first has ended."""
        recent = self.peaks.step_seconds[-_RECENT_STEPS:]
        return statistics.median(recent) if recent else None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of this rank, padding included."""
        seconds = self.step_seconds
        return self.peaks.tokens_per_step / seconds if seconds else None

    @property
    def peak_allocated_bytes(self) -> int:
        """Of the fullest phase so far."""
        phases = self.peaks.phases.values()
        return max((phase.peak_allocated_bytes for phase in phases), default=0)

    @property
    def peak_reserved_bytes(self) -> int:
        """Of the fullest phase so far."""
        phases = self.peaks.phases.values()
        return max((phase.peak_reserved_bytes for phase in phases), default=0)

    @property
    def device_used_bytes(self) -> int | None:
        """Highest use of the whole device so far; ``None`` on a processor."""
        phases = self.peaks.phases.values()
        return max((p.device_used_bytes for p in phases if p.device_used_bytes), default=None)

    @property
    def host_rss_bytes(self) -> int:
        """Highest resident memory of the process so far."""
        return max((phase.host_rss_bytes for phase in self.peaks.phases.values()), default=0)


class RankFolder:
    """The ranks' files of a run; one is read again only after it was replaced."""

    def __init__(self, run_dir_path: Path) -> None:
        self._folder = run_dir_path / run_dir.RANKS
        self._known: dict[int, tuple[tuple[int, int], RankPeaks | None]] = {}
        self.unreadable: frozenset[int] = frozenset()
        """Ranks whose file was there and of no use, at the last :meth:`read`."""

    def numbers(self) -> list[int]:
        """Return the ranks that have a file."""
        try:
            names = os.listdir(self._folder)  # noqa: PTH208 - thousands of Path objects are slow
        except OSError:
            return []
        stems = (name[:-5] for name in names if name.endswith(".json"))
        return sorted(int(stem) for stem in stems if stem.isascii() and stem.isdigit())

    def read(self, ranks: Iterable[int]) -> list[SeenRank]:
        """Return those of the ranks that have a readable file, in the order given."""
        now, seen, unreadable = time.time(), [], set()
        for rank in ranks:
            path = run_dir.rank_file(self._folder.parent, rank)
            try:
                stat = path.stat()
            except OSError:
                continue
            version = (stat.st_mtime_ns, stat.st_ino)
            known = self._known.get(rank)
            if known is None or known[0] != version:
                known = self._known[rank] = (version, _read(path, rank))
            peaks = known[1]
            if peaks is None:
                unreadable.add(rank)
                continue
            seen.append(SeenRank(peaks=peaks, age_seconds=max(0.0, now - stat.st_mtime)))
        self.unreadable = frozenset(unreadable)
        return seen


def _read(path: Path, rank: int) -> RankPeaks | None:
    try:
        peaks = run_dir.read_rank(path)
        check_rank(peaks)
    except (RunDirError, ValueError):
        return None
    return peaks if peaks.rank == rank else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What rank 0 logged last; ``None`` where it has not logged such a thing yet."""

    step: int | None = None
    total_steps: int | None = None
    remaining_seconds: float | None = None
    loss: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    """Of all ranks."""


def read_progress(folder: Path) -> Progress:
    """Return what the trainer's log says last; of a log without a whole line, nothing."""
    latest: dict[str, Any] = {}
    for entry in _last_entries(folder / run_dir.TRAINER_LOG):
        latest.update(entry)
    return Progress(
        step=read_int(latest, "step"),
        total_steps=read_int(latest, "total_steps"),
        remaining_seconds=read_float(latest, "remaining_seconds"),
        loss=read_float(latest, "loss"),
        eval_loss=read_float(latest, "eval_loss"),
        learning_rate=read_float(latest, "learning_rate"),
        tokens_per_second=read_float(latest, "tokens_per_s"),
    )


def _last_entries(path: Path) -> Iterable[Mapping[str, Any]]:
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - _LOG_TAIL_BYTES))
            lines = stream.read().split(b"\n")
    except OSError:
        return
    # The first may be cut off, the last is still being written.
    for line in lines[size > _LOG_TAIL_BYTES : -1]:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            yield entry


def read_prediction(folder: Path) -> Prediction:
    """Return what the plan promised; nothing of a plan that is missing or broken."""
    try:
        plan = json.loads((folder / run_dir.PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        plan = None
    return prediction_from_plan(plan if isinstance(plan, dict) else None)
