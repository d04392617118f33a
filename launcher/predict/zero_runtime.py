"""What DeepSpeed's ZeRO keeps on a GPU, and adds while gradients arrive and the step runs.

Source:
    DeepSpeed 0.19.8: ``runtime/zero/stage_1_and_2.py``, ``runtime/zero/stage3.py``,
    ``runtime/fp16/unfused_optimizer.py``, ``runtime/bf16_optimizer.py``, ``runtime/engine.py``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from launcher.predict.components import (
    ADAPTERS,
    BUCKETS,
    CARRIED,
    COPIES,
    OPTIMIZER,
    PARAMETERS,
    QUANTIZED,
)
from launcher.predict.module_calls import call_setting
from launcher.predict.parameter_counts import ParameterCounts, count_parameters
from launcher.predict.parameter_gathers import NOTHING_GATHERED, GatheredBytes, gathered_bytes
from launcher.strategy import Method, Offload, Optimizer, Precision, Strategy
from launcher.workload import Workload

# MEMORY_OPT_ALLREDUCE_SIZE of engine.py
_STAGE_0_BUCKET_ELEMENTS = 500_000_000
# The chunk of _constant_buffered_norm2 in stage3.py.
_STAGE_3_NORM_ELEMENTS = 250_000_000


@dataclass(frozen=True, kw_only=True)
class ZeroRuntime:
    """One rank's ZeRO bookkeeping: widths in bytes per element and derived sizes.

    Without slots, for the cached properties: a plan asks for them some thousand times.
    """

    workload: Workload
    counts: ParameterCounts
    strategy: Strategy
    world_size: int
    is_full: bool
    width: int
    """Of the model's own precision."""
    trained_width: int
    """Of a trained parameter and its gradient."""
    accumulation_width: int
    precision: Precision
    is_int8: bool = False
    """The base weights are int8, which PEFT's adapters do not take over."""
    has_random_weights: bool = False

    @functools.cached_property
    def stage(self) -> int:
        """The ZeRO stage."""
        return self.strategy.zero_stage

    @functools.cached_property
    def partition(self) -> float:
        """Trained elements whose optimizer states this rank owns."""
        ranks = self.world_size if self.stage >= 1 else 1
        return self.counts.trainable / ranks

    @functools.cached_property
    def owned(self) -> float:
        """Elements of the tensors that overlap the partition: they are kept whole."""
        if self.world_size == 1:
            return self.counts.trainable
        cut = min(self.counts.expected_cut, self.partition)
        return min(self.partition + cut, self.counts.trainable)

    @functools.cached_property
    def has_offloaded_optimizer(self) -> bool:
        """Optimizer states live on the host or on NVMe."""
        return self.strategy.offload_optimizer is not Offload.none

    @functools.cached_property
    def has_offloaded_params(self) -> bool:
        """Parameter partitions live on the host or on NVMe."""
        return self.strategy.offload_param is not Offload.none

    @functools.cached_property
    def bucket(self) -> int:
        """Elements of one reduce bucket."""
        return self.strategy.zero.reduce_bucket_size

    @functools.cached_property
    def reduces_in_backward(self) -> bool:
        """Gradients go to buckets as they appear, instead of staying to the boundary."""
        if self.stage == 1:
            return self.strategy.zero.overlaps(1) and not self.has_fp32_stage_1
        return self.stage >= 2

    @functools.cached_property
    def has_fp32_stage_1(self) -> bool:
        """DeepSpeed runs ``BF16_Optimizer``, which keeps all gradients in fp32.

        Source: ``engine.py:_do_optimizer_sanity_check``.
        """
        return (
            self.stage == 1
            and self.precision is Precision.bf16
            and self.accumulation_width == 4
            and not self.has_offloaded_optimizer
        )

    @functools.cached_property
    def has_compact_gradients(self) -> bool:
        """ZeRO-2 adds into one fp32 partition, with no copies at the step."""
        return self.stage == 2 and self.accumulation_width == 4 and self.width == 2

    @functools.cached_property
    def casts_gradients(self) -> bool:
        """Gradients are reduced in another type than the model's (``communication_data_type``)."""
        wanted = self.strategy.zero.communication_data_type
        return wanted is not None and wanted != self.precision.value

    @functools.cached_property
    def reduced_width(self) -> int:
        """Bytes per element of a gradient while it is reduced."""
        wanted = self.strategy.zero.communication_data_type
        return self.trained_width if wanted is None else Precision(wanted).bytes_per_element

    @functools.cached_property
    def copy_ranks(self) -> int:
        """Ranks that hpZ's second copies are divided among; 1: there are none.

        Source: ``partition_parameters.py:_partition_param_sec``. They are made when a parameter
        is released, at birth too, and serve every gather until the step makes them stale
        (``stage3.py:invalidate_secondary_tensor``): those of frozen parameters stay for ever.
        """
        return self.strategy.zero.copy_ranks(self.world_size) if self.gathers else 1

    @functools.cached_property
    def gathers(self) -> bool:
        """Parameters are brought together for use: more ranks, or host memory, hold them."""
        return self.stage == 3 and (self.world_size > 1 or self.has_offloaded_params)

    @functools.cached_property
    def gathered(self) -> GatheredBytes:
        """Full parameters that ZeRO-3 holds at each place of a micro-step."""
        if not self.gathers:
            return NOTHING_GATHERED
        return gathered_bytes(
            call_setting(self.workload, self.strategy),
            self.strategy.zero,
            element_bytes=self.width,
            world_size=self.world_size,
            has_offloaded_params=self.has_offloaded_params,
            copies_trained=not self.keeps_copies,
        )

    @functools.cached_property
    def keeps_copies(self) -> bool:
        """Second copies of trained parameters wait from one micro-step to the next."""
        return self.strategy.gradient_accumulation_steps > 1

    # --- what stays -------------------------------------------------------------------------

    def model_bytes(self) -> dict[str, float]:
        """Return parameters on the GPU between steps, by component."""
        counts, shard = self.counts, 1.0
        persisted = 0.0
        if self.stage == 3:
            shard = 0.0 if self.has_offloaded_params else 1 / self.world_size
            threshold = self.strategy.zero.stage3_param_persistence_threshold
            if self.gathers:
                persisted = counts.persisted(threshold) * self.width
        found = {PARAMETERS: self.width * counts.frozen * shard + persisted}
        if self.is_full:
            found[PARAMETERS] += self.width * counts.trainable * shard
        else:
            found[ADAPTERS] = self.trained_width * counts.trainable * shard
        if counts.quantized:
            # ZeRO-3 partitions the packed weights; their scales stay on every rank.
            found[QUANTIZED] = counts.quantized_bytes * shard + counts.quantization_state_bytes
        return found

    def copies_bytes(self, *, of_trained: bool, of_frozen: bool) -> float:
        """Return hpZ's second copies on the GPU; with the parameters offloaded they are not."""
        if self.copy_ranks == 1 or self.has_offloaded_params:
            return 0.0
        return self.all_copies_bytes(of_trained=of_trained, of_frozen=of_frozen)

    def all_copies_bytes(self, *, of_trained: bool = True, of_frozen: bool = True) -> float:
        """Return hpZ's second copies, wherever they are; persistent ones are made at birth only."""
        if self.copy_ranks == 1:
            return 0.0
        frozen = self.width * self.counts.frozen + self.counts.quantized_bytes
        trained = self.trained_width * self.counts.trainable
        return (of_frozen * frozen + of_trained * trained) / self.copy_ranks

    def optimizer_bytes(self) -> float:
        """Return fp32 master weights and moments on the GPU after the first step."""
        if self.has_offloaded_optimizer:
            return 0.0
        master = 0.0 if self.stage == 0 and self.precision is Precision.fp32 else 4.0
        return (master + self.moment_bytes()) * self.partition

    def moment_bytes(self) -> float:
        """Return bytes per element of Adam's moments inside torch's allocator."""
        # bitsandbytes: 1 B and one fp32 scale per 256; the scales are never paged.
        if self.strategy.optimizer is Optimizer.adamw_8bit:
            return 2 * (1 + 4 / 256)
        return 2 * 4 / 256 if self.strategy.optimizer is Optimizer.paged_adamw_8bit else 8.0

    def paged_bytes(self) -> float:
        """Return optimizer states in CUDA managed memory, which torch does not count."""
        if self.strategy.optimizer is not Optimizer.paged_adamw_8bit:
            return 0.0
        return 0.0 if self.has_offloaded_optimizer else 2.0 * self.partition

    def static_bytes(self) -> dict[str, float]:
        """Return everything that is alive between two steps, by component."""
        found = self.model_bytes()
        found[OPTIMIZER] = self.optimizer_bytes()
        found[COPIES] = self.copies_bytes(of_trained=False, of_frozen=True)
        if self.stage == 3:
            if self.strategy.zero.contiguous_gradients:
                found[BUCKETS] = float(self.reduced_width * self.bucket)
            if not self.has_offloaded_optimizer:
                # grad_partitions_flat_buffer, from init on
                found["gradient partitions"] = self.accumulation_width * self.partition
        elif self.has_fp32_stage_1:
            found["fp32 gradients of the whole model"] = 4.0 * self.counts.trainable
        elif self.has_offloaded_optimizer and self.stage >= 1:
            # temp_grad_buffer_for_gpu_offload
            found["offload staging buffer"] = self.trained_width * self.counts.largest_trainable
        return {name: size for name, size in found.items() if size}

    def carried_bytes(self) -> dict[str, float]:
        """Return what waits from one micro-step to the next: gradients, buckets, hpZ's copies.

        Source: ``stage_1_and_2.py:setup_buckets`` and ``reduce_gradients``; H100, four runs: the
        bucket to the byte, in forward and loss.
        """
        if self.strategy.gradient_accumulation_steps == 1:
            return {}
        if self.stage == 3:
            copies = self.copies_bytes(of_trained=True, of_frozen=True)
            return {COPIES: copies} if copies else {}
        if self.stage <= 1 and not self.has_fp32_stage_1:
            # ZeRO-1 makes its buckets at the first gradient and gives them back at the boundary.
            carried = {CARRIED: float(self.trained_width * self.counts.trainable)}
            return {**carried, BUCKETS: self.bucket_bytes()} if self.stage == 1 else carried
        if self.stage == 2 and not self.has_offloaded_optimizer:
            if self.has_compact_gradients:
                return {CARRIED: 4 * self.partition}
            return {CARRIED: self.trained_width * self.owned}
        return {}

    # --- gradients --------------------------------------------------------------------------

    def bucket_bytes(self) -> float:
        """Return reduce buckets that exist from the first gradient of a backward to its end."""
        if self.stage not in (1, 2) or self.has_fp32_stage_1:
            return 0.0
        if not self.strategy.zero.contiguous_gradients and not self.has_offloaded_optimizer:
            return 0.0
        copies = 2 if self.strategy.zero.overlaps(self.strategy.zero_stage) else 1
        return float(self.trained_width * self.bucket * copies)

    def reduction_bytes(self, elements: float) -> float:
        """Return the copy that reducing ``elements`` gradients makes, all in one bucket.

        ZeRO-1/2 concatenate the slices of different owners (``allreduce_bucket``), ZeRO-3
        the shares of all ranks (``reduce_scatter_coalesced``); one slice needs no copy. Before
        them, ZeRO-1/2 cast to ``communication_data_type``; ZeRO-3's bucket has it, so only what
        is larger is cast, and afterwards the rank's own share.
        """
        if self.stage == 3:
            single = elements > self.bucket
            copied = 0.0 if single and not self.casts_gradients else self.reduced_width * elements
            share = self.accumulation_width * elements / self.world_size
            return copied + (share if self.casts_gradients else 0.0)
        return self.cast_bytes(elements) + (
            self.trained_width * elements if self.world_size > 1 else 0.0
        )

    def cast_bytes(self, elements: float) -> float:
        """Return ``elements`` gradients in the type that ZeRO-0 to 2 reduce them in, if another."""
        return self.reduced_width * elements if self.casts_gradients else 0.0

    def norm_bytes(self, largest: float) -> float:
        """Return the fp64 copy of the largest gradient slice (``get_norm_dtype``)."""
        if self.stage == 3:
            return 8 * min(largest / self.world_size, _STAGE_3_NORM_ELEMENTS)
        return 8 * min(largest, self.partition)

    def stage_0_reduction_bytes(self) -> float:
        """Return the flat copy of ``buffered_allreduce_fallback``."""
        elements = min(_STAGE_0_BUCKET_ELEMENTS, self.counts.trainable)
        return self.trained_width * elements + self.cast_bytes(elements)

    def fp32_stage_1_reduction_bytes(self) -> float:
        """Return BF16_Optimizer's cast of all fp32 gradients, and their copy if it is small.

        One flat tensor above the bucket's size is reduced where it is; below, it is joined
        with the next group's first.
        """
        count = self.counts.trainable
        copied = 4.0 * count if count <= _STAGE_0_BUCKET_ELEMENTS else 0.0
        return (0 if self.reduced_width == 4 else self.reduced_width) * count + copied


def zero_runtime(workload: Workload, strategy: Strategy, *, world_size: int) -> ZeroRuntime:
    """Return one rank's ZeRO bookkeeping for a workload and a strategy.

    Adapters have the model's precision: the engine casts every parameter at init except under
    ZeRO-3 (``engine.py:_cast_module_mixed_precision``), and there the worker makes them so
    (``autocast_adapter_dtype=False``); PEFT's default would keep them fp32.
    """
    width = workload.precision.bytes_per_element
    is_full = workload.method is Method.full
    accumulation = strategy.grad_accum_dtype
    return ZeroRuntime(
        workload=workload,
        counts=count_parameters(workload),
        strategy=strategy,
        world_size=world_size,
        is_full=is_full,
        width=width,
        trained_width=width,
        accumulation_width=accumulation.bytes_per_element if accumulation else width,
        precision=workload.precision,
        is_int8=workload.method is Method.qlora and workload.quantization.kind == "int8",
        has_random_weights=workload.has_random_weights,
    )
