"""The ranks on this machine: who was seen, and who ended how."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import psutil

from launcher.dispatch import process_group
from launcher.dispatch.failure import DeadRank


@dataclass(kw_only=True)
class RankWatch:
    """Follows the ranks of one run, which are children of DeepSpeed and not of ours.

    Only a parent learns how a process ended, but until it asks, /proc shows it too. DeepSpeed
    asks once a second; we are woken at once and look first.
    """

    run_id: str
    session_id: int | None
    seen: dict[int, psutil.Process] = field(default_factory=dict)
    ended: dict[int, DeadRank] = field(default_factory=dict)
    """In the order in which they ended."""
    _num_local_ranks: int | None = None
    _descriptors: dict[int, int] = field(default_factory=dict)
    """A pidfd of each rank that runs."""

    def know(self, pids: Sequence[int]) -> None:
        """Take these processes for the ranks, in order, and look for no others.

        The environment of a forked process is its parent's in /proc.
        """
        for rank, pid in enumerate(pids):
            try:
                self._see(rank, psutil.Process(pid))
            except psutil.NoSuchProcess:
                self.ended[rank] = DeadRank(rank=rank, exit_status=None)
        self._num_local_ranks = len(pids) or None

    def look_for_new(self) -> None:
        """Find ranks that have started since the last look."""
        if self._num_local_ranks is not None and len(self.seen) >= self._num_local_ranks:
            return
        found = process_group.find_processes(self.run_id, session_id=self.session_id)
        for process in sorted(found, key=lambda item: item.pid):
            env = process_group.environment_of(process)
            if "RANK" not in env or "LOCAL_SIZE" not in env or int(env["RANK"]) in self.seen:
                # Workers of a data loader inherit the variables; the rank itself came first.
                continue
            self._see(int(env["RANK"]), process)
            self._num_local_ranks = int(env["LOCAL_SIZE"])

    def _see(self, rank: int, process: psutil.Process) -> None:
        self.seen[rank] = process
        # It may have ended, or this kernel has no pidfds: the regular look finds out.
        with contextlib.suppress(OSError):
            self._descriptors[rank] = os.pidfd_open(process.pid)

    def look_for_dead(self) -> None:
        """Note the ranks that ended since the last look, and how, while it can be told."""
        for rank, process in self.seen.items():
            if rank in self.ended:
                continue
            status = process_group.exit_status_of_zombie(process.pid)
            if status is not None or not process_group.is_alive(process):
                self.ended[rank] = DeadRank(rank=rank, exit_status=status)
                if rank in self._descriptors:
                    os.close(self._descriptors.pop(rank))

    def wait_for_an_end(self, seconds: float) -> None:
        """Sleep, but wake up when a rank ends."""
        if not self._descriptors:
            time.sleep(seconds)
            return
        poll = select.poll()
        for descriptor in self._descriptors.values():
            poll.register(descriptor, select.POLLIN)
        if poll.poll(seconds * 1000):
            self.look_for_dead()

    def close(self) -> None:
        """Give back what was opened."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    @property
    def has_failure(self) -> bool:
        """Whether a rank is known to have ended badly."""
        return any(dead.exit_status for dead in self.ended.values())

    @property
    def all_ended(self) -> bool:
        """Whether there were ranks and none is left."""
        return bool(self.seen) and len(self.ended) == len(self.seen)
