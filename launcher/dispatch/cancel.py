"""End a run from another terminal, whatever runs it."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from launcher import run_dir as rd
from launcher.dispatch import process_group
from launcher.dispatch import slurm as slurm_backend
from launcher.dispatch import slurm_commands as slurm
from launcher.dispatch.base import JobHandle, read_handle
from launcher.dispatch.run_state import RunState, observe, watcher
from launcher.dispatch.watch import CANCELLED
from launcher.errors import JobFailedError, SetupError

# Slurm ends ranks that ignore SIGTERM after KillWait, 30 s by default (slurm.conf(5)).
_SLURM_SECONDS = 45.0
# A watcher ends its ranks in TERM_GRACE_SECONDS and KILL_GRACE_SECONDS, here or on other hosts.
_WATCHER_SECONDS = 30.0


def cancel_run(run_dir: Path) -> RunState:
    """End a run and return how it is then; one that has ended already stays as it is.

    Raises:
        RunDirError: zerofit has not started this run.
        SetupError: it was started on another host, or by another user.
        ControllerError: Slurm does not answer.
        JobFailedError: processes are left that do not end.
    """
    rd.check_is_run(run_dir)
    handle = read_handle(run_dir)
    (before,) = observe([run_dir])
    if before.state not in ("running", "pending", "unknown"):
        return before
    if handle.backend == slurm_backend.NAME:
        _cancel_slurm(handle)
    else:
        _cancel_processes(handle)
    if rd.read_status(run_dir).state in ("created", "running"):
        rd.write_status(run_dir, "interrupted", reason=CANCELLED)
    return observe([run_dir])[0]


def _cancel_slurm(handle: JobHandle) -> None:
    slurm.cancel(handle.job_id)
    deadline = time.monotonic() + _SLURM_SECONDS
    while time.monotonic() < deadline:
        job = slurm.ask([handle.job_id]).get(handle.job_id)
        if job is None or job.has_ended:
            return
        time.sleep(0.5)
    raise JobFailedError(
        f"job {handle.job_id} is still ending after {_SLURM_SECONDS:.0f} s",
        where=str(handle.run_dir),
        fix=f"`squeue -j {handle.job_id}` shows it; ask the administrators if it stays",
    )


def _cancel_processes(handle: JobHandle) -> None:
    if handle.host != socket.gethostname():
        raise SetupError(
            f"its processes are on {handle.host}, and this is {socket.gethostname()}",
            where=str(handle.run_dir),
            fix=f"run `zerofit cancel` on {handle.host}",
        )
    # The watcher also ends what runs on other hosts, and writes down how the run ended. No signal:
    # it may be a sweep, of which this run is one.
    process = watcher(handle)
    if process is not None:
        try:
            (handle.run_dir / rd.CANCEL).touch()
        except OSError as error:
            raise SetupError(
                f"cannot be asked to end: {error.strerror}",
                where=str(handle.run_dir),
                fix="ask the run's owner to cancel it",
            ) from None
        deadline = time.monotonic() + _WATCHER_SECONDS
        while process_group.is_alive(process) and time.monotonic() < deadline:
            time.sleep(0.1)
    if not process_group.end_processes(handle.run_id, session_id=handle.session_id):
        raise JobFailedError(
            "some of its processes do not end",
            where=str(handle.run_dir),
            fix=f"`ps -s {handle.session_id}` shows them",
        )
