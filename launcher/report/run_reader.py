"""Read a run directory in whatever state it is, for the report."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher import run_dir
from launcher.peaks import RankPeaks, peaks_from_json
from launcher.planning import plan
from launcher.report.prediction import MAX_WORLD_SIZE
from launcher.report.run_report import RunFiles

_RANK_FILE = re.compile(r"(\d+)\.json")
_MAX_PROBLEMS_OF_A_KIND = 5


def load_run(directory: Path) -> RunFiles:
    """Read what is there; a file that cannot be read becomes a sentence in ``problems``.

    The run may be going on: files are replaced atomically by their writers, and a log line
    that is still being written is left for the next time.

    Raises:
        RunDirError: there is no such directory, or no run was ever written to it.
    """
    run_dir.check_is_run(directory)
    problems: list[str] = []
    plan_json = _read_mapping(directory / run_dir.PLAN, problems)
    if plan_json is None and not (directory / run_dir.PLAN).exists():
        problems.append(f"{run_dir.PLAN} is missing: nothing can be compared with a prediction.")
    if plan_json is not None and plan_json.get("schema_version") != plan.SCHEMA_VERSION:
        problems.append(
            f"{run_dir.PLAN} has schema_version {plan_json.get('schema_version')!r}, this zerofit "
            f"reads {plan.SCHEMA_VERSION}: only the keys that are still known are shown."
        )
    return RunFiles(
        name=directory.resolve().name,
        plan=plan_json,
        status=_read_mapping(directory / run_dir.STATUS, problems),
        results=_read_mapping(directory / run_dir.RESULTS, problems),
        ranks=_read_ranks(directory / run_dir.RANKS, problems),
        log=_read_log(directory / run_dir.TRAINER_LOG, problems),
        problems=tuple(problems),
    )


def _read_mapping(path: Path, problems: list[str]) -> Mapping[str, Any] | None:
    """Return a JSON object, ``None`` when the file is missing or unreadable."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name} cannot be read and was left out: {_reason(error)}.")
        return None
    if not isinstance(value, dict):
        problems.append(f"{path.name} holds no JSON object and was left out.")
        return None
    return value


def _read_ranks(folder: Path, problems: list[str]) -> tuple[RankPeaks, ...]:
    found: list[RankPeaks] = []
    bad: list[str] = []
    try:
        paths = sorted(path for path in folder.iterdir() if _RANK_FILE.fullmatch(path.name))
    except OSError:
        return ()
    for path in paths:
        try:
            peaks = peaks_from_json(json.loads(path.read_text(encoding="utf-8")))
            _check(peaks)
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            bad.append(f"{run_dir.RANKS}/{path.name} was left out: {_reason(error)}.")
            continue
        if peaks.rank != int(path.stem):
            bad.append(f"{run_dir.RANKS}/{path.name} was left out: it is of rank {peaks.rank}.")
            continue
        found.append(peaks)
    problems += bad[:_MAX_PROBLEMS_OF_A_KIND]
    if len(bad) > _MAX_PROBLEMS_OF_A_KIND:
        problems.append(f"{len(bad) - _MAX_PROBLEMS_OF_A_KIND} more rank files were left out.")
    world_sizes = sorted({peaks.world_size for peaks in found})
    if len(world_sizes) > 1:
        problems.append(
            f"The rank files name different world sizes ({', '.join(map(str, world_sizes))}): "
            "some are left from another run."
        )
    return tuple(found)


_NUMBERS = ("rank", "world_size", "steps_done", "tokens_per_step", "allocator_retries",
            "allocator_ooms")  # fmt: skip
_MAYBE_NUMBERS = ("first_step_at",)
_PHASE = ("peak_allocated_bytes", "peak_reserved_bytes", "host_rss_bytes", "count", "seconds")
_MAYBE_PHASE = ("device_used_bytes", "peak_active_bytes", "host_pinned_bytes",
                "gpu_utilisation_fraction", "power_watts")  # fmt: skip
_STEP, _MAYBE_STEP = ("allocated_bytes", "reserved_bytes"), ("active_bytes",)


def _check(peaks: RankPeaks) -> None:
    """Raise ValueError unless every number of a rank's file is one: JSON has no types to trust."""
    _check_fields(peaks, _NUMBERS, _MAYBE_NUMBERS)
    for name, phase in peaks.phases.items():
        _check_fields(phase, _PHASE, _MAYBE_PHASE, prefix=f"{name}.")
        for step in (phase.first_step, phase.steady_state):
            if step is not None:
                _check_fields(step, _STEP, _MAYBE_STEP, prefix=f"{name}.")
    for index, seconds in enumerate(peaks.step_seconds):
        if not _is_number(seconds):
            raise ValueError(f"step_seconds[{index}] is {seconds!r}, which is no time")
    if peaks.world_size > MAX_WORLD_SIZE:
        raise ValueError(f"world_size is {peaks.world_size}")
    texts: list[object] = [peaks.host, peaks.device, peaks.device_name, peaks.state]
    if failure := peaks.failure:
        texts += [failure.phase, failure.type, failure.message, failure.traceback]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{text!r} stands where a text belongs")


def _check_fields(
    item: object, names: tuple[str, ...], maybe_names: tuple[str, ...], *, prefix: str = ""
) -> None:
    for name in names:
        if not _is_number(value := getattr(item, name)):
            raise ValueError(f"{prefix}{name} is {value!r}, which is no size, count or time")
    for name in maybe_names:
        value = getattr(item, name)
        if value is not None and not _is_number(value):
            raise ValueError(f"{prefix}{name} is {value!r}, which is no size, count or time")


def _is_number(value: object) -> bool:
    return (type(value) is int or type(value) is float) and 0 <= value < 1e18


def _read_log(path: Path, problems: list[str]) -> tuple[Mapping[str, Any], ...]:
    """Return the log's lines; a last one without its newline is still being written."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ()
    except OSError as error:
        problems.append(f"{path.name} cannot be read and was left out: {_reason(error)}.")
        return ()
    lines: list[Mapping[str, Any]] = []
    bad: list[int] = []
    whole = text if text.endswith("\n") else text.rpartition("\n")[0]
    for number, line in enumerate(whole.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            lines.append(value)
        else:
            bad.append(number)
    if bad:
        shown = ", ".join(map(str, bad[:_MAX_PROBLEMS_OF_A_KIND]))
        more = ", …" if len(bad) > _MAX_PROBLEMS_OF_A_KIND else ""
        problems.append(f"{path.name}: line {shown}{more} cannot be read and was left out.")
    return tuple(lines)


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"broken or half-written JSON (line {error.lineno}: {error.msg})"
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(error)[:300] or type(error).__name__
