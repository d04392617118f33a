"""What a model is made of: every weight tensor's shape, from its Hugging Face config."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from launcher.architectures import WeightRole, WeightSpec, layout_of
from launcher.config_facts import ConfigFacts
from launcher.traced_layer import TracedArchitecture

__all__ = ["ModelSpec", "WeightRole", "WeightSpec", "spec_from_config", "spec_from_facts"]


# PEFT 0.21 utils/transformers_weight_conversion.py:_MOE_TARGET_MODULE_MAPPING.
_EXPERT_NAMES = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen3_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Architecture facts of a causal language model; lengths in tokens, sizes in elements.

    Without slots, for the cached properties: a search asks for them some thousand times.
    """

    name: str
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    norm: Literal["rmsnorm", "layernorm"]
    num_norms_per_layer: int
    has_qk_norm: bool
    mlp: Literal["gated", "plain"]
    activation: str
    has_parallel_residual: bool
    weights: tuple[WeightSpec, ...]
    num_experts: int = 0
    """Routed experts per MoE layer; 0 is a dense model."""
    num_experts_per_token: int = 0
    moe_intermediate_size: int = 0
    num_moe_layers: int = 0
    sliding_window: int | None = None
    num_sliding_layers: int = 0
    """Layers that attend only within ``sliding_window`` tokens; the others see everything."""
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    has_sdpa: bool = True
    """transformers lets torch's attention run it; GPT-OSS's sinks need its own."""
    expert_names: tuple[str, ...] = ()
    """What PEFT takes for the fused experts and their router when adapters name it."""
    traced: TracedArchitecture | None = None
    """The layer as measured, where the closed form does not know its operations."""

    def __hash__(self) -> int:
        """Hash what tells models apart: to hash every weight takes longer than what is cached."""
        return hash((self.name, self.hidden_size, self.num_hidden_layers, self.vocab_size))

    @functools.cached_property
    def num_params(self) -> int:
        """Exact parameter count; a tied lm_head is counted once."""
        return sum(weight.num_params for weight in self.weights)

    @property
    def largest_tensor_elements(self) -> int:
        """Elements of the largest single parameter tensor."""
        return max(weight.num_elements for weight in self.weights)

    @functools.cached_property
    def num_params_per_layer(self) -> int:
        """Parameters of one decoder layer (the mean, where layers differ)."""
        in_layers = sum(weight.num_params for weight in self.weights if weight.in_layer)
        return in_layers // self.num_hidden_layers


def spec_from_config(config: Mapping[str, object], *, name: str) -> ModelSpec:
    """Return a model's facts and exact weight inventory from its config.json mapping.

    Keys that the config lacks take transformers' defaults for that model type. Of an image
    and text model (Gemma 3 from 4B up) the language model alone is described.

    Args:
        config: the parsed config.json.
        name: what to call the model in plans and errors.

    Raises:
        ModelError: the model type has no closed form here, or a size is missing or wrong.

    Source:
        transformers 5.23, ``models/<type>/configuration_<type>.py`` and ``modeling_<type>.py``.
    """
    facts = ConfigFacts(_text_config(config), name=name)
    layout = layout_of(facts)
    return ModelSpec(
        name=name,
        model_type=facts.model_type,
        hidden_size=facts.hidden_size,
        intermediate_size=facts.intermediate_size,
        num_hidden_layers=facts.num_hidden_layers,
        num_attention_heads=facts.num_attention_heads,
        num_key_value_heads=facts.num_key_value_heads,
        head_dim=facts.head_dim,
        vocab_size=facts.integer("vocab_size"),
        max_position_embeddings=facts.integer("max_position_embeddings"),
        tie_word_embeddings=facts.flag("tie_word_embeddings"),
        norm=layout.norm,
        num_norms_per_layer=layout.num_norms_per_layer,
        has_qk_norm=layout.has_qk_norm,
        mlp=layout.mlp,
        activation=facts.activation,
        has_parallel_residual=layout.has_parallel_residual,
        weights=layout.weights,
        num_experts=layout.num_experts,
        num_experts_per_token=layout.num_experts_per_token,
        moe_intermediate_size=layout.moe_intermediate_size,
        num_moe_layers=layout.num_moe_layers,
        sliding_window=layout.sliding_window,
        num_sliding_layers=layout.num_sliding_layers,
        attention_softcap=facts.number("attn_logit_softcapping"),
        logit_softcap=facts.number("final_logit_softcapping"),
        expert_names=_EXPERT_NAMES.get(facts.model_type, ()),
    )


def spec_from_facts(
    facts: Mapping[str, Any], *, name: str, traced: TracedArchitecture | None = None
) -> ModelSpec:
    """Return a model from what ``launcher.worker.model_facts`` read off the real one.

    Args:
        facts: a value for each field, the weights as mappings.
        name: what to call the model in plans and errors.
        traced: what one of its layers keeps and needs.
    """
    weights = (WeightSpec(**{**item, "shape": tuple(item["shape"])}) for item in facts["weights"])
    found = {"weights": tuple(weights), "expert_names": tuple(facts.get("expert_names", ()))}
    return ModelSpec(**{**facts, **found, "name": name, "traced": traced})


def _text_config(config: Mapping[str, object]) -> Mapping[str, object]:
    """Return the language model's part of a Gemma 3 image-and-text config."""
    text = config.get("text_config")
    if config.get("model_type") != "gemma3" or not isinstance(text, Mapping):
        return config
    return {"model_type": "gemma3_text", **text}
