"""When nothing fits: find the smallest changes that would, each tried with the planner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from launcher.errors import RecipeError
from launcher.hardware import ClusterSpec, default_cluster
from launcher.planning.plan import Plan
from launcher.recipe_sections import StrategySection
from launcher.strategy import Method, Offload, Optimizer, Precision
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
        larger_gpus: as many GPUs of more memory in their usual nodes, in the order to try them.
        fits: asks the planner; a combination that cannot work counts as not fitting.
    """

    def asks(workload: Workload, cluster: ClusterSpec, section: StrategySection) -> bool:
        try:
            return fits(workload, cluster, section)
        except RecipeError:
            return False

    found = list(_single_changes(plan, fixed, larger_gpus, asks))
    yield from found or _several_changes(plan.workload, fixed, larger_gpus, asks)


def _single_changes(
    plan: Plan, fixed: StrategySection, larger_gpus: tuple[ClusterSpec, ...], fits: Fits
) -> Iterator[str]:
    workload, cluster = plan.workload, plan.cluster
    yield from _free_a_field(workload, cluster, fixed, fits)
    yield from _save_more(workload, cluster, fixed, fits)
    tokens = _longest_that_fits(workload, lambda changed: fits(changed, cluster, fixed))
    if tokens is not None:
        yield f"shorter samples: max_seq_len={tokens} fits"
    yield from _store_less(workload, cluster, fixed, fits)
    yield from _train_less(workload, cluster, fixed, fits)
    yield from _more_nodes(workload, cluster, fixed, fits)
    for larger in larger_gpus:
        if fits(workload, larger, fixed):
            size, host = format_gib(larger.gpu.memory_bytes), format_gib(larger.host_memory_bytes)
            verb = "fits" if larger.world_size == 1 else "fit"
            yield (
                f"larger GPUs: {larger.world_size:,} x {larger.gpu.name} ({size} each; "
                f"{host} of host memory per node) {verb}"
            )
            break


def _more_nodes(
    workload: Workload, cluster: ClusterSpec, fixed: StrategySection, fits: Fits
) -> Iterator[str]:
    """Yield the fewest nodes that fit, and where a method that trains less does with fewer."""
    least: int | None = None
    for method in _methods_that_train_less(workload.method):
        lighter = replace(workload, method=method)
        most = None if least is None else least - 1
        found = _fewest_nodes(lighter, cluster, fixed, fits, low=cluster.num_nodes, most=most)
        is_own = method is workload.method
        if found is None or (not is_own and fits(lighter, cluster, fixed)):
            return  # with none, or without more nodes, which is named by itself
        least = found[0]
        yield f"more GPUs: {found[1]}" + ("" if is_own else f", with method={method.value}")


def _several_changes(
    workload: Workload, fixed: StrategySection, larger_gpus: tuple[ClusterSpec, ...], fits: Fits
) -> Iterator[str]:
    """Yield the fewest usual nodes of larger GPUs, and where less that is trained needs fewer."""
    nodes = [default_cluster(larger.gpu) for larger in larger_gpus]
    least: int | None = None
    for changed, also in _ever_smaller(workload):
        best = None
        for node in nodes:
            # Of those that need as few nodes the smallest GPUs, which are asked first.
            most = None if least is None else least - 1
            found = _fewest_nodes(changed, node, fixed, fits, low=0, most=most)
            if found is not None:
                best, least = found, found[0]
        if best is not None:
            yield f"more and larger GPUs: {best[1]}{also}"


def _ever_smaller(workload: Workload) -> Iterator[tuple[Workload, str]]:
    """Yield the workload, then what needs less memory or can be shared better, in words."""
    yield workload, ""
    for method in _methods_that_train_less(workload.method)[1:]:
        yield replace(workload, method=method), f", with method={method.value}"
    if workload.method is Method.qlora:
        # What ZeRO-3 can share out: see the rules.
        quantization = replace(workload.quantization, kind="nf4")
        lora = replace(workload.lora, use_dora=False)
        changed = ["quantization.kind=nf4"] if workload.quantization.kind != "nf4" else []
        changed += ["lora.use_dora=false"] if workload.lora.use_dora else []
        if changed:
            plain = replace(workload, quantization=quantization, lora=lora)
            yield plain, f", with {' and '.join(changed)}"


def _free_a_field(
    workload: Workload, cluster: ClusterSpec, fixed: StrategySection, fits: Fits
) -> Iterator[str]:
    """Yield the one recipe field without which something fits."""
    for key, given in fixed.given().items():
        if key != "nvme_path" and fits(workload, cluster, fixed.without(key)):
            values = given if isinstance(given, tuple) else (given,)
            shown = " and ".join(str(getattr(value, "value", value)) for value in values)
            yield f"leave strategy.{key} to the planner: without {shown} it fits"


def _save_more(
    workload: Workload, cluster: ClusterSpec, fixed: StrategySection, fits: Fits
) -> Iterator[str]:
    """Yield what the planner does not take by itself: it needs a drive, changes Adam, or is new."""
    given = fixed.given()
    if "optimizer" not in given:
        smaller = replace(fixed, optimizer=Optimizer.adamw_8bit)
        if cluster.gpu.device_type == "cuda" and fits(workload, cluster, smaller):
            yield "8-bit optimizer states, rounded: strategy.optimizer=adamw_8bit fits"
    is_free = given.keys().isdisjoint({"zero_stage", "offload_optimizer", "offload_param"})
    if workload.method is Method.qlora:
        on_host = replace(fixed, zero_stage=3, offload_param=Offload.cpu)
        if is_free and fits(workload, cluster, on_host):
            yield (
                "4-bit weights in host memory, slow, and tried on processors alone: "
                "strategy.zero_stage=3 strategy.offload_param=cpu fits"
            )
        return
    if fixed.nvme_path is not None:
        return
    on_drive = replace(
        fixed, nvme_path="/nvme", offload_optimizer=Offload.nvme, offload_param=Offload.nvme
    )
    if is_free and fits(workload, cluster, on_drive):
        yield (
            "a fast drive instead of memory, slow: strategy.offload_optimizer=nvme "
            "strategy.offload_param=nvme strategy.nvme_path=FOLDER fits"
        )


def _train_less(
    workload: Workload, cluster: ClusterSpec, fixed: StrategySection, fits: Fits
) -> Iterator[str]:
    """Yield the first method that trains or stores less and fits."""
    for method in _methods_that_train_less(workload.method)[1:]:
        if fits(replace(workload, method=method), cluster, fixed):
            meaning = "store the frozen weights in 4 bits"
            if workload.method is Method.full:
                adapters = "train small adapters"
                meaning = adapters if method is Method.lora else f"{adapters} and {meaning}"
            yield f"{meaning}: method={method.value} fits"
            return


def _methods_that_train_less(method: Method) -> tuple[Method, ...]:
    """Return the method itself, then those that need ever less memory."""
    return tuple(Method)[tuple(Method).index(method) :]


def _store_less(
    workload: Workload, cluster: ClusterSpec, fixed: StrategySection, fits: Fits
) -> Iterator[str]:
    """Yield what is stored in more bits than need be, or keeps ZeRO-3 from sharing weights."""
    gpu, quantization = cluster.gpu, workload.quantization
    if workload.precision is Precision.fp32 and gpu.device_type == "cuda":
        precision = Precision.bf16 if gpu.has_bf16 else Precision.fp16
        if fits(replace(workload, precision=precision), cluster, fixed):
            yield f"16 bits a number: model.precision={precision.value} fits"
    if workload.method is not Method.qlora:
        return
    nf4 = replace(workload, quantization=replace(quantization, kind="nf4"))
    if quantization.kind == "int8" and fits(nf4, cluster, fixed):
        yield "4 bits instead of 8: quantization.kind=nf4 fits"
    plain = replace(workload, lora=replace(workload.lora, use_dora=False))
    if workload.lora.use_dora and fits(plain, cluster, fixed):
        yield "plain adapters: lora.use_dora=false fits"


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


def _fewest_nodes(
    workload: Workload,
    cluster: ClusterSpec,
    fixed: StrategySection,
    fits: Fits,
    *,
    low: int,
    most: int | None,
) -> tuple[int, str] | None:
    """Return the fewest nodes that fit, also in words; the batch grows to a multiple of the GPUs.

    Args:
        workload: what is to be trained.
        cluster: the nodes' kind.
        fixed: the strategy fields that the recipe sets.
        fits: asks the planner.
        low: nodes that are known to be too few.
        most: nodes beyond which nobody wants to know.
    """

    def at(num_nodes: int) -> tuple[Workload, ClusterSpec]:
        larger = replace(cluster, num_nodes=num_nodes)
        batch = -(-workload.global_batch_size // larger.world_size) * larger.world_size
        return replace(workload, global_batch_size=batch), larger

    if most is None:
        most = _MOST_NODES_FACTOR * max(low, 1)
    high = min(max(2 * low, 1), most)
    while high > low and not fits(*at(high), fixed):
        low, high = high, min(2 * high, most)
    if high <= low:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(*at(middle), fixed) else (middle, high)
    batch = at(high)[0].global_batch_size
    grown = f" (with optim.global_batch_size={batch})"
    nodes = "1 node" if high == 1 else f"{high:,} nodes"
    verb = "fits" if high == 1 else "fit"
    words = f"{nodes} of {cluster.gpus_per_node} {cluster.gpu.name} {verb}"
    return high, words + (grown if batch != workload.global_batch_size else "")
