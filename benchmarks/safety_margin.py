"""Print what the measured runs needed beyond their prediction: the planner's safety margin.

    python benchmarks/safety_margin.py

Every finished run of results/*.jsonl is predicted anew with the present formulas. A plan that
may use ``1 - m`` of a device stays within it if ``m`` is at least ``(measured - predicted) /
device``; the largest of these over the runs that count, each on the smallest device that holds
it, is the margin, rounded up to a thousandth. It belongs into ``launcher/planning/safety.py``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launcher.hardware import default_cluster, find_gpu, gpu_names, match_device_name
from launcher.model_source import resolve_model
from launcher.planning.plan import strategy_from_json
from launcher.predict.memory import estimate_memory
from launcher.recipe import parse_recipe
from launcher.resolve import resolve_workload
from launcher.strategy import Method, Optimizer, Precision, Strategy
from launcher.workload import Workload

SMALLEST_DEVICE_BYTES = min(find_gpu(name).memory_bytes for name in gpu_names())
RESULTS = sorted((Path(__file__).resolve().parent / "results").glob("*.jsonl"))
# When these were made, the worker held gathered 4-bit weights until the step was over, and did
# not yet copy grouped heads where FlashAttention does not run.
OUTDATED = {"7b-qlora-z3-2048-gc", "8b-qlora-z3-4096-gc-liger", "1b-full-z2-1024-fp32"}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Device memory of one run: what was predicted and what the driver showed."""

    case: str
    predicted_bytes: int
    measured_bytes: int
    is_planned: bool
    """Whether the planner chooses such settings by itself."""

    @property
    def needed_fraction(self) -> float:
        """Share of a device, just large enough for the run, that had to be left free.

        No device is smaller than the smallest known one: what a run of 5 GiB needed beyond its
        prediction is a share of 15 GiB, not of 5.
        """
        device_bytes = max(self.measured_bytes, SMALLEST_DEVICE_BYTES)
        return (self.measured_bytes - self.predicted_bytes) / device_bytes


def comparisons() -> Iterator[Comparison]:
    """Yield every finished run, predicted anew."""
    lines = (line for path in RESULTS for line in path.read_text(encoding="utf-8").splitlines())
    for line in lines:
        run = json.loads(line)
        used = [rank["device_used_bytes"] for rank in run["measured"] if rank["device_used_bytes"]]
        if run["state"] != "finished" or not used or run["case"] in OUTDATED:
            continue
        gpu = find_gpu(match_device_name(run["device_name"]) or run["device_name"])
        cluster = default_cluster(gpu, gpus_per_node=len(run["measured"]))
        recipe = parse_recipe(yaml.safe_dump(run["recipe"]), source=run["case"])
        model, _ = resolve_model(recipe.model.name_or_path)
        workload = resolve_workload(recipe, model, cluster.gpu, source=run["case"])
        strategy = _strategy(run["predicted"]["strategy"])
        yield Comparison(
            case=run["case"],
            predicted_bytes=estimate_memory(workload, strategy, cluster).device_used_bytes,
            measured_bytes=max(used),
            is_planned=is_planned(workload, strategy),
        )


def _strategy(content: Mapping[str, Any]) -> Strategy:
    return strategy_from_json(content)


def is_planned(workload: Workload, strategy: Strategy) -> bool:
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


def margin(found: list[Comparison]) -> float:
    """Return the safety margin, rounded up to a thousandth."""
    worst = max(item.needed_fraction for item in found if item.is_planned)
    return math.ceil(1000 * max(0.0, worst)) / 1000


def main() -> None:
    """Print all runs, the worst last, and the margin."""
    found = sorted(comparisons(), key=lambda item: item.needed_fraction)
    for item in found:
        note = "" if item.is_planned else "  (not planned, does not count)"
        print(f"{item.needed_fraction:+7.1%}  {item.case}{note}")
    print(f"\n{len(found)} runs; SAFETY_FRACTION = {margin(found)}")


if __name__ == "__main__":
    main()
