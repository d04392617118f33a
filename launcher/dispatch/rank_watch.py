"""The ranks on this machine: who was seen, who ended how, and an end to all that are left."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import psutil

from launcher.dispatch import process_group
from launcher.dispatch.failure import DeadRank, LostHost

_OOM_KILL_SECONDS = 30.0


@dataclass(kw_only=True)
class OomKills:
    """Whether this host's kernel has killed something for want of memory in the last minute.

    The process that it kills is counted at once, and dies when its memory is given back.
    """

    before: int = field(default_factory=process_group.count_oom_kills)
    """The count half a minute ago or a minute ago."""
    now: int = field(default_factory=process_group.count_oom_kills)
    looked: float = field(default_factory=time.monotonic)

    def look(self) -> None:
        """Count anew, when it is time."""
        if time.monotonic() - self.looked > _OOM_KILL_SECONDS:
            self.before, self.now = self.now, process_group.count_oom_kills()
            self.looked = time.monotonic()

    def was_one_lately(self) -> bool:
        """Return whether something was killed."""
        return process_group.count_oom_kills() > self.before


@dataclass(kw_only=True)
class RankWatch:
    """Follows the ranks of one run, which are children of DeepSpeed and not of ours.

    Only a parent learns how a process ended, but until it asks, /proc shows it too. DeepSpeed
    asks once a second; we are woken at once and look first.
    """

    run_id: str
    session_id: int | None
    """Session that the ranks were started in, where it is known."""
    seen: dict[int, psutil.Process] = field(default_factory=dict)
    ended: dict[int, DeadRank] = field(default_factory=dict)
    """In the order in which they ended."""
    lost: list[LostHost] = field(default_factory=list)
    """Stays empty: this machine is not lost while it can say so."""
    _num_local_ranks: int | None = None
    _oom_kills: OomKills = field(default_factory=OomKills)
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

    def look(self) -> None:
        """Note ranks that have started and ranks that have ended since the last look."""
        self._look_for_new()
        self._look_for_dead()
        self._oom_kills.look()

    def _look_for_new(self) -> None:
        if self._num_local_ranks is not None and len(self.seen) >= self._num_local_ranks:
            return
        found = process_group.find_processes(self.run_id, session_id=self.session_id)
        for process in sorted(found, key=lambda item: item.pid):
            place = _place(process_group.environment_of(process))
            if place is None or place[0] in self.seen:
                # Workers of a data loader inherit the variables; the rank itself came first.
                continue
            rank, self._num_local_ranks = place
            self._see(rank, process)

    def _see(self, rank: int, process: psutil.Process) -> None:
        self.seen[rank] = process
        # It may have ended, or this kernel has no pidfds: the regular look finds out.
        with contextlib.suppress(OSError):
            self._descriptors[rank] = os.pidfd_open(process.pid)

    def _look_for_dead(self) -> None:
        for rank, process in self.seen.items():
            if rank in self.ended:
                continue
            status = process_group.exit_status_of_zombie(process.pid)
            if status is not None or not process_group.is_alive(process):
                self.ended[rank] = DeadRank(
                    rank=rank, exit_status=status, is_oom_kill=self._oom_kills.was_one_lately()
                )
                if rank in self._descriptors:
                    os.close(self._descriptors.pop(rank))

    def wait(self, seconds: float) -> None:
        """Sleep, but wake up when a rank ends."""
        self.wait_for_input(seconds, descriptor=None)

    def wait_for_input(self, seconds: float, *, descriptor: int | None) -> bool:
        """Sleep, but wake up when a rank ends or something can be read; return the latter."""
        poll = select.poll()
        for watched in (*self._descriptors.values(), *([] if descriptor is None else [descriptor])):
            poll.register(watched, select.POLLIN)
        ready = {number for number, _ in poll.poll(seconds * 1000)}
        if ready - {descriptor}:
            self._look_for_dead()
        return descriptor in ready

    def end(self, *, at_once: bool) -> bool:
        """End every process of the run on this machine; return whether all are gone."""
        return process_group.end_processes(self.run_id, session_id=self.session_id, at_once=at_once)

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


def _place(env: Mapping[str, str]) -> tuple[int, int] | None:
    """Return a rank's number and the number of ranks on its host, from its environment.

    Variables of DeepSpeed's launch.py, of Open MPI's mpirun (``ompi_info`` lists them).
    """
    for rank, local_size in (
        ("RANK", "LOCAL_SIZE"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ):
        if rank in env and local_size in env:
            return int(env[rank]), int(env[local_size])
    return None
