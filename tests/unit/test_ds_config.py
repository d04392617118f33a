from __future__ import annotations

from typing import Any

from launcher.ds_config import build_ds_config
from launcher.hardware import find_gpu
from launcher.model_source import resolve_model
from launcher.recipe import parse_recipe
from launcher.resolve import resolve_workload
from launcher.strategy import Offload, Precision, Strategy, ZeroKnobs

LLAMA, _ = resolve_model("llama2-7b")


def config_of(strategy: Strategy, text: str = "", gpu: str = "A100-80GB") -> dict[str, Any]:
    recipe = parse_recipe("model: {name_or_path: llama2-7b}\n" + text, source="r.yaml")
    workload = resolve_workload(recipe, LLAMA, find_gpu(gpu), source="r.yaml")
    return build_ds_config(recipe, workload, strategy, world_size=8)


def test_the_three_batch_sizes_agree_as_deepspeed_demands() -> None:
    config = config_of(
        Strategy(zero_stage=2, micro_batch_size_per_gpu=2, gradient_accumulation_steps=4)
    )
    assert config["train_batch_size"] == 2 * 4 * 8
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 4


def test_nothing_is_left_to_auto() -> None:
    assert "auto" not in str(config_of(Strategy(zero_stage=3)))


def test_fp16_is_switched_on_where_bf16_is_not_native() -> None:
    config = config_of(Strategy(zero_stage=1), gpu="V100-32GB")
    assert config["fp16"]["enabled"] is True
    assert "bf16" not in config


def test_offload_and_its_folder_reach_the_file() -> None:
    strategy = Strategy(
        zero_stage=3, offload_optimizer=Offload.nvme, offload_param=Offload.cpu, zero=ZeroKnobs()
    )
    config = config_of(strategy, "strategy: {nvme_path: /local/nvme}")
    zero = config["zero_optimization"]
    assert zero["offload_optimizer"] == {
        "device": "nvme", "pin_memory": True, "nvme_path": "/local/nvme"
    }  # fmt: skip
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": True}


def test_zero_3_saves_whole_weights() -> None:
    zero = config_of(Strategy(zero_stage=3))["zero_optimization"]
    assert zero["stage3_gather_16bit_weights_on_model_save"] is True


def test_raw_keys_are_merged_in_last() -> None:
    text = (
        "deepspeed: {wall_clock_breakdown: true, zero_optimization: {round_robin_gradients: true}}"
    )
    config = config_of(Strategy(zero_stage=2), text)
    assert config["wall_clock_breakdown"] is True
    assert config["zero_optimization"]["round_robin_gradients"] is True
    assert config["zero_optimization"]["stage"] == 2


def test_fp32_accumulation_is_said_in_deepspeeds_words() -> None:
    config = config_of(Strategy(zero_stage=2, grad_accum_dtype=Precision.fp32))
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
