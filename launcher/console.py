"""Where the command line writes: results to stdout, messages to stderr."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.markup import escape

from launcher.errors import LauncherError
from launcher.redact import redacted

out = Console(highlight=False, soft_wrap=False)
err = Console(stderr=True, highlight=False)


def say(line: str) -> None:
    """Print a line on stdout as it is: no markup, and not broken where a path is long."""
    out.print(line, markup=False, soft_wrap=True)
    sys.stdout.flush()  # others write to the same terminal


def say_aside(line: str) -> None:
    """Print a line on stderr as it is."""
    err.print(line, markup=False, soft_wrap=True)


def show_error(error: LauncherError) -> None:
    """Print an error that a user can mend, unless a program that we ran has shown it already."""
    if not error.is_shown:
        err.print(f"[bold red]error:[/] {escape(redacted(str(error)))}", soft_wrap=True)
