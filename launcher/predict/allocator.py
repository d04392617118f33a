"""From allocated bytes to what torch reserves and nvidia-smi shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from launcher.hardware import GpuSpec
from launcher.predict.calibration import Calibration
from launcher.predict.components import (
    CARRIED,
    FLAT_GRADIENTS,
    FP32_GRADIENTS,
    GATHERED,
    LEAVING,
    LOGITS,
    NORM,
    OVERFLOW,
    REDUCTION,
    SAVED,
    TEMPORARIES,
)
from launcher.predict.zero_runtime import ZeroRuntime
from launcher.strategy import Strategy

_HOPPER = (9, 0)


def workspace_bytes(gpu: GpuSpec, calibration: Calibration) -> int:
    """Return one cuBLAS workspace, which torch's allocator hands out."""
    if gpu.device_type != "cuda":
        return 0
    if gpu.compute_capability is not None and gpu.compute_capability >= _HOPPER:
        return calibration.cublas_workspace_bytes_hopper
    return calibration.cublas_workspace_bytes


def outside_bytes(
    gpu: GpuSpec, calibration: Calibration, *, zero_stage: int, world_size: int
) -> int:
    """Return device memory outside torch's allocator: CUDA context, kernels and NCCL."""
    if gpu.device_type != "cuda":
        return 0
    reduces = calibration.all_reduce_bytes if zero_stage < 3 else 0
    peers = calibration.peer_buffers_bytes if world_size > 1 else 0
    return gpu.context_bytes + calibration.nccl_bytes + reduces + peers


def reserved_bytes(
    phases: Mapping[str, Mapping[str, int]],
    moments: Mapping[str, Iterable[Mapping[str, float]]],
    *,
    zero: ZeroRuntime,
    is_cuda: bool,
    logits_hole_bytes: float,
    calibration: Calibration,
) -> int:
    """Return what torch's caching allocator holds after every phase has run once.

    A block belongs to the stream that asked for it (c10/cuda/CUDACachingAllocator.cpp), so
    ZeRO-3's gathers and reductions, which run on streams of their own, cannot reuse what the
    compute stream freed: their peaks add up even when they come at different times. And the
    low-precision logits leave a hole that the fp32 gradients of the loss are too large for.

    Args:
        phases: components of each phase's fullest moment, in bytes.
        moments: of all its moments: what one stream needs most may be needed at another.
        zero: the rank's ZeRO bookkeeping.
        is_cuda: on the CPU, reserved is allocated.
        logits_hole_bytes: the logits in the model's precision, if the loss makes them whole.
        calibration: slack and fragmentation.
    """
    strategy = zero.strategy
    totals = {name: sum(parts.values()) for name, parts in phases.items()}
    peak = max(totals.values())
    if not is_cuda:
        return peak
    holes = {
        "loss": logits_hole_bytes + _carried_hole_bytes(phases["loss"], strategy),
        "step": _step_hole_bytes(phases["step"]) + _shared_step_hole_bytes(phases, zero),
    }
    if zero.counts.is_head_tied and strategy.zero_stage < 3:
        holes["backward"] = _activations_hole_bytes(phases)
    pooled = max(size + holes.get(name, 0) for name, size in totals.items())
    if strategy.zero_stage == 3:
        pooled = max(pooled, round(_stream_pools_bytes(moments, strategy, calibration)))
    fraction = (
        calibration.transient_fragmentation
        if strategy.expandable_segments
        else calibration.transient_fragmentation_fixed_segments
    )
    return round(pooled + calibration.block_slack_bytes + fraction * (peak - min(totals.values())))


def _carried_hole_bytes(loss: Mapping[str, int], strategy: Strategy) -> int:
    """Return what logits, each in one piece, cannot use between carried gradients.

    Those of an earlier micro-step lie where its activations were, tensor by tensor, unless they
    are added up in one fp32 buffer (H100, Llama-3.2-1B, four micro-steps: reserved 3.7 GB above
    the loss's allocated bytes; with the buffer 0.3).
    """
    if strategy.grad_accum_dtype is not None:
        return 0
    return min(loss.get(CARRIED, 0), loss.get(LOGITS, 0))


def _step_hole_bytes(step: Mapping[str, int]) -> int:
    """Return what the flat gradients left behind, too small for the optimizer's temporaries.

    They are freed once cast to fp32; a temporary is as large as the cast and needs its bytes in
    one piece (H100, AdamW foreach and single-tensor: 2.4 GB more than allocated, 1.2e9 elements).
    """
    return step[FP32_GRADIENTS] // 2 if TEMPORARIES in step and FP32_GRADIENTS in step else 0


def _shared_step_hole_bytes(phases: Mapping[str, Mapping[str, int]], zero: ZeroRuntime) -> int:
    """Return what is free between gradients, too small for flat ones; other ranks' were there.

    Those that wait from earlier micro-steps leave as much again (two H200, ZeRO-1/2, 7B and 8B:
    reserved 6.7 to 9.0 GB above allocated for 6.7 to 8.0 GB of flat gradients, 13.4 with two
    micro-steps). On one GPU the gradients of a whole model fit where its activations were, unless
    those were checkpointed (H100, Qwen2.5-0.5B, 1.0 GB waiting: reserved 2.0 GB above allocated);
    adapters' do not, between the frozen layers' (LoRA of 2.4 and 6.4 GB: 4.5 and 6.5 GB above).
    """
    if zero.has_offloaded_optimizer:
        return 0
    carried = phases["backward"].get(CARRIED, 0)
    if zero.world_size == 1 and zero.is_full:
        return max(0, carried - phases["loss"].get(SAVED, 0))
    return phases["step"].get(FLAT_GRADIENTS, 0) + carried


def _activations_hole_bytes(phases: Mapping[str, Mapping[str, int]]) -> int:
    """Return the room of the activations, if the fp64 norm of the embedding does not fit there.

    With the optimizer offloaded. A tied matrix's first gradient is made in the loss, when all
    activations lie below it, and stays until the embedding's own is there: it divides what is
    free in two (H100, Llama-3.2-1B under ZeRO-2: reserved 1.4 GB above allocated).
    """
    saved = phases["loss"].get(SAVED, 0)
    return saved if saved < phases["backward"].get(NORM, 0) else 0


def _stream_pools_bytes(
    moments: Mapping[str, Iterable[Mapping[str, float]]],
    strategy: Strategy,
    calibration: Calibration,
) -> float:
    """Return the sum of each stream's own peak.

    With overlap_comm, reductions and what is done to their results have a stream of their own.

    Source: DeepSpeed 0.19.8 ``stage3.py:__reduce_and_partition_ipg_grads``.
    """
    reducing = {REDUCTION}
    if strategy.zero.overlaps(3):
        reducing |= {NORM, LEAVING, OVERFLOW}
    compute = gathered = reduced = 0.0
    for name, of_phase in moments.items():
        # The optimizer takes its norms on the main stream.
        apart = reducing if name != "step" else reducing & {OVERFLOW}
        for parts in of_phase:
            gathered_here = parts.get(GATHERED, 0.0)
            reduced_here = sum(parts.get(part, 0.0) for part in apart)
            gathered, reduced = max(gathered, gathered_here), max(reduced, reduced_here)
            compute = max(compute, sum(parts.values()) - gathered_here - reduced_here)
    waiting = 0
    if gathered:
        waiting = calibration.gathers_in_flight * 2 * strategy.zero.stage3_prefetch_bucket_size
    return compute + gathered + waiting + reduced
