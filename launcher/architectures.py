"""Weight tensors of each supported architecture, as transformers names and shapes them.

One short function per family returns its :class:`Layout`. Names and shapes are those of
transformers 5.23 (``models/<type>/modeling_<type>.py``); a test builds every catalogue model
on the meta device and compares all tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from launcher.config_facts import ConfigFacts

WeightRole = Literal["embedding", "lm_head", "linear", "expert", "router", "norm", "bias", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSpec:
    """One kind of parameter tensor and how many of it the model has.

    ``name`` is the parameter's path inside its decoder layer (``self_attn.q_proj.weight``)
    or inside the model (``model.embed_tokens.weight``). Linear shapes are (out, in), as
    torch stores them; ``expert`` tensors are 3-D (experts, out, in), as transformers 5 does.
    """

    name: str
    shape: tuple[int, ...]
    count: int
    role: WeightRole
    in_layer: bool
    layers: Literal["all", "dense", "moe"] = "all"  # that have it, of a model that was traced

    @property
    def num_elements(self) -> int:
        """Elements of one such tensor."""
        return math.prod(self.shape)

    @property
    def num_params(self) -> int:
        """Elements of all such tensors."""
        return self.num_elements * self.count

    @property
    def module(self) -> str:
        """Last component of the module's path, the name that PEFT matches: ``q_proj``."""
        return self.name.split(".")[-2] if "." in self.name else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What an architecture is made of, beyond the numbers that its config states."""

    weights: tuple[WeightSpec, ...]
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    num_norms_per_layer: int = 2
    has_qk_norm: bool = False
    mlp: Literal["gated", "plain"] = "gated"
    has_parallel_residual: bool = False
    num_experts: int = 0
    num_experts_per_token: int = 0
    moe_intermediate_size: int = 0
    num_moe_layers: int = 0
    sliding_window: int | None = None
    num_sliding_layers: int = 0


def layout_of(facts: ConfigFacts) -> Layout:
    """Return the weights and structure of a supported architecture.

    Raises:
        ModelError: a size is missing or impossible.
    """
    return _FAMILIES[facts.model_type](facts)


def _linear(
    name: str, out_features: int, in_features: int, count: int, *, bias: bool = False
) -> Iterator[WeightSpec]:
    yield WeightSpec(
        name=f"{name}.weight",
        shape=(out_features, in_features),
        count=count,
        role="linear",
        in_layer=True,
    )
    if bias:
        yield WeightSpec(
            name=f"{name}.bias", shape=(out_features,), count=count, role="bias", in_layer=True
        )


def _norm(
    name: str, width: int, count: int, *, bias: bool = False, in_layer: bool = True
) -> Iterator[WeightSpec]:
    for kind in ("weight", "bias") if bias else ("weight",):
        yield WeightSpec(
            name=f"{name}.{kind}", shape=(width,), count=count, role="norm", in_layer=in_layer
        )


def _ends(
    facts: ConfigFacts,
    *,
    embedding: str = "model.embed_tokens",
    final_norm: str = "model.norm",
    norm_bias: bool = False,
    head_bias: bool = False,
) -> Iterator[WeightSpec]:
    """Yield the tensors outside the layers: embedding, final norm and untied lm_head."""
    vocab_size, hidden_size = facts.integer("vocab_size"), facts.hidden_size
    shape = (vocab_size, hidden_size)
    yield WeightSpec(
        name=f"{embedding}.weight", shape=shape, count=1, role="embedding", in_layer=False
    )
    yield from _norm(final_norm, hidden_size, 1, bias=norm_bias, in_layer=False)
    if not facts.flag("tie_word_embeddings"):
        yield WeightSpec(
            name="lm_head.weight", shape=shape, count=1, role="lm_head", in_layer=False
        )
    if head_bias:
        yield WeightSpec(
            name="lm_head.bias", shape=(vocab_size,), count=1, role="bias", in_layer=False
        )


def _attention(facts: ConfigFacts, *, qkv_bias: bool, out_bias: bool) -> Iterator[WeightSpec]:
    """Yield q, k, v and o projections under their usual names."""
    hidden_size, count = facts.hidden_size, facts.num_hidden_layers
    q_width = facts.num_attention_heads * facts.head_dim
    kv_width = facts.num_key_value_heads * facts.head_dim
    yield from _linear("self_attn.q_proj", q_width, hidden_size, count, bias=qkv_bias)
    yield from _linear("self_attn.k_proj", kv_width, hidden_size, count, bias=qkv_bias)
    yield from _linear("self_attn.v_proj", kv_width, hidden_size, count, bias=qkv_bias)
    yield from _linear("self_attn.o_proj", hidden_size, q_width, count, bias=out_bias)


def _gated_mlp(facts: ConfigFacts, count: int, *, bias: bool = False) -> Iterator[WeightSpec]:
    hidden_size, width = facts.hidden_size, facts.intermediate_size
    yield from _linear("mlp.gate_proj", width, hidden_size, count, bias=bias)
    yield from _linear("mlp.up_proj", width, hidden_size, count, bias=bias)
    yield from _linear("mlp.down_proj", hidden_size, width, count, bias=bias)


def _experts(facts: ConfigFacts, width: int, count: int) -> Iterator[WeightSpec]:
    """Yield the router and the two 3-D tensors that hold all experts of a layer."""
    experts, hidden_size = facts.num_experts, facts.hidden_size
    shapes: tuple[tuple[str, WeightRole, tuple[int, ...]], ...] = (
        ("mlp.gate.weight", "router", (experts, hidden_size)),
        ("mlp.experts.gate_up_proj", "expert", (experts, 2 * width, hidden_size)),
        ("mlp.experts.down_proj", "expert", (experts, hidden_size, width)),
    )
    for name, role, shape in shapes:
        yield WeightSpec(name=name, shape=shape, count=count, role=role, in_layer=True)


def _layer_norms(
    facts: ConfigFacts, *extra: str, qk_norm: bool = False, bias: bool = False
) -> Iterator[WeightSpec]:
    count = facts.num_hidden_layers
    for name in ("input_layernorm", "post_attention_layernorm", *extra):
        yield from _norm(name, facts.hidden_size, count, bias=bias)
    if qk_norm:
        yield from _norm("self_attn.q_norm", facts.head_dim, count)
        yield from _norm("self_attn.k_norm", facts.head_dim, count)


def _llama(facts: ConfigFacts) -> Layout:
    """Llama 2/3, SmolLM2; Mistral with its window in every layer."""
    biased = facts.flag("attention_bias") and facts.model_type == "llama"
    window = facts.optional_integer("sliding_window") if facts.model_type == "mistral" else None
    return Layout(
        weights=(
            *_ends(facts),
            *_attention(facts, qkv_bias=biased, out_bias=biased),
            *_gated_mlp(facts, facts.num_hidden_layers, bias=facts.flag("mlp_bias")),
            *_layer_norms(facts),
        ),
        sliding_window=window,
        num_sliding_layers=facts.num_hidden_layers if window else 0,
    )


def _mixtral(facts: ConfigFacts) -> Layout:
    count, width = facts.num_hidden_layers, facts.intermediate_size
    window = facts.optional_integer("sliding_window")
    return Layout(
        weights=(
            *_ends(facts),
            *_attention(facts, qkv_bias=False, out_bias=False),
            *_experts(facts, width, count),
            *_layer_norms(facts),
        ),
        num_experts=facts.num_experts,
        num_experts_per_token=facts.integer("num_experts_per_tok"),
        moe_intermediate_size=width,
        num_moe_layers=count,
        sliding_window=window,
        num_sliding_layers=count if window else 0,
    )


def _qwen(facts: ConfigFacts) -> Layout:
    """Qwen2 and 2.5 (biases on q, k, v) and Qwen3 dense (q and k norms)."""
    is_qwen3 = facts.model_type == "qwen3"
    window = facts.optional_integer("sliding_window") if facts.flag("use_sliding_window") else None
    first_sliding = facts.integer("max_window_layers", facts.num_hidden_layers)
    sliding = _sliding_layers(facts, max(0, facts.num_hidden_layers - first_sliding))
    attention_bias = facts.flag("attention_bias")
    return Layout(
        weights=(
            *_ends(facts),
            *_attention(
                facts,
                qkv_bias=attention_bias if is_qwen3 else True,
                out_bias=attention_bias and is_qwen3,
            ),
            *_gated_mlp(facts, facts.num_hidden_layers),
            *_layer_norms(facts, qk_norm=is_qwen3),
        ),
        has_qk_norm=is_qwen3,
        sliding_window=window,
        num_sliding_layers=sliding if window else 0,
    )


def _qwen3_moe(facts: ConfigFacts) -> Layout:
    count, step = facts.num_hidden_layers, facts.integer("decoder_sparse_step", 1)
    dense_only = facts.items("mlp_only_layers")
    num_moe = sum((i + 1) % step == 0 and i not in dense_only for i in range(count))
    width = facts.integer("moe_intermediate_size")
    biased = facts.flag("attention_bias")
    window = facts.optional_integer("sliding_window") if facts.flag("use_sliding_window") else None
    return Layout(
        weights=(
            *_ends(facts),
            *_attention(facts, qkv_bias=biased, out_bias=biased),
            *(_experts(facts, width, num_moe) if num_moe else ()),
            *(_gated_mlp(facts, count - num_moe) if num_moe < count else ()),
            *_layer_norms(facts, qk_norm=True),
        ),
        has_qk_norm=True,
        num_experts=facts.num_experts,
        num_experts_per_token=facts.integer("num_experts_per_tok"),
        moe_intermediate_size=width,
        num_moe_layers=num_moe,
        sliding_window=window,
        num_sliding_layers=count if window else 0,
    )


def _phi(facts: ConfigFacts) -> Layout:
    """Phi-1 and Phi-2: biases everywhere, one LayerNorm, attention beside the MLP."""
    hidden_size, count = facts.hidden_size, facts.num_hidden_layers
    width, q_width = facts.intermediate_size, facts.num_attention_heads * facts.head_dim
    kv_width = facts.num_key_value_heads * facts.head_dim
    qk_norm = facts.flag("qk_layernorm")
    head_norms = ("self_attn.q_layernorm", "self_attn.k_layernorm") if qk_norm else ()
    return Layout(
        weights=(
            *_ends(facts, final_norm="model.final_layernorm", norm_bias=True, head_bias=True),
            *_linear("self_attn.q_proj", q_width, hidden_size, count, bias=True),
            *_linear("self_attn.k_proj", kv_width, hidden_size, count, bias=True),
            *_linear("self_attn.v_proj", kv_width, hidden_size, count, bias=True),
            *_linear("self_attn.dense", hidden_size, q_width, count, bias=True),
            *_linear("mlp.fc1", width, hidden_size, count, bias=True),
            *_linear("mlp.fc2", hidden_size, width, count, bias=True),
            *_norm("input_layernorm", hidden_size, count, bias=True),
            *(w for n in head_norms for w in _norm(n, facts.head_dim, count, bias=True)),
        ),
        norm="layernorm",
        num_norms_per_layer=1,
        has_qk_norm=qk_norm,
        mlp="plain",
        has_parallel_residual=True,
    )


def _phi3(facts: ConfigFacts) -> Layout:
    """Phi-3, Phi-4 and Phi-4-mini: q, k, v in one matrix, gate and up in another."""
    hidden_size, count, width = facts.hidden_size, facts.num_hidden_layers, facts.intermediate_size
    q_width = facts.num_attention_heads * facts.head_dim
    qkv_width = q_width + 2 * facts.num_key_value_heads * facts.head_dim
    window = facts.optional_integer("sliding_window")
    return Layout(
        weights=(
            *_ends(facts),
            *_linear("self_attn.qkv_proj", qkv_width, hidden_size, count),
            *_linear("self_attn.o_proj", hidden_size, q_width, count),
            *_linear("mlp.gate_up_proj", 2 * width, hidden_size, count),
            *_linear("mlp.down_proj", hidden_size, width, count),
            *_layer_norms(facts),
        ),
        sliding_window=window,
        num_sliding_layers=count if window else 0,
    )


_GEMMA_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")


def _gemma(facts: ConfigFacts) -> Layout:
    """Gemma 2 (softcaps) and the text part of Gemma 3 (q and k norms); four norms a layer."""
    is_gemma3 = facts.model_type == "gemma3_text"
    count, biased = facts.num_hidden_layers, facts.flag("attention_bias")
    pattern = facts.integer("sliding_window_pattern", 6) if is_gemma3 else 2
    window = facts.optional_integer("sliding_window")
    return Layout(
        weights=(
            *_ends(facts),
            *_attention(facts, qkv_bias=biased, out_bias=biased),
            *_gated_mlp(facts, count),
            *_layer_norms(facts, *_GEMMA_NORMS, qk_norm=is_gemma3),
        ),
        num_norms_per_layer=4,
        has_qk_norm=is_gemma3,
        sliding_window=window,
        num_sliding_layers=_sliding_layers(facts, count - count // pattern) if window else 0,
    )


def _falcon(facts: ConfigFacts) -> Layout:
    """Falcon 7B (multi-query, one norm), 40B and 180B (grouped-query, two norms), RW."""
    hidden_size, count, width = facts.hidden_size, facts.num_hidden_layers, facts.intermediate_size
    biased, is_new = facts.flag("bias"), facts.flag("new_decoder_architecture")
    is_parallel = facts.flag("parallel_attn")
    num_norms = facts.integer("num_ln_in_parallel_attn", 2 if is_new else 1)
    norm_names: tuple[str, ...] = ("input_layernorm",)
    if not is_parallel:
        norm_names = ("input_layernorm", "post_attention_layernorm")
    elif num_norms == 2:
        norm_names = ("ln_attn", "ln_mlp")
    qkv_width = (facts.num_attention_heads + 2 * facts.num_key_value_heads) * facts.head_dim
    return Layout(
        weights=(
            *_ends(
                facts,
                embedding="transformer.word_embeddings",
                final_norm="transformer.ln_f",
                norm_bias=True,
            ),
            *_linear("self_attention.query_key_value", qkv_width, hidden_size, count, bias=biased),
            *_linear("self_attention.dense", hidden_size, hidden_size, count, bias=biased),
            *_linear("mlp.dense_h_to_4h", width, hidden_size, count, bias=biased),
            *_linear("mlp.dense_4h_to_h", hidden_size, width, count, bias=biased),
            *(w for n in norm_names for w in _norm(n, hidden_size, count, bias=True)),
        ),
        norm="layernorm",
        num_norms_per_layer=len(norm_names),
        mlp="plain",
        has_parallel_residual=is_parallel or is_new,
    )


def _gpt_neox(facts: ConfigFacts) -> Layout:
    """GPT-NeoX and Pythia: q, k, v in one matrix, biases everywhere."""
    hidden_size, count, width = facts.hidden_size, facts.num_hidden_layers, facts.intermediate_size
    biased = facts.flag("attention_bias")
    return Layout(
        weights=(
            *_ends(
                facts,
                embedding="gpt_neox.embed_in",
                final_norm="gpt_neox.final_layer_norm",
                norm_bias=True,
            ),
            *_linear("attention.query_key_value", 3 * hidden_size, hidden_size, count, bias=biased),
            *_linear("attention.dense", hidden_size, hidden_size, count, bias=biased),
            *_linear("mlp.dense_h_to_4h", width, hidden_size, count, bias=True),
            *_linear("mlp.dense_4h_to_h", hidden_size, width, count, bias=True),
            *_layer_norms(facts, bias=True),
        ),
        norm="layernorm",
        mlp="plain",
        has_parallel_residual=facts.flag("use_parallel_residual"),
    )


def _sliding_layers(facts: ConfigFacts, default: int) -> int:
    """Count the layers that attend within the window; ``layer_types`` says it where present."""
    layer_types = facts.items("layer_types")
    return layer_types.count("sliding_attention") if layer_types else default


_FAMILIES: Mapping[str, Callable[[ConfigFacts], Layout]] = {
    "llama": _llama,
    "mistral": _llama,
    "mixtral": _mixtral,
    "qwen2": _qwen,
    "qwen3": _qwen,
    "qwen3_moe": _qwen3_moe,
    "phi": _phi,
    "phi3": _phi3,
    "falcon": _falcon,
    "gemma2": _gemma,
    "gemma3_text": _gemma,
    "gpt_neox": _gpt_neox,
}
