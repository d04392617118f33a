"""Whether GPUs should share sequences: where whole ones do not fit, or fit only at a price."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from launcher.planning.plan import Candidate
from launcher.planning.rules import why_impossible, why_not_shared
from launcher.planning.search import SearchSpace, all_shapes, divisors
from launcher.predict.step_time import least_step_seconds
from launcher.strategy import Attention, Checkpointing, Loss, Offload, Strategy

# The time of all-to-alls has been compared with no measurement on GPUs: a gain must be worth it.
LEAST_GAIN_FRACTION = 0.1
# Of 2,048 tokens of a 7B model, a tensor to exchange has 16 MB in 16 bits; all-to-alls need tens of
# MB for their full rate (nccl-tests), and matrix products need the rows.
LEAST_TOKENS = 2048


def weigh_shared(space: SearchSpace, best: Candidate) -> list[Candidate]:
    """Return what fits and is faster with GPUs that share sequences; mostly nothing is asked.

    Sharing sends more than it saves, unless the activations of whole sequences are what forces
    checkpointing or offload, or do not fit at all.

    Args:
        space: what was searched, with whole sequences.
        best: the choice there, or the nearest miss.
    """
    lighter = list(_lighter(space, best.strategy)) if best.fits else []
    if best.fits and not lighter:
        return []
    limit_seconds = float("inf")
    if best.fits:
        limit_seconds = best.time.step_seconds * (1 - LEAST_GAIN_FRACTION)
    elif not can_fit_shared(space):
        return []
    found: list[Candidate] = []
    for degree in _degrees(space, within_node=best.fits):
        if best.fits and space.workload.max_seq_len < degree * LEAST_TOKENS:
            break
        sharing = shared_by(space, degree)
        shapes = lighter if best.fits else _frugal(sharing)
        fastest = _fastest_that_fits(sharing, shapes, limit_seconds=limit_seconds)
        if fastest is not None:
            found.append(fastest)
            limit_seconds = fastest.time.step_seconds
    return found


def can_fit_shared(space: SearchSpace) -> bool:
    """Return whether anything fits with as many GPUs to a sequence as can share one."""
    most = max(_degrees(space, within_node=False), default=1)
    if most == 1:
        return False
    sharing = shared_by(space, most)
    return any(
        sharing.admits(sharing.size(shape, sharing.micro_batch_sizes[0]).memory)
        for shape in _frugal(sharing)
    )


def shared_by(space: SearchSpace, degree: int) -> SearchSpace:
    """Return the same space with groups of GPUs that share sequences."""
    num_shares = space.cluster.world_size // degree
    sizes = divisors(space.workload.global_batch_size // num_shares)
    wanted = space.fixed.choices("micro_batch_size_per_gpu", sizes)
    return replace(
        space,
        sequence_parallel_size=degree,
        micro_batch_sizes=tuple(size for size in sizes if size in wanted),
    )


def _degrees(space: SearchSpace, *, within_node: bool) -> Iterator[int]:
    """Yield sizes of larger groups, smallest first: parts of a node, or whole nodes."""
    cluster, fixed = space.cluster, space.fixed
    per_node = cluster.gpus_per_node
    # Each GPU needs a head.
    most = min(space.workload.model.num_attention_heads, cluster.world_size)
    largest = min(most, per_node) if within_node else most
    for degree in range(space.sequence_parallel_size + 1, largest + 1):
        is_neat = per_node % degree == 0 or degree % per_node == 0
        if not is_neat or cluster.world_size % degree:
            continue
        if not fixed.permits("sequence_parallel_size", degree):
            continue
        shapes = (
            Strategy(zero_stage=2, attention=attention, sequence_parallel_size=degree)
            for attention in fixed.choices("attention", (Attention.sdpa,))
        )
        if any(why_not_shared(shape, space.workload) is None for shape in shapes):
            yield degree


def _lighter(space: SearchSpace, strategy: Strategy) -> Iterator[Strategy]:
    """Yield the strategy with less checkpointing, without offload, and without both."""
    fixed = space.fixed
    order = list(Checkpointing)
    less = order[: order.index(strategy.gradient_checkpointing)]
    kept = [
        replace(strategy, gradient_checkpointing=checkpointing)
        for checkpointing in less
        if fixed.permits("gradient_checkpointing", checkpointing)
    ]
    for shape in (strategy, *kept):
        optimizer_to, param_to = shape.offload_optimizer, shape.offload_param
        if fixed.permits("offload_optimizer", Offload.none):
            optimizer_to = Offload.none
        if fixed.permits("offload_param", Offload.none):
            param_to = Offload.none
        here = replace(shape, offload_optimizer=optimizer_to, offload_param=param_to)
        # One of each, in an order that no hash decides: equally fast ones are tried in it.
        yield from (item for item in dict.fromkeys((shape, here)) if item != strategy)


def _frugal(space: SearchSpace) -> list[Strategy]:
    """Return the shapes that leave most room for activations, with and without offload."""
    possible = [
        shape
        for shape in all_shapes(space)
        if why_impossible(shape, space.workload, space.cluster) is None
    ]
    stage = max((shape.zero_stage for shape in possible), default=0)
    at_stage = [shape for shape in possible if shape.zero_stage == stage]
    losses = {shape.loss for shape in at_stage}
    least = min((shape.zero.stage3_max_live_parameters for shape in at_stage), default=0)
    return [
        shape
        for shape in at_stage
        if shape.zero.stage3_max_live_parameters == least
        and (shape.loss is not Loss.full or losses == {Loss.full})
    ]


def _fastest_that_fits(
    space: SearchSpace, shapes: Iterable[Strategy], *, limit_seconds: float
) -> Candidate | None:
    """Return the fastest shape, at its largest micro-batch that fits, below a time."""
    bounded = []
    for shape in shapes:
        shared = replace(shape, sequence_parallel_size=space.sequence_parallel_size)
        largest = space.at(shared, space.micro_batch_sizes[-1])
        bounded.append((least_step_seconds(space.workload, largest, space.cluster), shared))
    found = None
    for bound, shape in sorted(bounded, key=lambda item: item[0]):
        if bound > limit_seconds:
            break
        candidate = space.largest_that_fits(shape)
        if candidate.fits and candidate.time.step_seconds <= limit_seconds:
            found, limit_seconds = candidate, candidate.time.step_seconds
    return found
