"""Notice that this rank gets no further: keep its stack, say where it hangs, and end it.

A thread of the rank itself does it, so that it works under every launcher and without a driver.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path

from launcher import run_dir
from launcher.errors import JobFailedError
from launcher.failure_kind import FailureKind
from launcher.peaks import RankFailure, RankPeaks, peaks_to_text
from launcher.starter_lock import LOOK_SECONDS, starter_lock
from launcher.watchdog import HUNG_EXIT_STATUS, Patience

TICK_SECONDS = 1.0
WRITE_INTERVAL_SECONDS = 5.0
# Ranks that wait for this one notice within a tick or two; each keeps its own stack.
LINGER_SECONDS = 3.0
# Writing what is known can hang, too, where the file system is what hangs.
REPORT_SECONDS = 10.0
_BACKUP_SECONDS = 30.0
LOST_EXIT_STATUS = 128 + signal.SIGTERM
"""As if Slurm had ended the rank."""


class RankHungError(JobFailedError):
    """A rank that got no further for longer than it may."""

    kind = FailureKind.hang


class Heartbeat:
    """Counts a rank's progress, writes it into the rank's file, and ends a rank that has none.

    Call :meth:`mark` whenever the rank gets further: at each border between phases, and for
    each batch of an evaluation. It costs a few assignments. Time in which the whole process
    was stopped (SIGSTOP, a suspended Slurm job) does not count.
    """

    def __init__(
        self, folder: Path, patience: Patience, *, rank: int, local_rank: int, world_size: int
    ) -> None:
        self.known = RankPeaks(
            rank=rank,
            local_rank=local_rank,
            world_size=world_size,
            host=socket.gethostname(),
            pid=os.getpid(),
            device="cpu",
            device_name="not chosen yet",
            state="running",
            steps_done=0,
        )
        """What is known of this rank, written within ``WRITE_INTERVAL_SECONDS``."""
        self.folder = folder
        self._path = run_dir.rank_file(folder, rank)
        self._patience = patience
        self._phase: str | None = "start"
        self._beats = 0
        self._progress_at = time.time()
        self._steps_done = 0
        self._written_beats = -1
        self._written = 0.0
        self._touched = 0.0
        self._starter = starter_lock(folder, os.environ)
        self._starter_seen = 0.0
        self._lock = threading.Lock()
        self._is_over = False
        self._stopped = threading.Event()
        self._ranks_folder: int | None = None
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch.

        Raises:
            OSError: the folder of the ranks' files cannot be made.
        """
        folder = self._path.parent
        folder.mkdir(parents=True, exist_ok=True)
        # Kept open, so that it stays the same to every file system until the rank ends.
        self._ranks_folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer: the rank has ended its work, or says itself why not."""
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()

    def mark(self, phase: str | None, *, steps_done: int | None = None) -> None:
        """Note that the rank got further, and the phase that it is in now."""
        self._phase = phase
        self._beats += 1
        self._progress_at = time.time()
        if steps_done is not None:
            self._steps_done = steps_done

    def write(self, known: RankPeaks) -> None:
        """Replace the rank's file with what is known and how far the rank is.

        A rank that wakes up when the run goes on without it has no file there any more.

        Raises:
            OSError: it cannot be written.
        """
        self.known = known
        with self._lock:
            # A rank that hung may still notice that another one is gone: the first word counts.
            if not self._is_over:
                self._write(known)

    def _is_of_this_attempt(self) -> bool:
        """Return whether the folder of ranks is still the one in which this rank began.

        The next attempt has a new one: ``launcher/resume.py`` moves this away.
        """
        if self._ranks_folder is None:
            return True
        return os.path.samestat(os.fstat(self._ranks_folder), self._path.parent.stat())

    def _write(self, known: RankPeaks) -> None:
        if not self._is_of_this_attempt():
            return
        beats = self._beats
        content = replace(
            known,
            phase=self._phase,
            beats=beats,
            progress_at=round(self._progress_at, 3),
            steps_done=max(known.steps_done, self._steps_done),
        )
        run_dir.write_text(self._path, peaks_to_text(content))
        self._written_beats, self._written = beats, time.monotonic()

    def _run(self) -> None:
        beats, idle_seconds, last = self._beats, 0.0, time.monotonic()
        while not self._stopped.wait(TICK_SECONDS):
            now = time.monotonic()
            # A longer pause means that this process, and not only its main thread, stood still.
            idle_seconds += min(now - last, 2 * TICK_SECONDS)
            last = now
            self._touch_if_due(now)
            if self._has_lost_its_job(now):
                sys.stderr.write(
                    f"[rank {self.known.rank}] error: the job that started this rank has ended: "
                    "ending\n"
                )
                sys.stderr.flush()
                os._exit(LOST_EXIT_STATUS)
            if beats != self._beats:
                beats, idle_seconds = self._beats, 0.0
            limit_seconds = self._patience.limit_seconds(self._phase, steps_done=self._steps_done)
            if limit_seconds:
                if idle_seconds > limit_seconds:
                    self._end_rank(limit_seconds)
                # Needs no interpreter lock: shows the stack also when a library keeps it.
                faulthandler.dump_traceback_later(limit_seconds + _BACKUP_SECONDS)
            self._write_if_due(now)

    def _touch_if_due(self, now: float) -> None:
        """Show that this host lives, also while its ranks wait for others and have no news."""
        if self.known.local_rank == 0 and now - self._touched > WRITE_INTERVAL_SECONDS:
            self._touched = now
            with contextlib.suppress(OSError):
                if self._is_of_this_attempt():
                    os.utime(self._path)

    def _has_lost_its_job(self, now: float) -> bool:
        """Look at the lock of the Slurm job now and then; with a dead slurmd nobody else does."""
        if self._starter is None or now - self._starter_seen < LOOK_SECONDS:
            return False
        self._starter_seen = now
        return self._starter.is_lost()

    def _write_if_due(self, now: float) -> None:
        is_news = self._beats != self._written_beats
        if is_news and now - self._written > WRITE_INTERVAL_SECONDS and self._lock.acquire(False):  # noqa: FBT003
            try:
                with contextlib.suppress(
                    OSError
                ):  # a full disk: what was measured ends no training
                    self._write(self.known)
            finally:
                self._lock.release()

    def _end_rank(self, limit_seconds: float) -> None:
        # In a thread of its own, because the process must end whatever the disk does.
        report = threading.Thread(target=self._report, args=(limit_seconds,), daemon=True)
        report.start()
        report.join(REPORT_SECONDS)
        time.sleep(LINGER_SECONDS)
        os._exit(HUNG_EXIT_STATUS)

    def _report(self, limit_seconds: float) -> None:
        name = f"{run_dir.LOGS}/stack-{self.known.rank:05d}.txt"
        frames = sys._current_frames()
        main = traceback.extract_stack(frames[threading.main_thread().ident or 0])
        error = self._describe(main, limit_seconds, stack_file=name)
        sys.stderr.write(f"[rank {self.known.rank}] error: {error}\n")
        sys.stderr.flush()
        with contextlib.suppress(OSError), (self.folder / name).open("a") as stream:
            stream.write(f"{error.problem}\n")
            stream.flush()
            faulthandler.dump_traceback(stream, all_threads=True)
        failure = RankFailure(
            phase=self._phase or "between steps",
            type=type(error).__name__,
            message=str(error),
            traceback="".join(traceback.format_list(main)),
            kind=error.kind,
        )
        self._lock.acquire(timeout=REPORT_SECONDS / 2)  # the main thread may hang in writing
        self._is_over = True
        with contextlib.suppress(OSError):
            self._write(replace(self.known, state="failed", failure=failure))

    def _describe(
        self, main: traceback.StackSummary, limit_seconds: float, *, stack_file: str
    ) -> RankHungError:
        since = time.strftime("%H:%M:%S", time.gmtime(self._progress_at))
        inner = main[-1]
        where = f"{Path(inner.filename).name}:{inner.lineno} in {inner.name}"
        phase = f"phase {self._phase}" if self._phase else "between two phases"
        return RankHungError(
            f"no progress since {since} UTC, for more than {limit_seconds:g} s, in step "
            f"{self._steps_done + 1} of this attempt, {phase}, at {where}",
            where=stack_file,
            fix="the file has the stacks of all threads; where all ranks wait in a collective, "
            "the network between them is dead; a slow cluster needs a larger "
            "recovery.watchdog_seconds or recovery.phase_seconds",
        )
