"""Hosts whose ranks have fallen silent, by the files that the ranks keep fresh.

Slurm itself calls a node lost after ``SlurmdTimeout``, which is 300 s by default.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from launcher import run_dir as rd

SILENT_AFTER_SECONDS = 11.0
"""The first rank of each host touches its file every 5 s (launcher/worker/heartbeat.py)."""
_FRESH_SECONDS = 8.0


@dataclass(kw_only=True)
class SilentHosts:
    """Follows one file of each host; a host is silent while others are not.

    Times are those of the file system's clock, carried on by ours, so that they may differ. When
    all are silent, it is the file system or a pause of the whole job, and no host to blame.
    """

    run_dir: Path
    _files: dict[str, Path] = field(default_factory=dict)
    """The file of the first rank of each host."""
    _seen: set[str] = field(default_factory=set)
    _named: set[str] = field(default_factory=set)
    _ages: dict[str, float] = field(default_factory=dict)
    """Seconds by host, at the last look."""
    _newest: float = 0.0
    _newest_at: float = 0.0

    def look(self, now: float | None = None) -> list[str]:
        """Return the hosts that have become silent since the last look.

        Args:
            now: seconds of a clock that never jumps; by default ``time.monotonic``.
        """
        now = time.monotonic() if now is None else now
        self._find_new()
        times = {host: _touched(path) for host, path in self._files.items()}
        newest = max(times.values(), default=0.0)
        if newest > self._newest:
            self._newest, self._newest_at = newest, now
        since_newest = now - self._newest_at
        if since_newest > _FRESH_SECONDS:
            return []
        self._ages = {host: self._newest + since_newest - at for host, at in times.items()}
        silent = {
            host
            for host, age in self._ages.items()
            if age > SILENT_AFTER_SECONDS and _is_running(self._files[host])
        }
        found = sorted(silent - self._named)
        self._named = silent
        return found

    def heard_seconds_ago(self, node: str) -> float | None:
        """Return how long before the last look a host was heard of; ``None`` if it never was.

        Args:
            node: Slurm's name of it, which may be the host's without its domain.
        """
        ages = (age for host, age in self._ages.items() if node in (host, host.split(".")[0]))
        return next(ages, None)

    def _find_new(self) -> None:
        try:
            names = sorted(os.listdir(self.run_dir / rd.RANKS))  # noqa: PTH208  names suffice
        except OSError:
            return
        for name in names:
            if name in self._seen or not name.endswith(".json") or name.startswith("."):
                continue
            path = self.run_dir / rd.RANKS / name
            content = _read(path)
            host = content.get("host")
            if isinstance(host, str):
                self._seen.add(name)
                # The others' files are not touched, and may be there first.
                if content.get("local_rank") == 0:
                    self._files[host] = path


def _touched(path: Path) -> float:
    try:
        # Opened, because a network file system may answer a mere stat from its cache.
        with path.open("rb") as stream:
            return os.fstat(stream.fileno()).st_mtime
    except OSError:
        return 0.0


def _is_running(path: Path) -> bool:
    return _read(path).get("state") == "running"


def _read(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
