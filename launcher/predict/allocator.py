"""From allocated bytes to what torch reserves and nvidia-smi shows."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.hardware import GpuSpec
from launcher.predict.calibration import Calibration
from launcher.predict.components import GATHERED, REDUCTION
from launcher.strategy import Strategy

_HOPPER = (9, 0)


def workspace_bytes(gpu: GpuSpec, calibration: Calibration) -> int:
    """Return one cuBLAS workspace, which torch's allocator hands out."""
    if gpu.device_type != "cuda":
        return 0
    if gpu.compute_capability is not None and gpu.compute_capability >= _HOPPER:
        return calibration.cublas_workspace_bytes_hopper
    return calibration.cublas_workspace_bytes


def outside_bytes(gpu: GpuSpec, calibration: Calibration, *, zero_stage: int) -> int:
    """Return device memory outside torch's allocator: CUDA context, kernels and NCCL."""
    if gpu.device_type != "cuda":
        return 0
    reduces = calibration.all_reduce_bytes if zero_stage < 3 else 0
    return gpu.context_bytes + calibration.nccl_bytes + reduces


def reserved_bytes(
    phases: Mapping[str, Mapping[str, int]],
    *,
    strategy: Strategy,
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
        strategy: ZeRO stage and allocator mode.
        is_cuda: on the CPU, reserved is allocated.
        logits_hole_bytes: the logits in the model's precision, if the loss makes them whole.
        calibration: slack and fragmentation.
    """
    totals = {name: sum(parts.values()) for name, parts in phases.items()}
    peak = max(totals.values())
    if not is_cuda:
        return peak
    pooled = max(
        size + (logits_hole_bytes if name == "loss" else 0) for name, size in totals.items()
    )
    if strategy.zero_stage == 3:
        pooled = max(pooled, _stream_pools_bytes(phases, strategy, calibration))
    fraction = (
        calibration.transient_fragmentation
        if strategy.expandable_segments
        else calibration.transient_fragmentation_fixed_segments
    )
    return round(pooled + calibration.block_slack_bytes + fraction * (peak - min(totals.values())))


def _stream_pools_bytes(
    phases: Mapping[str, Mapping[str, int]], strategy: Strategy, calibration: Calibration
) -> float:
    """Return the sum of each stream's own peak."""
    side = (GATHERED, REDUCTION)
    compute = max(
        sum(size for name, size in parts.items() if name not in side) for parts in phases.values()
    )
    gathered, reduced = (max(parts.get(name, 0) for parts in phases.values()) for name in side)
    waiting = 0
    if gathered:
        waiting = calibration.gathers_in_flight * 2 * strategy.zero.stage3_prefetch_bucket_size
    return compute + gathered + waiting + reduced
