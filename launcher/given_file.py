"""Reading a file that the user named."""

from __future__ import annotations

from pathlib import Path

from launcher.errors import LauncherError


def read_given(path: Path, *, error: type[LauncherError], fix: str) -> str:
    """Return the text of a file that a command or a recipe names.

    Raises:
        LauncherError: of the class ``error`` with ``fix``: it is missing, a folder, unreadable
            or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        problem = "there is no such file"
    except UnicodeDecodeError:
        problem = "this is not a text file"
    except OSError as reason:
        problem = f"it cannot be read: {reason.strerror or reason}"
    raise error(problem, where=str(path), fix=fix)
