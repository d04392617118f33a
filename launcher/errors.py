"""Errors that a user can act on: what was wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

from launcher.failure_kind import FailureKind

# Of one error; the first ones are enough to know what kind of file it is.
_MOST_PROBLEMS = 20


class LauncherError(Exception):
    """Base class of every error that is the user's to mend.

    Args:
        problem: what was wrong, with the value.
        where: the file (and line), key, option or host.
        fix: what to do about it.
    """

    exit_code = 2
    kind = FailureKind.other
    """What it means for a run; a rank's own errors say it here."""
    is_shown = False
    """Whether the user has seen it already, so that the command line only leaves."""

    def __init__(self, problem: str, *, where: str, fix: str) -> None:
        self.problem = problem
        self.where = where
        self.fix = fix
        super().__init__(f"{where}: {problem}\n  fix: {fix}")


class RecipeError(LauncherError):
    """A recipe, or a key=value override, that cannot be used."""


class ModelError(LauncherError):
    """A model that cannot be found, read or trained."""


class HardwareError(LauncherError):
    """A GPU or cluster description that is unknown or impossible."""


class DataError(LauncherError):
    """A data file that is missing, broken or of the wrong shape."""


class HostfileError(LauncherError):
    """A hostfile that does not say which hosts to use."""


class RunDirError(LauncherError):
    """A run directory that exists, cannot be written, or cannot be read."""


class SetupError(LauncherError):
    """This machine lacks something that the command needs."""


class DoesNotFitError(LauncherError):
    """No strategy fits the GPUs; the fix names the smallest change that would."""

    exit_code = 3


class JobFailedError(LauncherError):
    """A job started and did not finish; the run directory holds what it left.

    ``kind`` is given where it is known why.
    """

    exit_code = 4

    def __init__(
        self, problem: str, *, where: str, fix: str, kind: FailureKind | None = None
    ) -> None:
        super().__init__(problem, where=where, fix=fix)
        if kind is not None:
            self.kind = kind


def did_you_mean(value: str, known: Collection[str]) -> str:
    """Return a fix for an unknown name: the nearest known one, else all of them."""
    close = difflib.get_close_matches(value.lower(), list(known), n=1)
    if not close:
        by_lower = {name.lower(): name for name in known}
        close = [by_lower[n] for n in difflib.get_close_matches(value.lower(), list(by_lower), n=1)]
    return f"did you mean {close[0]!r}?" if close else f"use one of: {', '.join(sorted(known))}"


def list_problems(problems: Iterable[str]) -> str:
    """Join several problems so that one error can report them all at once."""
    found = list(problems)
    if len(found) == 1:
        return found[0]
    more = len(found) - _MOST_PROBLEMS
    rest = [f"and {more:,} more"] if more > 0 else []
    return "\n  - ".join([f"{len(found):,} problems", *found[:_MOST_PROBLEMS], *rest])
