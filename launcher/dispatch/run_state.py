"""How runs are doing, by their run directories and by whoever runs them; there is no database."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from launcher import run_dir as rd
from launcher.dispatch import process_group
from launcher.dispatch import slurm as slurm_backend
from launcher.dispatch import slurm_commands as slurm
from launcher.dispatch.base import JobHandle, read_handle
from launcher.dispatch.slurm_failure import BY_SLURM
from launcher.dispatch.slurm_watch import conclude, describe_reason
from launcher.errors import JobFailedError, LauncherError, RunDirError

_log = logging.getLogger(__name__)

State = Literal["not started", "pending", "running", "finished", "failed", "killed", "unknown"]
_LAST_LINE_BYTES = 2**14


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What is known of one run."""

    run_dir: Path
    state: State
    """``killed``: ended from outside, so that it could not say so itself."""
    reason: str | None
    """Why it waits, failed or was killed, or why nothing is known."""
    backend: str | None
    job_id: str | None
    host: str | None
    """Where it was started; with Slurm, the nodes that it has now, ``None`` when it has none."""
    changed_at: str
    """When the run directory's state last changed: UTC, ISO 8601."""
    step: int | None
    loss: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the fields for scripts."""
        return asdict(self) | {"run_dir": str(self.run_dir)}


def find_runs(folder: Path) -> list[Path]:
    """Return the run directories in a folder and in its sweeps, oldest first.

    Raises:
        RunDirError: there is no such folder.
    """
    if not folder.is_dir():
        raise RunDirError(
            "there is no such folder", where=str(folder), fix="name the folder that holds runs"
        )
    found = [path.parent for depth in ("", "*/", "*/*/") for path in folder.glob(depth + rd.STATUS)]
    # Other programs write a status.json, too.
    runs = [path for path in found if (path / rd.RECIPE).is_file()]
    return sorted(runs, key=lambda path: ((path / rd.RECIPE).stat().st_mtime, path.name))


def observe(run_dirs: Sequence[Path]) -> list[RunState]:
    """Return how runs are doing; Slurm is asked once about all of them.

    A run that was ended from outside is marked as such in its directory, so that this is known
    when Slurm has forgotten the job.

    Raises:
        RunDirError: a folder is no run directory.
    """
    handles = [_handle(run_dir) for run_dir in run_dirs]
    # Also those that failed or were interrupted: Slurm may start them again.
    open_jobs = [
        handle.job_id
        for handle, run_dir in zip(handles, run_dirs, strict=True)
        if handle is not None
        and handle.backend == slurm_backend.NAME
        and rd.read_status(run_dir).state != "finished"
    ]
    jobs: dict[str, slurm.SlurmJobState] = {}
    try:
        answer = slurm.ask_all(open_jobs)
        jobs, trouble = answer.jobs, answer.accounting_problem
    except slurm.ControllerError as error:
        trouble = f"Slurm does not answer: {error.problem}"
    return [
        _observe_one(run_dir, handle, jobs, trouble)
        for run_dir, handle in zip(run_dirs, handles, strict=True)
    ]


def _handle(run_dir: Path) -> JobHandle | None:
    """Return the run's handle; ``None`` when zerofit has not started it."""
    rd.check_is_run(run_dir)
    return read_handle(run_dir) if (run_dir / rd.JOB).exists() else None


def _observe_one(
    run_dir: Path,
    handle: JobHandle | None,
    jobs: dict[str, slurm.SlurmJobState],
    trouble: str | None,
) -> RunState:
    status = rd.read_status(run_dir)
    # A Slurm job's ranks are where Slurm has put them, not where it was submitted.
    where = handle.host if handle and handle.backend != slurm_backend.NAME else None
    state: State
    reason: str | None = None
    if status.state == "finished":
        state = "finished"
    elif handle is None:
        state, reason = _without_handle(status)
    elif handle.backend == slurm_backend.NAME:
        job = jobs.get(handle.job_id)
        state, reason = _of_slurm(handle, job, status, trouble)
        where = (job.nodes if job else "") or None
    else:
        state, reason = _of_processes(handle, status)
    step, loss = last_logged(run_dir)
    return RunState(
        run_dir=run_dir,
        state=state,
        reason=reason,
        backend=handle.backend if handle else None,
        job_id=handle.job_id if handle else None,
        host=where,
        changed_at=status.changed_at,
        step=step,
        loss=loss,
    )


def _without_handle(status: rd.RunStatus) -> tuple[State, str | None]:
    if status.state == "created":
        return "not started", None
    if status.state == "running":
        return "unknown", "started by hand, so nobody watches its processes"
    return _ended(status)


def _ended(status: rd.RunStatus) -> tuple[State, str | None]:
    return ("failed" if status.state == "failed" else "killed"), status.reason


def _of_slurm(
    handle: JobHandle,
    job: slurm.SlurmJobState | None,
    status: rd.RunStatus,
    trouble: str | None,
) -> tuple[State, str | None]:
    if job is not None and job.is_pending:
        return "pending", describe_reason(job)
    if job is not None and not job.has_ended:
        return "running", None
    if status.state in ("failed", "interrupted"):
        return _ended(status)
    if job is None and trouble is not None:
        return "unknown", trouble
    try:
        # Writes the end into the run directory, which the ranks could not.
        conclude(handle, job)
    except JobFailedError as error:
        is_killed = job is not None and job.state in BY_SLURM
        return ("killed" if is_killed else "failed"), error.problem.partition("\n")[0]
    return "finished", None


def _of_processes(handle: JobHandle, status: rd.RunStatus) -> tuple[State, str | None]:
    if status.state in ("failed", "interrupted"):
        return _ended(status)
    if handle.host != socket.gethostname():
        return "unknown", f"its processes are on {handle.host}: ask there"
    if process_group.find_processes(handle.run_id, session_id=handle.session_id):
        return "running", None
    if watcher(handle) is not None:
        return "running", "zerofit is starting or ending it"
    return "killed", "its processes are gone, and none could say why"


def watcher(handle: JobHandle) -> psutil.Process | None:
    """Return the zerofit process that sees the job to its end, if it lives on this host."""
    if handle.watcher_pid is None or handle.host != socket.gethostname():
        return None
    try:
        process = psutil.Process(handle.watcher_pid)
        # A pid that was given to another program: that one is younger than the job file.
        started_before = process.create_time() <= (handle.run_dir / rd.JOB).stat().st_mtime
        return process if started_before and process_group.is_alive(process) else None
    except (psutil.Error, OSError):
        return None


def last_logged(run_dir: Path) -> tuple[int | None, float | None]:
    """Return the last step and loss that rank 0 logged."""
    step, loss = None, None
    for line in _last_lines(run_dir / rd.TRAINER_LOG):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # half a line: it is being written
        if not isinstance(entry, dict):
            continue
        step = entry.get("step", step)
        loss = entry.get("loss", loss)
    return step, loss


def _last_lines(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - _LAST_LINE_BYTES))
            yield from stream.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return


def observe_all(folder: Path) -> list[RunState]:
    """Return the runs in a folder; one that cannot be read is shown as unknown.

    Raises:
        RunDirError: there is no such folder.
    """
    return observe_readable(find_runs(folder))


def observe_readable(run_dirs: Sequence[Path]) -> list[RunState]:
    """Return how runs are doing; those that cannot be read come last, as unknown."""
    readable, broken = [], []
    for run_dir in run_dirs:
        try:
            rd.read_status(run_dir)
            _handle(run_dir)
            readable.append(run_dir)
        except LauncherError as error:
            broken.append((run_dir, error.problem))
    unknown = [
        RunState(
            run_dir=run_dir,
            state="unknown",
            reason=problem,
            backend=None,
            job_id=None,
            host=None,
            changed_at="",
            step=None,
            loss=None,
        )
        for run_dir, problem in broken
    ]
    return [*observe(readable), *unknown]
