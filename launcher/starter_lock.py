"""The file that says which Slurm job runs a run directory, and whether it still is a rank's own.

When the slurmd of a host dies, Slurm ends the job everywhere else, and nobody is left who could
end the ranks of that host: they have to notice by themselves.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

LOCK = "lock"
"""In the run directory, while somebody runs it; see launcher/dispatch/run_lock.py."""
LOOK_SECONDS = 5.0
"""Between two looks of a rank at it."""
_LOOKS = 2
FENCE_SECONDS = _LOOKS * LOOK_SECONDS + 5.0
"""After so long, ranks of nodes that were given up have ended, or see no run directory to harm."""


@dataclass(kw_only=True)
class StarterLock:
    """The lock as a rank found it when it started."""

    run_dir: Path
    content: bytes
    _misses: int = 0

    def is_lost(self) -> bool:
        """Return whether the lock has been away, or another's, at two looks in a row.

        The folder is listed first, which makes an NFS client look anew (nfs(5), "close-to-open").
        A file server that does not answer says nothing about the job.
        """
        try:
            is_there = LOCK in os.listdir(self.run_dir)  # noqa: PTH208  as in stop_file.py
            is_own = is_there and (self.run_dir / LOCK).read_bytes() == self.content
        except OSError:
            return False
        self._misses = 0 if is_own else self._misses + 1
        return self._misses >= _LOOKS


def give_up_ranks(run_dir: Path, *, now: str) -> None:
    """Change the lock, so that ranks that run by now end; those that start later go by the new one.

    Args:
        run_dir: of a Slurm job that goes on without some of its nodes.
        now: since when the lock is held; no time that it has had.

    Raises:
        OSError: the lock cannot be read or written.
        ValueError: it is no lock.
    """
    path = run_dir / LOCK
    written = path.with_name(f".{LOCK}-changed")
    content = {**json.loads(path.read_text(encoding="utf-8")), "since": now}
    written.write_text(json.dumps(content) + "\n", encoding="utf-8")
    written.replace(path)


def starter_lock(run_dir: Path, environ: Mapping[str, str]) -> StarterLock | None:
    """Return the lock of the Slurm job around a rank; ``None`` outside Slurm or without one."""
    if "SLURM_JOB_ID" not in environ:
        return None
    try:
        return StarterLock(run_dir=run_dir, content=(run_dir / LOCK).read_bytes())
    except OSError:
        return None  # the job's script was written by hand
