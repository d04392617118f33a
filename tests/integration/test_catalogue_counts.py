"""Every catalogue model against transformers' own, built on the meta device."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

from launcher.model_source import catalogue_names, load_catalogue_entry
from launcher.model_spec import spec_from_config

pytestmark = pytest.mark.integration

_LAYER = re.compile(r"^.*?\.(?:layers|h)\.\d+\.")


def build_on_meta(config: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    facts = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **facts))


def tensors_of(model: Any) -> Counter[tuple[str, tuple[int, ...]]]:
    """Count parameters by their name inside the layer and their shape."""
    return Counter((_LAYER.sub("", n), tuple(p.shape)) for n, p in model.named_parameters())


def tensors_of_spec(config: dict[str, Any]) -> Counter[tuple[str, tuple[int, ...]]]:
    found: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for weight in spec_from_config(config, name="x").weights:
        found[weight.name, weight.shape] += weight.count
    return found


@pytest.mark.parametrize("name", catalogue_names())
def test_catalogue_model_has_exactly_the_tensors_of_transformers(name: str) -> None:
    entry = load_catalogue_entry(name)
    model = build_on_meta(dict(entry.config))
    spec = spec_from_config(entry.config, name=name)
    assert type(model).__name__ in entry.config["architectures"]  # type: ignore[operator]
    assert tensors_of_spec(dict(entry.config)) == tensors_of(model)
    assert spec.num_params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", catalogue_names())
def test_catalogue_model_has_the_roles_that_transformers_classes_imply(name: str) -> None:
    import torch

    entry = load_catalogue_entry(name)
    # Two layers show every kind of module; LoRA and 4-bit storage reach nn.Linear alone.
    config = {**entry.config, "num_hidden_layers": 2}
    model = build_on_meta(config)
    head = model.get_output_embeddings()
    linear = {
        _LAYER.sub("", f"{name}.weight")
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    weights = spec_from_config(config, name=name).weights
    assert {w.name for w in weights if w.role == "linear"} == linear
    norms = {w.name for w in weights if w.role == "norm"}
    assert norms == {n for n, _ in tensors_of(model) if "norm" in n or ".ln_" in n or "ln_" in n}


# Configs that differ from the catalogue in the keys that change tensors, and bare ones that
# leave everything to the defaults.
@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 96},
        {"model_type": "llama", "num_key_value_heads": None},
        {"model_type": "mistral"},
        {"model_type": "mixtral"},
        {"model_type": "qwen2", "tie_word_embeddings": True},
        {"model_type": "qwen3", "attention_bias": True},
        {"model_type": "qwen3_moe", "attention_bias": True, "mlp_only_layers": [1]},
        {"model_type": "qwen3_moe", "decoder_sparse_step": 2},
        {"model_type": "phi", "qk_layernorm": True},
        {"model_type": "phi3"},
        {"model_type": "falcon"},
        {"model_type": "falcon", "multi_query": False, "parallel_attn": False, "bias": True},
        {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 1},
        {"model_type": "falcon", "num_ln_in_parallel_attn": 2, "ffn_hidden_size": 640},
        {"model_type": "gemma2", "attention_bias": True},
        {"model_type": "gemma3_text", "tie_word_embeddings": False},
        {"model_type": "gpt_neox", "attention_bias": False},
    ],
    ids=str,
)
def test_other_configs_have_exactly_the_tensors_of_transformers(config: dict[str, Any]) -> None:
    small = {**config, "num_hidden_layers": 4}
    assert tensors_of_spec(small) == tensors_of(build_on_meta(small))


@pytest.mark.parametrize(
    ("name", "index_total"),
    # safetensors totals of the hub's image-and-text checkpoints.
    [("gemma3-4b", 4_300_079_472), ("gemma3-12b", 12_187_325_040), ("gemma3-27b", 27_432_406_640)],
)
def test_gemma3_language_model_and_vision_tower_make_the_published_total(
    name: str, index_total: int
) -> None:
    entry = load_catalogue_entry(name)
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    }
    whole = {"model_type": "gemma3", "text_config": dict(entry.config), "vision_config": vision}
    model = build_on_meta(whole)
    text = spec_from_config(whole, name=name).num_params
    outside = sum(
        p.numel() for n, p in model.named_parameters() if not n.startswith("model.language_model.")
    )
    assert text + outside == index_total
