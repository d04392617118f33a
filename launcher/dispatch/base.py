"""What every backend does: render a job without effects, start it, and see it to its end."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from launcher import run_dir as rd
from launcher.dispatch.interruptions import Interruptions
from launcher.errors import JobFailedError, LauncherError, RunDirError
from launcher.failure_kind import FailureKind
from launcher.job_script import JobRequest
from launcher.planning.plan import Plan

JOB_SCHEMA_VERSION = 1


class InterruptionError(LauncherError):
    """A signal ended this command and no job: exit status 128 + the signal, as shells have it."""

    def __init__(self, problem: str, *, where: str, fix: str, signal_number: int) -> None:
        super().__init__(problem, where=where, fix=fix)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number


class JobInterruptedError(InterruptionError, JobFailedError):
    """A signal ended the job before it had finished: exit status 4, as for any other reason."""

    kind = FailureKind.interrupted

    def __init__(self, problem: str, *, where: str, fix: str, signal_number: int) -> None:
        super().__init__(problem, where=where, fix=fix, signal_number=signal_number)
        self.exit_code = JobFailedError.exit_code


@dataclass(frozen=True, slots=True, kw_only=True)
class JobHandle:
    """A job that was started: what it takes to watch, find or cancel it."""

    backend: str
    run_dir: Path
    run_id: str
    job_id: str
    """For people: a process id here, a job number elsewhere."""
    host: str
    """Where the job was started."""
    session_id: int | None = None
    """Session of the job's processes on ``host``, which is also the launcher's process id."""
    master_port: int | None = None
    watcher_pid: int | None = None
    """The zerofit process on ``host`` that sees the job to its end; it also ends it."""


class Backend(Protocol):
    """A place that runs jobs: this machine, the hosts of a hostfile, or Slurm."""

    @property
    def name(self) -> str:
        """Name that recipes use."""

    def render(self, plan: Plan, *, run_dir: Path, files: Mapping[str, str]) -> JobRequest:
        """Return what :meth:`submit` would run. Pure; ``--dry-run`` stops here."""

    def check_place(self, plan: Plan) -> None:
        """Look whether a job of this plan can be started from here; starts nothing.

        Raises:
            SetupError: something that it needs is missing.
        """

    def submit(self, request: JobRequest, *, run_dir: Path) -> JobHandle:
        """Write the files and start the job. The only step with effects."""

    def wait(
        self, handle: JobHandle, *, interruptions: Interruptions, console: BinaryIO | None
    ) -> None:
        """Return when the run has finished, with nothing left behind.

        Raises:
            JobFailedError: it did not finish.
            JobInterruptedError: a signal ended it.
        """


def run_to_end(
    backend: Backend,
    request: JobRequest,
    *,
    run_dir: Path,
    console: BinaryIO | None = None,
    saves: bool = True,
) -> JobHandle:
    """Submit a job and wait until it has finished; Ctrl-C at any moment ends all of it.

    SIGTERM and SIGUSR1 let the ranks save a checkpoint first.

    Args:
        backend: where to run.
        request: what its ``render`` returned.
        run_dir: an existing, writable run directory.
        console: where to copy what the job prints; ``None`` leaves it in the log file.
        saves: whether a run that is stopped is worth a checkpoint.

    Raises:
        JobFailedError: it did not finish (exit status 4).
        JobInterruptedError: a signal ended it (exit status 4).
        RunDirError: the files cannot be written.
        SetupError: the job cannot be started here.
    """
    with Interruptions(saves=saves) as interruptions:
        handle = backend.submit(request, run_dir=run_dir)
        backend.wait(handle, interruptions=interruptions, console=console)
    return handle


def new_run_id() -> str:
    """Return a name that no other run has."""
    return uuid.uuid4().hex


def write_files(request: JobRequest, run_dir: Path) -> None:
    """Write a request's files into an existing run directory.

    Raises:
        RunDirError: a file cannot be written.
    """
    for name, text in request.files.items():
        path = run_dir / name
        assert path.parent == run_dir, name
        try:
            rd.write_text(path, text)
            if text.startswith("#!"):
                path.chmod(0o755)
        except OSError as error:
            raise RunDirError(
                f"cannot write: {error.strerror or error}",
                where=str(path),
                fix="free some disk space, or choose another folder",
            ) from None


def write_handle(handle: JobHandle) -> None:
    """Keep a handle in the run directory, so that other commands find the job."""
    content = asdict(handle) | {"run_dir": str(handle.run_dir)}
    rd.write_json(handle.run_dir / rd.JOB, {"schema_version": JOB_SCHEMA_VERSION, **content})


def read_handle(run_dir: Path) -> JobHandle:
    """Read back the handle of a run.

    Raises:
        RunDirError: the run was never started, or the file is broken or of another version.
    """
    path = run_dir / rd.JOB
    content: dict[str, Any] = rd.read_mapping(path, schema_version=JOB_SCHEMA_VERSION)
    texts = ("backend", "run_id", "job_id", "host")
    numbers = ("session_id", "master_port", "watcher_pid")
    try:
        if not all(isinstance(content[name], str) for name in texts):
            raise TypeError(f"{', '.join(texts)} must be text")
        if not all(isinstance(content.get(name), int | None) for name in numbers):
            raise TypeError(f"{', '.join(numbers)} must be numbers")
        # Slurm's programs would take anything else for an option or a list of jobs.
        if not re.fullmatch(r"\d+(_\d+)?", content["job_id"], re.ASCII):
            raise TypeError(f"job_id is {content['job_id']!r}")
        # The directory may have been moved: it is where the file is.
        return JobHandle(**{**content, "run_dir": run_dir})
    except (KeyError, TypeError) as error:
        raise RunDirError(
            f"not a job file: {error}", where=str(path), fix="it was not written by zerofit"
        ) from None
