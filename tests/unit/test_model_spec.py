"""Exact parameter counts and structure from config mappings, without torch."""

from __future__ import annotations

import pytest

from launcher.errors import ModelError
from launcher.model_source import catalogue_names, load_catalogue_entry
from launcher.model_spec import ModelSpec, spec_from_config

LLAMA2_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}


def catalogue_spec(name: str) -> ModelSpec:
    return spec_from_config(load_catalogue_entry(name).config, name=name)


@pytest.mark.parametrize("name", catalogue_names())
def test_every_catalogue_model_has_its_published_parameter_count(name: str) -> None:
    entry = load_catalogue_entry(name)
    assert catalogue_spec(name).num_params == entry.published_num_params, entry.published_source


# Counts that the model cards and papers print, typed in here a second time on purpose.
@pytest.mark.parametrize(
    ("name", "num_params"),
    [
        ("llama2-7b", 6_738_415_616),
        ("llama3-8b", 8_030_261_248),
        ("mixtral-8x7b", 46_702_792_704),
        ("phi-3-mini-4k", 3_821_079_552),
        ("phi-2", 2_779_683_840),
        ("qwen2.5-7b", 7_615_616_512),
        ("smollm2-135m", 134_515_008),
        ("gpt-neox-20b", 20_554_567_680),
    ],
)
def test_counts_equal_the_model_cards(name: str, num_params: int) -> None:
    assert catalogue_spec(name).num_params == num_params


def test_all_families_are_in_the_catalogue() -> None:
    found = {catalogue_spec(name).model_type for name in catalogue_names()}
    assert found == {
        *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "phi", "phi3"),
        *("falcon", "gemma2", "gemma3_text", "gpt_neox"),
    }


def test_missing_keys_take_the_defaults_of_transformers() -> None:
    # LlamaConfig's defaults are Llama-1-7B: the same tensors as Llama-2-7B.
    assert spec_from_config({"model_type": "llama"}, name="x").num_params == 6_738_415_616


def test_null_key_value_heads_mean_as_many_as_query_heads() -> None:
    spec = spec_from_config({**LLAMA2_7B, "num_key_value_heads": None}, name="x")
    assert spec.num_key_value_heads == 32


def test_head_dim_defaults_to_hidden_size_over_heads() -> None:
    assert spec_from_config({**LLAMA2_7B, "head_dim": None}, name="x").head_dim == 128


def test_gemma_ties_its_embedding_unless_told_otherwise() -> None:
    spec = spec_from_config({"model_type": "gemma2"}, name="x")
    assert spec.tie_word_embeddings
    assert not any(weight.role == "lm_head" for weight in spec.weights)


def test_tied_lm_head_is_counted_once() -> None:
    tied = spec_from_config({**LLAMA2_7B, "tie_word_embeddings": True}, name="x")
    assert tied.num_params == 6_738_415_616 - 32000 * 4096


def test_mixtral_experts_are_two_three_dimensional_tensors_a_layer() -> None:
    spec = catalogue_spec("mixtral-8x7b")
    experts = {w.name: (w.shape, w.count) for w in spec.weights if w.role == "expert"}
    # Two thirds of 8 x 3 x 4096 x 14336 in one tensor: 939,524,096 elements.
    assert experts == {
        "mlp.experts.gate_up_proj": ((8, 28672, 4096), 32),
        "mlp.experts.down_proj": ((8, 4096, 14336), 32),
    }
    assert spec.largest_tensor_elements == 939_524_096


def test_phi3_fuses_query_key_value_and_gate_up() -> None:
    names = {w.module: w.shape for w in catalogue_spec("phi-4-mini").weights if w.role == "linear"}
    # 24 query heads and 8 key/value heads of 128: 3072 + 2 x 1024.
    assert names["qkv_proj"] == (5120, 3072)
    assert names["gate_up_proj"] == (16384, 3072)


def test_falcon_7b_has_one_key_value_head_and_one_norm() -> None:
    spec = catalogue_spec("falcon-7b")
    assert (spec.num_key_value_heads, spec.num_norms_per_layer) == (1, 1)
    assert spec.has_parallel_residual
    assert spec.intermediate_size == 4 * 4544


def test_falcon_180b_has_grouped_heads_and_two_norms() -> None:
    spec = catalogue_spec("falcon-180b")
    assert (spec.num_key_value_heads, spec.num_norms_per_layer) == (8, 2)


def test_qwen2_has_biases_on_query_key_value_and_qwen3_has_norms_instead() -> None:
    qwen2, qwen3 = catalogue_spec("qwen2-7b"), catalogue_spec("qwen3-8b")
    assert sum(w.role == "bias" for w in qwen2.weights) == 3
    assert not any(w.role == "bias" for w in qwen3.weights)
    assert (qwen2.has_qk_norm, qwen3.has_qk_norm) == (False, True)


# Gemma 2: every other layer is local (arXiv:2408.00118, section 2); Gemma 3: five local per
# global one (arXiv:2503.19786, section 2), so 34 layers hold 5 global ones.
@pytest.mark.parametrize(("name", "layers"), [("gemma2-2b", 13), ("gemma3-4b", 29)])
def test_gemma_counts_its_local_layers(name: str, layers: int) -> None:
    assert catalogue_spec(name).num_sliding_layers == layers


def test_sliding_window_of_qwen2_is_off_unless_enabled() -> None:
    assert catalogue_spec("qwen2.5-7b").sliding_window is None


def test_moe_layers_skip_those_listed_as_dense() -> None:
    config = dict(load_catalogue_entry("qwen3-30b-a3b").config)
    spec = spec_from_config({**config, "mlp_only_layers": [0, 1]}, name="x")
    counts = {w.name: w.count for w in spec.weights}
    assert spec.num_moe_layers == 46
    assert counts["mlp.experts.down_proj"] == 46
    assert counts["mlp.gate_proj.weight"] == 2


def test_image_and_text_config_gives_the_language_model() -> None:
    text = load_catalogue_entry("gemma3-4b").config
    whole = {"model_type": "gemma3", "text_config": dict(text), "vision_config": {}}
    assert spec_from_config(whole, name="x").num_params == catalogue_spec("gemma3-4b").num_params


def test_a_model_of_more_than_text_is_refused_with_what_to_do() -> None:
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}}
    with pytest.raises(ModelError, match="more than text") as caught:
        spec_from_config(config, name="x")
    assert "text_config" in str(caught.value)


def test_unknown_architecture_names_the_supported_ones_and_the_traced_path() -> None:
    with pytest.raises(ModelError, match=r"mamba2(.|\n)*llama(.|\n)*zerofit plan"):
        spec_from_config({"model_type": "mamba2"}, name="x")


@pytest.mark.parametrize("value", [0, -1, "many", True, 1.5])
def test_impossible_sizes_are_named(value: object) -> None:
    with pytest.raises(ModelError, match="hidden_size"):
        spec_from_config({**LLAMA2_7B, "hidden_size": value}, name="x")


def test_config_without_model_type_is_refused() -> None:
    with pytest.raises(ModelError, match="model_type None"):
        spec_from_config({"hidden_size": 64}, name="x")


def test_wrong_kinds_of_value_are_named() -> None:
    with pytest.raises(ModelError, match="tie_word_embeddings"):
        spec_from_config({**LLAMA2_7B, "tie_word_embeddings": "yes"}, name="x")
    with pytest.raises(ModelError, match="attn_logit_softcapping"):
        spec_from_config({"model_type": "gemma2", "attn_logit_softcapping": "50"}, name="x")


def test_module_is_the_name_that_peft_matches() -> None:
    modules = {w.module for w in catalogue_spec("llama2-7b").weights if w.role == "linear"}
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert modules == attention | {"gate_proj", "up_proj", "down_proj"}


def test_parameters_of_a_layer_are_those_of_the_model_without_its_ends() -> None:
    spec = catalogue_spec("llama2-7b")
    # 4 x 4096^2 + 3 x 4096 x 11008 + 2 x 4096
    assert spec.num_params_per_layer == 202_383_360


def test_phi_with_query_key_norms_adds_two_layer_norms_of_a_head() -> None:
    plain = spec_from_config({"model_type": "phi"}, name="x")
    normed = spec_from_config({"model_type": "phi", "qk_layernorm": True}, name="x")
    # weight and bias of 64 elements, for q and for k, in 24 layers
    assert normed.num_params - plain.num_params == 2 * 2 * 64 * 24


def test_sequential_falcon_has_biases_and_two_norms() -> None:
    # Falcon-RW-1B: 24 x (12 h^2 + 13 h) + 50304 h + 2 h with h = 2048 is 1,311,625,216.
    config = {
        "model_type": "falcon",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
        "alibi": True,
    }
    spec = spec_from_config(config, name="falcon-rw-1b")
    assert spec.num_params == 1_311_625_216
    assert not spec.has_parallel_residual
