"""Processes of virtual hosts: what was started there, and what runs there."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

WAIT_SECONDS = 180.0  # for machines that do much else


@dataclass(kw_only=True)
class HostProcess:
    """A program that was started on a virtual host."""

    entering: subprocess.Popen[bytes]
    """``nsenter``; it ends when the program does, with its exit status."""
    log: Path

    def signal(self, number: signal.Signals) -> None:
        """Signal the program itself, and nothing that it started."""
        (program,) = psutil.Process(self.entering.pid).children()
        program.send_signal(number)

    def kill(self) -> None:
        """End the program and what it has started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.entering.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def wait(self, *, timeout: float = WAIT_SECONDS) -> int:
        """Return the exit status; raises ``subprocess.TimeoutExpired``."""
        return self.entering.wait(timeout)

    @property
    def output(self) -> str:
        """Return what it has printed so far, both streams."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def identity(process: psutil.Process) -> tuple[int, float]:
    """Return what no other process has had."""
    return process.pid, process.create_time()


def is_stopped(process: psutil.Process) -> bool:
    """Return whether a process does nothing any more; it may have ended, too."""
    try:
        return process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def has_become_another(entering: subprocess.Popen[bytes]) -> bool:
    """Return whether ``nsenter`` has a child that is no copy of it any more."""
    try:
        return any(child.name() != "nsenter" for child in psutil.Process(entering.pid).children())
    except psutil.NoSuchProcess:
        return False


def namespace(pid: int, kind: str) -> str:
    """Return which namespace a process is in; empty if there is no such process."""
    try:
        return str(Path(f"/proc/{pid}/ns/{kind}").readlink())
    except OSError:
        return ""


def wait_until(is_so: Callable[[], object], what: str) -> None:
    """Wait until something is so; else raise ``TimeoutError``."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not ready within {WAIT_SECONDS:.0f} s: {what}")
        time.sleep(0.01)
