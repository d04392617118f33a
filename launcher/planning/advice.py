"""When nothing fits: find the smallest change that would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from launcher.hardware import ClusterSpec
from launcher.planning.plan import Plan
from launcher.strategy import Method
from launcher.units import format_gib
from launcher.workload import Workload

Planner = Callable[[Workload, ClusterSpec], Plan]


def suggest_changes(
    plan: Plan, larger_gpus: tuple[ClusterSpec, ...], planner: Planner
) -> Iterator[str]:
    """Yield changes that make the workload fit, each tried with the planner itself.

    Args:
        plan: a plan that does not fit.
        larger_gpus: the same cluster with GPUs of more memory, smallest first.
        planner: plans another workload or cluster under the same fixed fields.
    """
    workload, cluster = plan.workload, plan.cluster
    if (tokens := _longest_that_fits(workload, cluster, planner)) is not None:
        yield f"shorten the sequences: max_seq_len={tokens} fits"
    for method in (Method.lora, Method.qlora):
        harder = workload.method is Method.full or (workload.method, method) == (
            Method.lora,
            Method.qlora,
        )
        if harder and planner(replace(workload, method=method), cluster).fits:
            yield f"train less: method={method.value} fits"
            break
    if (nodes := _fewest_nodes(workload, cluster, planner)) is not None:
        yield f"use more GPUs: {nodes} nodes of {cluster.gpus_per_node} {cluster.gpu.name} fit"
    for larger in larger_gpus:
        if planner(workload, larger).fits:
            yield (
                f"use larger GPUs: {larger.world_size} x {larger.gpu.name} "
                f"({format_gib(larger.gpu.memory_bytes)} each) fit"
            )
            break


def _longest_that_fits(workload: Workload, cluster: ClusterSpec, planner: Planner) -> int | None:
    """Return the longest length in steps of 128 tokens that fits, or ``None``."""
    shortest, longest = 128, workload.max_seq_len
    if longest <= shortest:
        return None

    def fits(tokens: int) -> bool:
        return planner(replace(workload, max_seq_len=tokens), cluster).fits

    if not fits(shortest):
        return None
    low, high = 1, longest // 128
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * 128) else (low, middle)
    return low * 128


def _fewest_nodes(workload: Workload, cluster: ClusterSpec, planner: Planner) -> int | None:
    for factor in (2, 4, 8, 16):
        larger = replace(cluster, num_nodes=cluster.num_nodes * factor)
        if workload.global_batch_size % larger.world_size:
            workload = replace(workload, global_batch_size=larger.world_size)
        if planner(workload, larger).fits:
            return larger.num_nodes
    return None
