"""Seconds per optimizer step from a roofline of compute, communication and transfers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.hardware import ClusterSpec
from launcher.predict.attention_kernel import attention_kernel, can_run_flash
from launcher.predict.bottleneck import what_bounds
from launcher.predict.compute_cost import MicroStepWork, micro_step_work
from launcher.predict.host_work import awaited_seconds
from launcher.predict.liger_kernels import has_liger_kernels
from launcher.predict.site_constants import time_constants
from launcher.predict.start_up import start_up_seconds
from launcher.predict.time_calibration import TimeCalibration
from launcher.predict.weight_totals import WeightTotals, weight_totals
from launcher.predict.zero_runtime import zero_runtime
from launcher.strategy import Checkpointing, Method, Offload, Optimizer, Precision, Strategy
from launcher.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeEstimate:
    """Predicted time of one optimizer step and what bounds it."""

    step_seconds: float
    components: Mapping[str, float]
    """Seconds of each part; parts overlap, so they may add up to more than the step."""
    tokens_per_second_per_gpu: float
    mfu: float
    """Model FLOPs utilisation, 0-1 of the GPU's dense peak."""
    bound_by: str
    """What to change first, in a few words a newcomer understands."""
    start_up_seconds: float = 0.0
    """What one of the first steps takes more, once."""

    def run_seconds(self, num_steps: int) -> float:
        """Return the seconds of so many steps, from the first one on."""
        return num_steps * self.step_seconds + self.start_up_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class _Transfers:
    """Seconds of collectives and host copies: every micro-step, and once a step."""

    micro_seconds: float
    boundary_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gathers:
    """ZeRO-3's gathers in one micro-step."""

    count: int
    total_bytes: float
    """All that they bring together; a weight that is released and used again counts again."""
    group_bytes: float = 0.0
    """Of that, what hpZ's second copies give, inside groups of ranks: the mean micro-step's."""


_NO_GATHERS = _Gathers(count=0, total_bytes=0.0)


def estimate_time(
    workload: Workload,
    strategy: Strategy,
    cluster: ClusterSpec,
    *,
    calibration: TimeCalibration | None = None,
) -> TimeEstimate:
    """Predict one optimizer step.

    A micro-step takes as long as the slower of the host (Python, kernel launches, DeepSpeed's
    hooks) and the GPU (matrices, attention, memory traffic and what communication is not
    hidden); copies to the host and the work at the accumulation boundary come on top. On a
    processor both are the same cores and add up.

    Args:
        workload: model, method and sequence length; every sample counts as full length.
        strategy: fixes the micro-batch, accumulation and everything that ZeRO does.
        cluster: rates of the GPUs and of the links between them.
        calibration: physical constants; by default the site's, else those fitted on one H100.

    Returns:
        Seconds, tokens (padding included) per second per GPU, MFU (0-1), and the bottleneck.
    """
    constants = calibration or time_constants(cluster)
    work = micro_step_work(workload, strategy, constants, gpu=cluster.gpu)
    gathers = _gathers(workload, strategy, cluster.world_size)
    step_seconds, components = _step_seconds(
        work, workload, strategy, cluster, constants, gathers=gathers
    )
    steps = strategy.gradient_accumulation_steps
    return TimeEstimate(
        step_seconds=step_seconds,
        components=components,
        tokens_per_second_per_gpu=steps * work.tokens / step_seconds,
        mfu=steps * work.model_flops / (step_seconds * cluster.gpu.matmul_flops_per_s),
        bound_by=what_bounds(
            components,
            work,
            cluster,
            can_fuse=not strategy.liger_kernels
            and has_liger_kernels(workload.model.model_type, cluster.gpu),
            can_flash=can_run_flash(workload, cluster.gpu)
            and attention_kernel(workload, strategy, cluster.gpu) != "flash",
            is_one_micro_step=steps == 1,
        ),
        start_up_seconds=start_up_seconds(
            workload,
            strategy,
            constants,
            module_visits=work.module_visits,
            num_passes=work.num_passes,
        ),
    )


def least_step_seconds(workload: Workload, strategy: Strategy, cluster: ClusterSpec) -> float:
    """Return seconds that a step takes at least: with ZeRO-3 gathering each weight once.

    Counting how often it does takes a hundred times longer than all the rest, and a planner
    asks this of strategies that it then leaves out.
    """
    once = _NO_GATHERS
    if strategy.zero_stage == 3:
        stored = _stored_bytes(workload, weight_totals(workload))
        has_copies = strategy.zero.copy_ranks(cluster.world_size) > 1
        once = _Gathers(count=0, total_bytes=stored, group_bytes=stored if has_copies else 0.0)
    constants = time_constants(cluster)
    work = micro_step_work(workload, strategy, constants, gpu=cluster.gpu)
    return _step_seconds(work, workload, strategy, cluster, constants, gathers=once)[0]


def _step_seconds(
    work: MicroStepWork,
    workload: Workload,
    strategy: Strategy,
    cluster: ClusterSpec,
    calibration: TimeCalibration,
    *,
    gathers: _Gathers,
) -> tuple[float, dict[str, float]]:
    """Return the seconds of a step, and those of each part."""
    compute = _compute_seconds(work, workload, cluster, calibration)
    host, hooks = _host_seconds(work, strategy, calibration, num_gathers=gathers.count)
    links = _communication(workload, strategy, cluster, calibration, gathers=gathers)
    copies = _host_copies(workload, strategy, cluster, gathers=gathers)
    device = _overlapped(
        sum(compute.values()),
        links.micro_seconds,
        calibration.overlap_fraction if strategy.zero.overlaps(strategy.zero_stage) else 0.0,
    )
    # On a processor the same cores start the operations and run them: the times add up.
    power = 1.0 if cluster.gpu.device_type == "cpu" else calibration.bottleneck_exponent
    alone = awaited_seconds(work.trainable_tensors, strategy, calibration)
    micro = ((host + hooks) ** power + device**power) ** (1 / power)
    last = ((host + hooks - alone) ** power + device**power) ** (1 / power) + alone
    optimizer = _optimizer_seconds(strategy, cluster, calibration, weight_totals(workload))
    if strategy.zero_stage == 0:
        # Without ZeRO no gradient has a hook. DeepSpeed 0.19.8 (fp16/unfused_optimizer.py:step)
        # goes over them one by one after backward, and waits to hear whether each is finite.
        optimizer["optimizer"] += calibration.gradient_hook_seconds * work.trainable_tensors
    steps = strategy.gradient_accumulation_steps
    boundary = links.boundary_seconds + copies.boundary_seconds + sum(optimizer.values())
    step_seconds = (steps - 1) * micro + last + steps * copies.micro_seconds + boundary
    components = {
        **{name: steps * seconds for name, seconds in compute.items()},
        "host": steps * host,
        "zero3_hooks": steps * hooks,
        "communication": steps * links.micro_seconds + links.boundary_seconds,
        "offload_copies": steps * copies.micro_seconds + copies.boundary_seconds,
        **optimizer,
    }
    return step_seconds, components


def _compute_seconds(
    work: MicroStepWork,
    workload: Workload,
    cluster: ClusterSpec,
    calibration: TimeCalibration,
) -> dict[str, float]:
    gpu, width = cluster.gpu, workload.precision.bytes_per_element
    reached = calibration.efficiency_of(gpu)
    peak = gpu.matmul_flops_per_s
    fp32_peak = peak
    if gpu.device_type == "cuda":
        # Without TF32 (torch's default) fp32 runs outside the tensor cores: 15.7 of 125 TFLOPS
        # on V100, 19.5 of 312 on A100, 67 of 989 on H100 (NVIDIA datasheets).
        fp32_peak /= 8 if not gpu.has_bf16 else 15
    masked_fraction = reached.masked_fraction
    if width == 4:
        # Outside the tensor cores products take longer than what a mask adds to them.
        peak, masked_fraction = fp32_peak, reached.flash_fraction
    memory_rate = gpu.memory_bytes_per_s * reached.memory_fraction
    return {
        # Adding the weights' read time gives small micro-batches their lower efficiency.
        "matmul": work.matmul_flops / (peak * reached.matmul_fraction)
        + work.weight_bytes / memory_rate,
        "attention": work.flash_attention_flops / (peak * reached.flash_fraction)
        + work.masked_attention_flops / (peak * masked_fraction)
        + work.fp32_attention_flops / (fp32_peak * reached.matmul_fraction),
        "memory_traffic": (work.elementwise_bytes + work.gradient_bytes) / memory_rate,
    }


def _gathers(workload: Workload, strategy: Strategy, world_size: int) -> _Gathers:
    if strategy.zero_stage != 3:
        return _NO_GATHERS
    runtime = zero_runtime(workload, strategy, world_size=world_size)
    if not runtime.gathers:
        return _NO_GATHERS
    gathered, steps = runtime.gathered, strategy.gradient_accumulation_steps
    # The step makes trained parameters' copies stale; the first micro-step after it renews them.
    later = gathered.gathered_in_all if runtime.copy_ranks > 1 else 0
    return _Gathers(
        # A single rank brings its weights from the host without a collective.
        count=gathered.num_gathers if world_size > 1 else 0,
        total_bytes=gathered.gathered_in_all,
        group_bytes=(gathered.gathered_in_groups + (steps - 1) * later) / steps,
    )


def _host_seconds(
    work: MicroStepWork, strategy: Strategy, calibration: TimeCalibration, *, num_gathers: int
) -> tuple[float, float]:
    """Return the host's time for launches, and for ZeRO-3's hooks, in one micro-step."""
    launches = calibration.host_op_seconds * work.host_ops
    if strategy.zero_stage > 0:
        launches += calibration.gradient_hook_seconds * work.trainable_tensors
    if strategy.zero_stage < 3:
        return launches, 0.0
    hooks = calibration.zero3_hook_seconds * work.module_visits
    hooks += calibration.zero3_module_seconds * work.modules_with_params
    return launches, hooks + calibration.gather_seconds * num_gathers


def _overlapped(compute_seconds: float, link_seconds: float, overlap_fraction: float) -> float:
    larger, smaller = max(compute_seconds, link_seconds), min(compute_seconds, link_seconds)
    return larger + (1 - overlap_fraction) * smaller


def _communication(
    workload: Workload,
    strategy: Strategy,
    cluster: ClusterSpec,
    calibration: TimeCalibration,
    *,
    gathers: _Gathers,
) -> _Transfers:
    """Return the time of ZeRO's collectives and of sequence parallelism's all-to-alls.

    Source:
        Volumes: ZeRO, arXiv:1910.02054, section 7; that stage 2 all-reduces whole buckets on
        every micro-step: DeepSpeed 0.19.8 ``zero/stage_1_and_2.py:allreduce_bucket``.
    """
    ranks, stage = cluster.world_size, strategy.zero_stage
    if ranks == 1:
        return _Transfers(micro_seconds=0.0, boundary_seconds=0.0)
    num_trainable = workload.num_trainable_params
    trainable = workload.precision.bytes_per_element * num_trainable
    reduced_in = strategy.zero.communication_data_type or workload.precision
    reduced = Precision(reduced_in).bytes_per_element * num_trainable
    bus = cluster.gpu.peer_link_bytes_per_s
    if cluster.num_nodes > 1:
        bus = min(bus, cluster.inter_node_bytes_per_s)
    latency = calibration.collective_latency_seconds * math.log2(ranks)
    buckets = 1 + num_trainable // strategy.zero.reduce_bucket_size
    micro = boundary = 0.0
    if stage <= 1:
        boundary = 2 * reduced + stage * trainable
    elif stage == 2:
        micro, boundary = 2 * reduced, trainable
    else:
        micro = gathers.total_bytes - gathers.group_bytes + reduced
    share = (ranks - 1) / ranks / bus
    copy_ranks = strategy.zero.copy_ranks(ranks)
    group_bus = cluster.gpu.peer_link_bytes_per_s if copy_ranks <= cluster.gpus_per_node else bus
    in_groups = gathers.group_bytes * (copy_ranks - 1) / copy_ranks / group_bus
    exchanged = _sequence_parallel_seconds(workload, strategy, cluster, calibration)
    return _Transfers(
        micro_seconds=micro * share
        + in_groups
        + exchanged
        + (latency * buckets if stage >= 2 else 0.0),
        boundary_seconds=boundary * share + latency * buckets,
    )


def _sequence_parallel_seconds(
    workload: Workload, strategy: Strategy, cluster: ClusterSpec, calibration: TimeCalibration
) -> float:
    """Return the time of Ulysses' four all-to-alls per layer and pass (arXiv:2309.14509).

    Before and after each, ``launcher/worker/sequence.py`` orders the tensor anew: a copy.
    """
    degree = strategy.sequence_parallel_size
    if degree == 1:
        return 0.0
    model = workload.model
    tokens = strategy.micro_batch_size_per_gpu * workload.max_seq_len / degree
    heads = 2 * model.num_attention_heads + 2 * max(model.num_key_value_heads, degree)
    per_pass = workload.precision.bytes_per_element * tokens * heads * model.head_dim
    passes = 2 if strategy.gradient_checkpointing is Checkpointing.none else 3
    bus = cluster.gpu.peer_link_bytes_per_s
    if degree > cluster.gpus_per_node:
        bus = min(bus, cluster.inter_node_bytes_per_s / cluster.gpus_per_node)
    memory_fraction = calibration.efficiency_of(cluster.gpu).memory_fraction
    seconds = per_pass * (degree - 1) / degree / bus
    seconds += 4 * per_pass / (cluster.gpu.memory_bytes_per_s * memory_fraction)
    seconds += 4 * calibration.collective_latency_seconds * math.log2(degree)
    return passes * model.num_hidden_layers * seconds


def _stored_bytes(workload: Workload, totals: WeightTotals) -> float:
    """Return the bytes of all weights as they are stored and gathered, adapters included."""
    adapters = 0 if workload.method is Method.full else totals.num_trainable_params
    packed = 0.5 if workload.quantization.kind == "nf4" else 1.0
    quantized = totals.num_quantized_params
    plain = totals.num_params + adapters - quantized
    return workload.precision.bytes_per_element * plain + packed * quantized


def _host_copies(
    workload: Workload, strategy: Strategy, cluster: ClusterSpec, *, gathers: _Gathers
) -> _Transfers:
    """Return the time of PCIe and NVMe traffic; each GPU has its own link to the host."""
    gpu, ranks = cluster.gpu, cluster.world_size
    width = workload.precision.bytes_per_element
    micro = boundary = 0.0
    if strategy.offload_optimizer is not Offload.none:
        # Gradients go down in fp32 (cast on the GPU); updated weights come back in 16 bits.
        owned = workload.num_trainable_params / ranks
        down = 4 * owned / gpu.host_link_bytes_per_s
        boundary += width * owned / gpu.host_link_bytes_per_s
        if strategy.zero_stage >= 2:
            micro += down
        else:
            boundary += down
    if strategy.offload_param is not Offload.none:
        # Each rank's part comes from its host before it is gathered; the fetch is waited for.
        fetched = (gathers.total_bytes - gathers.group_bytes) / ranks
        fetched += gathers.group_bytes / strategy.zero.copy_ranks(ranks)
        micro += fetched / gpu.host_link_bytes_per_s
        if strategy.offload_param is Offload.nvme:
            micro += fetched * cluster.gpus_per_node / cluster.nvme_bytes_per_s
    if strategy.gradient_checkpointing is Checkpointing.cpu_offload:
        model = workload.model
        tokens = (
            strategy.micro_batch_size_per_gpu
            * workload.max_seq_len
            / strategy.sequence_parallel_size
        )
        saved = width * tokens * model.hidden_size * model.num_hidden_layers
        micro += 2 * saved / gpu.host_link_bytes_per_s
    return _Transfers(micro_seconds=micro, boundary_seconds=boundary)


def _optimizer_seconds(
    strategy: Strategy, cluster: ClusterSpec, calibration: TimeCalibration, totals: WeightTotals
) -> dict[str, float]:
    """Return the optimizer's own time, on the GPU or on the node's processors."""
    trainable = totals.num_trainable_params
    fixed = calibration.step_fixed_seconds + calibration.trainer_step_seconds
    if strategy.offload_optimizer is not Offload.none:
        per_node = trainable / cluster.num_nodes
        moved = calibration.cpu_adam_bytes_per_param * per_node
        seconds = moved / cluster.host_memory_bytes_per_s
        if strategy.offload_optimizer is Offload.nvme:
            # fp32 weight, two moments and gradient read; the first three written back.
            seconds += 28 * per_node / cluster.nvme_bytes_per_s
        return {"cpu_optimizer": seconds, "optimizer": fixed}
    owned = trainable / (cluster.world_size if strategy.zero_stage else 1)
    bytes_per_param = calibration.gpu_adam_bytes_per_param
    if strategy.optimizer.is_8bit:
        bytes_per_param += calibration.eight_bit_adam_bytes_per_param
    if strategy.optimizer in (Optimizer.adamw_foreach, Optimizer.adamw_single):
        # One pass per operation instead of one for all: twelve operations of 8-12 bytes.
        bytes_per_param += 90
    memory_fraction = calibration.efficiency_of(cluster.gpu).memory_fraction
    rate = cluster.gpu.memory_bytes_per_s * memory_fraction
    return {
        "cpu_optimizer": 0.0,
        "optimizer": fixed + bytes_per_param * owned / rate,
    }
