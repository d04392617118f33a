"""One job's processes on this machine: start them apart, find all of them, end all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from launcher.job_script import RUN_ID_VARIABLE

# Enough for a handler that writes one small file. With what a watch waits for before, SIGKILL is
# sent so early that all is gone within 10 s; tests/unit/test_stopping.py adds it up.
TERM_GRACE_SECONDS = 2.5
KILL_GRACE_SECONDS = 3.0
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  where POSIX shared memory is on Linux


def start_job(
    argv: Sequence[str], *, env: Mapping[str, str], cwd: Path, log_file: Path
) -> subprocess.Popen[bytes]:
    """Start a job in its own session, with both outputs appended to ``log_file``.

    Its own session, so that signals reach the whole job and nothing else, and so that Ctrl-C
    in the terminal comes to us alone. To a file and not through a pipe, so that a slow
    terminal, or the end of this process, never stops a rank that prints.

    Args:
        argv: program and arguments.
        env: variables on top of this process's own.
        cwd: folder that the job starts in.
        log_file: made if missing.

    Raises:
        OSError: the program or the log file cannot be opened.
    """
    with log_file.open("ab") as log:
        return subprocess.Popen(
            argv,
            env={**os.environ, **env},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process still runs; one that only waits to be reaped does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def find_processes(run_id: str, *, session_id: int | None = None) -> list[psutil.Process]:
    """Return the live processes of a run on this machine, this process left out.

    Found by the marker in their environment, which children inherit whatever session or
    parent they have, and by the session, which also holds those that cleared their
    environment.
    """
    return [
        process
        for process in psutil.process_iter()
        if process.pid != os.getpid() and _belongs(process, run_id, session_id)
    ]


def environment_of(process: psutil.Process) -> Mapping[str, str]:
    """Return a process's environment; empty for other users' processes and dead ones."""
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def end_processes(run_id: str, *, session_id: int | None = None, at_once: bool = False) -> bool:
    """End every process of a run: SIGTERM, a few seconds, SIGKILL; return whether all are gone.

    Processes that are started meanwhile are found too, because each round looks again.

    Args:
        run_id: the marker in their environment.
        session_id: session that the job was started in, if it is known.
        at_once: SIGKILL right away.
    """
    if not at_once:
        _signal_all(find_processes(run_id, session_id=session_id), signal.SIGTERM)
        if _wait_gone(run_id, session_id, TERM_GRACE_SECONDS):
            return True
    deadline = time.monotonic() + KILL_GRACE_SECONDS
    while time.monotonic() < deadline:
        _signal_all(find_processes(run_id, session_id=session_id), signal.SIGKILL)
        if _wait_gone(run_id, session_id, 0.3):
            return True
    return False


def exit_status_of_zombie(pid: int) -> int | None:
    """Return how a process ended that its parent has not reaped yet, as ``Popen`` would say.

    Returns:
        The exit code, or minus the signal; ``None`` when it is gone or still running.

    Source: proc_pid_stat(5), field 3 (state) and 52 (exit_code, as waitpid reports it).
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field is the program's name, which may hold spaces and brackets.
    fields = stat.rpartition(")")[2].split()
    if len(fields) < 50 or fields[0] != "Z":
        return None
    return os.waitstatus_to_exitcode(int(fields[49]))


def count_oom_kills(vmstat: Path = Path("/proc/vmstat")) -> int:
    """Return how many processes this host's kernel has killed for want of memory since it started.

    Those of memory limits (cgroups: containers, Slurm) are among them. 0 where nobody counts.

    Source: Linux 4.13 and later, ``mm/oom_kill.c:__oom_kill_process`` counts before it kills.
    """
    try:
        lines = vmstat.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def shared_memory_leftovers(
    *, master_port: int | None = None, folder: Path = SHARED_MEMORY
) -> Iterator[Path]:
    """Yield this user's buffers of DeepSpeed's CPU all-reduce, which it never removes.

    69 MB per rank and run. With ``master_port`` only those of runs on that port.

    Source: DeepSpeed 0.19.8 ``csrc/cpu/comm/shm.cpp``:
    ``deepspeed_allreduce_buffer_<uid>_<address>_<port>_<rank>``.
    """
    prefix = f"deepspeed_allreduce_buffer_{os.getuid()}_"
    for path in sorted(folder.glob(f"{prefix}*")):
        *_, port, rank = path.name.removeprefix(prefix).rsplit("_", 2)
        if rank.isdigit() and master_port in (None, int(port) if port.isdigit() else None):
            yield path


def _belongs(process: psutil.Process, run_id: str, session_id: int | None) -> bool:
    if not is_alive(process):
        return False
    if session_id is not None:
        try:
            if os.getsid(process.pid) == session_id:
                return True
        except (ProcessLookupError, PermissionError):
            return False
    return environment_of(process).get(RUN_ID_VARIABLE) == run_id


def _signal_all(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            # psutil checks the start time first: a pid that was given to another program
            # meanwhile is left alone.
            process.send_signal(number)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


def _wait_gone(run_id: str, session_id: int | None, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while find_processes(run_id, session_id=session_id):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
