"""Names of the files in a run directory; making one, atomic writes, strict reads."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from launcher.errors import RunDirError
from launcher.peaks import SCHEMA_VERSION as PEAKS_SCHEMA_VERSION
from launcher.peaks import RankPeaks, peaks_from_json
from launcher.units import format_bytes

RECIPE = "recipe.yaml"
PLAN = "plan.json"
DS_CONFIG = "ds_config.json"
ENVIRONMENT = "environment.json"
JOB_SCRIPT = "job.sh"
HOSTFILE = "hostfile"
STATUS = "status.json"
"""State of the run, read by :func:`read_status`; who wrote it last wins."""
JOB = "job.json"
"""Which backend runs it and what it takes to find or cancel it."""
CANCEL = "cancel"
"""Exists when somebody has asked for the end of the run."""
TRAINER_LOG = "trainer_log.jsonl"
"""One JSON object a line from rank 0, with the keys that transformers logs."""
RESULTS = "results.json"
"""Held-out loss before and after, sample answers, tokens seen: rank 0, at the end."""
RANKS = "ranks"
TIMELINES = "timeline"
"""Folder with each rank's memory over time; its files are named as in ``ranks``."""
LOGS = "logs"
LAUNCHER_LOG = "logs/launcher.log"
"""Everything that the job printed: launcher and all ranks."""
CHECKPOINTS = "checkpoints"
MODEL_CONFIG = "model_config"
"""Folder with a config.json, when the run starts from random weights."""
EXPORT = "export"
REPORT_JSON = "report.json"
REPORT_MARKDOWN = "report.md"
REPORT_HTML = "report.html"
LOSS_PNG = "loss.png"

STATUS_SCHEMA_VERSION = 1
PROBE_BYTES = 2**20
"""Written, synced and removed before a run: configuration, logs and peaks need about this much."""

RunState = Literal["created", "running", "finished", "failed", "interrupted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """What ``status.json`` says; ``changed_at`` is UTC in ISO 8601."""

    state: RunState
    changed_at: str
    reason: str | None = None


def rank_file(run_dir: Path, rank: int) -> Path:
    """Return where a rank writes its peaks: ``ranks/00003.json``."""
    return run_dir / RANKS / f"{rank:05d}.json"


def check_is_run(run_dir: Path) -> None:
    """Raise RunDirError unless a run was written to the folder."""
    if not run_dir.is_dir():
        raise RunDirError(
            "this is not a folder" if run_dir.exists() else "there is no such run directory",
            where=str(run_dir),
            fix="name the folder that `zerofit train` printed",
        )
    names = (RECIPE, PLAN, STATUS, RANKS)
    if not any((run_dir / name).exists() for name in names):
        raise RunDirError(
            "this is not a run directory: it has none of " + ", ".join(names),
            where=str(run_dir),
            fix="name the folder that `zerofit train` printed",
        )


def default_name(model: str, method: str, when: datetime) -> str:
    """Return ``<model>-<method>-<timestamp>``, with letters that are safe in any path."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", model.rstrip("/").rsplit("/", 1)[-1]).strip("-.")
    return f"{stem or 'model'}-{method}-{when:%Y%m%d-%H%M%S}"


def create(run_dir: Path, *, needed_bytes: int = 0) -> Path:
    """Make a run directory and prove that it can be written; return its absolute path.

    Args:
        run_dir: where; parents are made, an existing folder must be empty.
        needed_bytes: free disk space that the run will need, checkpoints included.

    Raises:
        RunDirError: it exists and is not empty, is not a folder, cannot be written, or the
            disk is full. Folders that were made here are removed again.
    """
    run_dir = _absolute(run_dir)
    made = _make_folders(run_dir)
    try:
        if any(run_dir.iterdir()):
            raise RunDirError(
                "the run directory exists and is not empty",
                where=str(run_dir),
                fix="choose another folder; a run never overwrites an earlier one",
            )
        prove_writable(run_dir, needed_bytes)
        for folder in (RANKS, LOGS):
            (run_dir / folder).mkdir()
            made.append(run_dir / folder)
        write_status(run_dir, "created")
    except (OSError, RunDirError) as error:
        for path in reversed(made):
            with contextlib.suppress(OSError):
                path.rmdir()
        if isinstance(error, OSError):
            raise _cannot(run_dir, error) from None
        raise
    return run_dir


def create_default(
    parent: Path, *, model: str, method: str, when: datetime, needed_bytes: int = 0
) -> Path:
    """Make ``parent/<model>-<method>-<timestamp>``; a number is added if the name is taken.

    Raises:
        RunDirError: as :func:`create`.
    """
    name = default_name(model, method, when)
    for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
        candidate = _absolute(parent / f"{name}{suffix}")
        if not candidate.exists():
            return create(candidate, needed_bytes=needed_bytes)
    raise RunDirError(
        "a thousand runs of this second exist", where=str(parent / name), fix="name the folder"
    )


def create_folder(folder: Path) -> Path:
    """Make a folder that will hold several runs; return its absolute path.

    Raises:
        RunDirError: it exists and is not empty, or cannot be made.
    """
    folder = _absolute(folder)
    _make_folders(folder)
    if any(folder.iterdir()):
        raise RunDirError(
            "the folder exists and is not empty", where=str(folder), fix="choose another folder"
        )
    return folder


def create_file(path: Path, text: str) -> None:
    """Write a new file; parents are made.

    Raises:
        RunDirError: it exists, or cannot be written.
    """
    path = _absolute(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise RunDirError(
            "the file exists already", where=str(path), fix="choose another name, or remove it"
        ) from None
    except OSError as error:
        raise _cannot(path, error) from None


def write_text(path: Path, text: str) -> None:
    """Replace a file so that a reader sees the old or the new text, never half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError:
        # A full disk must not also leave half a temporary file behind.
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, with sorted keys left as given and a final newline."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_text(path: Path) -> str:
    """Read a file of a run.

    Raises:
        RunDirError: it is missing, unreadable or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RunDirError(
            f"there is no {path.name}",
            where=str(path.parent),
            fix="check the path; a run that stopped early, or was never started, lacks it",
        ) from None
    except UnicodeDecodeError:
        raise RunDirError(
            "this is not a text file", where=str(path), fix="it was not written by zerofit"
        ) from None
    except OSError as error:
        raise _cannot(path, error, verb="read") from None


def read_json(path: Path) -> Any:
    """Read a JSON file of a run.

    Raises:
        RunDirError: it is missing or broken.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise RunDirError(
            f"this is not JSON (line {error.lineno}: {error.msg}), perhaps half a file",
            where=str(path),
            fix="start the run again in a new folder",
        ) from None


def read_mapping(path: Path, *, schema_version: int) -> dict[str, Any]:
    """Read a JSON object of one schema version; the version itself is left out.

    Raises:
        RunDirError: it is missing, broken, no object, or of another version.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise RunDirError("this is not a JSON object", where=str(path), fix="check the path")
    if value.get("schema_version") != schema_version:
        raise RunDirError(
            f"schema_version is {value.get('schema_version')!r}, this zerofit reads "
            f"{schema_version}",
            where=str(path),
            fix="read it with the zerofit that wrote it",
        )
    return {key: item for key, item in value.items() if key != "schema_version"}


def write_status(run_dir: Path, state: RunState, *, reason: str | None = None) -> None:
    """Record the state of the run, now; ``reason`` is one sentence for people."""
    changed_at = datetime.now(UTC).isoformat(timespec="milliseconds")
    content: dict[str, Any] = {
        "schema_version": STATUS_SCHEMA_VERSION,
        "state": state,
        "changed_at": changed_at,
    }
    content |= {"reason": reason} if reason else {}
    try:
        write_json(run_dir / STATUS, content)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        # That the disk is full should still be recorded: the old file's own block has room.
        with (run_dir / STATUS).open("r+", encoding="utf-8") as stream:
            stream.write(json.dumps(content) + "\n")
            stream.truncate()


def read_status(run_dir: Path) -> RunStatus:
    """Read the state of a run.

    Raises:
        RunDirError: not a run directory, a broken file, or one of another version.
    """
    path = run_dir / STATUS
    content = read_mapping(path, schema_version=STATUS_SCHEMA_VERSION)
    if content.get("state") not in get_args(RunState):
        raise RunDirError(
            f"the state {content.get('state')!r} is unknown",
            where=str(path),
            fix=f"it must be one of {', '.join(get_args(RunState))}",
        )
    return RunStatus(
        state=content["state"],
        changed_at=str(content.get("changed_at", "")),
        reason=content.get("reason"),
    )


def read_rank(path: Path) -> RankPeaks:
    """Read one rank's file.

    Raises:
        RunDirError: it is missing, broken or of another version.
    """
    content = read_mapping(path, schema_version=PEAKS_SCHEMA_VERSION)
    try:
        return peaks_from_json({"schema_version": PEAKS_SCHEMA_VERSION, **content})
    except ValueError as error:
        raise RunDirError(
            str(error), where=str(path), fix="read it with the zerofit that wrote it"
        ) from None


def read_ranks(run_dir: Path) -> tuple[RankPeaks, ...]:
    """Read every rank file there is, in the order of ranks; none yet is an empty tuple.

    Raises:
        RunDirError: a file is broken or of another version.
    """
    return tuple(read_rank(path) for path in sorted((run_dir / RANKS).glob("[0-9]*.json")))


def free_bytes(folder: Path) -> int:
    """Return the free space of the disk that a folder is on, for this user."""
    stats = os.statvfs(folder)
    return stats.f_bavail * stats.f_frsize


def _absolute(path: Path) -> Path:
    """Return an absolute path that can stand in generated files."""
    try:
        str(path).encode("utf-8")
        if "\0" in str(path):
            raise ValueError
    except ValueError:  # UnicodeEncodeError is one
        raise RunDirError(
            f"the path {str(path)!r} is not text", where="run directory", fix="rename the folder"
        ) from None
    # abspath keeps symbolic links, expanduser a ~ before a name that no user has.
    return Path(os.path.abspath(os.path.expanduser(path)))  # noqa: PTH100, PTH111


def _make_folders(run_dir: Path) -> list[Path]:
    """Make a folder and its parents; return those that did not exist, outermost first."""
    try:
        missing = [p for p in (*reversed(run_dir.parents), run_dir) if not p.exists()]
        run_dir.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise RunDirError(
            "this is a file, not a folder", where=str(run_dir), fix="choose another folder"
        ) from None
    except OSError as error:
        raise _cannot(run_dir, error) from None
    return missing


def prove_writable(run_dir: Path, needed_bytes: int) -> None:
    """Write and sync a probe file: permissions alone do not tell of quotas or full disks.

    Raises:
        RunDirError: less than ``needed_bytes`` are free.
        OSError: the probe cannot be written.
    """
    probe = run_dir / ".write-probe"
    try:
        with probe.open("wb") as stream:
            stream.write(b"\0" * PROBE_BYTES)
            stream.flush()
            os.fsync(stream.fileno())
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    free = free_bytes(run_dir)
    if free < needed_bytes:
        raise RunDirError(
            f"the disk has {format_bytes(free)} free, the run needs "
            f"{format_bytes(needed_bytes)} for what it saves",
            where=str(run_dir),
            fix="choose a folder on a larger disk, or keep fewer checkpoints "
            "(optim.save_total_limit)",
        )


def _cannot(path: Path, error: OSError, *, verb: str = "write") -> RunDirError:
    fixes = {
        errno.ENOSPC: "free some disk space or choose a folder on another disk",
        errno.EDQUOT: "your disk quota is used up: free some space or choose another disk",
        errno.EROFS: "the file system is read-only: choose another folder",
        errno.EACCES: "ask for the permission or choose another folder",
        errno.EPERM: "ask for the permission or choose another folder",
        errno.ENOTDIR: "a parent of it is a file: choose another folder",
        errno.ENAMETOOLONG: "choose a shorter name",
    }
    return RunDirError(
        f"cannot {verb} here: {error.strerror or error}",
        where=str(path),
        fix=fixes.get(error.errno or 0, "choose another folder"),
    )
