"""What any transformers model is made of: its tensors and the facts that a plan reads."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, Literal, NamedTuple

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


def decoder_of(model: Any) -> Any:
    """Return the part of a causal language model that ends with the last hidden state.

    Source: transformers 5.23 ``modeling_utils.py:get_decoder``, whose last resort is the model
    itself: where ``base_model_prefix`` names no attribute, as in Llama 4's language model.
    """
    decoder = model.get_decoder()
    return model.model if decoder is model else decoder


def layers_of(decoder: torch.nn.Module, num_layers: int) -> tuple[str, torch.nn.ModuleList]:
    """Return the name and the list of a decoder's layers.

    Raises:
        ValueError: it has none of that length.
    """
    for name, module in decoder.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers:
            return name, module
    raise ValueError(f"the decoder has no list of {num_layers} layers")


def layer_kinds(model: Any) -> dict[bool, int | None]:
    """Return, with and without routed experts, the first decoder layer of that kind.

    ``None`` stands for any layer, where none has experts.
    """
    _, layers = layers_of(decoder_of(model), _num_layers(model))
    found: dict[bool, int | None] = {}
    for index, layer in enumerate(layers):
        found.setdefault(_has_experts(layer), index)
    return found if True in found else {False: None}


def _num_layers(model: Any) -> int:
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)


def _has_experts(layer: torch.nn.Module) -> bool:
    modules = dict(layer.named_modules())
    return any(
        _role(modules[name.rpartition(".")[0]], parameter, in_layer=True) == "expert"
        for name, parameter in layer.named_parameters()
    )


def facts_of(model: Any) -> dict[str, Any]:
    """Return the fields of a ModelSpec, its weights as mappings, as JSON values."""
    config = model.config.get_text_config(decoder=True)
    weights = tuple(_weights(model, _num_layers(model)))
    layer_norms = [w for w in weights if w.in_layer and w.role == "norm" and _is_scale(w)]
    head_norms = [w for w in layer_norms if re.match(r"(q|k|query|key)_", w.module)]
    per_layer = sum(w.count for w in layer_norms if w not in head_norms) / config.num_hidden_layers
    linears = [w for w in weights if w.in_layer and w.role == "linear"]
    experts = _expert_facts(config, weights)
    routers = (1, experts.get("num_experts"))
    mlp = [w for w in linears if not _is_attention(w) and w.shape[0] not in routers]
    is_packed = any("gate_up" in w.name for w in mlp)
    heads = config.num_attention_heads
    window = getattr(config, "sliding_window", None)
    kinds = Counter(getattr(config, "layer_types", None) or ())
    sliding = kinds["sliding_attention"] if kinds else config.num_hidden_layers
    return {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "intermediate_size": (
            max(w.shape[0] for w in mlp) // (2 if is_packed else 1)
            if mlp
            else experts["moe_intermediate_size"]
        ),
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
        "mlp": "gated" if is_packed or experts or len(mlp) > 2 else "plain",
        "activation": str(
            getattr(config, "hidden_act", None) or getattr(config, "activation_function", "silu")
        ),
        "has_parallel_residual": bool(getattr(config, "use_parallel_residual", False)),
        "sliding_window": window if sliding else None,
        "num_sliding_layers": sliding if window else 0,
        "attention_softcap": getattr(config, "attn_logit_softcapping", None),
        "logit_softcap": getattr(config, "final_logit_softcapping", None),
        "expert_names": expert_names(model),
        "has_sdpa": bool(model._supports_sdpa),
        "weights": [asdict(weight) for weight in weights],
        **experts,
    }


# What transformers 5.23 calls the experts that a token meets: most models; Phi-3.5-MoE and others;
# Ernie 4.5; Hunyuan.
_ACTIVE_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k")


def expert_names(model: Any) -> list[str]:
    """Return the module names that PEFT would take for a model's fused experts.

    Source: PEFT 0.21 ``utils/transformers_weight_conversion.py:_convert_peft_config_moe``.
    """
    from peft.utils import transformers_weight_conversion as conversion

    pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type)
    return sorted(conversion._MOE_TARGET_MODULE_MAPPING.get(pattern, ()))


def _expert_facts(config: Any, weights: tuple[WeightSpec, ...]) -> dict[str, int]:
    """Return what a mixture of experts adds to the facts; nothing of a dense model.

    Raises:
        ValueError: its config does not say how many experts a token meets.
    """
    routed = [w for w in weights if w.role == "expert"]
    if not routed:
        return {}
    active = next((getattr(config, key, None) for key in _ACTIVE_KEYS if hasattr(config, key)), 0)
    if not isinstance(active, int) or active < 1:
        raise ValueError(f"its config has none of {', '.join(_ACTIVE_KEYS)}")
    down = next((w for w in routed if "down" in w.name), routed[-1])
    inner = [size for size in down.shape[1:] if size != config.hidden_size]
    return {
        "num_experts": down.shape[0],
        "num_experts_per_token": active,
        "moe_intermediate_size": inner[0] if inner else config.hidden_size,
        "num_moe_layers": down.count,
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


class _Kind(NamedTuple):
    """Tensors that differ only in their layer."""

    name: str
    shape: tuple[int, ...]
    role: WeightRole
    in_layer: bool


def _weights(model: Any, num_layers: int) -> Iterator[WeightSpec]:
    """Yield each kind of tensor once: those of all layers under one name."""
    decoder = decoder_of(model)
    layers_name, layers = layers_of(decoder, num_layers)
    owner = next(name for name, module in model.named_modules() if module is decoder)
    prefix = f"{owner}.{layers_name}."
    modules = dict(model.named_modules())
    found, with_experts = Counter[_Kind](), Counter[_Kind]()
    moe = {str(i) for i, layer in enumerate(layers) if _has_experts(layer)}
    ends: dict[int, WeightRole] = {id(model.get_input_embeddings().weight): "embedding"}
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
        kind = _Kind(name=short, shape=shape, role=role, in_layer=in_layer)
        found[kind] += 1
        if in_layer and name.removeprefix(prefix).partition(".")[0] in moe:
            with_experts[kind] += 1
    for kind, count in found.items():
        layers_with_it: Literal["all", "dense", "moe"] = "all"
        if kind.in_layer and moe and with_experts[kind] in (0, count):
            layers_with_it = "moe" if with_experts[kind] else "dense"
        yield WeightSpec(**kind._asdict(), count=count, layers=layers_with_it)


def _role(module: torch.nn.Module, parameter: torch.nn.Parameter, *, in_layer: bool) -> WeightRole:
    kind = type(module).__name__
    if "norm" in kind.lower():
        return "norm"
    if parameter.dim() == 1:
        return "bias"
    if parameter.dim() == 3:
        return "other" if isinstance(module, torch.nn.Conv1d) else "expert"
    if is_router(module):
        return "router"
    is_linear = isinstance(module, torch.nn.Linear) or kind == "Conv1D"
    return "linear" if is_linear and in_layer else "other"


def is_router(module: torch.nn.Module) -> bool:
    """Return whether a linear layer returns more than its product: no adapter can be added to it.

    Source: transformers 5.23 ``models/phimoe/modeling_phimoe.py:PhimoeTopKRouter``.
    """
    return isinstance(module, torch.nn.Linear) and "Router" in type(module).__name__
