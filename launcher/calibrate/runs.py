"""Measured runs as the fit needs them, from run directories and results of ``zerofit bench``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from launcher import run_dir as rd
from launcher.bench.result import FINISHED, measurement_of, parse_results
from launcher.errors import LauncherError, RunDirError
from launcher.hardware import ClusterSpec, default_cluster, find_gpu, match_device_name
from launcher.model_source import resolve_model
from launcher.planning.plan import strategy_from_json
from launcher.recipe import parse_recipe
from launcher.resolve import resolve_workload
from launcher.strategy import Strategy
from launcher.workload import Workload

_TOKENS_TOLERANCE = 0.02
"""A step whose batches held fewer tokens than planned tells nothing about its predicted time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRun:
    """One finished run on GPUs."""

    name: str
    workload: Workload
    strategy: Strategy
    cluster: ClusterSpec
    """Without constants of a site."""
    measured: Mapping[str, float]
    """Of the fullest rank, by the predictor's name; host memory of the fullest node."""


def read_runs(paths: Sequence[Path]) -> tuple[tuple[MeasuredRun, ...], tuple[str, ...]]:
    """Return the runs that can be used, and why others cannot, a sentence each.

    Args:
        paths: run directories, folders of them, and ``.jsonl`` files of ``zerofit bench``.

    Raises:
        RunDirError: a path is none of these.
    """
    runs, problems = [], []
    for name, content in _contents(paths):
        if isinstance(content, str):
            problems.append(f"{name}: {content}")
            continue
        try:
            runs.append(_run(name, content))
        except LauncherError as error:
            problems.append(f"{name}: {error.problem}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            # Written by another version, or by hand.
            problems.append(f"{name}: {type(error).__name__} {error}")
    return tuple(runs), tuple(problems)


def _contents(paths: Sequence[Path]) -> Iterable[tuple[str, Mapping[str, Any] | str]]:
    """Yield each run's line of a results file, or why it is of no use."""
    for path in paths:
        if path.is_file():
            for result in parse_results(rd.read_text(path), source=str(path)):
                useful = result.state == FINISHED
                yield result.case, result.content if useful else f"it is {result.state}"
            continue
        found = [path] if (path / rd.RECIPE).is_file() else sorted(_runs_in(path))
        if not found:
            raise RunDirError(
                "there is no run",
                where=str(path),
                fix="name run directories, folders of them, or .jsonl files of zerofit bench",
            )
        for folder in found:
            try:
                yield folder.name, _of_run_dir(folder)
            except (LauncherError, KeyError, TypeError) as error:
                yield folder.name, error.problem if isinstance(error, LauncherError) else str(error)


def _runs_in(folder: Path) -> list[Path]:
    return [path.parent for depth in ("*/", "*/*/") for path in folder.glob(depth + rd.RECIPE)]


def _of_run_dir(folder: Path) -> Mapping[str, Any] | str:
    """Return what ``zerofit bench`` would have written about a run."""
    state = rd.read_status(folder).state
    if state != "finished":
        return f"it is {state}"
    ranks = rd.read_ranks(folder)
    plan = rd.read_json(folder / rd.PLAN)
    recipe = yaml.safe_load(rd.read_text(folder / rd.RECIPE))
    if not ranks or not isinstance(recipe, dict):
        return "its files are incomplete"
    # A plan is for the longest sequence that the data has.
    return {
        "recipe": {**recipe, "max_seq_len": plan["max_seq_len"]},
        "predicted": {"strategy": plan["strategy"]},
        "device_name": ranks[0].device_name,
        "measured": [measurement_of(rank) for rank in ranks],
    }


def _run(name: str, content: Mapping[str, Any]) -> MeasuredRun:
    recipe = parse_recipe(yaml.safe_dump(dict(content["recipe"])), source=name)
    device_name = str(content["device_name"])
    gpu_name = match_device_name(device_name)
    if gpu_name is None:
        raise RunDirError(
            f"no GPU of the table is called {device_name!r}", where=name, fix="leave it out"
        )
    gpu = find_gpu(gpu_name)
    ranks: list[Mapping[str, Any]] = content["measured"]
    if not ranks:
        raise RunDirError("no rank measured anything", where=name, fix="leave it out")
    hosts = {rank.get("host") for rank in ranks}
    cluster = default_cluster(
        gpu, num_nodes=len(hosts), gpus_per_node=max(1, len(ranks) // len(hosts))
    )
    strategy = strategy_from_json(content["predicted"]["strategy"])
    model, _ = resolve_model(recipe.model.name_or_path)
    workload = replace(
        resolve_workload(recipe, model, gpu, source=name),
        has_padding=recipe.data.packing,
    )
    return MeasuredRun(
        name=name,
        workload=workload,
        strategy=strategy,
        cluster=cluster,
        measured=_measured(ranks, workload, strategy),
    )


def _measured(
    ranks: Sequence[Mapping[str, Any]], workload: Workload, strategy: Strategy
) -> dict[str, float]:
    fullest = max(ranks, key=lambda rank: int(rank["peak_allocated_bytes"]))
    names = ("peak_allocated_bytes", "peak_reserved_bytes", "device_used_bytes")
    found = {name: float(fullest[name]) for name in names if fullest.get(name)}
    by_host: dict[Any, float] = {}
    for rank in ranks:
        by_host[rank.get("host")] = by_host.get(rank.get("host"), 0.0) + rank["host_rss_bytes"]
    found["host_bytes_per_node"] = max(by_host.values())
    planned = (
        workload.max_seq_len
        * strategy.micro_batch_size_per_gpu
        * strategy.gradient_accumulation_steps
    )
    tokens = fullest.get("tokens_per_step") or planned
    if fullest.get("step_seconds") and tokens >= (1 - _TOKENS_TOLERANCE) * planned:
        found["step_seconds"] = float(fullest["step_seconds"])
    return {name: value for name, value in found.items() if value > 0}
