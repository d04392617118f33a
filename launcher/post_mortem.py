"""What a rank found when its memory ran out: ``post_mortem/00001.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher import run_dir as rd
from launcher.errors import RunDirError
from launcher.failure_kind import FailureKind

POST_MORTEM = "post_mortem"
"""Folder with a file of each rank that ran out of memory."""
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PostMortem:
    """One rank's memory at the moment when it ran out; bytes of a GPU are ``None`` without one."""

    rank: int
    host: str
    kind: FailureKind
    phase: str
    step: int
    """The last optimizer step that was done, over all attempts."""
    message: str
    allocated_bytes: int | None
    """Of torch's allocator, without what it was asked for last."""
    reserved_bytes: int | None
    requested_bytes: int | None
    """What did not fit any more, where torch said it."""
    device_free_bytes: int | None
    device_total_bytes: int | None
    host_available_bytes: int
    host_total_bytes: int
    host_rss_bytes: int
    """Resident memory of this rank's process."""
    predicted_bytes: int | None
    """Allocated bytes that the plan says for this phase."""
    predicted: Mapping[str, int]
    """Its components, the largest first."""
    measured: Mapping[str, int]
    """Weights, gradients, optimizer states and everything else on the device."""
    next_rung: Mapping[str, Any] | None
    """The first strategy of the plan's own ladder; the supervisor searches again. Where that ladder
    is empty, what the supervisor found, with ``given_up``: keys of the recipe that it changes."""

    def to_json(self) -> dict[str, Any]:
        """Return JSON values that :func:`read_post_mortems` reads back."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


def post_mortem_file(run_dir: Path, rank: int) -> Path:
    """Return where a rank writes its post-mortem."""
    return run_dir / POST_MORTEM / f"{rank:05d}.json"


def read_post_mortems(run_dir: Path) -> tuple[PostMortem, ...]:
    """Return the post-mortems of the last attempt, in the order of ranks.

    Raises:
        RunDirError: a file is broken or of another version.
    """
    paths = sorted((run_dir / POST_MORTEM).glob("[0-9]*.json"))
    return tuple(_read(path) for path in paths)


def _read(path: Path) -> PostMortem:
    content = rd.read_mapping(path, schema_version=SCHEMA_VERSION)
    try:
        return PostMortem(**{**content, "kind": FailureKind(content["kind"])})
    except (KeyError, TypeError, ValueError) as error:
        raise RunDirError(
            f"not a post-mortem: {error}", where=str(path), fix="it was not written by zerofit"
        ) from None
