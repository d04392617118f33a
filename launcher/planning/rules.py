"""Combinations that cannot work or never pay, each with its reason and source."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.hardware import ClusterSpec, GpuSpec
from launcher.model_spec import ModelSpec
from launcher.predict.attention_kernel import LARGEST_FLASH_HEAD_DIM
from launcher.predict.liger_kernels import LIGER_MODEL_TYPES, has_liger_kernels, runs_triton
from launcher.strategy import (
    Attention,
    Checkpointing,
    Loss,
    Method,
    Offload,
    Optimizer,
    Precision,
    Strategy,
)
from launcher.units import format_bytes
from launcher.workload import Workload

METHOD_NAME = {Method.full: "full fine-tuning", Method.lora: "LoRA", Method.qlora: "QLoRA"}
_MOST_8BIT_ELEMENTS = 2**31 - 1
_MANY_PARTS = 64
"""Of 4,096 tokens, a part then has 64 and fewer: products of so few rows leave a GPU idle."""


def default_attention(model: ModelSpec) -> Attention:
    """Return sdpa: torch's own FlashAttention-2 kernel, or memory-efficient before sm80.

    Eager only where the architecture caps attention scores, which SDPA cannot do
    (transformers 5.23 models/gemma2/modeling_gemma2.py:eager_attention_forward).
    """
    is_eager = model.attention_softcap or not model.has_sdpa
    return Attention.eager if is_eager else Attention.sdpa


def losses_that_work(model: ModelSpec, gpu: GpuSpec, *, has_liger: bool) -> tuple[Loss, ...]:
    """Return the loss implementations to consider, simplest first.

    Liger makes the scores of about tokens x hidden size / vocabulary at a time, and where
    that layer is trained its whole gradient for each: many parts take longer than the chunked loss.

    Source: liger-kernel 0.8.5 ``ops/fused_linear_cross_entropy.py``: ``inc_factor``.
    """
    if not has_liger or not has_liger_kernels(model.model_type, gpu):
        return (Loss.full, Loss.chunked)
    if model.vocab_size > _MANY_PARTS * model.hidden_size:
        return (Loss.full, Loss.chunked, Loss.liger)
    return (Loss.full, Loss.liger)


def why_impossible(strategy: Strategy, workload: Workload, cluster: ClusterSpec) -> str | None:
    """Return the first reason why this combination must not be chosen, or ``None``."""
    return next(_reasons(strategy, workload, cluster), None)


def why_zero_3_is_too_much(
    strategy: Strategy, workload: Workload, *, world_size: int
) -> str | None:
    """Return why this is not chosen although it fits, given that ZeRO-1 or 2 fits as well.

    Adapters leave next to nothing to shard but the frozen weights; ZeRO-3 then sends all of
    them to every GPU, layer by layer, two or three times per step.

    Source:
        arXiv:2406.02290, section 5: ZeRO-2 with LoRA is the default, ZeRO-3 is for what does
        not fit otherwise; arXiv:1910.02054, section 7.3: ZeRO-3 gathers parameters anew.
    """
    if workload.method is Method.full or strategy.zero_stage < 3:
        return None
    if world_size == 1:
        return "on one GPU ZeRO-3 has nothing to share out, only work to do"
    return (
        "ZeRO-3 sends the whole frozen model between the GPUs in every pass, which "
        f"{METHOD_NAME[workload.method]} does not need here: it fits without"
    )


def why_offload_gains_nothing(offloaded_bytes: int, kept_bytes: int) -> str | None:
    """Return why moving states to the host is pointless, or ``None`` when it saves GPU memory.

    DeepSpeed stages offloaded gradients in a GPU buffer of the largest tensor and takes their
    norm in fp64 there; with few trained parameters that is more than the states themselves.

    Args:
        offloaded_bytes: predicted device memory with offload.
        kept_bytes: the same strategy without it.

    Source:
        deepspeed 0.19.8 ``runtime/zero/stage_1_and_2.py``: ``temp_grad_buffer_for_gpu_offload``
        and ``get_norm_dtype``; peft 0.21 ``docs/source/accelerate/deepspeed.md``, on QLoRA:
        with CPU offload more GPU memory was needed than without.
    """
    if offloaded_bytes < kept_bytes:
        return None
    more = format_bytes(offloaded_bytes - kept_bytes)
    return f"offloading to the host takes {more} more GPU memory here, not less"


def _reasons(strategy: Strategy, workload: Workload, cluster: ClusterSpec) -> Iterator[str]:
    yield from _hardware_reasons(strategy, workload, cluster.gpu)
    yield from _kernel_reasons(strategy, workload, cluster.gpu)
    yield from _optimizer_reasons(strategy, workload, cluster)
    yield from _offload_reasons(strategy, cluster)
    if strategy.zero_stage == 3 and cluster.world_size % strategy.zero.copy_ranks(
        cluster.world_size
    ):
        # deepspeed 0.19.8 utils/groups.py:_create_zero_param_parallel_group asserts it.
        yield (
            f"{cluster.world_size} GPUs cannot be cut into groups of "
            f"{strategy.zero.zero_hpz_partition_size} (zero_hpz_partition_size)"
        )
    if workload.method is Method.qlora:
        yield from _qlora_reasons(strategy, workload)
    yield from _accumulation_reasons(strategy, workload)
    if strategy.sequence_parallel_size > 1:
        yield from _sequence_reasons(strategy, workload)


def why_not_shared(strategy: Strategy, workload: Workload) -> str | None:
    """Return the first reason why GPUs cannot share this workload's sequences, or ``None``."""
    return next(_sequence_reasons(strategy, workload), None)


def _sequence_reasons(strategy: Strategy, workload: Workload) -> Iterator[str]:
    """Yield what ``launcher/worker/sequence.py`` cannot do."""
    model, size = workload.model, strategy.sequence_parallel_size
    heads, key_heads = model.num_attention_heads, model.num_key_value_heads
    if heads % size or (key_heads % size and size % key_heads):
        yield (
            f"{model.name} has {heads} heads and {key_heads} key heads, which {size} GPUs cannot "
            "share evenly"
        )
    if workload.max_seq_len < size:
        yield f"{workload.max_seq_len} tokens have no part for each of {size} GPUs"
    if workload.has_padding:
        yield "packed examples are kept apart by masks, which no GPU has for a whole sequence"
    if strategy.attention is Attention.eager:
        # transformers makes the mask from a rank's own part, of s/N x s/N.
        yield "eager attention needs a mask of the whole sequence: use sdpa"
    window = model.sliding_window
    if window and window < workload.max_seq_len and strategy.attention is Attention.sdpa:
        yield f"sdpa needs a mask for {model.name}'s sliding window: use flash_attention_2"
    if model.traced is not None or model.model_type == "falcon":
        # transformers 5.23 models/falcon/modeling_falcon.py: _supports_attention_backend is off.
        yield f"whether {model.model_type}'s attention can be shared by GPUs is not known"
    if model.model_type == "phi3":
        # LongRoPE picks its factors by the largest position (modeling_rope_utils.py).
        yield "Phi-3's positions may depend on the length, of which each GPU sees its part only"


def _hardware_reasons(strategy: Strategy, workload: Workload, gpu: GpuSpec) -> Iterator[str]:
    if workload.precision is Precision.bf16 and not gpu.has_bf16:
        # torch 2.13 cuda/__init__.py:is_bf16_supported says yes before sm80: it is emulated.
        yield f"{gpu.name} has no bf16 units (compute capability below 8.0): use fp16"
    if workload.precision is Precision.fp16 and gpu.device_type == "cpu":
        # deepspeed 0.19.8 accelerator/cpu_accelerator.py:is_fp16_supported, engine.py.
        yield "DeepSpeed refuses fp16 on a processor: use fp32 or bf16"
    if strategy.attention is Attention.flash_attention_2 and not gpu.has_flash_attention_2:
        # flash-attention 2 README: Ampere, Ada or Hopper; Turing and Volta are not supported.
        yield f"FlashAttention-2 needs compute capability 8.0; {gpu.name} has less: use sdpa"


def _kernel_reasons(strategy: Strategy, workload: Workload, gpu: GpuSpec) -> Iterator[str]:
    model = workload.model
    if strategy.attention is Attention.flash_attention_2:
        if workload.precision is Precision.fp32:
            # flash-attention 2 README: "Datatype fp16 and bf16".
            yield "FlashAttention-2 has fp16 and bf16 kernels only: use sdpa for fp32"
        if model.head_dim > LARGEST_FLASH_HEAD_DIM:
            yield (
                f"FlashAttention-2 has kernels up to head size {LARGEST_FLASH_HEAD_DIM}; "
                f"{model.name} has {model.head_dim}: use sdpa"
            )
    if strategy.attention is not Attention.eager and model.attention_softcap:
        yield f"{model.name} caps its attention scores, which only eager attention does: use eager"
    if strategy.attention is Attention.sdpa and not model.has_sdpa:
        # transformers 5.23 modeling_utils.py:_check_and_adjust_attn_implementation refuses it.
        yield f"{model.model_type} has no sdpa attention in transformers: use eager"
    if strategy.loss is not Loss.liger and not strategy.liger_kernels:
        return
    if not runs_triton(gpu):
        yield (
            f"Liger's kernels need Triton, which needs compute capability 8.0; {gpu.name} has "
            "less: use the chunked loss"
        )
    if model.model_type not in LIGER_MODEL_TYPES:
        instead = (
            "use the chunked loss" if strategy.loss is Loss.liger else "leave liger_kernels out"
        )
        yield f"Liger has no kernels for {model.model_type}: {instead}"


def _optimizer_reasons(
    strategy: Strategy, workload: Workload, cluster: ClusterSpec
) -> Iterator[str]:
    gpu = cluster.gpu
    if not strategy.optimizer.is_8bit:
        return
    partition = workload.num_trainable_params
    if strategy.zero_stage > 0:
        partition //= cluster.world_size
    if strategy.zero_stage < 3 and partition > _MOST_8BIT_ELEMENTS:
        # DeepSpeed makes one flat tensor of the partition, ZeRO-3 several of sub_group_size.
        # bitsandbytes 0.50.2 backends/cuda/ops.py passes c_int32(g.numel()); H100, 3.2e9
        # elements: SIGABRT in the first step.
        yield (
            f"bitsandbytes' 8-bit optimizers count to {_MOST_8BIT_ELEMENTS:,} elements, and each "
            f"rank would have {partition:,} in one tensor: use ZeRO-3, more GPUs, or adamw"
        )
    if strategy.offload_optimizer is not Offload.none:
        # accelerate 1.15 utils/deepspeed.py:map_pytorch_optim_to_deepspeed: offloaded states
        # belong to DeepSpeedCPUAdam, which keeps them in fp32.
        yield "an 8-bit optimizer lives on the GPU; offloaded states are always fp32: use adamw"
    if gpu.device_type == "cpu" and strategy.optimizer is Optimizer.paged_adamw_8bit:
        # bitsandbytes 0.50 functional.py:get_paged: CUDA managed memory.
        yield "paged optimizer states are CUDA memory, a processor has none: use adamw_8bit"


def _offload_reasons(strategy: Strategy, cluster: ClusterSpec) -> Iterator[str]:
    stage = strategy.zero_stage
    optimizer_to, param_to = strategy.offload_optimizer, strategy.offload_param
    moves_inputs = strategy.gradient_checkpointing is Checkpointing.cpu_offload
    moves_states = Offload.none != optimizer_to or Offload.none != param_to
    if cluster.gpu.device_type == "cpu" and (moves_states or moves_inputs):
        yield "the ranks already run on the processor: there is nothing to offload to"
    if param_to is not Offload.none and stage != 3:
        # deepspeed 0.19.8 runtime/zero/offload_config.py: "valid only with stage 3".
        yield f"parameters can be offloaded at ZeRO-3 only, not ZeRO-{stage}"
    if optimizer_to is not Offload.none and stage == 0:
        # deepspeed 0.19.8 runtime/zero/offload_config.py: stages 1, 2 and 3.
        yield "optimizer states can be offloaded at ZeRO-1, 2 or 3, not ZeRO-0"
    if optimizer_to is Offload.nvme and stage != 3:
        # deepspeed 0.19.8 runtime/engine.py:zero_cpu_offload takes nvme for cpu there, silently.
        yield f"optimizer states can go to NVMe at ZeRO-3 only, not ZeRO-{stage}"
    if param_to is not Offload.none and optimizer_to is Offload.none:
        # 2 bytes a parameter leave the GPU while 12 of its optimizer states stay; untested.
        yield "offloading parameters while their optimizer states stay on the GPU gains nothing"


def _accumulation_reasons(strategy: Strategy, workload: Workload) -> Iterator[str]:
    """Yield what DeepSpeed does to an accumulation type other than the model's.

    Source: deepspeed 0.19.8 ``runtime/engine.py:_do_optimizer_sanity_check``.
    """
    wanted = strategy.grad_accum_dtype
    if wanted is None or wanted is workload.precision:
        return
    if strategy.zero_stage == 0:
        yield (
            f"without ZeRO, DeepSpeed cannot accumulate gradients in {wanted.value} for a model "
            f"in {workload.precision.value}: use ZeRO-2"
        )
    if (
        strategy.zero_stage == 1
        and workload.precision is Precision.bf16
        and wanted is Precision.fp32
        and strategy.offload_optimizer is Offload.none
    ):
        # It selects BF16_Optimizer (runtime/bf16_optimizer.py): 4 bytes per trained parameter
        # on every GPU, unsharded, besides the gradients.
        yield "ZeRO-1 with fp32 gradient accumulation keeps all gradients in fp32: use ZeRO-2"


def _qlora_reasons(strategy: Strategy, workload: Workload) -> Iterator[str]:
    if strategy.zero_stage == 3 and workload.quantization.kind == "int8":
        # bitsandbytes 0.50.2 nn/modules.py:Linear8bitLt keeps the whole matrix in ``state.CB`` from
        # the first forward on, beside ZeRO-3's parameter: every rank would hold the whole model.
        yield "int8 weights cannot be sharded by ZeRO-3: use nf4, or ZeRO-2"
