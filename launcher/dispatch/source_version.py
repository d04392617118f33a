"""Which zerofit this is, exactly: version, commit, and a digest of its source files."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from launcher import __version__

COMMIT_VARIABLE = "ZEROFIT_COMMIT"
"""Says the commit where the files were copied without their repository."""
_PACKAGE = Path(__file__).parents[1]
_GIT_SECONDS = 10


def source_version(*, environ: Mapping[str, str] = os.environ) -> dict[str, str | None]:
    """Return what a prediction was made with.

    Returns:
        ``version``; ``commit``, with ``+changes`` when tracked files differ from it, and
        ``None`` when the package is not in a git checkout; ``source_sha256`` of the package's
        Python and catalogue files, which tells formulas apart whatever git knows.
    """
    return {
        "version": __version__,
        "commit": _commit() or environ.get(COMMIT_VARIABLE),
        "source_sha256": _digest(),
    }


def _commit() -> str | None:
    # A site-packages folder may lie in a repository of something else.
    tracked = _git("ls-files", "--error-unmatch", str(_PACKAGE / "__init__.py"))
    commit = _git("rev-parse", "HEAD")
    if tracked is None or commit is None:
        return None
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", str(_PACKAGE))
    return commit + ("+changes" if changes else "")


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(_PACKAGE), *args],
            capture_output=True,
            text=True,
            check=False,
            timeout=_GIT_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _digest() -> str:
    total = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*")):
        if path.suffix in (".py", ".json"):
            total.update(str(path.relative_to(_PACKAGE)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]
