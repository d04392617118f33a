"""Choose a strategy: of what fits, take the fastest that there is a reason for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from launcher.ds_keys import unpredicted_keys
from launcher.errors import RecipeError
from launcher.hardware import ClusterSpec
from launcher.planning.ceiling import NO_CEILING, Ceiling
from launcher.planning.explain import Setting, explain_choice
from launcher.planning.ladder import ladder, num_offloads, simplicity
from launcher.planning.plan import Candidate, Plan
from launcher.planning.rejections import explain_rejections
from launcher.planning.rules import why_offload_gains_nothing, why_zero_3_is_too_much
from launcher.planning.safety import SAFETY_FRACTION
from launcher.planning.search import (
    TIE_FRACTION,
    USUAL_PACKAGES,
    Packages,
    SearchSpace,
    anything_fits,
    divisors,
    smaller_micro_batches,
    weigh_all,
)
from launcher.planning.sequences import can_fit_shared, shared_by, weigh_shared
from launcher.planning.wording import fit_words
from launcher.recipe_sections import StrategySection
from launcher.strategy import Checkpointing, Offload, Optimizer, Strategy
from launcher.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The best strategy and everything that it was chosen from."""

    space: SearchSpace
    best: Candidate
    weighed: Sequence[Candidate]
    smaller: Sequence[Candidate]
    """Smaller micro-batches of the fastest, weighed to break ties."""
    impossible: Mapping[Strategy, str]
    pointless: Mapping[Strategy, str]

    @property
    def fits(self) -> bool:
        """Whether the best strategy fits."""
        return self.best.fits


def choose_strategy(
    workload: Workload,
    cluster: ClusterSpec,
    *,
    fixed: StrategySection | None = None,
    raw_deepspeed: Mapping[str, Any] | None = None,
    packages: Packages = USUAL_PACKAGES,
    safety_fraction: float = SAFETY_FRACTION,
    ceiling: Ceiling = NO_CEILING,
    every_kind: bool = False,
) -> Choice:
    """Return the fastest strategy that fits; :func:`make_plan` explains it as well.

    Args:
        workload: model, method and length.
        cluster: equal nodes of equal GPUs.
        fixed: strategy fields that the recipe sets; the rest is searched.
        raw_deepspeed: raw DeepSpeed keys; the prediction follows those that move memory.
        packages: which optional ones may be chosen where the recipe leaves it open.
        safety_fraction: share of the device's memory that stays free (0-1).
        ceiling: what an attempt that ran out of memory has taught.
        every_kind: weigh also what could not be the best, so that it can be explained.

    Raises:
        RecipeError: the fixed fields cannot work together, or the batch cannot be divided.
    """
    space = _search_space(
        workload,
        cluster,
        fixed,
        raw_deepspeed,
        packages=packages,
        safety_fraction=safety_fraction,
        ceiling=ceiling,
    )
    weighed, impossible = weigh_all(space, every_kind=every_kind)
    if not weighed:
        raise RecipeError(
            next(iter(impossible.values())),
            where="strategy",
            fix="leave that field out, or allow more values, and the planner chooses one that "
            "works",
        )
    choice = _best_of(space, weighed, impossible)
    shared = weigh_shared(space, choice.best)
    return _best_of(space, [*weighed, *shared], impossible) if shared else choice


def _best_of(
    space: SearchSpace, weighed: list[Candidate], impossible: Mapping[Strategy, str]
) -> Choice:
    """Choose among what was weighed, without what gains nothing."""
    pointless = _find_unneeded(space, weighed)
    while True:
        allowed = [candidate for candidate in weighed if candidate.strategy not in pointless]
        best, smaller = _choose(space, allowed)
        reason = _why_offload_is_pointless(space, best)
        if reason is None:
            break
        pointless[best.strategy] = reason
    degree = best.strategy.sequence_parallel_size
    return Choice(
        space=space if degree == space.sequence_parallel_size else shared_by(space, degree),
        best=best,
        weighed=weighed,
        smaller=smaller,
        impossible=impossible,
        pointless=pointless,
    )


def can_fit(
    workload: Workload,
    cluster: ClusterSpec,
    *,
    fixed: StrategySection | None = None,
    raw_deepspeed: Mapping[str, Any] | None = None,
    packages: Packages = USUAL_PACKAGES,
    safety_fraction: float = SAFETY_FRACTION,
    ceiling: Ceiling = NO_CEILING,
) -> bool:
    """Return whether :func:`choose_strategy` would find something that fits, only faster."""
    space = _search_space(
        workload,
        cluster,
        fixed,
        raw_deepspeed,
        packages=packages,
        safety_fraction=safety_fraction,
        ceiling=ceiling,
    )
    return anything_fits(space) or can_fit_shared(space)


def make_plan(
    workload: Workload,
    cluster: ClusterSpec,
    *,
    fixed: StrategySection | None = None,
    raw_deepspeed: Mapping[str, Any] | None = None,
    packages: Packages = USUAL_PACKAGES,
    safety_fraction: float = SAFETY_FRACTION,
    ceiling: Ceiling = NO_CEILING,
) -> Plan:
    """Return the fastest strategy that fits, with the reasons and what it was weighed against.

    Arguments and errors are those of :func:`choose_strategy`.
    """
    choice = choose_strategy(
        workload,
        cluster,
        fixed=fixed,
        raw_deepspeed=raw_deepspeed,
        packages=packages,
        safety_fraction=safety_fraction,
        ceiling=ceiling,
        every_kind=True,
    )
    best, limit_bytes = choice.best, choice.space.limit_bytes
    comparable = {item.strategy: _comparable(choice.space, item, best) for item in choice.weighed}
    pointless = {
        comparable[strategy].strategy: reason for strategy, reason in choice.pointless.items()
    }
    setting = Setting(space=choice.space, best=best, weighed=tuple(comparable.values()))
    return Plan(
        workload=workload,
        cluster=cluster,
        strategy=best.strategy,
        fits=best.fits,
        memory=best.memory,
        time=best.time,
        limit_bytes=limit_bytes,
        safety_margin_bytes=(cluster.free_memory_bytes or cluster.gpu.memory_bytes) - limit_bytes,
        decisions=tuple(
            replace(decision, reason=fit_words(decision.reason, cluster.gpu))
            for decision in explain_choice(setting)
        ),
        rejected=tuple(
            replace(rejected, reason=fit_words(rejected.reason, cluster.gpu))
            for rejected in explain_rejections(setting, choice.impossible, pointless)
        ),
        ladder=ladder(best, [*choice.weighed, *choice.smaller]),
        unpredicted_keys=unpredicted_keys(choice.space.raw_deepspeed),
    )


def _comparable(space: SearchSpace, candidate: Candidate, best: Candidate) -> Candidate:
    """Return a rival with the choice's loss and micro-batch where its own gain it no time.

    Ties are broken towards less memory; a rival that was not would look hungrier than it is.
    """
    rival, chosen = candidate.strategy, best.strategy
    if rival.sequence_parallel_size != chosen.sequence_parallel_size or not candidate.fits:
        return candidate
    alike = replace(rival, loss=chosen.loss, liger_kernels=chosen.liger_kernels)
    size = min(rival.micro_batch_size_per_gpu, chosen.micro_batch_size_per_gpu)
    limit_seconds = candidate.time.step_seconds * (1 + TIE_FRACTION)
    for shape in dict.fromkeys((alike, rival)):
        same = space.weigh(shape, size)
        if same.fits and same.time.step_seconds <= limit_seconds:
            return same
    return candidate


def _search_space(
    workload: Workload,
    cluster: ClusterSpec,
    fixed: StrategySection | None,
    raw_deepspeed: Mapping[str, Any] | None,
    *,
    packages: Packages,
    safety_fraction: float,
    ceiling: Ceiling,
) -> SearchSpace:
    fixed = fixed or StrategySection()
    memory_bytes = cluster.free_memory_bytes or cluster.gpu.memory_bytes
    return SearchSpace(
        workload=workload,
        cluster=cluster,
        fixed=fixed,
        raw_deepspeed=raw_deepspeed or {},
        packages=packages,
        limit_bytes=memory_bytes - int(memory_bytes * safety_fraction),
        micro_batch_sizes=_micro_batch_sizes(workload, cluster, fixed),
        sequence_parallel_size=_least_sharing(fixed),
        ceiling=ceiling,
    )


def _least_sharing(fixed: StrategySection) -> int:
    """Return the fewest GPUs that may share a sequence."""
    return int(min(fixed.choices("sequence_parallel_size", (1,))))


def _micro_batch_sizes(
    workload: Workload, cluster: ClusterSpec, fixed: StrategySection
) -> tuple[int, ...]:
    """Return the divisors of the samples per step of each share of the data, smallest first."""
    total, world_size = workload.global_batch_size, cluster.world_size
    degree = _least_sharing(fixed)
    if world_size % degree:
        raise RecipeError(
            f"{world_size} GPUs cannot be divided into groups of {degree}",
            where="strategy.sequence_parallel_size",
            fix=f"use one of {', '.join(map(str, divisors(world_size)))}",
        )
    num_shares = world_size // degree
    shares = f"{num_shares} GPUs" if degree == 1 else f"{num_shares} groups of {degree} GPUs"
    if total % num_shares:
        nearest = max(round(total / num_shares), 1) * num_shares
        raise RecipeError(
            f"{total} samples per step cannot be shared by {shares}",
            where="optim.global_batch_size",
            fix=f"use a multiple of {num_shares}, for example {nearest}",
        )
    per_share = total // num_shares
    sizes = divisors(per_share)
    wanted = fixed.choices("micro_batch_size_per_gpu", sizes)
    possible = tuple(size for size in sizes if size in wanted)
    if not possible:
        raise RecipeError(
            f"{' or '.join(map(str, wanted))} does not divide the {per_share} samples per "
            f"{'GPU' if degree == 1 else 'group'} and step (global batch {total} / {shares})",
            where="strategy.micro_batch_size_per_gpu",
            fix=f"use one of {', '.join(map(str, sizes))}, or change optim.global_batch_size",
        )
    return possible


def _find_unneeded(space: SearchSpace, weighed: list[Candidate]) -> dict[Strategy, str]:
    """Return the ZeRO-3 strategies that fit although less would do, with the reason."""
    has_simpler = any(
        item.fits
        and item.strategy.sequence_parallel_size == space.sequence_parallel_size
        and item.strategy.zero_stage < 3
        and not _moves_states(item, space.fixed)
        for item in weighed
    )
    if not has_simpler:
        return {}
    ranks = space.cluster.world_size
    reasons = {
        item.strategy: why_zero_3_is_too_much(item.strategy, space.workload, world_size=ranks)
        for item in weighed
    }
    return {strategy: reason for strategy, reason in reasons.items() if reason is not None}


def _why_offload_is_pointless(space: SearchSpace, best: Candidate) -> str | None:
    """Return why the chosen offload must not be, or ``None`` when it saves GPU memory."""
    strategy, fixed = best.strategy, space.fixed
    if not best.fits or strategy.offload_optimizer is Offload.none:
        return None
    places = ("offload_optimizer", "offload_param")
    if not all(fixed.permits(key, Offload.none) for key in places):
        return None
    kept = space.weigh(
        replace(strategy, offload_optimizer=Offload.none, offload_param=Offload.none),
        strategy.micro_batch_size_per_gpu,
    )
    return why_offload_gains_nothing(best.memory.device_used_bytes, kept.memory.device_used_bytes)


def _moves_states(candidate: Candidate, fixed: StrategySection) -> bool:
    """Return whether anything lives on the host or a drive that the recipe did not send there."""
    strategy = candidate.strategy
    return any(
        getattr(strategy, key) in moved and fixed.permits(key, at_home)
        for key, moved, at_home in (
            ("offload_optimizer", (Offload.cpu, Offload.nvme), Offload.none),
            ("offload_param", (Offload.cpu, Offload.nvme), Offload.none),
            ("gradient_checkpointing", (Checkpointing.cpu_offload,), Checkpointing.full),
        )
    )


def _choose(space: SearchSpace, allowed: list[Candidate]) -> tuple[Candidate, list[Candidate]]:
    """Return the fastest that fits, and what was weighed besides to break ties.

    Among strategies of equal time: the fewest offloads, then the optimizer that the recipe names
    first, then the least memory, then the simplest. When nothing fits, the one that exceeds its
    limits least.
    """
    fitting = [candidate for candidate in allowed if candidate.fits]
    if not fitting:
        return min(allowed, key=lambda item: _excess(space, item)), []
    fastest_seconds = min(candidate.time.step_seconds for candidate in fitting)
    limit_seconds = fastest_seconds * (1 + TIE_FRACTION)
    equals = [item for item in fitting if item.time.step_seconds <= limit_seconds]
    fewest = min(num_offloads(item) for item in equals)
    equals = [item for item in equals if num_offloads(item) == fewest]
    wanted = space.fixed.choices("optimizer", (Optimizer.adamw,))
    first = min((item.strategy.optimizer for item in equals), key=wanted.index)
    equals = [item for item in equals if item.strategy.optimizer is first]
    smaller = [small for item in equals for small in smaller_micro_batches(space, item)]
    equals += [item for item in smaller if item.time.step_seconds <= limit_seconds]
    least_bytes = min(candidate.memory.device_used_bytes for candidate in equals)
    equals = [
        candidate
        for candidate in equals
        if candidate.memory.device_used_bytes <= least_bytes * (1 + TIE_FRACTION)
    ]
    return min(equals, key=simplicity), smaller


def _excess(space: SearchSpace, candidate: Candidate) -> tuple[float, float]:
    """Sort by the factor by which device or host memory is exceeded, the worse of them first."""
    memory = candidate.memory
    device = memory.device_used_bytes / space.limit_bytes
    host = memory.host_bytes_per_node / space.cluster.host_memory_bytes
    return round(max(device, host), 2), device
