"""Say why: each choice against its best alternative, in sentences for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum

from launcher.hardware import ClusterSpec
from launcher.planning.plan import Candidate, Decision, Rejected
from launcher.recipe import StrategySection
from launcher.strategy import Attention, Checkpointing, Loss, Method, Offload, Strategy
from launcher.units import format_gib
from launcher.workload import Workload

_STAGE_MEANING = {
    0: "ZeRO-0 keeps everything on every GPU",
    1: "ZeRO-1 shards the optimizer states over the GPUs",
    2: "ZeRO-2 shards optimizer states and gradients over the GPUs",
    3: "ZeRO-3 shards optimizer states, gradients and parameters over the GPUs",
}
_CHECKPOINTING_MEANING = {
    Checkpointing.none: "activations are kept, nothing is computed twice",
    Checkpointing.full: "only each layer's input is kept, the rest is recomputed in backward",
    Checkpointing.cpu_offload: "each layer's input waits in host memory, the rest is recomputed",
}
_LOSS_MEANING = {
    Loss.full: "all logits at once",
    Loss.chunked: "logits in chunks, never all of sequence x vocabulary at once",
    Loss.liger: "Liger's fused kernel, logits never exist all at once",
}
_OFFLOAD_MEANING = {
    Offload.none: "stays on the GPU",
    Offload.cpu: "lives in host memory between uses",
    Offload.nvme: "lives on the NVMe drive between uses",
}


def explain_choice(
    best: Candidate,
    weighed: Sequence[Candidate],
    workload: Workload,
    cluster: ClusterSpec,
    fixed: StrategySection,
) -> tuple[Decision, ...]:
    """Return one decision per strategy field, each compared with its alternatives."""
    strategy = best.strategy

    def decide(field: str, meaning: str) -> Decision:
        def value_of(candidate: Candidate) -> object:
            return getattr(candidate.strategy, field)

        if getattr(fixed, field, None) is not None:
            reason = f"{meaning}; set in the recipe."
        else:
            against = _against_alternatives(best, weighed, value_of)
            reason = f"{meaning}. {against}".strip()
        return Decision(field=field, value=_plain(getattr(strategy, field)), reason=reason)

    per_gpu = workload.global_batch_size // cluster.world_size
    micro_meaning = (
        f"{strategy.micro_batch_size_per_gpu} samples per GPU at a time, "
        f"{strategy.gradient_accumulation_steps} times per optimizer step "
        f"({per_gpu} x {cluster.world_size} GPUs = {workload.global_batch_size} samples)"
    )
    return (
        Decision(field="precision", value=workload.precision.value, reason=_precision(cluster)),
        decide("zero_stage", _stage_meaning(strategy, workload, cluster)),
        decide("offload_optimizer", _OFFLOAD_MEANING[strategy.offload_optimizer]),
        decide("offload_param", _OFFLOAD_MEANING[strategy.offload_param]),
        decide("gradient_checkpointing", _CHECKPOINTING_MEANING[strategy.gradient_checkpointing]),
        Decision(
            field="attention",
            value=strategy.attention.value,
            reason=_attention(strategy, cluster, fixed),
        ),
        decide("loss", _LOSS_MEANING[strategy.loss]),
        decide("micro_batch_size_per_gpu", micro_meaning),
        Decision(
            field="reduce_bucket_size",
            value=f"{strategy.zero.reduce_bucket_size:,}",
            reason=_buckets(strategy, workload),
        ),
    )


def explain_rejections(
    best: Candidate,
    weighed: Sequence[Candidate],
    impossible: Mapping[Strategy, str],
    limit_bytes: int,
) -> tuple[Rejected, ...]:
    """Return the best of every other kind of strategy and why it lost, nearest first."""
    groups: dict[tuple[object, ...], Candidate] = {}
    for candidate in weighed:
        kind = _kind(candidate.strategy)
        if kind not in groups or _order(candidate) < _order(groups[kind]):
            groups[kind] = candidate
    groups.pop(_kind(best.strategy), None)
    lost = [
        Rejected(
            strategy=candidate.strategy,
            reason=_why_lost(candidate, best, limit_bytes),
            fits=candidate.fits,
            device_used_bytes=candidate.memory.device_used_bytes,
            step_seconds=candidate.time.step_seconds,
        )
        for candidate in sorted(groups.values(), key=_order)
    ]
    seen_reasons: set[str] = set()
    for strategy, reason in impossible.items():
        if reason not in seen_reasons and _kind(strategy) not in groups:
            seen_reasons.add(reason)
            lost.append(
                Rejected(
                    strategy=strategy,
                    reason=reason,
                    fits=False,
                    device_used_bytes=None,
                    step_seconds=None,
                )
            )
    return tuple(lost)


def label(strategy: Strategy) -> str:
    """Return a strategy in a few words: ``ZeRO-2, checkpointing, micro-batch 4``."""
    parts = [f"ZeRO-{strategy.zero_stage}"]
    if strategy.offload_optimizer is not Offload.none:
        parts.append(f"optimizer on {strategy.offload_optimizer.value}")
    if strategy.offload_param is not Offload.none:
        parts.append(f"parameters on {strategy.offload_param.value}")
    if strategy.gradient_checkpointing is not Checkpointing.none:
        moved = strategy.gradient_checkpointing is Checkpointing.cpu_offload
        parts.append("checkpointing" + (" with CPU offload" if moved else ""))
    if strategy.attention is Attention.eager:
        parts.append("eager attention")
    if strategy.loss is not Loss.full:
        parts.append(f"{strategy.loss.value} loss")
    parts.append(f"micro-batch {strategy.micro_batch_size_per_gpu}")
    return ", ".join(parts)


def _kind(strategy: Strategy) -> tuple[object, ...]:
    return (
        strategy.zero_stage,
        strategy.offload_optimizer,
        strategy.offload_param,
        strategy.gradient_checkpointing,
    )


def _order(candidate: Candidate) -> tuple[bool, float]:
    """Sort what fits by time, then what does not by how much memory it needs."""
    if candidate.fits:
        return (False, candidate.time.step_seconds)
    return (True, float(candidate.memory.device_used_bytes))


def _why_lost(candidate: Candidate, best: Candidate, limit_bytes: int) -> str:
    if not candidate.fits:
        return _why_too_large(candidate, limit_bytes)
    slower = candidate.time.step_seconds / best.time.step_seconds
    saved_bytes = best.memory.device_used_bytes - candidate.memory.device_used_bytes
    memory = f"{format_gib(abs(saved_bytes))} {'less' if saved_bytes > 0 else 'more'} memory"
    if slower <= 1.005:
        return f"fits, no faster, {memory}"
    return f"fits, {slower:.2f}x slower, {memory} ({candidate.time.bound_by})"


def _why_too_large(candidate: Candidate, limit_bytes: int) -> str:
    memory = candidate.memory
    if memory.device_used_bytes <= limit_bytes:
        name, size = max(memory.host_components.items(), key=lambda item: item[1])
        return (
            f"needs {format_gib(memory.host_bytes_per_node)} of host memory per node, more than "
            f"there is; most of it: {name} {format_gib(size)}"
        )
    name, size = max(memory.fullest.components.items(), key=lambda item: item[1])
    return (
        f"needs {format_gib(memory.device_used_bytes)} of {format_gib(limit_bytes)} usable; "
        f"most of it in {memory.fullest.phase}: {name} {format_gib(size)}"
    )


def _against_alternatives(
    best: Candidate, weighed: Sequence[Candidate], value_of: Callable[[Candidate], object]
) -> str:
    """Compare the choice with the best candidate for each other value of one field."""
    chosen = value_of(best)
    rivals: dict[object, Candidate] = {}
    for candidate in weighed:
        value = value_of(candidate)
        if value != chosen and (value not in rivals or _order(candidate) < _order(rivals[value])):
            rivals[value] = candidate
    sentences = []
    for value, rival in sorted(rivals.items(), key=lambda item: _order(item[1]))[:2]:
        name = _plain(value)
        if not rival.fits:
            needed = format_gib(rival.memory.device_used_bytes)
            sentences.append(f"{name} would need {needed} and does not fit.")
            continue
        ratio = rival.time.step_seconds / best.time.step_seconds
        saved_bytes = best.memory.device_used_bytes - rival.memory.device_used_bytes
        pace = "no faster" if ratio <= 1.02 else f"{ratio:.2f}x slower"
        size = f"{format_gib(abs(saved_bytes))} {'less' if saved_bytes > 0 else 'more'} memory"
        sentences.append(f"{name} would be {pace} with {size}.")
    return " ".join(sentences)


def _plain(value: object) -> str:
    return str(value.value if isinstance(value, Enum) else value)


def _precision(cluster: ClusterSpec) -> str:
    if cluster.gpu.device_type == "cpu":
        return "ranks run on the processor: fp32 unless the recipe asks for bf16."
    if cluster.gpu.has_bf16:
        return f"{cluster.gpu.name} has native bf16, which needs no loss scaling."
    return f"{cluster.gpu.name} has no native bf16: fp16 with loss scaling."


def _stage_meaning(strategy: Strategy, workload: Workload, cluster: ClusterSpec) -> str:
    meaning = _STAGE_MEANING[strategy.zero_stage]
    if cluster.world_size == 1:
        return f"{meaning}; on one GPU there is nothing to shard"
    if workload.method is not Method.full and strategy.zero_stage < 3:
        return f"{meaning}; the frozen base model stays whole on each GPU"
    return meaning


def _attention(strategy: Strategy, cluster: ClusterSpec, fixed: StrategySection) -> str:
    if fixed.attention is not None:
        return "set in the recipe."
    if strategy.attention is Attention.eager:
        return "the architecture caps its attention scores, which no fused kernel does."
    if cluster.gpu.device_type == "cpu":
        return "torch's fused kernel for processors; scores are never stored."
    if cluster.gpu.has_flash_attention_2:
        return "torch's own FlashAttention-2 kernel; scores are never stored."
    return f"memory-efficient kernel: {cluster.gpu.name} has no FlashAttention-2."


def _buckets(strategy: Strategy, workload: Workload) -> str:
    default = 500_000_000
    saved_bytes = (default - strategy.zero.reduce_bucket_size) * (
        workload.precision.bytes_per_element
    )
    if saved_bytes <= 0:
        return "set in the recipe."
    return (
        f"elements; DeepSpeed's default of 5e8 would hold {format_gib(saved_bytes)} more "
        "for no gain in speed."
    )
