"""What bounds a step, and what helps against it."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.hardware import ClusterSpec
from launcher.predict.compute_cost import MicroStepWork

_ON_HOST = frozenset({"host", "zero3_hooks"})
_ON_DEVICE = frozenset({"matmul", "attention", "memory_traffic", "communication"})

# Which part bounds a step, and what helps: shown to the user as they stand, so they must also
# be true where the device is a processor.
_ADVICE: Mapping[str, str] = {
    "matmul": "matrix products: the hardware is busy with useful work",
    "recompute": "matrix products, a third of them recomputed: what checkpointing costs",
    "attention": "attention over long sequences: its work grows with the square of their length",
    "slow_attention": "attention over long sequences: the flash-attn package helps "
    "(strategy.attention=flash_attention_2)",
    "memory_traffic": "memory traffic of small kernels: enable Liger kernels",
    "other_traffic": "memory traffic of small kernels: faster memory helps",
    "other_traffic_of_adapters": "memory traffic of small kernels: faster memory, or fewer LoRA "
    "modules",
    "host": "launch overhead: raise the micro-batch or pack sequences (Python starts work more "
    "slowly than the device does it)",
    "zero3_hooks": "ZeRO-3's work on every module: use ZeRO-2 if it fits, or raise the micro-batch",
    "communication": "the links between ranks: raise optim.global_batch_size or use LoRA",
    "communication_of_adapters": "the links between ranks: use ZeRO-2 if it fits, or longer "
    "micro-batches",
    "network_of_adapters": "the network between nodes: use fewer nodes, or longer micro-batches",
    "network": "the network between nodes: use fewer nodes, LoRA, or a larger "
    "optim.global_batch_size",
    "offload_copies": "copies between GPU and host: offload less, or raise the micro-batch",
    "cpu_optimizer": "the optimizer on the CPU: raise optim.global_batch_size, or keep it on the "
    "GPU",
    "optimizer": "the optimizer step: raise optim.global_batch_size",
}
_LARGER_MICRO_BATCH = "raise the micro-batch"


def what_bounds(
    components: Mapping[str, float],
    work: MicroStepWork,
    cluster: ClusterSpec,
    *,
    can_fuse: bool,
    can_flash: bool,
    is_one_micro_step: bool,
) -> str:
    """Return what to change first, in words, from the seconds of a step's parts.

    Args:
        components: seconds of each part.
        work: says whether adapters are trained, and layers computed twice.
        cluster: whether a network lies between the ranks.
        can_fuse: Liger has kernels for the model on this GPU, and they are not in use.
        can_flash: FlashAttention-2 has a kernel for it, which is not in use.
        is_one_micro_step: a micro-batch is all that a GPU has of the global batch.
    """
    key = _bottleneck(components, work, cluster, can_fuse=can_fuse)
    advice = _ADVICE["slow_attention" if key == "attention" and can_flash else key]
    if is_one_micro_step:
        larger = f"{_LARGER_MICRO_BATCH} by a larger optim.global_batch_size"
        advice = advice.replace(_LARGER_MICRO_BATCH, larger)
    return advice


def _bottleneck(
    components: Mapping[str, float],
    work: MicroStepWork,
    cluster: ClusterSpec,
    *,
    can_fuse: bool,
) -> str:
    """Return the largest part's key; host and GPU work side by side, so the slower's."""
    host = sum(components[name] for name in _ON_HOST)
    device = sum(components[name] for name in _ON_DEVICE)
    idle = _ON_HOST if host < device else _ON_DEVICE
    largest = max(components.keys() - idle, key=lambda name: (components[name], name))
    has_adapters = work.trains_adapters
    if largest == "communication" and cluster.num_nodes > 1:
        return "network_of_adapters" if has_adapters else "network"
    if largest == "communication" and has_adapters:
        return "communication_of_adapters"
    if largest == "memory_traffic" and not can_fuse:
        return "other_traffic_of_adapters" if has_adapters else "other_traffic"
    return "recompute" if largest == "matmul" and work.num_passes == 3 else largest
