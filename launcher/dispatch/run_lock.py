"""One starter at a time in a run directory: a lock that says who holds it.

The file ``lock`` is made with ``O_CREAT | O_EXCL``, which is atomic on local file systems and on
NFS (open(2): since NFSv3), and rewritten times say that its holder lives. Not ``flock``: on NFS it
may be local to each client (mount option ``local_lock``) or be forgotten when the server restarts,
and it leaves no trace of who holds it, where, and since when.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.dispatch import slurm_commands as slurm
from launcher.errors import LauncherError, RunDirError
from launcher.starter_lock import LOCK

_log = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
STALE_SECONDS = 120.0
"""Twelve missed signs of life; an NFS client shows times up to 60 s late (nfs(5), acregmax)."""

CONTEST_SECONDS = 5.0
"""How long to try while others remove the same stale lock."""


class RunLockedError(RunDirError):
    """Somebody else has started this run, and still holds it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds a lock: a process of zerofit, or a Slurm job."""

    host: str
    pid: int
    """The process; of a Slurm job, its script's."""
    since: str
    """UTC, ISO 8601."""
    place: str = ""
    """Machine start and pid namespace; processes of one place can look at each other."""
    started_ticks: int | None = None
    """When the process started, since the machine did: its pid may be another's later."""
    slurm_job: str | None = None

    def __str__(self) -> str:
        who = f"job {self.slurm_job}" if self.slurm_job else f"process {self.pid}"
        return f"{who} on {self.host}, since {self.since}"


@contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Hold a run directory against other starters for as long as the block runs.

    Raises:
        RunLockedError: somebody else holds it; says who.
        RunDirError: the lock cannot be written.
    """
    path = run_dir / LOCK
    _acquire(path)
    inode = path.stat().st_ino
    is_over = threading.Event()
    beats = threading.Thread(target=_beat, args=(path, inode, is_over), name="lock", daemon=True)
    beats.start()
    try:
        yield
    finally:
        is_over.set()
        beats.join()
        with contextlib.suppress(OSError):  # a folder that has vanished is held by nobody
            if path.stat().st_ino == inode:
                path.unlink()


def find_holder(run_dir: Path) -> Holder | None:
    """Return who holds a run; ``None`` when nobody does, or only somebody who is gone."""
    path = run_dir / LOCK
    return holder if (holder := _read(path)) and _lives(holder, path) else None


def _acquire(path: Path) -> None:
    deadline = time.monotonic() + CONTEST_SECONDS
    while True:
        try:
            _create(path)
        except FileExistsError:
            holder = _read(path)
            is_over = time.monotonic() > deadline
            if holder is None and not is_over and not _is_old(path):
                time.sleep(0.05)  # it is being written: soon it says by whom
                continue
            if _lives(holder, path) or is_over:
                raise _locked(path, holder) from None
            if not _remove_stale(path, holder):
                time.sleep(0.1)
        except OSError as error:
            raise RunDirError(
                f"cannot write here: {error.strerror}",
                where=str(path),
                fix="free some disk space, or ask for the permission",
            ) from None
        else:
            return


def _create(path: Path) -> None:
    holder = Holder(
        host=socket.gethostname(),
        pid=os.getpid(),
        since=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        place=_place(),
        started_ticks=_started_ticks(os.getpid()),
    )
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    try:
        os.write(descriptor, (json.dumps(asdict(holder)) + "\n").encode())
        os.fsync(descriptor)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _remove_stale(path: Path, holder: Holder | None) -> bool:
    """Remove a lock whose holder is gone; return whether it was this process that did.

    Under a second lock, or one of two starters could remove what the other has just made.
    """
    removing = path.with_name(f".{LOCK}-removing")
    try:
        os.close(os.open(removing, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        if _is_old(removing):  # who made it died within a millisecond, long ago
            removing.unlink(missing_ok=True)
        return False
    try:
        if _read(path) != holder or not path.exists():
            return False
        path.unlink()
    finally:
        removing.unlink(missing_ok=True)
    _log.warning("%s held this run and is gone; going on", holder or "somebody")
    return True


def _read(path: Path) -> Holder | None:
    """Return who a lock names; ``None`` when there is none, or it is being written."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Holder(**content)
    except (OSError, ValueError, TypeError):
        return None


def _lives(holder: Holder | None, path: Path) -> bool:
    if holder is None:
        return not _is_old(path)
    if holder.slurm_job is not None:
        return _job_lives(holder.slurm_job)
    if holder.place == _place():
        return _started_ticks(holder.pid) == holder.started_ticks
    return not _is_old(path)


def _job_lives(job_id: str) -> bool:
    try:
        job = slurm.ask([job_id]).get(job_id)
    except LauncherError as error:
        _log.warning("cannot see whether job %s still runs: %s", job_id, error.problem)
        return True
    return job is not None and not job.has_ended and not job.is_pending


def _is_old(path: Path) -> bool:
    """Return whether a lock shows no sign of life, by the clock of the file system."""
    probe = path.with_name(f".{LOCK}-clock-{socket.gethostname()}-{os.getpid()}")
    try:
        probe.touch()
        age_seconds = probe.stat().st_mtime - path.stat().st_mtime
        probe.unlink()
    except FileNotFoundError:
        return False  # it is gone by now, which the next look takes in
    return age_seconds > STALE_SECONDS


def _started_ticks(pid: int) -> int | None:
    """Return when a process started; ``None`` when it has ended.

    Source: proc_pid_stat(5), fields 3 (state) and 22 (starttime).
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field is the program's name, which may hold spaces and brackets.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def _place() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"


def _beat(path: Path, inode: int, is_over: threading.Event) -> None:
    while not is_over.wait(BEAT_SECONDS):
        try:
            if path.stat().st_ino == inode:
                os.utime(path)
                continue
        except OSError:
            continue  # a file server that is away for a moment
        _log.error("%s: another starter has taken this run over", path)
        return


def _locked(path: Path, holder: Holder | None) -> RunLockedError:
    return RunLockedError(
        f"this run is held by {holder or 'somebody who is just starting it'}",
        where=str(path.parent),
        fix="wait for it, or end it with `zerofit cancel`; two jobs must not write into one run "
        "directory",
    )
