"""The nodes of a running Slurm job: which of them give no sign of life, long before Slurm says so.

A node is silent in two ways: its slurmd does not answer, or its ranks no longer touch their file.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

from launcher.dispatch.daemons import ASK_SECONDS, Daemons
from launcher.dispatch.failure import LostHost
from launcher.dispatch.silent_hosts import SILENT_AFTER_SECONDS, SilentHosts

_log = logging.getLogger(__name__)

LOOK_SECONDS = 3.0
"""With ``SILENT_AFTER_SECONDS`` after the last touch: a silent host is named 14 s later."""
SILENT = (
    "has fallen silent while other hosts are heard of: it may be lost, which Slurm says only after "
    "its own time-out"
)
SLURM_WAITS = "should it stay away for SlurmdTimeout, Slurm ends the job"
_EXCLUDE = "start it again on other nodes; --exclude of sbatch and salloc leaves one out"
_SETTLE_SECONDS = 2 * ASK_SECONDS
_TICK_SECONDS = 0.1


@dataclass(kw_only=True)
class SlurmNodes:
    """Says what changes; never waits for a node, except in :meth:`settle`."""

    run_dir: Path
    _hosts: SilentHosts = field(init=False)
    _daemons: Daemons | None = None
    _names: str = ""
    _said: frozenset[str] = frozenset()
    _looked: float = 0.0

    def __post_init__(self) -> None:
        self._hosts = SilentHosts(run_dir=self.run_dir)

    def look(self, now: float, job_id: str | None, *, names: str = "") -> None:
        """Look at the nodes of a job, and say what has changed.

        Args:
            now: seconds of a clock that never jumps.
            job_id: ``None`` while no job runs.
            names: of the job's nodes as Slurm lists them, where they may become fewer.
        """
        if job_id is None:
            self.close()
            return
        if now - self._looked > LOOK_SECONDS:
            self._looked = now
            for host in self._hosts.look(now):
                _log.error("%s %s", host, SILENT)
        if self._daemons is None or self._daemons.job_id != job_id or self._names != names:
            # A node that the job goes on without does not answer again.
            self.close()
            self._daemons, self._names = Daemons(job_id=job_id), names
        if not self._daemons.look(now):
            return
        silent = self._daemons.silent
        for node in sorted(silent - self._said):
            heard = self._hosts.heard_seconds_ago(node)
            ranks = "" if heard is None else f"; its ranks were heard of {heard:.0f} s ago"
            _log.error("slurmd on %s does not answer%s; %s", node, ranks, SLURM_WAITS)
        # Of a node that is in no step any more, because the job goes on without it or has no ranks
        # just now, sstat says nothing.
        again = self._said & self._daemons.answering() if self._said - silent else frozenset[str]()
        for node in sorted(again):
            _log.warning("slurmd on %s answers again", node)
        self._said = (self._said - again) | silent

    @property
    def lost(self) -> tuple[LostHost, ...]:
        """Nodes of which neither slurmd nor the ranks are heard."""
        found = []
        for node in sorted(self._daemons.silent if self._daemons is not None else ()):
            heard = self._hosts.heard_seconds_ago(node)
            if heard is not None and heard > SILENT_AFTER_SECONDS:
                problem = f"its slurmd does not answer, its ranks were heard of {heard:.0f} s ago"
                found.append(LostHost(host=node, problem=problem, fix=_EXCLUDE))
        return tuple(found)

    def settle(self) -> tuple[LostHost, ...]:
        """Return the nodes whose slurmd does not answer; waits for an answer that is on its way.

        For when ranks have ended: by their files those that are left are as silent as the others.
        """
        daemons, deadline = self._daemons, time.monotonic() + _SETTLE_SECONDS
        if daemons is None:
            return ()
        while daemons.is_asking and not daemons.look(now := time.monotonic()) and now < deadline:
            time.sleep(_TICK_SECONDS)
        problem = "its slurmd does not answer"
        return tuple(
            LostHost(host=node, problem=problem, fix=_EXCLUDE) for node in sorted(daemons.silent)
        )

    def close(self) -> None:
        """Ask no longer."""
        if self._daemons is not None:
            self._daemons.close()
            self._daemons = None
            self._said = frozenset()
