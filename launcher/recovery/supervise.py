"""See a run to its end through failures: read why it failed, decide, go on with what follows."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import BinaryIO

from launcher.backends import choose_backend
from launcher.dispatch.base import run_to_end
from launcher.dispatch.run_lock import hold
from launcher.dispatch.warm import ForkServers
from launcher.errors import JobFailedError
from launcher.launch import check_can_start, create_run, prepare_data
from launcher.prepare import Prepared
from launcher.recovery.judge import judge
from launcher.recovery.record import FailedAttempt
from launcher.resume import check_has_stopped, resume_run

# In a Slurm job of its own the script does it, without waiting in the queue again.
_SUPERVISED_HERE = ("local", "deepspeed", "allocation")


def train_to_end(
    prepared: Prepared,
    output_dir: Path | None,
    *,
    say: Callable[[str], None],
    console: BinaryIO,
    servers: ForkServers | None = None,
) -> Path:
    """Make a run directory, train to the end, and return the directory.

    Args:
        prepared: what to run.
        output_dir: the directory to make; ``None`` leaves it to the recipe, or picks a name.
        say: shows a line of text.
        console: where the job's output is copied.
        servers: fork the ranks of all attempts, where they run on this machine.

    Raises:
        LauncherError: it cannot be started (exit status 2), failed for good (4) or was
            interrupted.
    """
    check_can_start(prepared)
    run_dir, backend, request = create_run(prepared, output_dir)
    if servers is not None:
        backend = servers.warmed(backend, prepared.plan)
    with hold(run_dir):
        say(f"run directory: {run_dir}")
        prepare_data(run_dir, request, say=say)
        first = partial(run_to_end, backend, request, run_dir=run_dir, console=console)
        if backend.name in _SUPERVISED_HERE:
            again = partial(resume_run, run_dir, say=say, console=console, servers=servers)
            _supervise(run_dir, prepared, first, again, say=say)
        else:
            first()
    return run_dir


def resume_to_end(
    run_dir: Path, prepared: Prepared, *, say: Callable[[str], None], console: BinaryIO
) -> Path:
    """Go on with a run to its end, as :func:`train_to_end` does; return its absolute directory.

    Args:
        run_dir: accepted by :func:`launcher.resume.prepare_resume`.
        prepared: a plan that fits.
        say: shows a line of text.
        console: where the job's output is copied.

    Raises:
        LauncherError: as :func:`train_to_end`.
    """
    run_dir = run_dir.absolute()
    again = partial(resume_run, run_dir, say=say, console=console)
    first = partial(again, prepared)
    backend = choose_backend(prepared.recipe).name
    # A job of its own in Slurm holds the run itself, on its first node.
    with nullcontext() if backend == "slurm" else hold(run_dir):
        check_has_stopped(run_dir)  # once more: it may have gone on since it was planned
        if backend in _SUPERVISED_HERE:
            _supervise(run_dir, prepared, first, again, say=say)
        else:
            first()
    return run_dir


def _supervise(
    run_dir: Path,
    prepared: Prepared,
    attempt: Callable[[], object],
    again: Callable[[Prepared], object],
    *,
    say: Callable[[str], None],
) -> None:
    """Run an attempt, and further ones for as long as there is something sensible to try.

    Raises:
        LauncherError: it failed for good.
    """
    supervisor = f"{socket.gethostname()}:{os.getpid()}"
    failed: list[FailedAttempt] = []
    while True:
        try:
            attempt()
        except JobFailedError as error:
            verdict = judge(run_dir, prepared, error, failed, supervisor=supervisor)
            for line in verdict.describe():
                say(line)
            if verdict.following is None:
                raise verdict.error from None
            time.sleep(verdict.following.wait_seconds)
            failed.append(verdict.record)
            prepared = verdict.following.prepared
            attempt = partial(again, prepared)
        else:
            return
