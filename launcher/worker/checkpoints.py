"""Checkpoints that are whole or absent: written under another name, verified, renamed, pruned.

Below ``checkpoints`` stand ``checkpoint-<step>`` folders in Hugging Face's layout, each with a
manifest. The folder ``.unfinished`` beside them holds whatever is being written or removed; what
an interrupted run left there is removed when the next one starts.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher import run_dir
from launcher.errors import JobFailedError, RunDirError
from launcher.failure_kind import FailureKind
from launcher.run_checkpoints import MANIFEST, UNFINISHED, newest_checkpoint
from launcher.strategy import Precision, Strategy
from launcher.units import MIB, format_bytes

SCHEMA_VERSION = 1
HASHED_BYTES = 32 * MIB
"""Hashed at a file's beginning and end, where headers and torch's directory of tensors are; all
of most LoRA checkpoints, while the terabytes of a large model need not be read twice."""

_NAME = re.compile(r"checkpoint-(\d+)")


class SaveFailedError(JobFailedError):
    """A checkpoint could not be written; earlier ones are whole."""

    kind = FailureKind.storage


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What the form of the optimizer states on disk depends on.

    States of the same layout are loaded as they are; others are converted first.
    """

    world_size: int
    zero_stage: int
    optimizer: str
    precision: str
    grad_accum_dtype: str | None
    offload_optimizer: str
    sub_group_size: int | None
    """Elements of ZeRO-3's sub-groups; ``None`` at other stages."""
    round_robin_gradients: bool


def layout_of(
    strategy: Strategy, precision: Precision, ds_config: Mapping[str, Any], *, world_size: int
) -> Layout:
    """Return the layout that a run of this configuration writes."""
    zero = ds_config["zero_optimization"]
    dtype = ds_config.get("data_types", {}).get("grad_accum_dtype")
    return Layout(
        world_size=world_size,
        zero_stage=zero["stage"],
        optimizer=strategy.optimizer.value,
        precision=precision.value,
        grad_accum_dtype=dtype,
        offload_optimizer=strategy.offload_optimizer.value,
        sub_group_size=zero.get("sub_group_size") if zero["stage"] == 3 else None,
        round_robin_gradients=bool(zero.get("round_robin_gradients", False)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    step: int
    layout: Layout
    parameter_groups: tuple[tuple[str, ...], ...]
    """Names of the trained parameters in the optimizer's order."""


def staging_folder(checkpoints: Path) -> Path:
    """Return the folder in which a checkpoint is written before it has its name."""
    return checkpoints / UNFINISHED


def clear_unfinished(checkpoints: Path) -> None:
    """Remove what an interrupted run left half written or half removed."""
    shutil.rmtree(staging_folder(checkpoints), ignore_errors=True)


def sync_files(folder: Path) -> None:
    """Force this host's writes to every file below ``folder`` to the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _sync(path)
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            _sync(path)


def complete(
    staged: Path,
    target: Path,
    *,
    step: int,
    layout: Layout,
    parameter_groups: tuple[tuple[str, ...], ...],
) -> None:
    """Give a staged checkpoint its manifest and then its name.

    Every file must be on the disk already (:func:`sync_files`, on every host).

    Raises:
        OSError: the manifest cannot be written or the folder not renamed.
    """
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "step": step,
        "layout": asdict(layout),
        "parameter_groups": [list(group) for group in parameter_groups],
        "files": {str(path.relative_to(staged)): _fingerprint(path) for path in _files(staged)},
    }
    run_dir.write_json(staged / MANIFEST, manifest)
    _sync(staged)
    if target.exists():  # broken, or it would not be written again
        remove(target)
    staged.rename(target)
    with contextlib.suppress(OSError):
        staged.parent.rmdir()  # unless it holds something else
    _sync(target.parent)


def remove(path: Path) -> None:
    """Remove a checkpoint so that no moment shows half of it."""
    unfinished = staging_folder(path.parent)
    unfinished.mkdir(exist_ok=True)
    doomed = unfinished / f"removed-{path.name}"
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
    with contextlib.suppress(OSError):
        unfinished.rmdir()


def prune(checkpoints: Path, *, keep: int | None) -> None:
    """Remove all but the ``keep`` newest checkpoints; ``None`` keeps all."""
    if keep is None:
        return
    for path in _newest_first(checkpoints)[keep:]:
        remove(path)


def find_newest(checkpoints: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest complete checkpoint, and a line for each newer one that is not.

    Returns:
        ``None`` where there is none that can be used.
    """
    skipped: list[str] = []
    for path in _newest_first(checkpoints):
        try:
            return read_checkpoint(path), skipped
        except RunDirError as error:
            skipped.append(f"skipped {path.name}: {error.problem}")
    return None, skipped


def read_checkpoint(path: Path) -> Checkpoint:
    """Return a checkpoint after holding every file of it against the manifest.

    Raises:
        RunDirError: a file is missing, truncated or changed, or there is no manifest.
    """
    fix = "continue from an earlier checkpoint"
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        found = Checkpoint(
            path=path,
            step=manifest["step"],
            layout=Layout(**manifest["layout"]),
            parameter_groups=tuple(tuple(group) for group in manifest["parameter_groups"]),
        )
    except FileNotFoundError:
        raise RunDirError("it was never finished", where=str(path), fix=fix) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"its {MANIFEST} cannot be read: {type(error).__name__}: {error}"
        raise RunDirError(problem, where=str(path), fix=fix) from None
    for name, expected in files.items():
        try:
            is_same = _fingerprint(path / name) == expected
        except OSError as error:
            problem = f"{name} cannot be read: {error.strerror}"
            raise RunDirError(problem, where=str(path), fix=fix) from None
        if not is_same:
            actual_bytes = (path / name).stat().st_size
            problem = f"{name} is not what was saved"
            if actual_bytes != expected["bytes"]:
                problem = f"{name} has {actual_bytes:,} of {expected['bytes']:,} bytes"
            raise RunDirError(problem, where=str(path), fix=fix)
    return found


_FIX_FULL = "free some disk space or lower optim.save_total_limit"
_REASONS = {
    errno.EDQUOT: ("the disk quota is used up", _FIX_FULL),
    errno.ENOSPC: ("the disk is full", _FIX_FULL),
    errno.EROFS: ("the file system is read-only", "have it mounted for writing again"),
    errno.ENOENT: ("the folder has vanished", "bring it back, or mount its file system again"),
    errno.ESTALE: ("the file server has lost the folder", "mount its file system again"),
    errno.EIO: ("the disk or its server failed", "look at the system's log"),
}


def save_failure(
    error: BaseException, checkpoints: Path, *, last: Path | None = None
) -> SaveFailedError:
    """Return what to tell the user when a checkpoint, or another file of a run, was not written.

    Args:
        error: what a writer raised: an OSError, or torch's and safetensors' own words for one.
        checkpoints: the folder of all checkpoints.
        last: the newest complete checkpoint that is known; it may not be in sight now.
    """
    number = error.errno if isinstance(error, OSError) else None
    # torch says where in its file it was, safetensors what the system said.
    reason = (error.strerror or str(error)) if isinstance(error, OSError) else "a write failed"
    fix = "look at the file system"
    free = ""
    with contextlib.suppress(OSError):  # the folder may have vanished
        free_bytes = run_dir.free_bytes(checkpoints)
        free = f" ({format_bytes(free_bytes)} free)"
        if number is None and free_bytes < run_dir.PROBE_BYTES:
            number = errno.ENOSPC
    if number in _REASONS:
        reason, fix = _REASONS[number]
    last = newest_checkpoint(checkpoints.parent) or last
    kept = f"nothing is lost up to {last}" if last else "no earlier checkpoint was complete"
    return SaveFailedError(
        f"the run could not be saved: {reason}{free}; {kept}",
        where=str(checkpoints),
        fix=f"{fix}, then `zerofit resume` the run",
    )


def check_is_same_folder(checkpoints: Path, inode: int) -> None:
    """Raise OSError when another folder has taken the place of one: an unmounted disk's, say.

    Whoever writes a checkpoint makes missing folders, and would fill the disk below.
    """
    if checkpoints.stat().st_ino != inode:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(checkpoints))


def storage_failure(error: BaseException, folder: Path) -> SaveFailedError | None:
    """Return the error for a file of the run that could not be written; ``None`` for any other.

    Args:
        error: what ended a rank.
        folder: the run directory.
    """
    if not isinstance(error, OSError) or error.errno not in _REASONS:
        return None
    is_below = error.filename is not None and str(folder) in str(error.filename)
    if error.errno == errno.ENOENT and not (is_below and not (folder / run_dir.RECIPE).exists()):
        return None  # some other file is missing
    return save_failure(error, folder / run_dir.CHECKPOINTS)


def is_write_failure(error: BaseException) -> bool:
    """Return whether an error of a writer means that the disk did not take the data.

    Source: torch 2.13 ``caffe2/serialize/inline_container.cc`` ("file write failed",
    "failed writing"); safetensors 0.8 raises SafetensorError with "I/O error".
    """
    text = str(error)
    words = ("file write failed", "failed writing", "unexpected pos", "I/O error", "IoError")
    return isinstance(error, OSError) or any(word in text for word in words)


def _newest_first(checkpoints: Path) -> list[Path]:
    if not checkpoints.is_dir():
        return []
    steps = {
        path: int(match.group(1))
        for path in checkpoints.iterdir()
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    }
    return sorted(steps, key=lambda path: steps[path], reverse=True)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _fingerprint(path: Path) -> dict[str, int | str]:
    """Return a file's size and the SHA-256 of its first and last ``HASHED_BYTES``."""
    size_bytes = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        digest.update(stream.read(HASHED_BYTES))
        if size_bytes > HASHED_BYTES:
            stream.seek(max(HASHED_BYTES, size_bytes - HASHED_BYTES))
            digest.update(stream.read())
    return {"bytes": size_bytes, "sha256": digest.hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
