"""What is to be trained, at which length: the planner's input besides the cluster."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Literal

from launcher.model_spec import ModelSpec, WeightSpec
from launcher.strategy import Method, Precision

# PEFT's own words for "every linear module but the output embedding", and our shorthand.
ALL_LINEAR = "all-linear"
ATTENTION_ONLY = "attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """Low-rank adapters: rank, dropout and the modules that carry one."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: tuple[str, ...] = (ALL_LINEAR,)
    """Module names as PEFT matches them, or one of ``all-linear`` and ``attention``."""
    use_dora: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationSpec:
    """Storage of frozen linear weights under QLoRA (bitsandbytes)."""

    kind: Literal["nf4", "int8"] = "nf4"
    double_quant: bool = True


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, a training method and a sequence length.

    ``max_seq_len`` is in tokens. ``has_padding`` says whether batches carry a mask, of padding
    or of packed examples' borders (it forces the masked attention path). Without slots, for the
    cached properties.
    """

    model: ModelSpec
    method: Method
    max_seq_len: int
    global_batch_size: int
    precision: Precision = Precision.bf16
    lora: LoraSpec = field(default_factory=LoraSpec)
    quantization: QuantizationSpec = field(default_factory=QuantizationSpec)
    has_padding: bool = False
    has_random_weights: bool = False
    """The model starts from its configuration alone; this changes how it is loaded."""

    @functools.cached_property
    def lora_weights(self) -> tuple[WeightSpec, ...]:
        """The linear weights that carry an adapter, empty for full fine-tuning.

        Routers and fused experts have none, nor what is named as experts once were: PEFT would
        make the whole change of all experts anew in each forward (peft 0.21
        ``tuners/lora/layer.py:ParamWrapper``), so the worker keeps their names from it.
        """
        if self.method is Method.full:
            return ()
        linears = [
            w
            for w in self.model.weights
            if w.role == "linear" and w.module not in self.model.expert_names
        ]
        targets = self.lora.target_modules
        if targets == (ALL_LINEAR,):
            return tuple(linears)
        if targets == (ATTENTION_ONLY,):
            return tuple(w for w in linears if "attn" in w.name or "attention" in w.name)
        return tuple(w for w in linears if w.module in targets)

    @functools.cached_property
    def num_trainable_params(self) -> int:
        """Parameters that get gradients: all of them, or A (r x in) and B (out x r)."""
        if self.method is Method.full:
            return self.model.num_params
        per_rank = sum((w.shape[0] + w.shape[1]) * w.count for w in self.lora_weights)
        dora = sum(w.shape[0] * w.count for w in self.lora_weights) if self.lora.use_dora else 0
        return self.lora.r * per_rank + dora

    @functools.cached_property
    def num_quantized_params(self) -> int:
        """Parameters that bitsandbytes stores quantized: ``nn.Linear`` layers, not lm_head.

        Source: transformers 5.23 ``integrations/bitsandbytes.py:replace_with_bnb_linear``.
        """
        if self.method is not Method.qlora:
            return 0
        return sum(w.num_params for w in self.model.weights if w.role == "linear")
