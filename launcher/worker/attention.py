"""Which attention kernel the ranks run: settled when the model is made, said, never replaced."""

# Shape suffixes: b = sequences, n = heads, s = tokens, d = head size.

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import Any

import torch

from launcher.errors import ModelError
from launcher.strategy import Attention

logger = logging.getLogger(__name__)

_NUM_TOKENS = 64
"""Tokens of the question to torch: what it answers does not depend on the length."""


def settle_attention(
    model: Any, attention: Attention, *, dtype: torch.dtype, device: torch.device
) -> str:
    """Bar torch from computing attention in the open, and say which kernel runs instead.

    Where SDPA finds no fused kernel it falls back to plain matrix products ("math"), which
    store every score as eager attention does, without a word. On a GPU this switches that
    fall-back off, so that such a call is an error. Where FlashAttention-2 does not run
    (compute capability below 8.0, fp32), transformers must copy grouped key and value heads to
    every query head first: the memory-efficient kernel does not know groups.

    Args:
        model: a transformers model, not wrapped yet by PEFT.
        attention: the plan's choice.
        dtype: of queries, keys and values.
        device: where the model trains.

    Returns:
        One line for the user.

    Raises:
        ModelError: torch has no fused kernel for this model on this GPU.
    """
    line = _settle(model, attention, dtype=dtype, device=device)
    logger.info("attention: %s", line)
    return line


def _settle(model: Any, attention: Attention, *, dtype: torch.dtype, device: torch.device) -> str:
    if attention is Attention.flash_attention_2:
        return f"the flash-attn package, {version('flash-attn')}"
    if attention is Attention.eager:
        return "eager, as planned: every token's score for every other is stored"
    if device.type != "cuda":
        return "torch's fused kernel for processors (SDPA)"
    if not model._supports_attention_backend:
        # Falcon: its single key/value head with a mask has no fused kernel, and is planned so.
        return f"{type(model).__name__} calls SDPA itself; torch chooses the kernel for each call"
    heads, key_heads, head_dim = _heads(model.config.get_text_config())
    if _can_run_flash(heads, key_heads, head_dim, dtype=dtype, device=device):
        torch.backends.cuda.enable_math_sdp(enabled=False)
        return "torch's own FlashAttention-2 kernel (SDPA)"
    if not _can_run_efficient(heads, head_dim, dtype=dtype, device=device):
        raise ModelError(
            f"torch has no fused attention kernel for heads of {head_dim} in {dtype} on "
            f"{torch.cuda.get_device_name(device)}",
            where="strategy.attention = sdpa",
            fix="use strategy.attention=eager, which stores every score, or shorter sequences",
        )
    if key_heads != heads:
        _copy_grouped_heads()
    torch.backends.cuda.enable_math_sdp(enabled=False)
    return "torch's memory-efficient kernel (SDPA); FlashAttention-2 does not run here"


def _heads(config: Any) -> tuple[int, int, int]:
    """Return query heads, key/value heads and the size of a head."""
    heads: int = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, key_heads, head_dim


def _can_run_flash(
    heads: int, key_heads: int, head_dim: int, *, dtype: torch.dtype, device: torch.device
) -> bool:
    shape = (1, key_heads, _NUM_TOKENS, head_dim)
    query_bnsd = torch.empty(1, heads, _NUM_TOKENS, head_dim, dtype=dtype, device=device)
    key_bnsd = torch.empty(shape, dtype=dtype, device=device)
    question = _question(query_bnsd, key_bnsd, is_grouped=heads != key_heads)
    return torch.backends.cuda.can_use_flash_attention(question, debug=False)


def _can_run_efficient(
    heads: int, head_dim: int, *, dtype: torch.dtype, device: torch.device
) -> bool:
    query_bnsd = torch.empty(1, heads, _NUM_TOKENS, head_dim, dtype=dtype, device=device)
    question = _question(query_bnsd, query_bnsd, is_grouped=False)
    return torch.backends.cuda.can_use_efficient_attention(question, debug=False)


def _question(query_bnsd: torch.Tensor, key_bnsd: torch.Tensor, *, is_grouped: bool) -> Any:
    mask, dropout, is_causal = None, 0.0, True
    return torch.backends.cuda.SDPAParams(
        query_bnsd, key_bnsd, key_bnsd, mask, dropout, is_causal, is_grouped
    )


def _copy_grouped_heads() -> None:
    """Make transformers copy grouped heads rather than hand the groups to SDPA.

    Source: transformers 5.23 ``integrations/sdpa_attention.py:use_gqa_in_sdpa``, which asks for
    groups whenever there is no mask, whatever the GPU and type.
    """
    from transformers.integrations import sdpa_attention

    sdpa_attention.use_gqa_in_sdpa = lambda *_arguments, **_options: False
