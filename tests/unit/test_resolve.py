from __future__ import annotations

import pytest

from launcher.errors import RecipeError
from launcher.hardware import find_gpu
from launcher.model_source import resolve_model
from launcher.recipe import parse_recipe
from launcher.resolve import default_precision, resolve_workload
from launcher.strategy import Precision
from launcher.workload import Workload

LLAMA, _ = resolve_model("llama2-7b")


def workload_of(text: str) -> Workload:
    recipe = parse_recipe("model: {name_or_path: llama2-7b}\n" + text, source="r.yaml")
    return resolve_workload(recipe, LLAMA, find_gpu("A100-80GB"), source="r.yaml")


def test_rank_64_on_q_and_v_trains_the_studys_33_6_million_parameters() -> None:
    # arXiv 2406.02290 section 4: 2 modules x 32 layers x 64 x (4096 + 4096) = 33,554,432.
    workload = workload_of("lora: {r: 64, target_modules: [q_proj, v_proj]}")
    assert workload.num_trainable_params == 33_554_432


def test_full_fine_tuning_trains_every_parameter() -> None:
    # 6,738,415,616: the published parameter count of Llama-2-7B.
    assert workload_of("method: full").num_trainable_params == 6_738_415_616


def test_a_sequence_beyond_the_models_limit_is_an_error_that_names_the_limit() -> None:
    with pytest.raises(RecipeError, match="made for 4,096 tokens"):
        workload_of("max_seq_len: 8192")


def test_the_limit_can_be_raised_for_positions_that_stretch() -> None:
    text = "model: {name_or_path: x, max_position_embeddings: 16384}\nmax_seq_len: 8192"
    recipe = parse_recipe(text, source="r.yaml")
    workload = resolve_workload(recipe, LLAMA, find_gpu("A100-80GB"), source="r.yaml")
    assert workload.max_seq_len == 8192


def test_a_lora_target_that_is_no_module_names_the_nearest_module() -> None:
    with pytest.raises(RecipeError, match="did you mean 'q_proj'"):
        workload_of("lora: {target_modules: [q_pro]}")


def test_an_unknown_raw_deepspeed_key_is_an_error() -> None:
    with pytest.raises(RecipeError, match="did you mean 'overlap_comm'"):
        workload_of("deepspeed: {zero_optimization: {overlap_com: true}}")


@pytest.mark.parametrize(
    ("gpu", "precision"),
    [("V100-32GB", Precision.fp16), ("T4", Precision.fp16), ("A100-80GB", Precision.bf16)],
)
def test_bf16_is_the_default_only_where_it_is_native(gpu: str, precision: Precision) -> None:
    # NVIDIA lists bf16 tensor cores from compute capability 8.0.
    assert default_precision(find_gpu(gpu)) is precision


def test_packing_brings_a_mask() -> None:
    assert workload_of("data: {packing: true}").has_padding
    assert not workload_of("data: {packing: false}").has_padding


def test_packing_is_refused_where_examples_would_see_each_other() -> None:
    falcon, _ = resolve_model("falcon-7b")
    text = "model: {name_or_path: falcon-7b}\ndata: {packing: true}\n"
    recipe = parse_recipe(text, source="r.yaml")
    with pytest.raises(RecipeError, match="leave packing off"):
        resolve_workload(recipe, falcon, find_gpu("A100-80GB"), source="r.yaml")
