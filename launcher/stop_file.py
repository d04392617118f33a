"""The file in a run directory that asks its ranks to save a checkpoint and end.

A file and not a signal: a signal to the job's processes also reaches DeepSpeed's launcher, which
ends all ranks at once, and kills a rank that is only just starting. All ranks see the run
directory, whatever started them and wherever they are, and a request waits there until they look.
"""

from __future__ import annotations

import os
from pathlib import Path

STOP_FILE = "stop"
"""Holds the reason, or nothing; `touch RUN/stop` asks as well."""


def ask_to_stop(run_dir: Path, reason: str) -> None:
    """Ask the ranks of a run to save a checkpoint and end.

    Args:
        run_dir: of the run.
        reason: who asks, in a word or two.

    Raises:
        OSError: the file cannot be written.
    """
    (run_dir / STOP_FILE).write_text(f"{reason}\n", encoding="utf-8")


def is_asked_to_stop(run_dir: Path) -> bool:
    """Return whether the ranks of a run were asked to save a checkpoint and end.

    The folder is listed: an NFS client believes for up to a minute that a file which it missed
    once does not exist, and looks anew when a folder is opened (nfs(5), "close-to-open").
    """
    try:
        return STOP_FILE in os.listdir(run_dir)  # noqa: PTH208  Path.iterdir makes a Path of each
    except OSError:
        return False  # a folder that has vanished ends the run by itself, when it saves


def stop_reason(run_dir: Path) -> str:
    """Return who asked; "a file named stop" where nobody has said so."""
    try:
        said = (run_dir / STOP_FILE).read_text(encoding="utf-8", errors="replace").split("\n")[0]
    except OSError:
        said = ""
    return said.strip() or f"a file named {STOP_FILE}"


def clear_stop(run_dir: Path) -> None:
    """Forget a request; it was acted on, or was meant for an earlier attempt.

    Raises:
        OSError: the file cannot be removed.
    """
    (run_dir / STOP_FILE).unlink(missing_ok=True)
