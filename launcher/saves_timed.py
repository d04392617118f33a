"""The rate at which runs beside this one have saved their checkpoints."""

from __future__ import annotations

import contextlib
from pathlib import Path

from launcher import run_dir as rd
from launcher.checkpoint_time import USUAL_RATE, SaveRate
from launcher.errors import RunDirError
from launcher.run_checkpoints import MANIFEST, newest_checkpoint
from launcher.units import MIB

SMALLEST_BYTES = 256 * MIB
"""Smaller checkpoints time the start of a save, and not the file system."""
NUM_RUNS = 20
"""Looked at, the newest first; the slowest counts, as others use the file system, too."""


def rate_beside(parent: Path) -> SaveRate:
    """Return the slowest rate of the newest runs in a folder, which share a file system.

    Where no run in it has saved a checkpoint that is large enough, the usual rate.

    Args:
        parent: holds run directories; it need not exist.
    """
    runs: list[tuple[float, Path]] = []
    with contextlib.suppress(OSError):
        runs = [
            (path.stat().st_mtime, path.parent.parent)
            for path in parent.glob(f"*/{rd.RANKS}/00000.json")
        ]
    found: list[tuple[float, str]] = []
    for _, run in sorted(runs, reverse=True)[:NUM_RUNS]:
        with contextlib.suppress(OSError, RunDirError, KeyError, TypeError):
            if (rate := _rate_of(run)) is not None:
                found.append((rate, run.name))
    if not found:
        return USUAL_RATE
    slowest, name = min(found)
    return SaveRate(bytes_per_s=slowest, source=f"measured: the saves of {name}")


def _rate_of(run: Path) -> float | None:
    """Return the mean rate of a run's saves in bytes a second; ``None`` if there is no good one."""
    checkpoint = newest_checkpoint(run)
    saves = rd.read_rank(rd.rank_file(run, 0)).phases.get("save")
    if checkpoint is None or saves is None or not saves.count or not saves.seconds:
        return None
    files = rd.read_json(checkpoint / MANIFEST)["files"]
    saved_bytes = sum(int(file["bytes"]) for file in files.values())
    if saved_bytes < SMALLEST_BYTES:
        return None
    return saved_bytes * saves.count / saves.seconds
