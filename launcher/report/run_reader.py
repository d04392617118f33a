"""Read a run directory in whatever state it is, for the report."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher import run_dir
from launcher.peaks import RankPeaks, peaks_from_text
from launcher.planning import plan
from launcher.report.attempts_reader import read_attempts, read_memory_at_failure
from launcher.report.check_rank import check_rank
from launcher.report.run_extras import (
    read_lengths,
    read_recipe,
    read_timelines,
)
from launcher.report.run_report import Observation, RunFiles

_RANK_FILE = re.compile(r"(\d+)\.json")
_MAX_PROBLEMS_OF_A_KIND = 5


def load_run(directory: Path, *, observation: Observation | None = None) -> RunFiles:
    """Read what is there; a file that cannot be read becomes a sentence in ``problems``.

    The run may be going on: files are replaced atomically by their writers, and a log line
    that is still being written is left for the next time.

    Args:
        directory: of the run.
        observation: what is known of the run from elsewhere, if somebody asked.

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
    ranks = _read_ranks(directory / run_dir.RANKS, problems)
    return RunFiles(
        name=directory.resolve().name,
        plan=plan_json,
        status=_read_mapping(directory / run_dir.STATUS, problems),
        results=_read_mapping(directory / run_dir.RESULTS, problems),
        ranks=ranks,
        log=_read_log(directory / run_dir.TRAINER_LOG, problems),
        timelines=read_timelines(directory, ranks, problems),
        lengths=read_lengths(directory),
        attempts=read_attempts(directory),
        memory_at_failure=read_memory_at_failure(directory, ranks),
        recipe=read_recipe(directory / run_dir.RECIPE),
        observation=observation,
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
        names = sorted(name for name in os.listdir(folder) if _RANK_FILE.fullmatch(name))  # noqa: PTH208
    except OSError:
        return ()
    for name in names:
        try:
            # Not pathlib: for thousands of files it takes longer than JSON.
            with open(os.path.join(folder, name), "rb", buffering=0) as stream:  # noqa: PTH118, PTH123
                peaks = peaks_from_text(stream.read())
            check_rank(peaks)
        except (OSError, ValueError) as error:
            bad.append(f"{run_dir.RANKS}/{name} was left out: {_reason(error)}.")
            continue
        if peaks.rank != int(name.removesuffix(".json")):
            bad.append(f"{run_dir.RANKS}/{name} was left out: it is of rank {peaks.rank}.")
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
