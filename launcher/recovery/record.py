"""The record of a run's failed attempts and what was done about each: ``recovery.jsonl``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import RunDirError
from launcher.failure_kind import FailureKind

RECOVERY_LOG = "recovery.jsonl"
"""One JSON object a line, appended when an attempt has failed."""
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedAttempt:
    """One attempt that failed, and the decision that followed."""

    attempt: int
    """From 1, counted since somebody started or resumed the run."""
    supervisor: str
    """Who decided: ``host:pid`` of a zerofit process, or ``slurm:<job>``."""
    failed_at: str
    """UTC, ISO 8601."""
    kind: FailureKind
    problem: str
    """One line."""
    rank: int | None = None
    host: str | None = None
    phase: str | None = None
    step: int = 0
    """The last optimizer step that was done, counted over all attempts."""
    action: str
    """An :class:`launcher.recovery.decide.Action`."""
    reason: str
    """Why this action, in a sentence."""
    changes: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    """Strategy and cluster fields of the next plan that differ: before, after."""
    given_up: tuple[str, ...] = ()
    """Those of the changed fields that the recipe had set."""
    resumes_from_step: int | None = None
    """Step of the checkpoint that the next attempt starts from; 0 is the beginning."""


def append_failed_attempt(run_dir: Path, attempt: FailedAttempt) -> None:
    """Add a line to the run's record.

    Raises:
        OSError: it cannot be written.
    """
    with (run_dir / RECOVERY_LOG).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"schema_version": SCHEMA_VERSION, **asdict(attempt)}) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_failed_attempts(run_dir: Path) -> tuple[FailedAttempt, ...]:
    """Return the run's failed attempts, oldest first; none is an empty tuple.

    Raises:
        RunDirError: the file cannot be read, or is of another version.
    """
    path = run_dir / RECOVERY_LOG
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        raise RunDirError(
            f"cannot be read: {error}", where=str(path), fix="move the file away"
        ) from None
    return tuple(_parse(line, f"{path}:{number}") for number, line in enumerate(lines, start=1))


def _parse(line: str, where: str) -> FailedAttempt:
    try:
        content = json.loads(line)
        version = content.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise ValueError(f"schema_version is {version!r}, this zerofit reads {SCHEMA_VERSION}")
        changes = {key: (before, after) for key, (before, after) in content["changes"].items()}
        given_up = tuple(content["given_up"])
        kind = FailureKind(content["kind"])
        return FailedAttempt(**{**content, "changes": changes, "given_up": given_up, "kind": kind})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunDirError(
            f"not a failed attempt: {error}", where=where, fix="move the file away"
        ) from None
