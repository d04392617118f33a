"""What any transformers model is made of: its tensors and the facts that a plan reads."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch

from launcher.model_spec import WeightRole, WeightSpec


def config_of(hf_config: Mapping[str, Any], *, num_layers: int | None = None) -> Any:
    """Return transformers' own configuration object, with another number of layers if asked.

    Raises:
        ValueError: transformers does not know the model type.
    """
    from transformers import AutoConfig

    content = {key: value for key, value in hf_config.items() if key != "model_type"}
    config = AutoConfig.for_model(str(hf_config["model_type"]), **content)
    config.use_cache = False
    if num_layers is not None:
        kinds = getattr(config, "layer_types", None)
        config.num_hidden_layers = num_layers
        if kinds:
            config.layer_types = list(kinds)[:num_layers]
    return config


def whole_model(hf_config: Mapping[str, Any]) -> Any:
    """Return the model on the meta device, all layers."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(hf_config), dtype=torch.bfloat16)


def layers_of(decoder: torch.nn.Module, num_layers: int) -> tuple[str, torch.nn.ModuleList]:
    """Return the name and the list of a decoder's layers.

    Raises:
        ValueError: it has none of that length.
    """
    for name, module in decoder.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers:
            return name, module
    raise ValueError(f"the decoder has no list of {num_layers} layers")


def facts_of(model: Any) -> dict[str, Any]:
    """Return the fields of a ModelSpec, its weights as mappings, as JSON values."""
    config = model.config.get_text_config(decoder=True)
    weights = tuple(_weights(model, config.num_hidden_layers))
    layer_norms = [w for w in weights if w.in_layer and w.role == "norm" and _is_scale(w)]
    head_norms = [w for w in layer_norms if re.match(r"(q|k|query|key)_", w.module)]
    per_layer = sum(w.count for w in layer_norms if w not in head_norms) / config.num_hidden_layers
    linears = [w for w in weights if w.in_layer and w.role == "linear"]
    mlp = [w for w in linears if not _is_attention(w)]
    is_packed = any("gate_up" in w.name for w in mlp)
    heads = config.num_attention_heads
    window = getattr(config, "sliding_window", None)
    kinds = Counter(getattr(config, "layer_types", None) or ())
    sliding = kinds["sliding_attention"] if kinds else config.num_hidden_layers
    return {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "intermediate_size": max(w.shape[0] for w in mlp) // (2 if is_packed else 1),
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": not any(w.role == "lm_head" for w in weights),
        "norm": "layernorm" if _has_layer_norm(model) else "rmsnorm",
        "num_norms_per_layer": max(1, round(per_layer)),
        "has_qk_norm": bool(head_norms),
        "mlp": "gated" if is_packed or len(mlp) > 2 else "plain",
        "activation": str(
            getattr(config, "hidden_act", None) or getattr(config, "activation_function", "silu")
        ),
        "has_parallel_residual": bool(getattr(config, "use_parallel_residual", False)),
        "sliding_window": window if sliding else None,
        "num_sliding_layers": sliding if window else 0,
        "attention_softcap": getattr(config, "attn_logit_softcapping", None),
        "logit_softcap": getattr(config, "final_logit_softcapping", None),
        "weights": [asdict(weight) for weight in weights],
    }


def _has_layer_norm(model: torch.nn.Module) -> bool:
    return any(
        isinstance(module, torch.nn.LayerNorm) or "LayerNorm" in type(module).__name__
        for module in model.modules()
    )


def _is_scale(weight: WeightSpec) -> bool:
    return weight.name.endswith("weight")


def _is_attention(weight: WeightSpec) -> bool:
    return "attn" in weight.name or "attention" in weight.name


def _weights(model: Any, num_layers: int) -> Iterator[WeightSpec]:
    """Yield each kind of tensor once: those of all layers under one name."""
    decoder = model.get_decoder()
    layers_name, _ = layers_of(decoder, num_layers)
    owner = next(name for name, module in model.named_modules() if module is decoder)
    prefix = f"{owner}.{layers_name}."
    modules = dict(model.named_modules())
    found: Counter[tuple[str, tuple[int, ...], WeightRole, bool]] = Counter()
    ends = {id(model.get_input_embeddings().weight): "embedding"}
    if model.get_output_embeddings() is not None:
        ends.setdefault(id(model.get_output_embeddings().weight), "lm_head")
    for name, parameter in model.named_parameters():
        in_layer = name.startswith(prefix)
        short = re.sub(r"^\d+\.", "", name.removeprefix(prefix)) if in_layer else name
        module = modules[name.rpartition(".")[0]]
        shape = tuple(parameter.shape)
        role = ends.get(id(parameter)) or _role(module, parameter, in_layer=in_layer)
        if role == "linear" and type(module).__name__ == "Conv1D":
            shape = shape[::-1]  # transformers' pytorch_utils.py:Conv1D stores (in, out)
        found[short, shape, role, in_layer] += 1  # type: ignore[index]
    for (name, shape, role, in_layer), count in found.items():
        yield WeightSpec(name=name, shape=shape, count=count, role=role, in_layer=in_layer)


def _role(module: torch.nn.Module, parameter: torch.nn.Parameter, *, in_layer: bool) -> WeightRole:
    kind = type(module).__name__
    if "norm" in kind.lower():
        return "norm"
    if parameter.dim() == 1:
        return "bias"
    if parameter.dim() == 3:
        return "expert"
    is_linear = isinstance(module, torch.nn.Linear) or kind == "Conv1D"
    return "linear" if is_linear and in_layer else "other"
