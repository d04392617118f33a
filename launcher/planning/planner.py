"""Choose a strategy: enumerate, keep what fits, and take the fastest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any, TypeVar

from launcher.ds_keys import apply_to_knobs
from launcher.errors import RecipeError
from launcher.hardware import ClusterSpec
from launcher.memory import estimate_memory
from launcher.planning.explain import explain_choice, explain_rejections
from launcher.planning.plan import Candidate, Plan
from launcher.planning.rules import default_attention, losses_that_work, why_impossible
from launcher.recipe import StrategySection
from launcher.step_time import estimate_time
from launcher.strategy import (
    Checkpointing,
    Loss,
    Offload,
    Optimizer,
    Strategy,
    ZeroKnobs,
    ZeroStage,
)
from launcher.workload import Workload

_T = TypeVar("_T")

# Times this close are called equal; the prediction is not better than that.
TIE_FRACTION = 0.02
# DeepSpeed's default of 5e8 elements costs 1 GB and more. All-reduce reaches full bandwidth at
# far smaller messages (nccl-tests: tens of MB), so 1e8 bytes of bf16 are enough.
LARGEST_BUCKET_ELEMENTS = 50_000_000
# Preferred order among equals: the study's default first (arXiv 2406.02290, section 5).
STAGE_ORDER: Mapping[ZeroStage, int] = {2: 0, 1: 1, 3: 2, 0: 3}


def make_plan(
    workload: Workload,
    cluster: ClusterSpec,
    *,
    fixed: StrategySection | None = None,
    raw_deepspeed: Mapping[str, Any] | None = None,
    has_liger: bool = True,
    safety_fraction: float = 0.05,
) -> Plan:
    """Return the fastest strategy that fits, with everything that was weighed.

    Args:
        workload: model, method and length.
        cluster: equal nodes of equal GPUs.
        fixed: strategy fields that the recipe sets; the rest is searched.
        raw_deepspeed: raw DeepSpeed keys; the prediction follows those that move memory.
        has_liger: whether Liger's kernels may be chosen.
        safety_fraction: share of the device's memory that stays free (0-1).

    Raises:
        RecipeError: the fixed fields cannot work together, or the batch cannot be divided.
    """
    fixed = fixed or StrategySection()
    memory_bytes = cluster.free_memory_bytes or cluster.gpu.memory_bytes
    margin_bytes = int(memory_bytes * safety_fraction)
    limit_bytes = memory_bytes - margin_bytes
    micro_batch_sizes = _micro_batch_sizes(workload, cluster, fixed)
    impossible: dict[Strategy, str] = {}
    weighed: list[Candidate] = []
    for shape in _shapes(workload, cluster, fixed, raw_deepspeed or {}, has_liger=has_liger):
        reason = why_impossible(shape, workload, cluster)
        if reason is not None:
            impossible[shape] = reason
            continue
        for micro_batch_size in micro_batch_sizes:
            candidate = _weigh(shape, micro_batch_size, workload, cluster, limit_bytes)
            weighed.append(candidate)
            if not candidate.fits:
                break
    if not weighed:
        raise RecipeError(
            next(iter(impossible.values())),
            where="strategy",
            fix="leave that field out and the planner chooses one that works",
        )
    best = _best(weighed)
    return Plan(
        workload=workload,
        cluster=cluster,
        strategy=best.strategy,
        fits=best.fits,
        memory=best.memory,
        time=best.time,
        limit_bytes=limit_bytes,
        safety_margin_bytes=margin_bytes,
        decisions=explain_choice(best, weighed, workload, cluster, fixed),
        rejected=explain_rejections(best, weighed, impossible, limit_bytes),
        ladder=_ladder(best, weighed),
    )


def _micro_batch_sizes(
    workload: Workload, cluster: ClusterSpec, fixed: StrategySection
) -> tuple[int, ...]:
    """Return the divisors of the samples per GPU and step, smallest first."""
    total, world_size = workload.global_batch_size, cluster.world_size
    if total % world_size:
        nearest = max(round(total / world_size), 1) * world_size
        raise RecipeError(
            f"{total} samples per step cannot be shared by {world_size} GPUs",
            where="optim.global_batch_size",
            fix=f"use a multiple of {world_size}, for example {nearest}",
        )
    per_gpu = total // world_size
    divisors = tuple(size for size in range(1, per_gpu + 1) if per_gpu % size == 0)
    wanted = fixed.micro_batch_size_per_gpu
    if wanted is None:
        return divisors
    if wanted not in divisors:
        raise RecipeError(
            f"{wanted} does not divide the {per_gpu} samples per GPU and step "
            f"(global batch {total} / {world_size} GPUs)",
            where="strategy.micro_batch_size_per_gpu",
            fix=f"use one of {', '.join(map(str, divisors))}, or change optim.global_batch_size",
        )
    return (wanted,)


def _shapes(
    workload: Workload,
    cluster: ClusterSpec,
    fixed: StrategySection,
    raw: Mapping[str, Any],
    *,
    has_liger: bool,
) -> Iterator[Strategy]:
    """Yield every strategy to weigh, at micro-batch 1; fixed fields have one value."""
    on_cpu = cluster.gpu.device_type == "cpu"
    # ZeRO-0 needs as much communication as ZeRO-1 and more memory: only when it is asked for.
    stages: tuple[ZeroStage, ...] = (1, 2, 3)
    offloads = (Offload.none,) if on_cpu else (Offload.none, Offload.cpu)
    checkpointings = tuple(Checkpointing)[:2] if on_cpu else tuple(Checkpointing)
    losses = losses_that_work(workload.model, cluster.gpu, has_liger=has_liger)
    for stage, optimizer_to, param_to, checkpointing, loss in product(
        _choices(fixed.zero_stage, stages),
        _choices(fixed.offload_optimizer, offloads),
        _choices(fixed.offload_param, offloads),
        _choices(fixed.gradient_checkpointing, checkpointings),
        _choices(fixed.loss, losses),
    ):
        if param_to is not Offload.none and stage != 3 and fixed.offload_param is None:
            continue
        for knobs in _knobs(stage, workload):
            yield Strategy(
                zero_stage=stage,
                offload_optimizer=optimizer_to,
                offload_param=param_to,
                gradient_checkpointing=checkpointing,
                attention=fixed.attention or default_attention(workload.model),
                loss=loss,
                optimizer=fixed.optimizer or Optimizer.adamw,
                grad_accum_dtype=fixed.grad_accum_dtype,
                liger_kernels=(
                    loss is Loss.liger if fixed.liger_kernels is None else fixed.liger_kernels
                ),
                zero=apply_to_knobs(knobs, raw),
            )


def _choices(wanted: _T | None, all_values: tuple[_T, ...]) -> tuple[_T, ...]:
    return all_values if wanted is None else (wanted,)


def _knobs(stage: ZeroStage, workload: Workload) -> Iterator[ZeroKnobs]:
    """Yield bucket sizes for a stage: fast ones, then for ZeRO-3 also frugal ones.

    DeepSpeed's defaults are sized for full fine-tuning of large models; a LoRA of 33 M
    parameters never fills a bucket of 5e8 elements and pays 1 GB for it all the same.
    """
    bucket = min(workload.num_trainable_params, LARGEST_BUCKET_ELEMENTS)
    bucket = -(-bucket // 1024) * 1024
    if stage != 3:
        yield ZeroKnobs(reduce_bucket_size=bucket, allgather_bucket_size=LARGEST_BUCKET_ELEMENTS)
        return
    hidden_size = workload.model.hidden_size
    # Prefetch and persistence as Hugging Face resolves "auto" (transformers 5.23
    # integrations/deepspeed.py:trainer_config_finalize). A sub-group of 1e8 elements takes
    # 2.6 GB off the step of a 7B model on 8 GPUs and costs no time.
    fast = ZeroKnobs(
        reduce_bucket_size=bucket,
        sub_group_size=100_000_000,
        stage3_prefetch_bucket_size=int(0.9 * hidden_size**2),
        stage3_param_persistence_threshold=10 * hidden_size,
    )
    yield fast
    yield replace(fast, stage3_max_live_parameters=100_000_000)


def _weigh(
    shape: Strategy,
    micro_batch_size: int,
    workload: Workload,
    cluster: ClusterSpec,
    limit_bytes: int,
) -> Candidate:
    per_gpu = workload.global_batch_size // cluster.world_size
    strategy = replace(
        shape,
        micro_batch_size_per_gpu=micro_batch_size,
        gradient_accumulation_steps=per_gpu // micro_batch_size,
    )
    memory = estimate_memory(workload, strategy, cluster)
    fits = (
        memory.device_used_bytes <= limit_bytes
        and memory.host_bytes_per_node <= cluster.host_memory_bytes
    )
    return Candidate(
        strategy=strategy,
        memory=memory,
        time=estimate_time(workload, strategy, cluster),
        fits=fits,
    )


def _best(weighed: list[Candidate]) -> Candidate:
    """Return the fastest that fits; among equals the least memory, then the simplest.

    When nothing fits, return the most frugal.
    """
    fitting = [candidate for candidate in weighed if candidate.fits]
    if not fitting:
        return min(weighed, key=lambda candidate: candidate.memory.device_used_bytes)
    fastest_seconds = min(candidate.time.step_seconds for candidate in fitting)
    equals = [
        candidate
        for candidate in fitting
        if candidate.time.step_seconds <= fastest_seconds * (1 + TIE_FRACTION)
    ]
    least_bytes = min(candidate.memory.device_used_bytes for candidate in equals)
    equals = [
        candidate
        for candidate in equals
        if candidate.memory.device_used_bytes <= least_bytes * (1 + TIE_FRACTION)
    ]
    return min(equals, key=_simplicity)


def _simplicity(candidate: Candidate) -> tuple[int, int, int, float]:
    strategy = candidate.strategy
    offloads = (strategy.offload_optimizer, strategy.offload_param)
    return (
        sum(offload is not Offload.none for offload in offloads),
        STAGE_ORDER[strategy.zero_stage],
        int(strategy.gradient_checkpointing is not Checkpointing.none),
        candidate.time.step_seconds,
    )


def _ladder(best: Candidate, weighed: list[Candidate]) -> tuple[Candidate, ...]:
    """Return strategies that use ever less memory, each the fastest of its kind."""
    frugal = [
        candidate
        for candidate in weighed
        if candidate.fits and candidate.memory.device_used_bytes < best.memory.device_used_bytes
    ]
    frugal.sort(key=lambda candidate: (candidate.time.step_seconds, _simplicity(candidate)))
    rungs: list[Candidate] = []
    lowest_bytes = best.memory.device_used_bytes
    for candidate in frugal:
        # A rung below 5 % less memory would not cure an out-of-memory error.
        if candidate.memory.device_used_bytes <= 0.95 * lowest_bytes:
            rungs.append(candidate)
            lowest_bytes = candidate.memory.device_used_bytes
    return tuple(rungs)
