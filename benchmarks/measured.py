"""The runs of results/*.jsonl, each with what is predicted for it today.

What accuracy.py tabulates and safety_margin.py takes the planner's margin from.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.bench.result import FINISHED, Result, parse_results
from launcher.hardware import default_cluster, find_gpu, match_device_name
from launcher.model_source import resolve_model
from launcher.planning.plan import strategy_from_json
from launcher.predict.memory import estimate_memory
from launcher.predict.step_time import estimate_time
from launcher.resolve import resolve_workload
from launcher.strategy import Method, Optimizer, Precision, Strategy
from launcher.workload import Workload

RESULTS = sorted((Path(__file__).resolve().parent / "results").glob("*.jsonl"))
FITTED = "h100"
"""The only file that constants were fitted to."""
OUTDATED = {
    ("h200x2", "7b-qlora-z3-2048-gc"),
    ("h200x2", "8b-qlora-z3-4096-gc-liger"),
    ("h100", "1b-full-z2-1024-fp32"),
}
"""Files and cases that today's predictions cannot be of. When these were made, the worker held
gathered 4-bit weights until the step was over, and did not yet copy grouped heads where
FlashAttention does not run."""
_FROZEN_STAY = "2026-11-23T04:14"
"""Since then saving adapters under ZeRO-3 gathers no frozen weights: what saving took before, up
to a whole embedding more, today's predictions cannot be of."""
HALVES = ("fit", "held out", "blind")
QUANTITIES = {
    "peak_allocated_bytes": "allocated",
    "peak_reserved_bytes": "reserved",
    "device_used_bytes": "in use",
    "step_seconds": "step",
    "step_seconds_of_host": "step, host measured",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured run; values are (predicted, measured) by quantity."""

    case: str
    half: str
    """``fit``, ``held out`` or ``blind``."""
    is_outdated: bool = False
    """Made by a worker that has since changed, see ``OUTDATED``."""
    is_planned: bool = False
    """Whether the planner chooses such settings by itself."""
    values: dict[str, tuple[float, float]]
    """``step_seconds_of_host`` is predicted with the host's speed as the run measured it when it
    started; only runs that did have it."""
    phases: dict[str, tuple[int, int]]

    @property
    def is_held_out(self) -> bool:
        """Whether no constant was fitted to it."""
        return self.half != "fit"

    def error(self, quantity: str) -> float | None:
        """Return (predicted - measured) / measured, ``None`` where nothing was measured."""
        if quantity not in self.values:
            return None
        predicted, measured = self.values[quantity]
        return (predicted - measured) / measured


@functools.cache
def read_rows(path: Path) -> tuple[Row, ...]:
    """Return every finished run of a file with the prediction of today."""
    rows = []
    for position, result in enumerate(finished_runs(path)):
        half = ("fit", "held out")[position % 2] if path.stem == FITTED else "blind"
        rows.append(_row(result, half=half, is_outdated=(path.stem, result.case) in OUTDATED))
    return tuple(rows)


def finished_runs(path: Path) -> list[Result]:
    """Return the results of the runs that reached their end."""
    results = parse_results(path.read_text(encoding="utf-8"), source=str(path))
    return [result for result in results if result.state == FINISHED]


def recorded_row(run: Mapping[str, Any]) -> Row:
    """Return a run with the prediction that was recorded before it was made."""
    predicted, fullest = run["predicted"], _fullest(run)
    return Row(
        case=run["case"],
        half="blind",
        values={
            key: (predicted[key], fullest[key])
            for key in QUANTITIES
            if key in predicted and fullest[key]
        },
        phases={
            name: (size, fullest["phases"][name])
            for name, size in predicted["phases"].items()
            if fullest["phases"].get(name)
        },
    )


def _fullest(run: Mapping[str, Any]) -> dict[str, Any]:
    ranks: list[dict[str, Any]] = run["measured"]
    return max(ranks, key=lambda rank: int(rank["peak_allocated_bytes"]))


def _row(result: Result, *, half: str, is_outdated: bool) -> Row:
    run, recipe = result.content, result.recipe
    model, _ = resolve_model(recipe.model.name_or_path)
    name = match_device_name(run["device_name"])
    gpu = find_gpu(name or run["device_name"])
    cluster = default_cluster(gpu, gpus_per_node=len(run["measured"]))
    workload = resolve_workload(recipe, model, gpu, source=run["case"])
    strategy = strategy_from_json(run["predicted"]["strategy"])
    memory = estimate_memory(workload, strategy, cluster)
    time = estimate_time(workload, strategy, cluster)
    fullest = dict(_fullest(run))
    gathered_frozen = (
        strategy.zero_stage == 3
        and recipe.method is not Method.full
        and run.get("planned_at", "") < _FROZEN_STAY
    )
    guesses = {
        "peak_allocated_bytes": memory.peak_allocated_bytes,
        "peak_reserved_bytes": memory.peak_reserved_bytes,
        "device_used_bytes": memory.device_used_bytes,
        "step_seconds": time.step_seconds,
    }
    # Ranks wait for each other: the slowest host counts.
    hosts = [rank.get("host_autograd_op_seconds") for rank in run["measured"]]
    if slowest := max(filter(None, hosts), default=None):
        known = replace(cluster, host_autograd_op_seconds=slowest)
        guesses["step_seconds_of_host"] = estimate_time(workload, strategy, known).step_seconds
        fullest["step_seconds_of_host"] = fullest["step_seconds"]
    return Row(
        case=run["case"],
        half=half,
        is_outdated=is_outdated,
        is_planned=_is_planned(workload, strategy),
        values={key: (guess, fullest[key]) for key, guess in guesses.items() if fullest[key]},
        phases={
            phase.phase: (phase.allocated_bytes, fullest["phases"][phase.phase])
            for phase in memory.phases
            if fullest["phases"].get(phase.phase)
            and not (phase.phase == "save" and gathered_frozen)
        },
    )


def _is_planned(workload: Workload, strategy: Strategy) -> bool:
    """Return whether the planner would choose such settings without being told to.

    It takes torch's fused AdamW, 16 bits on a GPU and gradients accumulated in them, ZeRO 1 to 3,
    and 4-bit storage for QLoRA; what a recipe asks for beyond that is the user's own risk.
    """
    return (
        strategy.optimizer is Optimizer.adamw
        and strategy.grad_accum_dtype is None
        and strategy.zero_stage > 0
        and workload.precision is not Precision.fp32
        and not (workload.method is Method.qlora and workload.quantization.kind == "int8")
    )
