"""Words for plans: strategies, comparisons and what fills memory, for people new to ZeRO."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.hardware import GpuSpec
from launcher.planning.plan import Candidate
from launcher.planning.rules import METHOD_NAME
from launcher.predict import components as parts
from launcher.strategy import Attention, Checkpointing, Loss, Offload, Optimizer, Strategy
from launcher.units import GIB, MIB

__all__ = [
    "LOSS_MEANING", "METHOD_NAME", "changes", "compare", "format_samples", "label", "plain_part",
    "short_label", "short_size", "why_too_large",
]  # fmt: skip

# Below these, two predictions count as the same for a reader: time as in the search's ties.
SAME_TIME_FRACTION = 0.02
SAME_MEMORY_BYTES = 100 * 2**20

LOSS_MEANING = {
    Loss.full: "the scores of all words for all tokens (logits) are made at once",
    Loss.chunked: "the scores of all words (logits) are made for a few tokens at a time",
    Loss.liger: "Liger's fused kernel, which never holds the scores of all words (logits) at once",
}
_LOSS = {Loss.full: "full logits", Loss.chunked: "chunked loss", Loss.liger: "Liger loss"}
_ATTENTION = {
    Attention.eager: "eager attention",
    Attention.sdpa: "sdpa attention",
    Attention.flash_attention_2: "flash-attn package",
}
_CHECKPOINTING = {
    Checkpointing.none: "no checkpointing",
    Checkpointing.full: "checkpointing",
    Checkpointing.cpu_offload: "checkpointing to host memory",
}
_HOST = {Offload.cpu: "in host memory", Offload.nvme: "on NVMe"}
_PLAIN_PARTS: Mapping[str, str] = {
    parts.PARAMETERS: "the model's weights",
    parts.ADAPTERS: "the adapters' weights",
    parts.QUANTIZED: "the model's 4- or 8-bit weights",
    parts.OPTIMIZER: "optimizer states",
    parts.MASTER: "fp32 copy of the weights",
    parts.GRADIENTS: "gradients",
    parts.FLAT_GRADIENTS: "gradients, joined for the optimizer",
    parts.FP32_GRADIENTS: "gradients in fp32",
    parts.TEMPORARIES: "the optimizer's temporaries",
    parts.BUCKETS: "buffers for gradients",
    parts.GATHERED: "weights gathered for use",
    parts.REDUCTION: "gradients on their way",
    parts.NORM: "gradient norm",
    parts.SAVED: "activations kept for backward",
    parts.RECOMPUTED: "activations of the recomputed layer",
    parts.PASSING: "activations in use",
    parts.LOGITS: "logits (a score per token and word)",
    parts.DEQUANTIZED: "a weight unpacked to 16 bits",
    parts.PENDING: "gradients not yet sent",
    parts.OWNED: "this GPU's share of the gradients",
    parts.WORKSPACE: "cuBLAS workspace",
    parts.INPUTS: "the batch itself",
}


def label(strategy: Strategy) -> str:
    """Return a strategy in a few words: ``ZeRO-2, checkpointing, micro-batch 4``."""
    words = [f"ZeRO-{strategy.zero_stage}", *_moved(strategy), *_shared(strategy)]
    if strategy.gradient_checkpointing is not Checkpointing.none:
        moved = strategy.gradient_checkpointing is Checkpointing.cpu_offload
        words.append("checkpointing" + (" to host memory" if moved else ""))
    if strategy.attention is not Attention.sdpa:
        words.append(_ATTENTION[strategy.attention])
    if strategy.loss is not Loss.full:
        words.append(_LOSS[strategy.loss])
    if strategy.optimizer is not Optimizer.adamw:
        words.append(strategy.optimizer.value)
    words.append(f"micro-batch {strategy.micro_batch_size_per_gpu}")
    return ", ".join(words)


def changes(strategy: Strategy, chosen: Strategy) -> str:
    """Return how a strategy differs from the chosen one: ``ZeRO-3, with checkpointing``."""
    words = []
    if strategy.zero_stage != chosen.zero_stage:
        words.append(f"ZeRO-{strategy.zero_stage}")
    if _moved(strategy) != _moved(chosen):
        words += _moved(strategy) or ["everything on the GPU"]
    if strategy.sequence_parallel_size != chosen.sequence_parallel_size:
        words += _shared(strategy) or ["whole sequences"]
    if strategy.gradient_checkpointing is not chosen.gradient_checkpointing:
        words.append(_CHECKPOINTING[strategy.gradient_checkpointing])
    if strategy.attention is not chosen.attention:
        words.append(_ATTENTION[strategy.attention])
    if strategy.loss is not chosen.loss:
        words.append(_LOSS[strategy.loss])
    if strategy.optimizer is not chosen.optimizer:
        words.append(strategy.optimizer.value)
    mine, theirs = strategy.zero, chosen.zero
    live, usual = mine.stage3_max_live_parameters, theirs.stage3_max_live_parameters
    if strategy.zero_stage == 3 and live < usual:
        words.append("fewer weights gathered ahead")
    if strategy.zero_stage == 3 == chosen.zero_stage and live > usual:
        words.append("more weights gathered ahead")
    if strategy.zero_stage == chosen.zero_stage and mine.overlap_comm != theirs.overlap_comm:
        words.append("overlapping communication" if mine.overlap_comm else "no overlap")
    if strategy.micro_batch_size_per_gpu != chosen.micro_batch_size_per_gpu:
        words.append(f"micro-batch {strategy.micro_batch_size_per_gpu}")
    return ", ".join(words) or "other buffer sizes"


def short_label(strategy: Strategy) -> str:
    """Return what kind of strategy it is, without kernels and micro-batch."""
    words = [f"ZeRO-{strategy.zero_stage}", *_moved(strategy), *_shared(strategy)]
    words.append(_CHECKPOINTING[strategy.gradient_checkpointing])
    return ", ".join(words)


def plain_part(component: str) -> str:
    """Return a memory component in words that need no knowledge of DeepSpeed."""
    return _PLAIN_PARTS.get(component, component)


def format_samples(count: int) -> str:
    """Return a number of samples: ``1 sample``, ``2,048 samples``."""
    return "1 sample" if count == 1 else f"{count:,} samples"


def short_size(num_bytes: float) -> str:
    """Return a size for comparisons: ``7.4 GiB``, ``113 MiB``."""
    if abs(num_bytes) >= GIB:
        return f"{num_bytes / GIB:.1f} GiB"
    return f"{num_bytes / MIB:.0f} MiB"


def compare(rival: Candidate, best: Candidate) -> str:
    """Return how a rival that fits differs from the choice, as the rest of a sentence."""
    pace, memory = _pace(rival, best), _memory_change(rival, best)
    ratio = rival.time.step_seconds / best.time.step_seconds
    is_slower = ratio > 1 + SAME_TIME_FRACTION
    saved_bytes = best.memory.device_used_bytes - rival.memory.device_used_bytes
    if abs(saved_bytes) < SAME_MEMORY_BYTES:
        if is_slower:
            return f"{pace} and saves no GPU memory"
        return "makes no difference here" if ratio > 1 - SAME_TIME_FRACTION else pace
    if is_slower and saved_bytes > 0:
        return f"{memory}, but {pace}"
    if is_slower:
        return f"{pace} and {memory}"
    if saved_bytes > 0:
        is_as_fast = best.fits and ratio > 1 - SAME_TIME_FRACTION
        return f"{pace} and {memory}" + (", which is not needed" if is_as_fast else "")
    return f"{pace}, but {memory}"


def why_too_large(candidate: Candidate, *, limit_bytes: int, host_memory_bytes: int) -> str:
    """Return what a strategy that does not fit needs, and which part of it is the largest."""
    memory = candidate.memory
    if memory.device_used_bytes > limit_bytes:
        fullest = memory.fullest
        name, size = max(fullest.components.items(), key=lambda item: item[1])
        over = short_size(memory.device_used_bytes - limit_bytes)
        return (
            f"needs {short_size(memory.device_used_bytes)} per GPU, {over} too much; largest "
            f"part: {plain_part(name)}, {short_size(size)}"
        )
    name, size = max(memory.host_components.items(), key=lambda item: item[1])
    return (
        f"needs {short_size(memory.host_bytes_per_node)} of host memory per node, which has "
        f"{short_size(host_memory_bytes)}; largest part: {name}, {short_size(size)}"
    )


def _shared(strategy: Strategy) -> list[str]:
    size = strategy.sequence_parallel_size
    return [f"sequences shared by {size}"] if size > 1 else []


def _moved(strategy: Strategy) -> list[str]:
    optimizer_to, param_to = strategy.offload_optimizer, strategy.offload_param
    if optimizer_to is param_to and optimizer_to is not Offload.none:
        return [f"weights and optimizer {_HOST[optimizer_to]}"]
    moved = []
    if optimizer_to is not Offload.none:
        moved.append(f"optimizer {_HOST[optimizer_to]}")
    if param_to is not Offload.none:
        moved.append(f"weights {_HOST[param_to]}")
    return moved


def _pace(rival: Candidate, best: Candidate) -> str:
    ratio = rival.time.step_seconds / best.time.step_seconds
    if ratio >= 2:
        return f"takes {ratio:.1f} times as long"
    if ratio > 1 + SAME_TIME_FRACTION:
        return f"takes {ratio - 1:.0%} longer"
    if ratio < 1 - SAME_TIME_FRACTION:
        return f"would be {1 - ratio:.0%} faster"
    return "is as fast"


def _memory_change(rival: Candidate, best: Candidate) -> str:
    change = rival.memory.device_used_bytes - best.memory.device_used_bytes
    size = short_size(abs(change))
    return f"needs {size} more" if change > 0 else f"saves {size}"


def fit_words(text: str, gpu: GpuSpec) -> str:
    """Return a sentence about GPUs as it reads where ranks run on the processor."""
    if gpu.device_type == "cuda":
        return text
    return text.replace("GPU memory", "memory").replace("GPU", "rank")
