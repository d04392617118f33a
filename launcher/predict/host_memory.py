"""Host memory of a node, NVMe space and checkpoint size.

Source:
    DeepSpeed 0.19.8 ``stage_1_and_2.py:__init__``, ``stage3.py:_create_fp32_partitions``,
    ``swap_tensor/``; torch 2.13 ``ATen/core/CachingHostAllocator.h``: a pinned buffer takes
    the next power of two.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from launcher.hardware import ClusterSpec
from launcher.predict.calibration import Calibration
from launcher.predict.components import COPIES
from launcher.predict.zero_runtime import ZeroRuntime
from launcher.strategy import Checkpointing, Offload, Precision

# zero/offload_config.py defaults for NVMe: buffers, elements in a buffer, elements kept in RAM.
_NVME_OPTIMIZER_BUFFERS = 4
_NVME_PARAM_BUFFERS = 5
_NVME_PARAM_BUFFER_ELEMENTS = 100_000_000
_NVME_PARAMS_IN_HOST_ELEMENTS = 1_000_000_000
SAVED_FILE_BYTES = 2 * 10**9
"""Size of a file of weights that a run saves; while it is made, its tensors are in memory."""


def pinned_bytes(size: float) -> int:
    """Return what a pinned buffer of ``size`` bytes really takes: the next power of two."""
    return 2 ** math.ceil(math.log2(size)) if size >= 1 else 0


def host_components(
    zero: ZeroRuntime,
    cluster: ClusterSpec,
    calibration: Calibration,
    *,
    saved_inputs_bytes: float,
    peak_allocated_bytes: int,
) -> dict[str, int]:
    """Return bytes of host memory on one node, by component.

    Args:
        zero: one rank's bookkeeping.
        cluster: how many ranks share the node.
        calibration: resident size of a bare process.
        saved_inputs_bytes: layer inputs that checkpointing keeps on the host, per rank.
        peak_allocated_bytes: tensors of one rank; host memory where the device is the CPU.
    """
    is_cuda = cluster.gpu.device_type == "cuda"
    base = calibration.process_host_bytes if is_cuda else calibration.process_host_bytes_cpu
    found: dict[str, float] = {"training processes": base}
    if not is_cuda:
        found["tensors of the ranks"] = peak_allocated_bytes
    elif zero.counts.quantized:
        found["bitsandbytes"] = calibration.bitsandbytes_host_bytes
    pin: Callable[[float], int] = (
        pinned_bytes if zero.strategy.zero.pin_memory and is_cuda else round
    )
    if zero.strategy.offload_optimizer is Offload.cpu:
        found.update(_cpu_optimizer(zero, pin))
    elif zero.strategy.offload_optimizer is Offload.nvme:
        group = min(zero.partition, zero.strategy.zero.sub_group_size)
        found["NVMe optimizer buffers"] = _NVME_OPTIMIZER_BUFFERS * pin(4 * group)
        found["gradient partitions"] = pin(zero.accumulation_width * zero.partition)
    if zero.strategy.offload_param is not Offload.none:
        found.update(_params(zero, pin))
        # In pinned memory tensor by tensor, also where the parameters themselves go to NVMe.
        found[COPIES] = zero.all_copies_bytes()
    if zero.strategy.gradient_checkpointing is Checkpointing.cpu_offload:
        found["checkpointed layer inputs"] = pin(saved_inputs_bytes)
    on_node = {name: size * cluster.gpus_per_node for name, size in found.items()}
    if is_cuda:
        on_node |= _passing(zero, gpus_per_node=cluster.gpus_per_node)
    return {name: round(size) for name, size in on_node.items() if size}


def _passing(zero: ZeroRuntime, *, gpus_per_node: int) -> dict[str, float]:
    """Return trained weights that pass through a node's host memory.

    One rank of all saves them, a whole model file by file. ZeRO-3 also bounces its partitions
    off the host as it starts, unless something is offloaded.

    Source: ``launcher/worker/weight_files.py``; DeepSpeed 0.19.8 ``stage3.py:defragment``.
    H100: 1.23 GB more for 0.64e9 adapter parameters saved, 5.6 for 3.2e9 under ZeRO-3.
    """
    trained = float(zero.trained_width * zero.counts.trainable)
    if zero.stage == 3 and not (zero.has_offloaded_optimizer or zero.has_offloaded_params):
        return {"partitions on their way": trained / zero.world_size * gpus_per_node}
    if zero.is_full:
        largest = zero.trained_width * zero.counts.largest_trainable
        trained = min(trained, max(SAVED_FILE_BYTES, largest))
    return {"trained weights to save": trained}


def _cpu_optimizer(zero: ZeroRuntime, pin: Callable[[float], int]) -> dict[str, float]:
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
    return 2 * (1 + 4 / 256) if zero.strategy.optimizer.is_8bit else 8.0


def _params(zero: ZeroRuntime, pin: Callable[[float], int]) -> dict[str, float]:
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
    """Return disk for one checkpoint of all ranks: the trained weights and their states.

    transformers writes the weights (an adapter alone with LoRA) and lets DeepSpeed write its
    own files without the frozen ones: fp32 master weights and moments, each once over all
    ranks, and under ZeRO-0 to 2 the trained weights again.

    Source: transformers 5.23 ``trainer.py:_save_checkpoint``, ``exclude_frozen_parameters``;
    DeepSpeed 0.19.8 ``engine.py:save_checkpoint``.
    """
    copies = 1 if zero.stage == 3 else 2
    per_param = 4 + _moment_bytes(zero) + copies * zero.trained_width
    if zero.stage == 0 and zero.precision is Precision.fp32:
        per_param -= 4  # its weights are their own master
    return round(per_param * zero.counts.trainable)
