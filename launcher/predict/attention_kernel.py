"""Which attention kernel torch runs for a workload on a GPU."""

from __future__ import annotations

from launcher.hardware import GpuSpec
from launcher.predict.layer_parts import AttentionKernel
from launcher.strategy import Attention, Precision, Strategy
from launcher.workload import Workload

# flash-attention 2 README: "All head dimensions up to 256".
LARGEST_FLASH_HEAD_DIM = 256
# Compute capability from which torch prefers cuDNN's attention to the memory-efficient kernel.
_CUDNN_ATTENTION = (9, 0)


def attention_kernel(
    workload: Workload, strategy: Strategy, gpu: GpuSpec, *, has_window: bool = True
) -> AttentionKernel:
    """Return the kernel that runs: torch's SDPA picks by mask and compute capability.

    Args:
        workload: model, length, precision and padding.
        strategy: the attention that was chosen.
        gpu: its compute capability decides.
        has_window: in the layers with a sliding window, if the model has any; else in the others.

    Source: torch 2.13 ``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``: a mask, fp32 or
    compute capability below 8.0 rule out FlashAttention, and the memory-efficient kernel knows no
    grouped key/value heads: the worker has transformers copy them (``worker/attention.py``).
    transformers 5.17 ``masking_utils.py:_ignore_causal_mask_sdpa``: a sliding window needs a mask
    once the sequence fills it.
    """
    model = workload.model
    if strategy.attention is Attention.eager or (
        strategy.attention is Attention.sdpa
        and (model.attention_softcap is not None or not model.has_sdpa)
    ):
        return "eager"
    if strategy.attention is Attention.flash_attention_2:
        return "flash"
    if model.model_type == "falcon":
        # Falcon builds its mask always; with one key/value head only torch's math remains.
        return "math" if model.num_key_value_heads == 1 else "efficient_masked"
    window = model.sliding_window if has_window and model.num_sliding_layers else None
    if workload.has_padding or (window is not None and workload.max_seq_len >= window):
        return "efficient_masked"
    if gpu.has_flash_attention_2 and workload.precision is not Precision.fp32:
        return "flash"
    return "efficient"


def can_run_flash(workload: Workload, gpu: GpuSpec) -> bool:
    """Return whether the flash-attn package has a kernel for the model, its precision and the GPU.

    Source: flash-attention 2 README: Ampere and newer, fp16 and bf16, heads up to 256; transformers
    5.23 ``models/gemma2/modeling_gemma2.py``: scores are capped in eager attention alone.
    """
    model = workload.model
    is_16_bit = workload.precision is not Precision.fp32
    fits_kernel = model.head_dim <= LARGEST_FLASH_HEAD_DIM and model.attention_softcap is None
    return gpu.has_flash_attention_2 and is_16_bit and fits_kernel


def has_cudnn_attention(gpu: GpuSpec) -> bool:
    """Return whether cuDNN's kernel takes the place of the memory-efficient one.

    Inferred from one H100 run, Phi-3-mini under its sliding window's mask: the output keeps
    q's order, which the memory-efficient kernel's does not. The kernel itself was not traced.
    """
    return gpu.compute_capability is not None and gpu.compute_capability >= _CUDNN_ATTENTION
