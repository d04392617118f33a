"""See a job to its end: show what it prints, notice dead ranks and signals, leave nobody."""

from __future__ import annotations

import contextlib
import logging
import shlex
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from launcher import run_dir as rd
from launcher.dispatch import process_group
from launcher.dispatch.base import JobHandle, JobInterruptedError
from launcher.dispatch.failure import DeadRank, LostHost, describe_failure, read_failures
from launcher.dispatch.interruptions import Interruptions
from launcher.dispatch.stopping import Stopping
from launcher.errors import JobFailedError, RunDirError
from launcher.failure_kind import FailureKind
from launcher.job_script import launcher_mark
from launcher.redact import StreamRedactor
from launcher.run_checkpoints import newest_checkpoint
from launcher.stop_file import clear_stop

_log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
# Looking for failures reads every rank's file.
SCAN_SECONDS = 1.0
# After a failure DeepSpeed waits 30 s for ranks that ignore SIGTERM (launcher/launch.py,
# terminate_process_tree), and for ever when its own children were not told. Ranks that hang
# together notice within two ticks of their watchdogs, and each of them shall say so.
FAILURE_LINGER_SECONDS = 4.0
# When all ranks have ended well, its two processes need some seconds to end on a busy machine.
END_LINGER_SECONDS = 30.0
CANCELLED = "stopped by zerofit cancel"
_CHUNK_BYTES = 2**16


class Ranks(Protocol):
    """The ranks of a job, on this machine or on others."""

    @property
    def ended(self) -> Mapping[int, DeadRank]:
        """The ranks that have ended, in that order."""

    @property
    def lost(self) -> Sequence[LostHost]:
        """Hosts that nothing is known of any more."""

    @property
    def has_failure(self) -> bool:
        """Whether a rank is known to have ended badly."""

    @property
    def all_ended(self) -> bool:
        """Whether there were ranks and none is left."""

    def look(self) -> None:
        """Note what has changed since the last look."""

    def wait(self, seconds: float) -> None:
        """Sleep, but wake up when a rank ends."""

    def end(self, *, at_once: bool) -> bool:
        """End all processes of the ranks; return whether none is left."""

    def close(self) -> None:
        """Give back what was opened."""


@dataclass(kw_only=True)
class LogRelay:
    """Copies a growing file to the console, byte by byte, so that progress bars survive.

    Tokens and keys that our environment holds are left out; the file is as the job wrote it.
    """

    path: Path
    console: BinaryIO | None
    _offset: int = 0
    _redactor: StreamRedactor = field(default_factory=StreamRedactor)

    def copy_new(self) -> None:
        """Copy what was added since the last call."""
        if self.console is None:
            return
        try:
            with self.path.open("rb") as stream:
                stream.seek(before := self._offset)
                while chunk := stream.read(_CHUNK_BYTES):
                    self._offset += len(chunk)
                    self.console.write(self._redactor.feed(chunk))
                if self._offset == before:
                    # Nobody tears a token by pausing in its middle.
                    self.console.write(self._redactor.rest())
            self.console.flush()
        except OSError as error:
            # The terminal went away, or `| head` had enough: the log file has everything.
            _log.warning("the job's output is no longer shown: %s", error)
            self.console = None

    def finish(self) -> None:
        """Copy the last of it."""
        self.copy_new()
        self.copy_new()  # nothing is new now, which lets go of what might have been half a token


class Describe(Protocol):
    """Says why a job did not finish."""

    def __call__(
        self,
        run_dir: Path,
        *,
        exit_code: int | None,
        dead_ranks: Iterable[DeadRank],
        lost_hosts: Sequence[LostHost],
    ) -> JobFailedError:
        """Return the error; as :func:`launcher.dispatch.failure.describe_failure`."""


class JobProcess(Protocol):
    """The launcher that was started; a ``subprocess.Popen`` is one."""

    returncode: int | None

    def poll(self) -> int | None:
        """Return how it ended, ``None`` while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Return how it ended, or raise ``subprocess.TimeoutExpired``."""


def watch(
    process: JobProcess,
    handle: JobHandle,
    ranks: Ranks,
    *,
    interruptions: Interruptions,
    console: BinaryIO | None,
    describe: Describe = describe_failure,
) -> None:
    """Return when the run has finished; when it returns or raises, no process is left.

    Args:
        process: the launcher that was started.
        handle: the job.
        ranks: its ranks; closed in the end.
        interruptions: already entered.
        console: where to copy the job's output.
        describe: says why the job did not finish.

    Raises:
        JobInterruptedError: a signal arrived; the run directory says "interrupted".
        JobFailedError: ``zerofit cancel``; or the launcher ended, or had to be ended, and rank 0
            had not marked the run as finished: DeepSpeed ends with 0 when it was killed, too.
    """
    relay = LogRelay(path=handle.run_dir / rd.LAUNCHER_LOG, console=console)
    started = time.time()
    last_scan = 0.0
    trouble_since: float | None = None
    ended_since: float | None = None
    stopping = Stopping(run_dir=handle.run_dir, interruptions=interruptions, started=started)
    try:
        while not stopping.is_time_to_end() and _goes_on(process, ranks, stopping):
            relay.copy_new()
            now = time.monotonic()
            ranks.look()
            if now - last_scan >= SCAN_SECONDS:
                last_scan = now
                if trouble_since is None and _new_failure(handle.run_dir, started):
                    trouble_since = now
            if trouble_since is None and ranks.has_failure:
                trouble_since = now
            if ranks.lost:
                # Said at once: ending what is left takes some seconds more.
                trouble_since = trouble_since or now
                _log.error("%s: %s", ranks.lost[0].host, ranks.lost[0].problem)
                break
            if ended_since is None and ranks.all_ended:
                ended_since = now
            if _has_lingered(now, trouble_since, ended_since):
                _log.warning("ranks have ended but their launcher lingers; ending it")
                break
            ranks.wait(POLL_SECONDS)
    finally:
        # Also when the launcher has ended by itself: ranks often outlive it.
        _end_everything(process, handle, ranks, interruptions)
        ranks.close()
    relay.finish()
    had_failed = trouble_since is not None  # before the signal came
    stopped_by = None if had_failed else next(iter(interruptions.received), None)
    _conclude(handle, process.returncode, ranks, stopped_by=stopped_by, describe=describe)


def _goes_on(process: JobProcess, ranks: Ranks, stopping: Stopping) -> bool:
    # A signal to all processes at once ends the launcher, while the ranks are saving.
    return process.poll() is None or (stopping.is_waiting and not ranks.all_ended)


def _has_lingered(now: float, trouble_since: float | None, ended_since: float | None) -> bool:
    if trouble_since is not None and now - trouble_since > FAILURE_LINGER_SECONDS:
        return True
    return ended_since is not None and now - ended_since > END_LINGER_SECONDS


def _new_failure(run_dir: Path, started: float) -> bool:
    """Return whether a rank wrote down a failure since the job started (wall clock)."""
    try:
        changed = any(
            path.stat().st_mtime >= started - 1 for path in (run_dir / rd.RANKS).glob("[0-9]*.json")
        )
    except OSError:
        return False
    return changed and bool(read_failures(run_dir))


def _end_everything(
    process: JobProcess, handle: JobHandle, ranks: Ranks, interruptions: Interruptions
) -> None:
    # Else ranks that are saving would take what follows for the first request.
    with contextlib.suppress(OSError):
        clear_stop(handle.run_dir)
    # A second Ctrl-C means: now.
    gone = ranks.end(at_once=len(interruptions.received) > 1)
    # What is left here is the launcher. It must not see SIGTERM when the ranks are on other
    # hosts: DeepSpeed 0.19.8 answers with `pkill -f` of all of the user's DeepSpeed jobs there
    # (launcher/runner.py, sigkill_handler).
    gone &= process_group.end_processes(
        launcher_mark(handle.run_id), session_id=handle.session_id, at_once=True
    )
    try:
        process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        gone = False
    if not gone:
        _log.error("some processes of this run do not end; `ps -s %d`", handle.session_id)
    for path in process_group.shared_memory_leftovers(master_port=handle.master_port):
        path.unlink(missing_ok=True)


def _conclude(
    handle: JobHandle,
    exit_code: int | None,
    ranks: Ranks,
    *,
    stopped_by: int | None,
    describe: Describe,
) -> None:
    """Compare what the run directory says with how the processes ended; raise unless finished."""
    run_dir = handle.run_dir
    if _is_finished(run_dir):
        if exit_code != 0:
            _log.warning("the run finished; its launcher then ended with code %s", exit_code)
        return
    said = _said_when_stopped(run_dir)
    if said is not None:
        raise JobInterruptedError(
            f"the run was stopped: {said}",
            where=str(run_dir),
            fix=_way_on(run_dir),
            # Somebody made the stop file, and this process was not told.
            signal_number=stopped_by or signal.SIGTERM,
        )
    if stopped_by is not None:
        name = signal.Signals(stopped_by).name
        _record(run_dir, "interrupted", f"stopped by {name}")
        raise JobInterruptedError(
            f"the run was stopped by {name}; all of its processes have ended",
            where=str(run_dir),
            fix=_way_on(run_dir),
            signal_number=stopped_by,
        )
    if (run_dir / rd.CANCEL).exists():
        _record(run_dir, "interrupted", CANCELLED)
        raise JobFailedError(
            f"the run was {CANCELLED}; all of its processes have ended",
            where=str(run_dir),
            fix=_way_on(run_dir),
            kind=FailureKind.interrupted,
        )
    error = describe(
        run_dir, exit_code=exit_code, dead_ranks=ranks.ended.values(), lost_hosts=ranks.lost
    )
    _record(run_dir, "failed", error.problem.partition("\n")[0])
    if newest := newest_checkpoint(run_dir):
        _log.warning(
            "the last complete checkpoint is %s; `zerofit resume %s` goes on from it",
            newest,
            run_dir,
        )
    raise error


def _said_when_stopped(run_dir: Path) -> str | None:
    """Return what the ranks wrote down when they had saved because they were asked to."""
    try:
        status = rd.read_status(run_dir)
    except RunDirError:
        return None
    return status.reason if status.state == "interrupted" else None


def _way_on(run_dir: Path) -> str:
    """Return how to go on after an interruption."""
    if newest := newest_checkpoint(run_dir):
        return f"`zerofit resume {shlex.quote(str(run_dir))}` goes on from {newest.name}"
    return "start it again in a new folder; with optim.save_steps a run can go on from checkpoints"


def _is_finished(run_dir: Path) -> bool:
    """Return whether rank 0 marked the run as finished and no rank says otherwise."""
    try:
        state = rd.read_status(run_dir).state
    except RunDirError as error:
        _log.error("%s", error)
        return False
    return state == "finished" and not read_failures(run_dir)


def _record(run_dir: Path, state: rd.RunState, reason: str) -> None:
    try:
        rd.write_status(run_dir, state, reason=reason)
    except OSError as error:
        # A full disk is often the very reason; the error to show is the job's.
        _log.error("cannot record that the run %s: %s", state, error)
