"""See a Slurm job to its end: show its log, say why it waits, notice how it ended."""

from __future__ import annotations

import contextlib
import logging
import shlex
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from launcher import run_dir as rd
from launcher.dispatch import slurm_commands as slurm
from launcher.dispatch.base import InterruptionError, JobHandle, JobInterruptedError, read_handle
from launcher.dispatch.failure import read_failures
from launcher.dispatch.interruptions import Interruptions
from launcher.dispatch.slurm_failure import (
    BY_SLURM,
    describe_slurm_failure,
    describe_unknown_end,
)
from launcher.dispatch.slurm_nodes import SlurmNodes
from launcher.dispatch.watch import LogRelay
from launcher.errors import JobFailedError, RunDirError

_log = logging.getLogger(__name__)

TICK_SECONDS = 0.2
# A controller serves thousands of users: often at first and after a change, then less often.
ASK_SECONDS = 2.0
ASK_SECONDS_LATER = 5.0
_LATER_AFTER_SECONDS = 60.0
SECOND_CTRL_C_SECONDS = 2.0
# When rank 0 has marked the run as finished, or ranks have failed, and Slurm cannot be asked.
WITHOUT_SLURM_SECONDS = 10.0
# Slurm can list a job some moments after it has taken it.
_UNKNOWN_SECONDS = 10.0


@dataclass(kw_only=True)
class _Watch:
    """What is known of the job, and what has been said about it."""

    handle: JobHandle
    state: slurm.SlurmJobState | None = None
    said: str = ""
    unreachable_since: float | None = None
    unknown_since: float | None = None
    changed: float = 0.0
    asked: float = 0.0

    def ask(self, now: float) -> None:
        """Ask Slurm, if it is time to, and say what has changed."""
        pause = ASK_SECONDS if now - self.changed < _LATER_AFTER_SECONDS else ASK_SECONDS_LATER
        if now - self.asked < pause:
            return
        try:
            found = slurm.ask([self.handle.job_id]).get(self.handle.job_id)
        except slurm.ControllerError as error:
            if self.unreachable_since is None:
                self.unreachable_since = now
                _log.warning("Slurm does not answer (%s); the job goes on", error.problem)
        else:
            if self.unreachable_since is not None:
                self.unreachable_since = None
                _log.warning("Slurm answers again")
            if found is None:
                self.unknown_since = self.unknown_since or now
            else:
                self.unknown_since = None
                self._note(found, now)
        self.asked = time.monotonic()

    @property
    def running_job(self) -> str | None:
        """The job's number while it runs."""
        is_running = self.state is not None and self.state.state == "RUNNING"
        return self.handle.job_id if is_running else None

    def _note(self, found: slurm.SlurmJobState, now: float) -> None:
        was_running = self.state is not None and self.state.state in slurm.ACTIVE
        if self.state is None or found.state != self.state.state:
            self.changed = now
        self.state = found
        said = ""
        if found.is_pending and found.reason:
            again = "has been put back into the queue" if was_running else "is pending"
            said = f"job {found.job_id} {again}: {describe_reason(found)}"
        elif found.state == "RUNNING":
            said = f"job {found.job_id} runs on {found.nodes}"
        if said and said != self.said:
            self.said = said
            _log.warning("%s", said)


def describe_reason(state: slurm.SlurmJobState) -> str:
    """Return why a job waits, in Slurm's word, and when Slurm expects it to start."""
    start = f", expected to start {state.expected_start}" if state.expected_start else ""
    return f"{state.reason or 'no reason given'}{start}"


def watch_job(handle: JobHandle, *, interruptions: Interruptions, console: BinaryIO | None) -> None:
    """Return when the run has finished; nothing of it is left then.

    Raises:
        JobFailedError: it ended otherwise; says which host or rank, and why.
        InterruptionError: a signal ended the watching; the job goes on.
        JobInterruptedError: Ctrl-C came twice; the job is cancelled.
    """
    relay = LogRelay(path=handle.run_dir / rd.LAUNCHER_LOG, console=console)
    watch = _Watch(handle=handle, changed=time.monotonic())
    with contextlib.closing(SlurmNodes(run_dir=handle.run_dir)) as nodes:
        watch = _follow(watch, nodes, relay, interruptions)
    relay.finish()
    conclude(watch.handle, watch.state if watch.unreachable_since is None else None)


def _follow(
    watch: _Watch, nodes: SlurmNodes, relay: LogRelay, interruptions: Interruptions
) -> _Watch:
    """Return what is known of the run's last job when it has ended."""
    while True:
        if interruptions.received:
            _leave(watch, interruptions)
        now = time.monotonic()
        watch.ask(now)
        nodes.look(now, watch.running_job, names=watch.state.nodes if watch.state else "")
        relay.copy_new()
        if watch.state is not None and watch.state.has_ended:
            following = read_handle(watch.handle.run_dir)
            if following.job_id == watch.handle.job_id:
                return watch
            # The job was one of a chain.
            _log.warning("job %s goes on as job %s", watch.handle.job_id, following.job_id)
            watch = _Watch(handle=following, changed=time.monotonic())
        if _is_over_without_slurm(watch, now):
            return watch
        time.sleep(TICK_SECONDS)


def conclude(handle: JobHandle, state: slurm.SlurmJobState | None) -> None:
    """Hold what Slurm says of an ended job against the run directory; raise unless finished.

    Args:
        handle: the job.
        state: what Slurm says; ``None`` when it cannot be asked or has forgotten the job.

    Raises:
        JobFailedError: rank 0 has not marked the run as finished; the run directory says so.
    """
    run_dir = handle.run_dir
    status = rd.read_status(run_dir)
    if status.state == "finished" and not read_failures(run_dir):
        if state is not None and state.state != "COMPLETED":
            _log.warning("the run finished; its job then ended as %s", state.state)
        return
    error: JobFailedError
    if state is None:
        error = describe_unknown_end(run_dir, handle.job_id)
    else:
        error = describe_slurm_failure(run_dir, state)
    is_killed = state is not None and state.state in BY_SLURM
    record(run_dir, "interrupted" if is_killed else "failed", error.problem)
    raise error


def record(run_dir: Path, state: rd.RunState, problem: str) -> None:
    """Write the end of a run that could not write it itself."""
    try:
        rd.write_status(run_dir, state, reason=problem.partition("\n")[0])
    except OSError as error:
        # A full disk is often the very reason; the error to show is the job's.
        _log.error("cannot record that the run %s: %s", state, error)


def _is_over_without_slurm(watch: _Watch, now: float) -> bool:
    """Return whether the run has ended although Slurm does not say so."""
    if watch.unknown_since is not None:
        return now - watch.unknown_since > _UNKNOWN_SECONDS
    if watch.unreachable_since is None or now - watch.unreachable_since < WITHOUT_SLURM_SECONDS:
        return False
    try:
        is_finished = rd.read_status(watch.handle.run_dir).state == "finished"
    except RunDirError:
        is_finished = False
    return is_finished or bool(read_failures(watch.handle.run_dir))


def _leave(watch: _Watch, interruptions: Interruptions) -> None:
    """Stop watching: the job goes on, unless Ctrl-C comes twice, as with srun.

    Raises:
        InterruptionError: always.
    """
    handle, number = watch.handle, interruptions.received[0]
    name = signal.Signals(number).name
    if number == signal.SIGINT:
        _log.warning(
            "job %s goes on; Ctrl-C again within %.0f s cancels it",
            handle.job_id,
            SECOND_CTRL_C_SECONDS,
        )
        deadline = time.monotonic() + SECOND_CTRL_C_SECONDS
        while time.monotonic() < deadline and len(interruptions.received) == 1:
            time.sleep(0.1)
    if interruptions.received.count(signal.SIGINT) > 1:
        slurm.cancel(handle.job_id)
        record(handle.run_dir, "interrupted", f"stopped by {name}")
        raise JobInterruptedError(
            f"job {handle.job_id} is cancelled",
            where=str(handle.run_dir),
            fix="start it again in a new folder",
            signal_number=number,
        )
    raise InterruptionError(
        f"no longer watching after {name}; job {handle.job_id} goes on",
        where=str(handle.run_dir),
        fix=f"`zerofit logs -f {shlex.quote(str(handle.run_dir))}` shows its log, "
        "`zerofit cancel` ends it",
        signal_number=number,
    )
