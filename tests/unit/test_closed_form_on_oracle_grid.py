"""The closed form against the real DeepSpeed engine, line by line of a stored grid.

``benchmarks/oracle_grid.jsonl`` was written by ``benchmarks/make_oracle_grid.py``, which runs
DeepSpeed itself; an integration test runs some of its lines anew.
"""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from launcher.hardware import default_cluster, find_gpu
from launcher.model_spec import spec_from_config
from launcher.planning.plan import strategy_from_json
from launcher.predict.memory import estimate_memory
from launcher.strategy import Method, Precision
from launcher.workload import LoraSpec, Workload

GRID = Path(__file__).resolve().parents[2] / "benchmarks" / "oracle_grid.jsonl"
README = GRID.parents[1] / "README.md"
TRAINING = ("forward", "loss", "backward", "step")
# The oracle has neither cuBLAS nor CUDA streams: what they hold is not in its truth.
CUDA_ONLY = frozenset({"cuBLAS workspace"})
MEAN_LIMIT, WORST_LIMIT = 0.02, 0.05


@functools.cache
def cases() -> Mapping[str, list[dict[str, Any]]]:
    """Return the grid's lines by case; a case has a line for each traced rank."""
    found = defaultdict(list)
    for line in GRID.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        found[record["name"]].append(record)
    return found


def measured_peak(name: str) -> int:
    return max(record["result"]["peak_bytes"] for record in cases()[name])


def predicted_peak(name: str, phases: tuple[str, ...] = TRAINING) -> int:
    request = cases()[name][0]["request"]
    content = dict(request["workload"])
    lora = dict(content.pop("lora"))
    lora["target_modules"] = tuple(lora["target_modules"])
    workload = Workload(
        model=spec_from_config(request["hf_config"], name=content.pop("model_name")),
        method=Method(content.pop("method")),
        precision=Precision(content.pop("precision")),
        lora=LoraSpec(**lora),
        **content,
    )
    ranks = request["world_size"]
    cluster = default_cluster(
        find_gpu("A100-80GB"), num_nodes=max(1, ranks // 8), gpus_per_node=min(8, ranks)
    )
    estimate = estimate_memory(workload, strategy_from_json(request["strategy"]), cluster)
    return max(
        sum(size for part, size in phase.components.items() if part not in CUDA_ONLY)
        for phase in estimate.phases
        if phase.phase in phases
    )


def test_the_grid_covers_every_stage_offload_method_and_checkpointing() -> None:
    seen = {
        (
            record["request"]["strategy"]["zero_stage"],
            record["request"]["strategy"]["offload_optimizer"],
            record["request"]["strategy"]["offload_param"],
            record["request"]["workload"]["method"],
            record["request"]["strategy"]["gradient_checkpointing"],
        )
        for records in cases().values()
        for record in records
    }
    places = [(0, "none", "none"), (1, "none", "none"), (1, "cpu", "none"), (2, "none", "none")]
    places += [(2, "cpu", "none"), (3, "none", "none"), (3, "cpu", "none"), (3, "cpu", "cpu")]
    wanted = {
        (*place, method, checkpointing)
        for place in places
        for method in ("full", "lora")
        for checkpointing in ("none", "full")
    }
    assert wanted <= seen
    assert len(cases()) >= 70
    assert {r["request"]["world_size"] for rs in cases().values() for r in rs} >= {1, 2, 8, 64}


@pytest.mark.parametrize("name", sorted(cases()))
def test_the_closed_form_is_within_5_percent_of_the_engine(name: str) -> None:
    assert predicted_peak(name) == pytest.approx(measured_peak(name), rel=WORST_LIMIT)


@pytest.mark.parametrize("name", sorted(name for name in cases() if "reduced_fp32" in name))
def test_reducing_in_fp32_widens_backward_as_in_the_engine(name: str) -> None:
    # Where the peak is in the optimizer step, the whole run would not show it.
    measured = max(record["result"]["phases"]["backward"] for record in cases()[name])
    assert predicted_peak(name, ("backward",)) == pytest.approx(measured, rel=MEAN_LIMIT)


def test_the_mean_difference_from_the_engine_is_at_most_2_percent() -> None:
    errors = [abs(predicted_peak(name) / measured_peak(name) - 1) for name in cases()]
    mean = sum(errors) / len(errors)
    assert mean <= MEAN_LIMIT
    said = f"({len(errors)} cases: mean difference {mean:.1%}, worst {max(errors):.1%})"
    assert said.replace("%", " %") in " ".join(README.read_text(encoding="utf-8").split())
