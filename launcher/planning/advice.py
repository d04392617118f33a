"""When nothing fits: find the smallest changes that would, each tried with the planner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from enum import Enum

from launcher.errors import RecipeError
from launcher.hardware import ClusterSpec
from launcher.planning.plan import Plan
from launcher.recipe_sections import StrategySection
from launcher.strategy import Method, Offload, Optimizer
from launcher.units import format_gib
from launcher.workload import Workload

Fits = Callable[[Workload, ClusterSpec, StrategySection], bool]
"""Plans another workload, cluster or fixed fields, and says whether anything fits."""

_TOKEN_STEP = 128
_MOST_NODES_FACTOR = 64


def suggest_changes(
    plan: Plan, fixed: StrategySection, larger_gpus: tuple[ClusterSpec, ...], fits: Fits
) -> Iterator[str]:
    """Yield changes that make the workload fit, the cheapest for the user first.

    Args:
        plan: a plan that does not fit.
        fixed: the strategy fields that the recipe sets.
        larger_gpus: the same cluster with GPUs of more memory, smallest first.
        fits: asks the planner; a combination that cannot work counts as not fitting.
    """

    def asks(workload: Workload, cluster: ClusterSpec, section: StrategySection) -> bool:
        try:
            return fits(workload, cluster, section)
        except RecipeError:
            return False

    workload, cluster = plan.workload, plan.cluster
    yield from _free_a_field(workload, cluster, fixed, asks)
    yield from _save_more(workload, cluster, fixed, asks)
    tokens = _longest_that_fits(workload, lambda changed: asks(changed, cluster, fixed))
    if tokens is not None:
        yield f"shorter samples: max_seq_len={tokens} fits"
    yield from _train_less(workload, cluster, fixed, asks)
    yield from _more_nodes(workload, cluster, lambda w, c: asks(w, c, fixed))
    for larger in larger_gpus:
        if asks(workload, larger, fixed):
            size = format_gib(larger.gpu.memory_bytes)
            yield f"larger GPUs: {larger.world_size:,} x {larger.gpu.name} ({size} each) fit"
            break


def _free_a_field(
    workload: Workload, cluster: ClusterSpec, fixed: StrategySection, fits: Fits
) -> Iterator[str]:
    """Yield the one recipe field without which something fits."""
    for item in fields(StrategySection):
        value = getattr(fixed, item.name)
        if value is None or item.name == "nvme_path":
            continue
        if fits(workload, cluster, replace(fixed, **{item.name: None})):
            shown = value.value if isinstance(value, Enum) else value
            yield f"leave strategy.{item.name} to the planner: without {shown} it fits"


def _save_more(
    workload: Workload, cluster: ClusterSpec, fixed: StrategySection, fits: Fits
) -> Iterator[str]:
    """Yield savings that the planner does not take by itself: they need a drive, or change Adam."""
    if fixed.optimizer is None:
        smaller = replace(fixed, optimizer=Optimizer.adamw_8bit)
        if cluster.gpu.device_type == "cuda" and fits(workload, cluster, smaller):
            yield "8-bit optimizer states, rounded: strategy.optimizer=adamw_8bit fits"
    if fixed.nvme_path is not None or workload.method is Method.qlora:
        return
    on_drive = replace(
        fixed, nvme_path="/nvme", offload_optimizer=Offload.nvme, offload_param=Offload.nvme
    )
    wanted = (fixed.zero_stage, fixed.offload_optimizer, fixed.offload_param)
    if wanted == (None, None, None) and fits(workload, cluster, on_drive):
        yield (
            "a fast drive instead of memory, slow: strategy.offload_optimizer=nvme "
            "strategy.offload_param=nvme strategy.nvme_path=FOLDER fits"
        )


def _train_less(
    workload: Workload, cluster: ClusterSpec, fixed: StrategySection, fits: Fits
) -> Iterator[str]:
    """Yield the first method that trains or stores less and fits."""
    cheaper = {
        Method.full: ((Method.lora, "train small adapters"), (Method.qlora, "and store 4 bits")),
        Method.lora: ((Method.qlora, "store the frozen weights in 4 bits"),),
        Method.qlora: (),
    }[workload.method]
    for method, meaning in cheaper:
        if fits(replace(workload, method=method), cluster, fixed):
            yield f"{meaning}: method={method.value} fits"
            return


def _longest_that_fits(workload: Workload, fits: Callable[[Workload], bool]) -> int | None:
    """Return the longest length in steps of 128 tokens that fits, or ``None``."""
    low, high = 1, -(-workload.max_seq_len // _TOKEN_STEP)
    if high <= low or not fits(replace(workload, max_seq_len=_TOKEN_STEP)):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        is_enough = fits(replace(workload, max_seq_len=middle * _TOKEN_STEP))
        low, high = (middle, high) if is_enough else (low, middle)
    return low * _TOKEN_STEP


def _more_nodes(
    workload: Workload, cluster: ClusterSpec, fits: Callable[[Workload, ClusterSpec], bool]
) -> Iterator[str]:
    """Yield the fewest nodes that fit; the batch grows to a multiple of the GPUs."""

    def at(num_nodes: int) -> tuple[Workload, ClusterSpec]:
        larger = replace(cluster, num_nodes=num_nodes)
        batch = -(-workload.global_batch_size // larger.world_size) * larger.world_size
        return replace(workload, global_batch_size=batch), larger

    low = cluster.num_nodes
    high = 2 * low
    while not fits(*at(high)):
        low, high = high, 2 * high
        if high > _MOST_NODES_FACTOR * cluster.num_nodes:
            return
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(*at(middle)) else (middle, high)
    batch = at(high)[0].global_batch_size
    grown = f" (with optim.global_batch_size={batch})"
    yield (
        f"more GPUs: {high} nodes of {cluster.gpus_per_node} {cluster.gpu.name} fit"
        + (grown if batch != workload.global_batch_size else "")
    )
