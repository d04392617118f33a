"""Combinations that cannot work or never pay, each with its reason and source."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.hardware import ClusterSpec, GpuSpec
from launcher.model_spec import ModelSpec
from launcher.strategy import Attention, Checkpointing, Loss, Method, Offload, Precision, Strategy
from launcher.workload import Workload

# liger_kernel 0.8.5 transformers/monkey_patch.py: MODEL_TYPE_TO_APPLY_LIGER_FN.
LIGER_MODEL_TYPES = frozenset(
    {
        "gemma2", "gemma3_text", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3",
        "qwen3_moe", "smollm3",
    }
)  # fmt: skip


def default_attention(model: ModelSpec) -> Attention:
    """Return sdpa: torch's own FlashAttention-2 kernel, or memory-efficient before sm80.

    Eager only where the architecture caps attention scores, which SDPA cannot do
    (transformers 5.23 models/gemma2/modeling_gemma2.py:eager_attention_forward).
    """
    return Attention.eager if model.attention_softcap else Attention.sdpa


def losses_that_work(model: ModelSpec, gpu: GpuSpec, *, has_liger: bool) -> tuple[Loss, ...]:
    """Return the loss implementations to consider, simplest first."""
    if has_liger and gpu.device_type == "cuda" and model.model_type in LIGER_MODEL_TYPES:
        return (Loss.full, Loss.liger)
    return (Loss.full, Loss.chunked)


def why_impossible(strategy: Strategy, workload: Workload, cluster: ClusterSpec) -> str | None:
    """Return the first reason why this combination must not be chosen, or ``None``."""
    return next(_reasons(strategy, workload, cluster), None)


def _reasons(strategy: Strategy, workload: Workload, cluster: ClusterSpec) -> Iterator[str]:
    yield from _hardware_reasons(strategy, workload, cluster.gpu)
    yield from _kernel_reasons(strategy, workload, cluster.gpu)
    yield from _offload_reasons(strategy, cluster.gpu)
    if workload.method is Method.qlora:
        yield from _qlora_reasons(strategy, workload)
    if strategy.zero_stage == 1 and _accumulates_in_fp32(strategy, workload):
        # deepspeed 0.19.8 runtime/engine.py: ZeRO-1 with bf16 and fp32 accumulation selects
        # BF16_Optimizer, whose boundary holds 10 bytes per trainable parameter.
        yield "ZeRO-1 with fp32 gradient accumulation keeps all gradients in fp32: use ZeRO-2"


def _hardware_reasons(strategy: Strategy, workload: Workload, gpu: GpuSpec) -> Iterator[str]:
    if workload.precision is Precision.bf16 and not gpu.has_bf16:
        yield f"{gpu.name} has no bf16 units (compute capability below 8.0): use fp16"
    if workload.precision is Precision.fp16 and gpu.device_type == "cpu":
        yield "DeepSpeed refuses fp16 on a processor: use fp32 or bf16"
    if strategy.attention is Attention.flash_attention_2 and not gpu.has_flash_attention_2:
        yield f"FlashAttention-2 needs compute capability 8.0; {gpu.name} has none: use sdpa"


def _kernel_reasons(strategy: Strategy, workload: Workload, gpu: GpuSpec) -> Iterator[str]:
    model = workload.model
    if strategy.attention is Attention.flash_attention_2 and workload.precision is Precision.fp32:
        yield "FlashAttention-2 has fp16 and bf16 kernels only: use sdpa for fp32"
    if strategy.attention is not Attention.eager and model.attention_softcap:
        yield f"{model.name} caps its attention scores, which only eager attention does"
    if (strategy.loss is Loss.liger or strategy.liger_kernels) and gpu.device_type == "cpu":
        yield "Liger's kernels are Triton and need a GPU"
    if strategy.loss is Loss.liger and model.model_type not in LIGER_MODEL_TYPES:
        yield f"Liger has no kernels for {model.model_type}: use the chunked loss"


def _offload_reasons(strategy: Strategy, gpu: GpuSpec) -> Iterator[str]:
    stage = strategy.zero_stage
    optimizer_to, param_to = strategy.offload_optimizer, strategy.offload_param
    moves_inputs = strategy.gradient_checkpointing is Checkpointing.cpu_offload
    moves_states = Offload.none != optimizer_to or Offload.none != param_to
    if gpu.device_type == "cpu" and (moves_states or moves_inputs):
        yield "the ranks already run on the processor: there is nothing to offload to"
    if param_to is not Offload.none and stage != 3:
        yield f"parameters can be offloaded at ZeRO-3 only, not ZeRO-{stage}"
    if optimizer_to is not Offload.none and stage == 0:
        yield "optimizer states can be offloaded at ZeRO-1, 2 or 3, not ZeRO-0"
    if optimizer_to is Offload.nvme and stage != 3:
        yield f"optimizer states can go to NVMe at ZeRO-3 only, not ZeRO-{stage}"
    if param_to is not Offload.none and optimizer_to is Offload.none:
        yield "offloading parameters while their optimizer states stay on the GPU gains nothing"


def _accumulates_in_fp32(strategy: Strategy, workload: Workload) -> bool:
    return (
        workload.precision is not Precision.fp32
        and strategy.grad_accum_dtype is Precision.fp32
        and strategy.offload_optimizer is Offload.none
    )


def _qlora_reasons(strategy: Strategy, workload: Workload) -> Iterator[str]:
    if strategy.zero_stage != 3:
        return
    if workload.quantization.kind == "int8":
        yield "int8 weights cannot be sharded by ZeRO-3: use nf4, or ZeRO-2"
    if strategy.offload_optimizer is not Offload.none or strategy.offload_param is not Offload.none:
        # peft 0.21 docs/source/accelerate/deepspeed.md, section on QLoRA and ZeRO-3.
        yield "QLoRA under ZeRO-3 needs more GPU memory with CPU offload than without"
