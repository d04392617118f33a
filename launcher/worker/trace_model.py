"""A model whose widths are divided by K, with attention and dropout that store what a GPU's do."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, cast
from unittest.mock import patch

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)

from launcher.errors import ModelError
from launcher.strategy import (
    LOSS_CHUNK_ELEMENTS,
    Attention,
    Checkpointing,
    Loss,
    Precision,
    Strategy,
)
from launcher.worker import loss as worker_loss
from launcher.worker import model as worker_model
from launcher.workload import LoraSpec

TORCH_DTYPE = {
    Precision.bf16: torch.bfloat16,
    Precision.fp16: torch.float16,
    Precision.fp32: torch.float32,
}
FUSED_ATTENTION = "traced_fused_attention"
_WIDTHS = ("hidden_size", "intermediate_size", "vocab_size", "head_dim")


def scale_config(hf_config: Mapping[str, Any], *, scale: int) -> dict[str, Any]:
    """Divide a dense model's widths by ``scale``; layers and heads stay.

    Every weight matrix, saved activation and logit then has exactly 1/scale**2 of its bytes
    when the sequence is divided too. Vectors (norms, biases) keep 1/scale: below 0.1 % of a
    model.

    Raises:
        ModelError: a width is not divisible, or has a name of its own.
    """
    # Token ids of the real vocabulary lie outside the scaled one.
    hf_config = {**hf_config, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    if scale == 1:
        return hf_config
    if not {"num_attention_heads", "hidden_size"} <= hf_config.keys():
        raise ModelError(
            f"model_type {hf_config['model_type']!r} has other names for its widths",
            where="scale",
            fix="trace it at its own size: --scale 1",
        )
    heads = int(hf_config["num_attention_heads"])
    head_dim = int(hf_config.get("head_dim") or int(hf_config["hidden_size"]) // heads)
    widths = {key: int(hf_config[key]) for key in _WIDTHS if hf_config.get(key) is not None}
    odd = {key: value for key, value in {**widths, "head_dim": head_dim}.items() if value % scale}
    if odd:
        raise ModelError(
            f"widths are not divisible by the scale {scale}: {odd}",
            where="scale",
            fix="choose a scale that divides them, a power of two such as 8",
        )
    return {**hf_config, **{key: value // scale for key, value in widths.items()}}


def build_model(
    config: Mapping[str, Any], strategy: Strategy, *, precision: Precision, scale: int
) -> torch.nn.Module:
    """Build a causal language model with random weights, before any adapter.

    Args:
        config: a config.json mapping, already scaled.
        strategy: the attention kernel is read.
        precision: of the weights.
        scale: the divisor of ``config``'s widths.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    register_fused_attention(scale=scale)
    content = {key: value for key, value in config.items() if key != "model_type"}
    hf_config = AutoConfig.for_model(config["model_type"], **content)
    hf_config.use_cache = False
    is_eager = strategy.attention is Attention.eager
    hf_config._attn_implementation = "eager" if is_eager else FUSED_ATTENTION
    model = AutoModelForCausalLM.from_config(hf_config, dtype=TORCH_DTYPE[precision])
    return cast("torch.nn.Module", model.train())


def add_adapters(model: Any, lora: LoraSpec, *, scale: int) -> Any:
    """Wrap the model for LoRA as the worker does, with the rank divided by ``scale``."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.r // scale,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=worker_model.adapter_targets(model, lora.target_modules),
        use_dora=lora.use_dora,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft 0.21 reads a property that transformers 5.23 renamed.
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    replace_dropout(adapted)
    return adapted.train()


def enable_checkpointing(model: Any, mode: Checkpointing) -> None:
    """Recompute layers as the worker does; call it after :func:`add_adapters`, as it does."""
    with warnings.catch_warnings():
        # transformers 5.23 renamed the method; the old name works in all of 5.x.
        warnings.simplefilter("ignore", FutureWarning)
        worker_model.enable_checkpointing(model, mode, device=torch.device("cpu"))


def use_loss(model: Any, kind: Loss, *, max_tokens: int, scale: int) -> None:
    """Install the worker's chunked loss, its chunks divided like everything else."""
    if kind is Loss.chunked:
        with patch.object(worker_loss, "LOSS_CHUNK_ELEMENTS", LOSS_CHUNK_ELEMENTS // scale**2):
            worker_loss.use_chunked_loss(model, max_tokens=max_tokens)


class ByteMaskDropout(torch.nn.Dropout):
    """Dropout that saves one byte per element, as the fused CUDA kernel does.

    The CPU's ``F.dropout`` saves a mask of the input's own dtype.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  (torch's name)
        """Apply ``torch.native_dropout``, whose mask is boolean on every device."""
        if not self.training or self.p == 0:
            return input
        return torch.native_dropout(input, self.p, train=True)[0]


def replace_dropout(model: torch.nn.Module) -> None:
    """Swap every active dropout for one with the CUDA kernel's mask."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Dropout:
                setattr(module, name, ByteMaskDropout(child.p))


class FusedAttention(torch.autograd.Function):
    """Allocate and save what the FlashAttention-2 CUDA kernel does; the values are zeros.

    Shapes: b batch, a heads, k key-value heads, s tokens, d head width.

    Source:
        torch 2.13 ``aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp``,
        ``mha_fwd`` (out, softmax_lse) and ``mha_bwd`` (dq_accum and softmax_d in fp32;
        dk_expanded, dv_expanded when a != k).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_basd: torch.Tensor,
        k_bksd: torch.Tensor,
        v_bksd: torch.Tensor,
        scale: int,
    ) -> torch.Tensor:
        """Return zeros [b, s, a, d] and save q, k, v, the output and the log-sum-exp."""
        b, a, s, _ = q_basd.shape
        out_bsad = q_basd.new_zeros(b, s, a, v_bksd.shape[3])
        # a * s shrinks by the scale once, bytes must shrink by its square.
        lse = q_basd.new_zeros(max(b * a * s // scale, 1), dtype=torch.float32)
        ctx.save_for_backward(q_basd, k_bksd, v_bksd, out_bsad, lse)
        return out_bsad

    @staticmethod
    def backward(ctx: Any, *_grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return zero gradients of q, k and v, with the kernel's fp32 accumulators alive."""
        q_basd, k_bksd, v_bksd, _, lse = ctx.saved_tensors
        b, a, s, d = q_basd.shape
        scratch = [torch.empty_like(lse)]
        if d == v_bksd.shape[3]:
            # Values of another width (DeepSeek) rule FlashAttention out (sdp_utils_cpp.h,
            # check_head_dim_size); the memory-efficient kernel adds up in the gradients.
            scratch.append(q_basd.new_empty(b, a, s, d, dtype=torch.float32))
        gradients = (
            torch.zeros_like(q_basd),
            torch.zeros_like(k_bksd),
            torch.zeros_like(v_bksd),
        )
        if k_bksd.shape[1] != a:
            scratch += [q_basd.new_empty(b, s, a, d), q_basd.new_empty(b, s, a, d)]
        del scratch
        return (*gradients, None)


def register_fused_attention(*, scale: int) -> None:
    """Make the fused kernel's stand-in selectable as an attention implementation."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(
        _module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        if attention_mask is None:
            return cast("torch.Tensor", FusedAttention.apply(query, key, value, scale)), None  # type: ignore[no-untyped-call]
        return _attend_with_mask(query, key, value, attention_mask, scale=scale), None

    ALL_ATTENTION_FUNCTIONS.register(FUSED_ATTENTION, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(FUSED_ATTENTION, sdpa_mask)


class MaskedAttention(torch.autograd.Function):
    """Allocate and save what SDPA's memory-efficient kernel does with a padding mask.

    Source:
        torch 2.13 ``attention.cpp``, ``convert_boolean_attn_mask`` (a bias of the query's
        dtype, saved for backward) and ``transformers/integrations/sdpa_attention.py``
        (keys and values repeated to all heads when a mask is given).
    """

    @staticmethod
    def forward(  # noqa: PLR0917  (autograd passes by position)
        ctx: Any,
        q_basd: torch.Tensor,
        k_basd: torch.Tensor,
        v_basd: torch.Tensor,
        mask_b1ss: torch.Tensor,
        scale: int,
    ) -> torch.Tensor:
        """Return zeros [b, s, a, d] and save the operands, the bias and the log-sum-exp."""
        b, a, s, _ = q_basd.shape
        bias_b1ss = torch.zeros_like(mask_b1ss, dtype=q_basd.dtype)
        out_bsad = q_basd.new_zeros(b, s, a, v_basd.shape[3])
        lse = q_basd.new_zeros(max(b * a * s // scale, 1), dtype=torch.float32)
        ctx.save_for_backward(q_basd, k_basd, v_basd, bias_b1ss, out_bsad, lse)
        return out_bsad

    @staticmethod
    def backward(ctx: Any, *_grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return zero gradients of q, k and v; delta (like the log-sum-exp) is alive."""
        q_basd, k_basd, v_basd, _, _, lse = ctx.saved_tensors
        delta = torch.empty_like(lse)
        gradients = (
            torch.zeros_like(q_basd),
            torch.zeros_like(k_basd),
            torch.zeros_like(v_basd),
        )
        del delta
        return (*gradients, None, None)


def _attend_with_mask(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, *, scale: int
) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    return cast("torch.Tensor", MaskedAttention.apply(query, key, value, mask, scale))  # type: ignore[no-untyped-call]


def token_ids(vocab_size: int, *, batch: int, tokens: int) -> torch.Tensor:
    """Return token ids [batch, tokens] that are valid for the scaled vocabulary."""
    return F.pad(torch.ones(batch, tokens - 1, dtype=torch.long), (0, 1), value=vocab_size - 1)
