"""What the host does in a step, against what the real engine was counted doing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.model_source import load_catalogue_entry
from launcher.model_spec import spec_from_config
from launcher.predict.host_work import host_operations, num_modules
from launcher.predict.time_calibration import TimeCalibration
from launcher.predict.weight_totals import weight_totals
from launcher.strategy import Attention, Checkpointing, Loss, Method, Precision, Strategy
from launcher.workload import LoraSpec, Workload

COUNTED = Path(__file__).parents[2] / "benchmarks" / "count_calls.jsonl"
CASES = [json.loads(line) for line in COUNTED.read_text(encoding="utf-8").splitlines()[1:]]
# Only what is counted: an attention kernel is one operation, an adapter four, a hook none.
PLAIN = TimeCalibration(fused_attention_ops=1.0, lora_linear_ops=4.0, checkpoint_hook_fraction=0.0)


def name_of(case: dict[str, Any]) -> str:
    return "-".join(str(value) for key, value in case.items() if key != "layer")


def job(case: dict[str, Any], *, num_layers: int) -> Workload:
    config = dict(load_catalogue_entry(case["model"]).config)
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:num_layers]
    return Workload(
        model=spec_from_config({**config, "num_hidden_layers": num_layers}, name=case["model"]),
        method=Method(case.get("method", "full")),
        precision=Precision(case.get("precision", "bf16")),
        max_seq_len=512,
        global_batch_size=1,
        lora=LoraSpec(r=4),
    )


def one_layer(case: dict[str, Any], *, liger: bool = False) -> float:
    """Operations of one layer's forward: half of what forward and backward together are."""
    strategy = Strategy(
        zero_stage=case.get("zero_stage", 2),
        attention=Attention(case.get("attention", "sdpa")),
        loss=Loss.full,
        liger_kernels=liger,
    )
    two, three = (
        host_operations(w, strategy, weight_totals(w), PLAIN, num_loss_chunks=1)
        for w in (job(case, num_layers=layers) for layers in (2, 3))
    )
    return (three - two) / 2


# Falcon's SDPA falls back to plain products, the biases of others are additions under ZeRO-3.
@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case["model"].startswith(("llama", "qwen3", "gemma3"))],
    ids=name_of,
)
def test_operations_of_a_layer_are_those_that_the_engine_was_counted_starting(
    case: dict[str, Any],
) -> None:
    assert one_layer(case) == case["layer"]["forward_operations"]


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.get("zero_stage") == 3], ids=name_of
)
def test_modules_are_those_that_zero3_was_counted_fetching(case: dict[str, Any]) -> None:
    two, three = (
        num_modules(w, weight_totals(w)) for w in (job(case, num_layers=n) for n in (2, 3))
    )
    # Forward and backward; recomputing a layer stops at its last saved tensor, so that its last
    # one or two modules are not called again.
    if Checkpointing(case.get("checkpointing", "none")) is Checkpointing.none:
        assert 2 * (three - two) == case["layer"]["fetches"]
    else:
        assert 3 * (three - two) - 2 <= case["layer"]["fetches"] < 3 * (three - two)


def test_a_kernel_of_ligers_costs_the_host_as_much_as_its_calls_that_were_counted() -> None:
    # Llama's layer: two norms of 8 operations, rope of 10 and an activation of 2 become four
    # calls of 5 (benchmarks/count_calls.py's library, kernels taken out).
    case = {"model": "llama3.2-1b"}
    assert one_layer(case) - one_layer(case, liger=True) == 2 * 8 + 10 + 2 - 4 * 5
