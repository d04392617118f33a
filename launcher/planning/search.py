"""Which strategies are weighed: every kind, its variants, and the micro-batches that matter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby, product
from typing import Any, NamedTuple

from launcher.ds_keys import apply_to_knobs
from launcher.hardware import ClusterSpec
from launcher.planning.ceiling import NO_CEILING, Ceiling
from launcher.planning.plan import Candidate
from launcher.planning.rules import default_attention, losses_that_work, why_impossible
from launcher.predict.attention_kernel import attention_kernel, can_run_flash
from launcher.predict.memory import MemoryEstimate, estimate_memory
from launcher.predict.step_time import estimate_time, least_step_seconds
from launcher.recipe_sections import StrategySection
from launcher.strategy import (
    Attention,
    Checkpointing,
    Loss,
    Method,
    Offload,
    Optimizer,
    Strategy,
    ZeroKnobs,
    ZeroStage,
)
from launcher.workload import Workload

# Times this close are called equal; the prediction is not better than that.
TIE_FRACTION = 0.02
# DeepSpeed's default of 5e8 elements costs 1 GB and more. All-reduce reaches full bandwidth at
# far smaller messages (nccl-tests: tens of MB), so 1e8 bytes of bf16 are enough.
LARGEST_BUCKET_ELEMENTS = 50_000_000
_OFFLOADS = frozenset({"offload_optimizer", "offload_param"})


class Sized(NamedTuple):
    """A strategy with its memory; most of what is tried is dropped before its time is asked."""

    strategy: Strategy
    memory: MemoryEstimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Packages:
    """Optional packages that may be chosen where the recipe leaves it open."""

    has_liger: bool = True
    has_flash_attn: bool = False


USUAL_PACKAGES = Packages()
"""Where nobody can look: flash-attn has to be built for each version of torch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """What is searched: the workload on the cluster, under the recipe's fixed fields."""

    workload: Workload
    cluster: ClusterSpec
    fixed: StrategySection
    raw_deepspeed: Mapping[str, Any]
    packages: Packages
    limit_bytes: int
    """Device memory that a rank may use."""
    micro_batch_sizes: tuple[int, ...]
    """Ascending divisors of the samples per step of each GPU, or group that shares sequences."""
    sequence_parallel_size: int = 1
    """GPUs that share each sequence."""
    ceiling: Ceiling = NO_CEILING

    def weigh(self, shape: Strategy, micro_batch_size: int) -> Candidate:
        """Return a strategy at a micro-batch size with its memory and time."""
        return self.time(self.size(shape, micro_batch_size))

    def largest_that_fits(self, shape: Strategy, *, smallest: Sized | None = None) -> Candidate:
        """Return a shape at its largest micro-batch that fits, or at the smallest if none does.

        Memory grows with the micro-batch, with one exception: the last one needs no accumulation,
        and with it no gradients that wait between micro-steps. So it is tried by itself first.

        Args:
            shape: what is taken at any micro-batch.
            smallest: the shape at the smallest micro-batch, where that is known already.
        """
        sizes = self.micro_batch_sizes
        last = smallest if smallest and len(sizes) == 1 else self.size(shape, sizes[-1])
        if len(sizes) == 1 or self.admits(last.memory):
            return self.time(last)
        found = smallest or self.size(shape, sizes[0])
        fits = self.admits(found.memory)
        low, high = 0, len(sizes) - 1
        while fits and high - low > 1:
            middle = (low + high) // 2
            sized = self.size(shape, sizes[middle])
            if self.admits(sized.memory):
                low, found = middle, sized
            else:
                high = middle
        return self.time(found)

    def size(self, shape: Strategy, micro_batch_size: int) -> Sized:
        """Return a strategy at a micro-batch size with its memory alone."""
        strategy = self.at(shape, micro_batch_size)
        memory = estimate_memory(self.workload, strategy, self.cluster)
        return Sized(strategy, memory)

    def admits(self, memory: MemoryEstimate) -> bool:
        """Return whether a rank, its node and the ceiling have room for that."""
        return (
            memory.device_used_bytes <= self.limit_bytes
            and memory.host_bytes_per_node <= self.cluster.host_memory_bytes
            and self.ceiling.admits(memory)
        )

    def time(self, sized: Sized) -> Candidate:
        """Return the candidate with its time, too."""
        return Candidate(
            strategy=sized.strategy,
            memory=sized.memory,
            time=estimate_time(self.workload, sized.strategy, self.cluster),
            fits=self.admits(sized.memory),
        )

    def at(self, shape: Strategy, micro_batch_size: int) -> Strategy:
        """Return the strategy at a micro-batch size, accumulating up to the global batch."""
        num_shares = self.cluster.world_size // shape.sequence_parallel_size
        per_share = self.workload.global_batch_size // num_shares
        return replace(
            shape,
            micro_batch_size_per_gpu=micro_batch_size,
            gradient_accumulation_steps=per_share // micro_batch_size,
        )


_Bounded = list[tuple[float, Strategy]]
"""Variants of a kind, each with the least seconds that it could take."""


def weigh_all(
    space: SearchSpace, *, every_kind: bool
) -> tuple[list[Candidate], dict[Strategy, str]]:
    """Return candidates of the kinds of strategies, and what cannot work with the reason.

    Of each kind (stage, offloads, checkpointing, optimizer) the variants in loss and buckets are
    weighed in the order of the time that they could reach; the search of a kind ends when the
    next one could not beat what fits already. Each variant is taken at the largest micro-batch
    that fits, which is its fastest. A kind whose most frugal variant is far too large is left
    at that.

    Args:
        space: what is searched.
        every_kind: weigh also kinds that could not beat what fits already, to explain them.
    """
    kinds, impossible = _kinds_that_work(space)
    if not every_kind:
        # ZeRO-3 last: whether less will do is asked whatever its time.
        kinds.sort(key=lambda variants: (variants[0][1].zero_stage == 3, variants[0][0]))
    weighed: list[Candidate] = []
    record_seconds = float("inf")
    for variants in kinds:
        if variants[0][0] > record_seconds * (1 + TIE_FRACTION) and not every_kind:
            continue
        found = _weigh_kind(space, variants)
        weighed += found
        fitting = [candidate.time.step_seconds for candidate in found if candidate.fits]
        record_seconds = min([record_seconds, *fitting])
    return weighed, impossible


def _kinds_that_work(space: SearchSpace) -> tuple[list[_Bounded], dict[Strategy, str]]:
    """Return the possible variants of every kind, the fastest first; and the impossible ones."""
    impossible: dict[Strategy, str] = {}
    kinds: list[_Bounded] = []
    for _, shapes in groupby(all_shapes(space), key=kind):
        variants = []
        for shape in shapes:
            reason = why_impossible(shape, space.workload, space.cluster)
            if reason is not None:
                impossible[shape] = reason
                continue
            fastest = space.at(shape, space.micro_batch_sizes[-1])
            bound = least_step_seconds(space.workload, fastest, space.cluster)
            variants.append((bound, shape))
        if variants:
            kinds.append(sorted(variants, key=lambda item: item[0]))
    return kinds, impossible


def _weigh_kind(space: SearchSpace, variants: _Bounded) -> list[Candidate]:
    """Return the variants of one kind that matter, each at its best micro-batch."""
    frugal = min((shape for _, shape in variants), key=_appetite)
    probe = space.size(frugal, space.micro_batch_sizes[0])
    if _is_hopeless(space, probe):
        return [space.time(probe)]
    weighed: list[Candidate] = []
    best_seconds = float("inf")
    for bound, shape in variants:
        if bound > best_seconds * (1 + TIE_FRACTION):
            break
        candidate = space.largest_that_fits(shape, smallest=probe if shape is frugal else None)
        weighed.append(candidate)
        if candidate.fits:
            best_seconds = min(best_seconds, candidate.time.step_seconds)
    return weighed


def _appetite(shape: Strategy) -> tuple[object, ...]:
    """Sort the variants of a kind, the most frugal first."""
    zero = shape.zero
    return (
        (Loss.liger, Loss.chunked, Loss.full).index(shape.loss),
        shape.attention is Attention.eager,
        bool(zero.overlap_comm),
        zero.stage3_max_live_parameters,
    )


def _is_hopeless(space: SearchSpace, probe: Sized) -> bool:
    """Return whether no variant of the kind can fit, given its most frugal at the least batch.

    A tenth above the limit leaves room for a variant that is more frugal after all, and the
    largest micro-batch needs no gradients that wait (4 bytes each at most).
    """
    if probe.memory.host_bytes_per_node > 1.1 * space.cluster.host_memory_bytes:
        return True
    waiting = 0
    if probe.strategy.gradient_accumulation_steps > 1:
        waiting = 4 * space.workload.num_trainable_params
    return probe.memory.device_used_bytes - waiting > 1.1 * space.limit_bytes


def anything_fits(space: SearchSpace) -> bool:
    """Return whether :func:`weigh_all` would find anything that fits, the frugal kinds first."""
    smallest, last = space.micro_batch_sizes[0], space.micro_batch_sizes[-1]
    for _, of_kind in groupby(reversed(tuple(all_shapes(space))), key=kind):
        shapes = [s for s in of_kind if why_impossible(s, space.workload, space.cluster) is None]
        if not shapes:
            continue
        probe = space.size(min(shapes, key=_appetite), smallest)
        if space.admits(probe.memory):
            return True
        if _is_hopeless(space, probe):
            continue
        sizes = product(shapes, {smallest, last})
        if any(space.admits(space.size(shape, size).memory) for shape, size in sizes):
            return True
    return False


def smaller_micro_batches(space: SearchSpace, candidate: Candidate) -> Iterator[Candidate]:
    """Yield a candidate at every smaller micro-batch size that fits."""
    for size in space.micro_batch_sizes:
        if size >= candidate.strategy.micro_batch_size_per_gpu:
            return
        smaller = space.size(candidate.strategy, size)
        if space.admits(smaller.memory):
            yield space.time(smaller)


def kind(
    strategy: Strategy,
) -> tuple[ZeroStage, Offload, Offload, Checkpointing, Optimizer, int]:
    """Return what kind of memory saving a strategy is; the rest are its variants."""
    return (
        strategy.zero_stage,
        strategy.offload_optimizer,
        strategy.offload_param,
        strategy.gradient_checkpointing,
        strategy.optimizer,
        strategy.sequence_parallel_size,
    )


def divisors(number: int) -> tuple[int, ...]:
    """Return the divisors of a positive number, ascending."""
    low = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return tuple(sorted({*low, *(number // d for d in low)}))


def all_shapes(space: SearchSpace) -> Iterator[Strategy]:
    """Yield every strategy to weigh, at micro-batch 1, kind by kind; fixed fields have one value.

    Left out unless the recipe allows them: ZeRO-0, which sends as much as ZeRO-1 and needs more
    memory; 8-bit optimizers, which change the result of training; under ZeRO-3 an offload of
    4-bit weights or of what is trained on them, which no GPU has been seen to run.
    """
    workload, fixed = space.workload, space.fixed
    is_offload_asked_for = not fixed.given().keys().isdisjoint(_OFFLOADS)
    on_cpu = space.cluster.gpu.device_type == "cpu"
    offloads = (Offload.none,) if on_cpu else (Offload.none, Offload.cpu)
    if fixed.nvme_path is not None:
        offloads = (*offloads, Offload.nvme)
    checkpointings = tuple(Checkpointing)[:2] if on_cpu else tuple(Checkpointing)
    losses = losses_that_work(workload.model, space.cluster.gpu, has_liger=space.packages.has_liger)
    for stage, optimizer_to, param_to, checkpointing, optimizer, loss, attention in product(
        fixed.choices("zero_stage", (1, 2, 3)),
        fixed.choices("offload_optimizer", offloads),
        fixed.choices("offload_param", offloads),
        fixed.choices("gradient_checkpointing", checkpointings),
        fixed.choices("optimizer", (Optimizer.adamw,)),
        fixed.choices("loss", losses),
        _attentions(space),
    ):
        is_offloaded = (optimizer_to, param_to) != (Offload.none, Offload.none)
        is_untried = workload.method is Method.qlora and stage == 3 and is_offloaded
        if is_untried and not is_offload_asked_for:
            continue
        for knobs, has_kernels in product(
            _knobs(stage, workload, world_size=space.cluster.world_size),
            fixed.choices("liger_kernels", (loss is Loss.liger,)),
        ):
            yield Strategy(
                zero_stage=stage,
                offload_optimizer=optimizer_to,
                offload_param=param_to,
                gradient_checkpointing=checkpointing,
                attention=attention,
                loss=loss,
                optimizer=optimizer,
                sequence_parallel_size=space.sequence_parallel_size,
                grad_accum_dtype=fixed.grad_accum_dtype,
                liger_kernels=has_kernels,
                expandable_segments=fixed.expandable_segments is not False,
                zero=apply_to_knobs(knobs, space.raw_deepspeed),
            )


def _attentions(space: SearchSpace) -> tuple[Attention, ...]:
    """Return what the recipe allows, else sdpa and what may be faster where its kernel is slow."""
    workload, gpu = space.workload, space.cluster.gpu
    chosen = default_attention(workload.model)
    kernel = attention_kernel(workload, Strategy(zero_stage=2, attention=chosen), gpu)
    found = [chosen]
    if kernel == "math":
        found.append(Attention.eager)
    if space.packages.has_flash_attn and kernel != "flash" and can_run_flash(workload, gpu):
        found.append(Attention.flash_attention_2)
    return space.fixed.choices("attention", tuple(found))


def _knobs(stage: ZeroStage, workload: Workload, *, world_size: int) -> Iterator[ZeroKnobs]:
    """Yield bucket sizes for a stage: for ZeRO-2 also overlapping ones, for ZeRO-3 frugal ones.

    DeepSpeed's defaults are sized for full fine-tuning of large models; a LoRA of 33 M
    parameters never fills a bucket of 5e8 elements and pays 1 GB for it all the same.
    """
    bucket = min(workload.num_trainable_params, LARGEST_BUCKET_ELEMENTS)
    bucket = -(-bucket // 1024) * 1024
    if stage != 3:
        plain = ZeroKnobs(reduce_bucket_size=bucket, allgather_bucket_size=LARGEST_BUCKET_ELEMENTS)
        yield plain
        if stage == 2 and world_size > 1 and workload.method is Method.full:
            # Gradients travel while backward goes on, for a second bucket; the gradients of
            # adapters are too small to matter (transformers docs, DeepSpeed guide: zero2).
            yield replace(plain, overlap_comm=True)
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
