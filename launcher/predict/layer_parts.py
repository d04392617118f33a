"""Residual adds, norms, linear layers and adapters, as operations on a tape.

Source:
    transformers 5.23 ``modeling_llama.py:LlamaRMSNorm``, ``modeling_gemma2.py:Gemma2RMSNorm``;
    PEFT 0.21 ``tuners/lora/layer.py:Linear.forward``; bitsandbytes 0.50
    ``autograd/_functions.py``; Liger 0.8.5 ``ops/rms_norm.py``; torch 2.13 ``derivatives.yaml``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launcher.model_spec import ModelSpec, WeightSpec
from launcher.predict.autograd_tape import NOTHING, Extra, Size, Tape, Weight

AttentionKernel = Literal["flash", "efficient", "efficient_masked", "eager", "math"]
"""``flash`` is FlashAttention-2, torch's or the package; ``efficient`` is the memory-efficient
kernel (compute capability below 8.0, or with a mask) and the CPU's; ``eager`` is the model's own
code; ``math`` is what torch's SDPA falls back to, eager in fp32."""


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
    has_cudnn_attention: bool = False
    """cuDNN's kernel takes the place of the memory-efficient one."""
    has_dora: bool = False
    exchanged_key_copies: int = 0
    """Of each key head, where ranks that share sequences exchange tokens for heads; 0: none do."""


class LayerParts:
    """Writes the parts that every layer is made of onto one tape."""

    def __init__(self, setting: LayerSetting) -> None:
        self.setting = setting
        self.model = setting.model
        self.width = setting.element_bytes
        self.tape = Tape()
        linears = [w for w in self.model.weights if w.in_layer and w.role == "linear"]
        self.attention_linears = [w for w in linears if "attn" in w.name or "attention" in w.name]
        self.mlp_linears = [w for w in linears if w not in self.attention_linears]

    def per_token(self, elements: float, element_bytes: int | None = None) -> Size:
        """Return the bytes of a tensor with ``elements`` per token."""
        return Size(token=elements * (element_bytes or self.width))

    def add(self, one: int, other: int) -> int:
        """Write a residual addition."""
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
            # liger_kernel/ops/rms_norm.py: saves X and RSTD; dX is written over dY, but not in
            # Gemma 2 and 3 (transformers/rms_norm.py: in_place=False), whose residual needs dY.
            return self.tape.record(
                "RMS norm", (value,), self.per_token(elements), saves=(value,),
                extra=Extra(saved=Size(token=4 * rows)), weight=Weight(gradient_elements=weight),
                gradient="new" if self.model.model_type.startswith("gemma") else "shared",
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

    def _dora(self, base: int, raised: int, weight: WeightSpec) -> tuple[int, int]:
        """Write DoRA's two products with the magnitudes; both operands are kept for them.

        The norm of ``W + BA`` is made anew in each forward: BA comes from an identity matrix,
        and it, its scaled copy and the sum are alive together, with W's values if it has fewer
        bits. The adapter's own dropout changes what is multiplied, not how much is kept.

        Source: peft 0.21 ``tuners/lora/dora.py:DoraLinearLayer.forward``.
        """
        kind, (out_features, in_features) = self.setting.adapter_bytes, weight.shape
        wide = self.per_token(out_features, kind)
        copies = 3 if self.setting.quantization is None else 4
        matrices = in_features * (in_features + copies * out_features)
        share = self.tape.record(
            f"{weight.module} magnitude share", (base,), wide, saves=(base,),
            extra=Extra(forward=Size(fixed=kind * matrices), backward=wide),
            weight=Weight(gradient_elements=out_features),
        )  # fmt: skip
        product = self.tape.record(
            f"{weight.module} magnitude product", (raised,), wide, saves=(raised,),
            extra=Extra(backward=wide),
        )  # fmt: skip
        return self.add(base, share), product

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
        if setting.has_dora:
            base, raised = self._dora(base, raised, weight)
        scaled = tape.record(f"{name} adapter scaling", (raised,), wide)
        if kind != self.width:
            base = tape.record(f"{name} promotion", (base,), wide)
        output = tape.record(f"{name} adapter add", (base, scaled), wide, gradient="shared")
        tape.hold((source,))
        if kind != self.width:
            output = tape.record(f"{name} result cast", (output,), self.per_token(out_features))
        return output
