"""GPUs, nodes and clusters as numbers with sources."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from launcher.errors import HardwareError, did_you_mean
from launcher.gpu_table import GIGA, GPU_ROWS, TERA, GpuRow, NodeDefaults
from launcher.units import GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpec:
    """One accelerator as torch sees it; ``cpu`` is a rank on this machine's processor.

    Memory is what torch reports as total (below the nominal size); rates are per second and
    one-directional.
    """

    name: str
    device_type: Literal["cuda", "cpu"]
    memory_bytes: int
    matmul_flops_per_s: float
    """Dense bf16/fp16 peak with fp32 accumulation (fp32 peak for ``cpu``)."""
    memory_bytes_per_s: float
    compute_capability: tuple[int, int] | None
    host_link_bytes_per_s: float
    """Effective pinned copy rate over PCIe, one direction."""
    peer_link_bytes_per_s: float
    """Effective all-gather bus bandwidth inside a node (NVLink, else PCIe)."""
    context_bytes: int
    """Device memory outside torch's allocator: CUDA context and kernels."""
    source: str

    @property
    def has_bf16(self) -> bool:
        """Native bf16: compute capability 8.0 or higher, whatever torch emulates."""
        return self.compute_capability is None or self.compute_capability >= (8, 0)

    @property
    def has_flash_attention_2(self) -> bool:
        """FlashAttention-2 kernels exist from compute capability 8.0."""
        return self.compute_capability is not None and self.compute_capability >= (8, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteConstants:
    """Physical constants that ``zerofit calibrate`` fitted to a site's own runs on one GPU."""

    values: tuple[tuple[str, float], ...]
    """By name; ``launcher.predict.site_constants`` says which there are."""
    num_runs: int
    fitted_at: str
    """Date, ISO 8601."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """Equal nodes of equal GPUs; host memory and links are per node."""

    gpu: GpuSpec
    num_nodes: int
    gpus_per_node: int
    host_memory_bytes: int
    inter_node_bytes_per_s: float
    """Effective network rate of a whole node, one direction; unused when num_nodes is 1."""
    host_memory_bytes_per_s: float
    """DRAM bandwidth that CPU Adam can use, per node."""
    nvme_bytes_per_s: float
    free_memory_bytes: int | None = None
    """Device memory that is free on the fullest GPU of a probed machine."""
    site: SiteConstants | None = None
    """What takes the place of the constants that were fitted elsewhere."""
    host_autograd_op_seconds: float | None = None
    """Measured on the slowest rank: what its host needs for an operation and its gradient."""

    @property
    def world_size(self) -> int:
        """Data-parallel ranks: one per GPU."""
        return self.num_nodes * self.gpus_per_node


# Assumed for a GPU outside the table and for processors: a plain server.
_PLAIN_NODE = NodeDefaults(
    gpus_per_node=1,
    host_memory_gib_per_gpu=64,
    host_memory_bytes_per_s=40 * GIGA,
    inter_node_bytes_per_s_per_gpu=0.85 * 10 / 8 * GIGA,
    nvme_bytes_per_s=3 * GIGA,
    source="two memory channels, 10 Gb/s Ethernet, one NVMe drive",
)
# One core with two FMA units of 8 (AVX2) or 16 (AVX-512) lanes, at about 2.5 GHz.
_CPU_CYCLES_PER_S = 2.5e9
_CPU_MEMORY_BYTES_PER_S = 20.0 * GIGA
# gloo between processes of one host goes through TCP on the loopback: about 1 GB/s.
_CPU_PEER_BYTES_PER_S = 1.0 * GIGA


def gpu_names() -> tuple[str, ...]:
    """Return the names of all GPUs in the table."""
    return tuple(row.name for row in GPU_ROWS)


def find_gpu(name: str) -> GpuSpec:
    """Return a GPU by name or alias; case, spaces, dashes and underscores do not matter.

    Raises:
        HardwareError: unknown, or several sizes are sold under that name.
    """
    wanted = _plain(name)
    for row in GPU_ROWS:
        if wanted in {_plain(known) for known in (row.name, *row.aliases)}:
            return _spec(row)
    sizes = [row.name for row in GPU_ROWS if wanted and _plain(row.name).startswith(wanted)]
    raise HardwareError(
        f"unknown GPU {name!r}",
        where="cluster.gpu",
        fix=f"say which: {', '.join(sizes)}" if sizes else did_you_mean(name, gpu_names()),
    )


def match_device_name(device_name: str) -> str | None:
    """Return the table's name for a driver's device name, or ``None`` when it has none.

    Args:
        device_name: as ``torch.cuda.get_device_name`` or nvidia-smi prints it, for example
            ``NVIDIA H100 80GB HBM3``.
    """
    for row in GPU_ROWS:
        if re.search(row.device_name_pattern, device_name.strip(), re.IGNORECASE):
            return row.name
    return None


def cpu_spec(
    memory_bytes: int,
    *,
    num_cores: int = 1,
    flops_per_cycle: int = 32,
    matmul_flops_per_s: float | None = None,
    memory_bytes_per_s: float = _CPU_MEMORY_BYTES_PER_S,
) -> GpuSpec:
    """Describe one rank that trains on the processor.

    Args:
        memory_bytes: memory that this rank may use.
        num_cores: cores of this rank.
        flops_per_cycle: fp32 operations of one core; 32 with AVX2, 64 with AVX-512.
        matmul_flops_per_s: fp32 peak when known, else cores x operations x 2.5 GHz.
        memory_bytes_per_s: DRAM bandwidth of this rank.
    """
    flops_per_s = matmul_flops_per_s or num_cores * flops_per_cycle * _CPU_CYCLES_PER_S
    return GpuSpec(
        name="cpu",
        device_type="cpu",
        memory_bytes=memory_bytes,
        matmul_flops_per_s=flops_per_s,
        memory_bytes_per_s=memory_bytes_per_s,
        compute_capability=None,
        host_link_bytes_per_s=memory_bytes_per_s,
        peer_link_bytes_per_s=_CPU_PEER_BYTES_PER_S,
        context_bytes=0,
        source=f"{num_cores} cores at {flops_per_cycle} fp32 operations a cycle and 2.5 GHz",
    )


def default_cluster(
    gpu: GpuSpec,
    *,
    num_nodes: int = 1,
    gpus_per_node: int | None = None,
    host_memory_bytes: int | None = None,
    inter_node_bytes_per_s: float | None = None,
    free_memory_bytes: int | None = None,
) -> ClusterSpec:
    """Describe a cluster; what is left out is usual for nodes with that GPU.

    Args:
        gpu: every GPU of the cluster.
        num_nodes: machines.
        gpus_per_node: GPUs of each machine; the usual node's by default.
        host_memory_bytes: per machine.
        inter_node_bytes_per_s: effective network rate of a machine, one direction.
        free_memory_bytes: device memory that is free on the fullest GPU, when probed.

    Raises:
        HardwareError: a count below 1.
    """
    node = next((row.node for row in GPU_ROWS if row.name == gpu.name), _PLAIN_NODE)
    per_node = node.gpus_per_node if gpus_per_node is None else gpus_per_node
    for key, count in (("num_nodes", num_nodes), ("gpus_per_node", per_node)):
        if count < 1:
            raise HardwareError(
                f"{key} is {count}", where=f"cluster.{key}", fix="use a whole number above 0"
            )
    network = node.inter_node_bytes_per_s_per_gpu * per_node
    memory = node.host_memory_gib_per_gpu * per_node * GIB
    return ClusterSpec(
        gpu=gpu,
        num_nodes=num_nodes,
        gpus_per_node=per_node,
        host_memory_bytes=memory if host_memory_bytes is None else host_memory_bytes,
        inter_node_bytes_per_s=(
            network if inter_node_bytes_per_s is None else inter_node_bytes_per_s
        ),
        host_memory_bytes_per_s=node.host_memory_bytes_per_s,
        nvme_bytes_per_s=node.nvme_bytes_per_s,
        free_memory_bytes=free_memory_bytes,
    )


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()


def _spec(row: GpuRow) -> GpuSpec:
    return GpuSpec(
        name=row.name,
        device_type="cuda",
        memory_bytes=round(row.memory_gib * GIB),
        matmul_flops_per_s=row.matmul_tflops * TERA,
        memory_bytes_per_s=row.memory_gb_per_s * GIGA,
        compute_capability=row.compute_capability,
        host_link_bytes_per_s=row.platform.host_link_gb_per_s * GIGA,
        peer_link_bytes_per_s=row.platform.peer_link_gb_per_s * GIGA,
        context_bytes=round(row.platform.context_gib * GIB),
        source=row.source,
    )
