"""Host memory of a node, NVMe space and checkpoint size.

Source:
    DeepSpeed 0.19.8 ``stage_1_and_2.py:__init__``, ``stage3.py:_create_fp32_partitions``,
    ``swap_tensor/``; torch 2.13 ``ATen/core/CachingHostAllocator.h``: a pinned buffer takes
    the next power of two.
"""

from __future__ import annotations

import math

from launcher.calibration import Calibration
from launcher.hardware import ClusterSpec
from launcher.strategy import Checkpointing, Offload, Optimizer
from launcher.zero_runtime import ZeroRuntime

# zero/offload_config.py defaults for NVMe: buffers, elements in a buffer, elements kept in RAM.
_NVME_OPTIMIZER_BUFFERS = 4
_NVME_PARAM_BUFFERS = 5
_NVME_PARAM_BUFFER_ELEMENTS = 100_000_000
_NVME_PARAMS_IN_HOST_ELEMENTS = 1_000_000_000


def pinned_bytes(size: float) -> int:
    """Return what a pinned buffer of ``size`` bytes really takes: the next power of two."""
    return 2 ** math.ceil(math.log2(size)) if size >= 1 else 0


def host_components(
    zero: ZeroRuntime,
    cluster: ClusterSpec,
    calibration: Calibration,
    *,
    saved_inputs_bytes: float,
) -> dict[str, int]:
    """Return bytes of host memory on one node, by component.

    Args:
        zero: one rank's bookkeeping.
        cluster: how many ranks share the node.
        calibration: resident size of a bare process.
        saved_inputs_bytes: layer inputs that checkpointing keeps on the host, per rank.
    """
    is_cuda = cluster.gpu.device_type == "cuda"
    base = calibration.process_host_bytes if is_cuda else calibration.process_host_bytes_cpu
    found: dict[str, float] = {"training processes": base}
    pin = pinned_bytes if zero.strategy.zero.pin_memory and is_cuda else round
    if zero.strategy.offload_optimizer is Offload.cpu:
        found.update(_cpu_optimizer(zero, pin))
    elif zero.strategy.offload_optimizer is Offload.nvme:
        group = min(zero.partition, zero.strategy.zero.sub_group_size)
        found["NVMe optimizer buffers"] = _NVME_OPTIMIZER_BUFFERS * pin(4 * group)
        found["gradient partitions"] = pin(zero.accumulation_width * zero.partition)
    if zero.strategy.offload_param is not Offload.none:
        found.update(_params(zero, pin))
    if zero.strategy.gradient_checkpointing is Checkpointing.cpu_offload:
        found["checkpointed layer inputs"] = pin(saved_inputs_bytes)
    ranks = cluster.gpus_per_node
    return {name: round(size * ranks) for name, size in found.items() if size}


def _cpu_optimizer(zero: ZeroRuntime, pin: object) -> dict[str, float]:
    assert callable(pin)
    part, counts = zero.partition, zero.counts
    found = {
        "optimizer moments (fp32)": _moment_bytes(zero) * part,
        "fp32 gradients": float(pin(4 * part)),
    }
    if zero.stage == 3:
        found["fp32 master weights"] = 4 * part
        found["gradient partitions"] = float(pin(zero.accumulation_width * part))
        return found
    found["fp32 master weights"] = float(pin(4 * part))
    found["updated parameters"] = float(pin(zero.trained_width * part))
    found["gradient staging"] = float(pin(zero.trained_width * counts.largest_trainable))
    if zero.strategy.gradient_accumulation_steps > 1:
        # accumulated_grads_in_cpu: whole tensors that overlap the partition, one pin each.
        found["accumulated gradients"] = zero.trained_width * zero.owned * 1.5
    return found


def _moment_bytes(zero: ZeroRuntime) -> float:
    is_8bit = zero.strategy.optimizer in {Optimizer.adamw_8bit, Optimizer.paged_adamw_8bit}
    return 2 * (1 + 4 / 256) if is_8bit else 8.0


def _params(zero: ZeroRuntime, pin: object) -> dict[str, float]:
    assert callable(pin)
    counts, ranks = zero.counts, zero.world_size
    trained = zero.trained_width * counts.trainable / ranks
    frozen = (zero.width * counts.frozen + counts.quantized_bytes) / ranks
    if zero.strategy.offload_param is Offload.nvme:
        kept = min(_NVME_PARAMS_IN_HOST_ELEMENTS, counts.gatherable / ranks)
        pool = _NVME_PARAM_BUFFERS * _NVME_PARAM_BUFFER_ELEMENTS
        return {
            "parameters kept in memory": float(pin(zero.width * kept)),
            "NVMe parameter buffers": float(pin(zero.width * pool)),
        }
    found = {"frozen parameters": frozen}
    if trained:
        # One flat buffer, after each tensor had a pinned copy that the host cache keeps.
        found["trained parameters"] = float(pin(trained)) + trained
    return found


def nvme_bytes(zero: ZeroRuntime, cluster: ClusterSpec) -> int:
    """Return bytes on a node's NVMe: optimizer states and gradients, parameters."""
    per_rank = 0.0
    if zero.strategy.offload_optimizer is Offload.nvme:
        per_rank += (4 + _moment_bytes(zero) + 4) * zero.partition
    if zero.strategy.offload_param is Offload.nvme:
        per_rank += (
            zero.width * zero.counts.frozen + zero.trained_width * zero.counts.trainable
        ) / zero.world_size
    return round(per_rank * cluster.gpus_per_node)


def checkpoint_bytes(zero: ZeroRuntime) -> int:
    """Return disk for one checkpoint of all ranks: optimizer states and trained weights.

    ZeRO partitions write each state once over all ranks; rank 0 (every rank's share under
    ZeRO-3) writes the parameters, frozen ones included.

    Source: DeepSpeed 0.19.8 ``engine.py:save_checkpoint``.
    """
    counts = zero.counts
    states = (4 + (8 if not zero.moment_bytes() else zero.moment_bytes())) * counts.trainable
    weights = zero.trained_width * counts.trainable + zero.width * counts.frozen
    return round(states + weights + counts.quantized_bytes + counts.quantization_state_bytes)
