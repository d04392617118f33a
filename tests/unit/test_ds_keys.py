from __future__ import annotations

from typing import Any

import pytest

from launcher.ds_keys import apply_to_knobs, check_keys, not_knobs, unpredicted_keys
from launcher.errors import RecipeError
from launcher.strategy import ZeroKnobs


def problem_of(raw: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        check_keys(raw, where="r.yaml: deepspeed")
    return str(caught.value)


def test_a_key_that_deepspeed_would_ignore_is_an_error_with_the_nearest_key() -> None:
    problem = problem_of({"zero_optimization": {"reduce_buket_size": 1}, "wall_clock": True})
    assert "did you mean 'reduce_bucket_size'?" in problem
    assert "did you mean 'wall_clock_breakdown'?" in problem


def test_a_key_that_the_plan_decides_names_the_recipe_key_to_use() -> None:
    assert "set strategy.zero_stage instead" in problem_of({"zero_optimization": {"stage": 3}})
    assert "set model.precision instead" in problem_of({"bf16": {"enabled": True}})


@pytest.mark.parametrize("value", ["big", -1, 0, True, None, float("inf"), float("nan"), 2**64])
def test_a_bucket_size_that_is_no_count_is_an_error(value: object) -> None:
    assert "reduce_bucket_size" in problem_of({"zero_optimization": {"reduce_bucket_size": value}})


def test_a_zero_section_that_is_no_section_is_an_error() -> None:
    assert "is a section" in problem_of({"zero_optimization": 3})


def test_keys_that_move_memory_reach_the_knobs() -> None:
    knobs = apply_to_knobs(
        ZeroKnobs(),
        {"zero_optimization": {"reduce_bucket_size": 5e7, "overlap_comm": True}},
    )
    assert knobs.reduce_bucket_size == 50_000_000
    assert isinstance(knobs.reduce_bucket_size, int)
    assert knobs.overlaps(2)


def test_groups_with_second_copies_and_the_type_of_reductions_reach_the_knobs() -> None:
    raw = {
        "communication_data_type": "fp32",
        "zero_optimization": {"zero_hpz_partition_size": 8},
    }
    knobs = apply_to_knobs(ZeroKnobs(), raw)
    assert (knobs.communication_data_type, knobs.zero_hpz_partition_size) == ("fp32", 8)
    assert not_knobs(raw) == {}


@pytest.mark.parametrize("value", ["float32", "FP32", 32])
def test_a_type_that_no_gradient_is_reduced_in_is_an_error(value: object) -> None:
    problem = problem_of({"communication_data_type": value})
    assert "must be one of fp16, bf16, fp32" in problem


def test_no_ranks_are_no_group() -> None:
    problem = problem_of({"zero_optimization": {"zero_hpz_partition_size": 0}})
    assert "a count of ranks, 1 or more" in problem


def test_keys_that_move_no_memory_pass() -> None:
    check_keys({"wall_clock_breakdown": True, "comms_logger": {"enabled": True}}, where="x")


def test_deepspeeds_short_names_of_stage_3_keys_are_refused_as_the_long_ones_would_win() -> None:
    # deepspeed 0.19.8 runtime/zero/config.py: alias="stage3_param_persistence_threshold".
    problem = problem_of({"zero_optimization": {"param_persistence_threshold": 1}})
    assert "did you mean 'stage3_param_persistence_threshold'?" in problem


def test_keys_that_no_prediction_follows_are_known() -> None:
    raw = {
        "compile": {"deepcompile": True},
        "wall_clock_breakdown": True,
        "torch_autocast": {"enabled": False},
        "zero_optimization": {
            "zero_quantized_gradients": True,
            "zero_quantized_weights": False,
            "zero_hpz_partition_size": 8,
            "reduce_bucket_size": 1,
        },
    }
    found = unpredicted_keys(raw)
    assert found == ("compile", "zero_optimization.zero_quantized_gradients")
    assert unpredicted_keys({}) == ()


def test_what_is_part_of_a_strategy_is_told_from_other_raw_keys() -> None:
    raw = {"prescale_gradients": True, "zero_optimization": {"sub_group_size": 1, "zenflow": {}}}
    assert not_knobs(raw) == {"prescale_gradients": True, "zero_optimization": {"zenflow": {}}}
    assert not_knobs({"zero_optimization": {"sub_group_size": 1}}) == {}


@pytest.mark.parametrize("key", ["amp", "elasticity", "sparse_attention", "compression_training"])
def test_what_deepspeed_has_removed_is_refused_before_a_run_dies_of_it(key: str) -> None:
    # deepspeed 0.19.8 runtime/config.py: _REMOVED_TOP_LEVEL_CONFIG_KEYS, _REMOVED_ZERO_CONFIG_KEYS.
    assert f"unknown key '{key}'" in problem_of({key: {}})
    assert "mics_shard_size" in problem_of({"zero_optimization": {"mics_shard_size": 2}})
