"""One decoder layer, operation by operation, as transformers 5 and PEFT run it.

Each function writes a module's forward onto a :class:`~launcher.autograd_tape.Tape`: what it
reads, makes and saves. Sizes are bytes per token (``T``) or per token pair (``score``).

Source:
    transformers 5.23 ``models/<type>/modeling_<type>.py`` and ``integrations/moe.py``;
    PEFT 0.21 ``tuners/lora/layer.py:Linear.forward``; torch 2.13 ``derivatives.yaml``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launcher.autograd_tape import NOTHING, Extra, Size, Tape, Weight
from launcher.model_spec import ModelSpec, WeightSpec

AttentionKernel = Literal["flash", "efficient", "efficient_masked", "eager", "math"]
"""``flash`` is FlashAttention-2, torch's or the package; ``efficient`` is the memory-efficient
kernel (compute capability below 8.0, or with a mask) and the CPU's; ``eager`` is the model's own
code; ``math`` is what torch's SDPA falls back to, eager in fp32."""

_ATTENTION_OUTPUTS = frozenset({"o_proj", "dense", "out_proj"})
# RoPE that ends in a concatenation leaves q ordered by head. The flash kernels of CUDA and the
# CPU give their output q's order: bringing it back to tokens is a copy that the output
# projection keeps. The memory-efficient kernel always orders by token.
_ROPE_BY_HEAD = frozenset({"gpt_neox", "phi", "phi3"})
_MLP_OUTPUTS = frozenset({"down_proj", "fc2", "dense_4h_to_h"})


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSetting:
    """Everything that decides what one layer keeps; hashable, so that a profile is made once."""

    model: ModelSpec
    is_moe: bool
    element_bytes: int
    adapter_targets: frozenset[str]
    """Names of the linear weights that carry a LoRA adapter; empty for full fine-tuning."""
    adapter_rank: int
    adapter_bytes: int
    """Bytes per element of adapter weights and activations."""
    has_adapter_dropout: bool
    is_frozen: bool
    """The base weights get no gradient."""
    has_zero3_linear: bool
    """DeepSpeed's linear of ZeRO-3, which keeps its input even if the weight is frozen."""
    quantization: Literal["nf4", "int8"] | None
    attention: AttentionKernel
    has_fp32_softmax_input: bool
    """Eager softmax copies the scores to fp32 first; CUDA's fp16 kernel does not."""
    has_liger: bool
    is_cuda: bool


def write_layer(setting: LayerSetting) -> Tape:
    """Return the tape of one decoder layer; its first value is the layer's input."""
    return _Writer(setting).write()


class _Writer:
    """Writes the modules of one layer onto one tape."""

    def __init__(self, setting: LayerSetting) -> None:
        self.setting = setting
        self.model = setting.model
        self.width = setting.element_bytes
        self.tape = Tape()
        linears = [w for w in self.model.weights if w.in_layer and w.role == "linear"]
        self.attention_linears = [w for w in linears if "attn" in w.name or "attention" in w.name]
        self.mlp_linears = [w for w in linears if w not in self.attention_linears]

    def per_token(self, elements: float, element_bytes: int | None = None) -> Size:
        return Size(token=elements * (element_bytes or self.width))

    def write(self) -> Tape:
        model = self.model
        hidden = self.tape.value(self.per_token(model.hidden_size), is_outside=True)
        if model.has_parallel_residual:
            self._parallel(hidden)
        else:
            self._sequential(hidden)
        return self.tape

    def _sequential(self, hidden: int) -> None:
        has_output_norms = self.model.num_norms_per_layer == 4
        for block in (self._attention, self._mlp):
            branch = block(self.norm(hidden))
            if has_output_norms:
                branch = self.norm(branch)
            hidden = self.add(hidden, branch)

    def _parallel(self, hidden: int) -> None:
        normed = self.norm(hidden)
        second = self.norm(hidden) if self.model.num_norms_per_layer > 1 else normed
        attended = self._attention(normed)
        passed = self._mlp(second)
        self.add(self.add(attended, passed), hidden)

    def add(self, one: int, other: int) -> int:
        return self.tape.record(
            "residual add", (one, other), self.tape.size(one), gradient="shared"
        )

    # --- normalisation ---------------------------------------------------------------------

    def norm(self, value: int, *, elements: float | None = None, rows: float = 1.0) -> int:
        """Write a normalisation over ``elements`` per token in ``rows`` groups."""
        elements = self.model.hidden_size if elements is None else elements
        weight = 0 if self.setting.is_frozen else int(elements / rows)
        if self.model.norm == "layernorm":
            # Mean and reciprocal deviation in fp32: native_layer_norm.
            return self.tape.record(
                "layer norm", (value,), self.per_token(elements), saves=(value,),
                extra=Extra(saved=Size(token=8 * rows)),
                weight=Weight(gradient_elements=2 * weight),
            )  # fmt: skip
        if self.setting.has_liger:
            # liger_kernel/ops/rms_norm.py: saves X and RSTD; dX is written over dY.
            return self.tape.record(
                "RMS norm", (value,), self.per_token(elements), saves=(value,),
                extra=Extra(saved=Size(token=4 * rows)), weight=Weight(gradient_elements=weight),
                gradient="shared",
            )  # fmt: skip
        return self._rms_norm(value, elements, rows, weight)

    def _rms_norm(self, value: int, elements: float, rows: float, weight: int) -> int:
        tape, fp32 = self.tape, self.per_token(elements, 4)
        is_gemma = self.model.model_type.startswith("gemma")
        wide = value if self.width == 4 else tape.record("RMS norm upcast", (value,), fp32)
        # Backward of mean and pow(2) holds an expanded gradient, x**1 and 2 * x**1, all fp32.
        scale = tape.record(
            "RMS norm mean", (wide,), Size(token=4 * rows), saves=(wide,), saves_output=True,
            extra=Extra(forward=fp32, backward=fp32 * 3),
        )  # fmt: skip
        # The gradient of the factor is full size before it is summed to one per row.
        normal = tape.record(
            "RMS norm product", (wide, scale), fp32, saves=(wide, scale), extra=Extra(backward=fp32)
        )
        kept_alive = normal
        if self.width != 4 and not is_gemma:
            normal = tape.record("RMS norm downcast", (normal,), self.per_token(elements))
        output = tape.record(
            "RMS norm weight", (normal,), tape.size(normal),
            saves=(normal,) if weight else (),
            extra=Extra(backward=tape.size(normal) if weight else NOTHING),
            weight=Weight(gradient_elements=weight),
        )  # fmt: skip
        tape.hold((kept_alive,))
        if self.width != 4 and is_gemma:
            output = tape.record("RMS norm downcast", (output,), self.per_token(elements))
        return output

    # --- linear layers ---------------------------------------------------------------------

    def linear(self, value: int, weight: WeightSpec) -> int:
        """Write a linear layer, with its adapter if it carries one."""
        setting, tape = self.setting, self.tape
        is_trained = not setting.is_frozen
        # bitsandbytes/autograd/_functions.py: MatMul8bitLt saves its input, MatMul4Bit does not.
        # deepspeed/runtime/zero/linear.py:LinearFunctionForZeroStage3 always does.
        keeps_input = is_trained or setting.quantization == "int8"
        if setting.has_zero3_linear and setting.quantization is None:
            keeps_input = True
        output = tape.record(
            weight.module, (value,), self.per_token(weight.shape[0]),
            saves=(value,) if keeps_input else (),
            weight=Weight(
                dequantized_bytes=self.width * weight.num_elements if setting.quantization else 0,
                gradient_elements=weight.num_elements if is_trained else 0,
            ),
        )  # fmt: skip
        if weight.name in setting.adapter_targets:
            output = self._adapter(value, output, weight)
        return output

    def _adapter(self, value: int, base: int, weight: WeightSpec) -> int:
        """Write ``base + B(A(dropout(x))) * scaling``."""
        setting, tape, kind = self.setting, self.tape, self.setting.adapter_bytes
        out_features, in_features, rank = weight.shape[0], weight.shape[1], setting.adapter_rank
        name, wide = weight.module, self.per_token(out_features, kind)
        source = value
        if kind != self.width:
            source = tape.record(
                f"{name} adapter cast", (value,), self.per_token(in_features, kind)
            )
        dropped = source
        if setting.has_adapter_dropout:
            # CUDA's fused dropout keeps a byte mask; the CPU one a mask of the input's type.
            mask_bytes = 1 if setting.is_cuda else kind
            dropped = tape.record(
                f"{name} adapter dropout", (source,), self.per_token(in_features, kind),
                extra=Extra(saved=self.per_token(in_features, mask_bytes)),
            )  # fmt: skip
        narrow = tape.record(
            f"{name} lora_A", (dropped,), self.per_token(rank, kind), saves=(dropped,),
            weight=Weight(gradient_elements=rank * in_features),
        )  # fmt: skip
        raised = tape.record(
            f"{name} lora_B", (narrow,), wide, saves=(narrow,),
            weight=Weight(gradient_elements=rank * out_features),
        )  # fmt: skip
        scaled = tape.record(f"{name} adapter scaling", (raised,), wide)
        if kind != self.width:
            base = tape.record(f"{name} promotion", (base,), wide)
        output = tape.record(f"{name} adapter add", (base, scaled), wide, gradient="shared")
        tape.hold((source,))
        if kind != self.width:
            output = tape.record(f"{name} result cast", (output,), self.per_token(out_features))
        return output

    # --- attention -------------------------------------------------------------------------

    def _attention(self, value: int) -> int:
        inputs = [w for w in self.attention_linears if w.module not in _ATTENTION_OUTPUTS]
        (output,) = [w for w in self.attention_linears if w.module in _ATTENTION_OUTPUTS]
        query, key, content, kept = self._query_key_value(value, inputs)
        if self.setting.attention == "math":
            attended = self._math(query, key, content)
        elif self.setting.attention == "eager":
            attended = self._eager(query, key, content, kept)
        else:
            attended = self._fused(query, key, content, kept)
        return self.linear(attended, output)

    def _query_key_value(
        self, value: int, inputs: list[WeightSpec]
    ) -> tuple[int, int, int, tuple[int, ...]]:
        """Write projections, head norms and RoPE; return q, k, v and what v's storage is."""
        model = self.model
        heads = model.num_attention_heads
        queries = self.model.head_dim * heads
        keys = self.model.head_dim * model.num_key_value_heads
        if len(inputs) == 1:
            return self._fused_projection(value, inputs[0], queries, keys)
        query, key, content = (self.linear(value, weight) for weight in inputs)
        if model.has_qk_norm:
            query = self.norm(query, elements=queries, rows=heads)
            key = self.norm(key, elements=keys, rows=model.num_key_value_heads)
        return self.rope(query, queries), self.rope(key, keys), content, (content,)

    def _fused_projection(
        self, value: int, weight: WeightSpec, queries: int, keys: int
    ) -> tuple[int, int, int, tuple[int, ...]]:
        packed, tape = self.linear(value, weight), self.tape
        is_falcon = self.model.model_type == "falcon"
        if is_falcon and self.model.num_key_value_heads > 1:
            # Falcon copies k and v to every query head (modeling_falcon.py:_split_heads).
            whole = self.per_token(queries)
            query, key, content = (tape.record("split heads", (packed,), whole) for _ in range(3))
            return self.rope(query, queries), self.rope(key, queries), content, (content,)
        parts = [
            tape.record("split heads", (packed,), NOTHING, gradient=self.per_token(width))
            for width in (queries, keys, keys)
        ]
        kept = packed
        return self.rope(parts[0], queries), self.rope(parts[1], keys), parts[2], (kept,)

    def rope(self, value: int, elements: int) -> int:
        # Backward: grad * sin, its two rotated slices (full size each).
        size = self.per_token(elements)
        if self.setting.has_liger:
            return self.tape.record("rotary embedding", (value,), size, gradient="shared")
        return self.tape.record(
            "rotary embedding", (value,), size, extra=Extra(forward=size * 2, backward=size * 3)
        )

    def _repeat(self, value: int) -> int:
        model = self.model
        if model.num_key_value_heads == model.num_attention_heads:
            return value
        whole = model.num_attention_heads * model.head_dim
        return self.tape.record("repeat key/value heads", (value,), self.per_token(whole))

    def _fused(self, query: int, key: int, content: int, kept: tuple[int, ...]) -> int:
        """Write FlashAttention-2 or the memory-efficient kernel: q, k, v, output, log-sum-exp."""
        model, heads = self.model, self.model.num_attention_heads
        whole = self.per_token(heads * model.head_dim)
        is_masked = self.setting.attention == "efficient_masked"
        if is_masked:
            key, repeated = self._repeat(key), self._repeat(content)
            kept, content = (kept if repeated == content else (repeated,)), repeated
        is_grouped = model.num_key_value_heads != heads and not is_masked
        backward = NOTHING
        if self.setting.is_cuda:
            # flash_api.cpp:mha_bwd: dq in fp32, row sums, and dk, dv for every query head.
            backward = self.per_token(heads * model.head_dim, 4) + Size(token=4 * heads)
            backward = backward + (whole * 2 if is_grouped else NOTHING)
        attended = self.tape.record(
            "attention", (query, key, content), whole,
            saves=(query, key, *kept), saves_output=True,
            # A bool mask becomes an additive one in each layer, for all heads together.
            extra=Extra(
                saved=Size(token=4 * heads, score=self.width if is_masked else 0),
                backward=backward,
            ),
        )  # fmt: skip
        keeps_order = self.setting.attention == "flash" or not self.setting.is_cuda
        if keeps_order and not is_masked and model.model_type in _ROPE_BY_HEAD:
            attended = self.tape.record("attention output copy", (attended,), whole)
        return attended

    def _eager(self, query: int, key: int, content: int, kept: tuple[int, ...]) -> int:
        model, tape, heads = self.model, self.tape, self.model.num_attention_heads
        key, repeated = self._repeat(key), self._repeat(content)
        kept, content = (kept if repeated == content else (repeated,)), repeated
        low, wide = Size(score=heads * self.width), Size(score=4 * heads)
        whole = self.per_token(heads * model.head_dim)
        scores = tape.record("scores", (query, key), low, saves=(query, key))
        scores = tape.record("score scaling", (scores,), low)
        if model.attention_softcap is not None:
            scores = tape.record("score cap division", (scores,), low)
            scores = tape.record("score cap", (scores,), low, saves_output=True)
            scores = tape.record("score cap product", (scores,), low)
        scores = tape.record("score mask", (scores,), low, gradient="shared")
        has_fp32 = self.width == 4 or model.model_type != "falcon"
        if has_fp32 and self.setting.has_fp32_softmax_input:
            scores = tape.record("softmax upcast", (scores,), wide)
        kind = wide if has_fp32 else low
        scores = tape.record("softmax", (scores,), kind, saves_output=True)
        if has_fp32 and self.width != 4:
            scores = tape.record("softmax downcast", (scores,), low)
        attended = tape.record("values", (scores, content), whole, saves=(scores, *kept))
        return tape.record("attention output copy", (attended,), whole)

    def _math(self, query: int, key: int, content: int) -> int:
        """Write SDPA's fallback: q, k, v in fp32 and fp32 scores (sdp_utils_cpp.cpp)."""
        model, tape, heads = self.model, self.tape, self.model.num_attention_heads
        wide = Size(score=4 * heads)
        whole = self.per_token(heads * model.head_dim, 4)
        inner = self.per_token(model.num_key_value_heads * model.head_dim, 4)
        query = tape.record("query upcast", (query,), whole)
        key = tape.record("key upcast", (key,), inner)
        content = tape.record("value upcast", (content,), inner)
        scores = tape.record("scores", (query, key), wide, saves=(query, key))
        scores = tape.record("score mask", (scores,), wide, gradient="shared")
        scores = tape.record("softmax", (scores,), wide, saves_output=True)
        attended = tape.record("values", (scores, content), whole, saves=(scores, content))
        return tape.record("attention output", (attended,), self.per_token(heads * model.head_dim))

    # --- feed-forward ----------------------------------------------------------------------

    def _mlp(self, value: int) -> int:
        if self.setting.is_moe:
            return self._experts(value)
        inputs = [w for w in self.mlp_linears if w.module not in _MLP_OUTPUTS]
        (output,) = [w for w in self.mlp_linears if w.module in _MLP_OUTPUTS]
        if self.model.mlp == "plain":
            return self.linear(self._activate(self.linear(value, inputs[0])), output)
        width = self.model.intermediate_size
        if len(inputs) == 1:
            return self.linear(self._gate_packed(self.linear(value, inputs[0]), width), output)
        gate = self.linear(value, inputs[0])
        if self.setting.has_liger:
            # liger_kernel/ops/swiglu.py saves gate and up and writes their gradients over them.
            up = self.linear(value, inputs[1])
            product = self.tape.record(
                "SwiGLU", (gate, up), self.per_token(width), saves=(gate, up), gradient="shared"
            )
            return self.linear(product, output)
        active = self._activate(gate)
        up = self.linear(value, inputs[1])
        product = self.tape.record(
            "gate product", (active, up), self.per_token(width), saves=(active, up)
        )
        return self.linear(product, output)

    def _activate(self, value: int, *, size: Size | None = None, saved: int | None = None) -> int:
        size = self.tape.size(value) if size is None else size
        saves = value if saved is None else saved
        if self.model.activation in {"gelu_new", "gelu_fast"}:
            # transformers/activations.py:NewGELUActivation in Python: also keeps 0.5 * x,
            # tanh and 1 + tanh.
            return self.tape.record(
                "activation", (value,), size, saves=(saves,),
                extra=Extra(saved=size * 3, backward=size),
            )  # fmt: skip
        return self.tape.record("activation", (value,), size, saves=(saves,))

    def _gate_packed(self, packed: int, width: float) -> int:
        """Write ``act(gate) * up`` where both are halves of one tensor."""
        part = self.per_token(width)
        # One split: its backward joins both halves' gradients, so up's waits for gate's.
        up = self.tape.record("up half", (), NOTHING, gradient=part)
        gate = self.tape.record("gate half", (packed,), NOTHING, gradient=part)
        active = self._activate(gate, size=part, saved=packed)
        return self.tape.record("gate product", (active, up), part, saves=(active, packed))

    def _experts(self, value: int) -> int:
        """Write router and routed experts through grouped matrix products."""
        model, tape = self.model, self.tape
        routed, width = model.num_experts_per_token, model.moe_intermediate_size
        experts = {w.name: w for w in model.weights if w.role == "expert"}
        is_trained = not self.setting.is_frozen
        sizes = [w.num_elements if is_trained else 0 for w in experts.values()]
        router = Size(token=4 * model.num_experts + 16 * routed)
        tape.record("router", (), NOTHING, saves=(value,), extra=Extra(saved=router))
        hidden = self.per_token(routed * model.hidden_size)
        gathered = tape.record("route tokens", (value,), hidden)
        packed = tape.record(
            "expert gate_up", (gathered,), self.per_token(2 * routed * width),
            saves=(gathered,) if is_trained else (), weight=Weight(gradient_elements=sizes[0]),
        )  # fmt: skip
        product = self._gate_packed(packed, routed * width)
        lowered = tape.record(
            "expert down", (product,), hidden,
            saves=(product,) if is_trained else (), weight=Weight(gradient_elements=sizes[1]),
        )  # fmt: skip
        # Mixtral's routing weights are fp32 (softmax in fp32, never cast back).
        is_fp32 = model.model_type == "mixtral"
        product = self.per_token(routed * model.hidden_size, 4) if is_fp32 else hidden
        weighted = tape.record(
            "routing weights", (lowered,), product, saves=(lowered,),
            extra=Extra(backward=product),
        )  # fmt: skip
        ordered = tape.record("restore order", (weighted,), product)
        return tape.record("sum experts", (ordered,), self.per_token(model.hidden_size))
