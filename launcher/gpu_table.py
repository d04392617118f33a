"""GPUs as data: one row each, with its source and the node that it usually sits in.

Memory is what ``torch.cuda.get_device_properties().total_memory`` reports, which is below the
label. Rates are one-directional. Ranges in a source were entered at their middle.
"""

from __future__ import annotations

from dataclasses import dataclass

TERA, GIGA = 10**12, 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeDefaults:
    """The node that a GPU usually sits in, for clusters that nobody described."""

    gpus_per_node: int
    host_memory_gib_per_gpu: int
    host_memory_bytes_per_s: float
    """DRAM bandwidth that a CPU optimizer reaches, for the whole node."""
    inter_node_bytes_per_s_per_gpu: float
    nvme_bytes_per_s: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """How a GPU is attached, and what its driver keeps for itself.

    These are priors of ordinary hosts, not readings of one: pinned copies over PCIe x16 reach
    about 0.77 of the nominal 15.8, 31.5 and 63 GB/s of generations 3, 4 and 5; all-gather bus
    bandwidth is what nccl-tests usually shows in 8-GPU nodes (without NVLink the GPUs meet
    through PCIe and the host); a CUDA context with kernels takes 0.3 GiB on V100 rising to
    0.6 GiB on H100.
    """

    host_link_gb_per_s: float
    peer_link_gb_per_s: float
    context_gib: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRow:
    """One GPU."""

    name: str
    device_name_pattern: str
    """Regular expression for the name that the driver reports."""
    memory_gib: float
    matmul_tflops: float
    """Dense bf16 (fp16 where bf16 is not native) with fp32 accumulation."""
    memory_gb_per_s: float
    compute_capability: tuple[int, int]
    platform: Platform
    node: NodeDefaults
    source: str
    aliases: tuple[str, ...] = ()


_VOLTA_NVLINK = Platform(host_link_gb_per_s=12, peer_link_gb_per_s=120, context_gib=0.3)
_TURING_PCIE = Platform(host_link_gb_per_s=12, peer_link_gb_per_s=8, context_gib=0.3)
_AMPERE_NVLINK = Platform(host_link_gb_per_s=24, peer_link_gb_per_s=230, context_gib=0.45)
_GEN4_PCIE = Platform(host_link_gb_per_s=24, peer_link_gb_per_s=15, context_gib=0.45)
_HOPPER_NVLINK = Platform(host_link_gb_per_s=50, peer_link_gb_per_s=370, context_gib=0.6)
_HOPPER_PCIE = Platform(host_link_gb_per_s=50, peer_link_gb_per_s=30, context_gib=0.6)
_BLACKWELL_NVLINK = Platform(host_link_gb_per_s=50, peer_link_gb_per_s=650, context_gib=0.6)
_MI250X_FABRIC = Platform(host_link_gb_per_s=24, peer_link_gb_per_s=100, context_gib=0.6)
_MI300X_FABRIC = Platform(host_link_gb_per_s=50, peer_link_gb_per_s=300, context_gib=0.6)


def _network(gbit_per_s_per_gpu: float) -> float:
    # 0.85 of line rate is what NCCL reaches on InfiniBand and RoCE.
    return 0.85 * gbit_per_s_per_gpu / 8 * GIGA


_V100_NODE = NodeDefaults(
    gpus_per_node=8,
    host_memory_gib_per_gpu=84,
    host_memory_bytes_per_s=80 * GIGA,
    inter_node_bytes_per_s_per_gpu=_network(12.5),
    nvme_bytes_per_s=3 * GIGA,
    source="Azure ND40rs_v2: 8 x V100-32GB, 672 GiB, 100 Gb/s InfiniBand per node",
)
_A100_40_NODE = NodeDefaults(
    gpus_per_node=8,
    host_memory_gib_per_gpu=112,
    host_memory_bytes_per_s=120 * GIGA,
    inter_node_bytes_per_s_per_gpu=_network(200),
    nvme_bytes_per_s=6 * GIGA,
    source="Azure ND96asr_v4: 8 x A100-40GB, 900 GiB, 200 Gb/s InfiniBand per GPU",
)
_A100_80_NODE = NodeDefaults(
    gpus_per_node=8,
    host_memory_gib_per_gpu=237,
    host_memory_bytes_per_s=120 * GIGA,
    inter_node_bytes_per_s_per_gpu=_network(200),
    nvme_bytes_per_s=6 * GIGA,
    source="Azure ND96amsr_A100_v4: 8 x A100-80GB, 1900 GiB, 200 Gb/s InfiniBand per GPU",
)
_H100_NODE = NodeDefaults(
    gpus_per_node=8,
    host_memory_gib_per_gpu=231,
    host_memory_bytes_per_s=150 * GIGA,
    inter_node_bytes_per_s_per_gpu=_network(400),
    nvme_bytes_per_s=6 * GIGA,
    source="Azure ND96isr_H100_v5, _H200_v5, _MI300X_v5: 8 GPUs, 1850-1900 GiB, 400 Gb/s per GPU",
)
_CLOUD_PCIE_NODE = NodeDefaults(
    gpus_per_node=8,
    host_memory_gib_per_gpu=96,
    host_memory_bytes_per_s=80 * GIGA,
    inter_node_bytes_per_s_per_gpu=_network(12.5),
    nvme_bytes_per_s=3 * GIGA,
    source="AWS g5.48xlarge and g6.48xlarge: 8 GPUs, 768 GiB, 100 Gb/s per node",
)
_T4_NODE = NodeDefaults(
    gpus_per_node=8,
    host_memory_gib_per_gpu=48,
    host_memory_bytes_per_s=80 * GIGA,
    inter_node_bytes_per_s_per_gpu=_network(12.5),
    nvme_bytes_per_s=3 * GIGA,
    source="AWS g4dn.metal: 8 x T4, 384 GiB, 100 Gb/s per node",
)
_WORKSTATION = NodeDefaults(
    gpus_per_node=1,
    host_memory_gib_per_gpu=64,
    host_memory_bytes_per_s=40 * GIGA,
    inter_node_bytes_per_s_per_gpu=_network(10),
    nvme_bytes_per_s=5 * GIGA,
    source="a workstation: two DDR4/DDR5 channels, 64 GiB, 10 Gb/s Ethernet, one NVMe drive",
)

GPU_ROWS: tuple[GpuRow, ...] = (
    GpuRow(
        name="V100-16GB",
        device_name_pattern=r"V100-SXM\d-16GB",
        memory_gib=15.77,
        matmul_tflops=125,
        memory_gb_per_s=900,
        compute_capability=(7, 0),
        platform=_VOLTA_NVLINK,
        node=_V100_NODE,
        source="NVIDIA V100 datasheet (SXM2)",
        aliases=("V100-16GB-SXM2",),
    ),
    GpuRow(
        name="V100-32GB",
        device_name_pattern=r"V100-SXM\d-32GB",
        memory_gib=31.74,
        matmul_tflops=125,
        memory_gb_per_s=900,
        compute_capability=(7, 0),
        platform=_VOLTA_NVLINK,
        node=_V100_NODE,
        source="NVIDIA V100 datasheet (SXM2)",
        aliases=("V100-32GB-SXM2",),
    ),
    GpuRow(
        name="A100-40GB",
        device_name_pattern=r"A100-SXM4-40GB",
        memory_gib=39.5,
        matmul_tflops=312,
        memory_gb_per_s=1555,
        compute_capability=(8, 0),
        platform=_AMPERE_NVLINK,
        node=_A100_40_NODE,
        source="NVIDIA A100 datasheet (SXM4)",
        aliases=("A100-40GB-SXM4", "A100-SXM4-40GB"),
    ),
    GpuRow(
        name="A100-80GB",
        device_name_pattern=r"A100-SXM4-80GB",
        memory_gib=79.2,
        matmul_tflops=312,
        memory_gb_per_s=2039,
        compute_capability=(8, 0),
        platform=_AMPERE_NVLINK,
        node=_A100_80_NODE,
        source="NVIDIA A100 datasheet (SXM4)",
        aliases=("A100-80GB-SXM4", "A100-SXM4-80GB", "A800-80GB"),
    ),
    GpuRow(
        name="A100-40GB-PCIe",
        device_name_pattern=r"A100-PCIE-40GB",
        memory_gib=39.4,
        matmul_tflops=312,
        memory_gb_per_s=1555,
        compute_capability=(8, 0),
        platform=_GEN4_PCIE,
        node=_A100_40_NODE,
        source="NVIDIA A100 datasheet (PCIe, no NVLink bridge)",
    ),
    GpuRow(
        name="A100-80GB-PCIe",
        device_name_pattern=r"A100 80GB PCIe|A100-PCIE-80GB",
        memory_gib=79.3,
        matmul_tflops=312,
        memory_gb_per_s=1935,
        compute_capability=(8, 0),
        platform=_GEN4_PCIE,
        node=_A100_80_NODE,
        source="NVIDIA A100 datasheet (PCIe, no NVLink bridge)",
    ),
    GpuRow(
        name="H100-80GB",
        device_name_pattern=r"H100 80GB HBM3|H100-SXM",
        memory_gib=79.2,
        matmul_tflops=989,
        memory_gb_per_s=3350,
        compute_capability=(9, 0),
        platform=_HOPPER_NVLINK,
        node=_H100_NODE,
        source="NVIDIA H100 datasheet (SXM5); 798 TFLOPS and 3.0 TB/s were measured on one",
        aliases=("H100", "H100-SXM", "H100-80GB-SXM5"),
    ),
    GpuRow(
        name="H100-80GB-PCIe",
        device_name_pattern=r"H100 PCIe",
        memory_gib=79.1,
        matmul_tflops=756,
        memory_gb_per_s=2000,
        compute_capability=(9, 0),
        platform=_HOPPER_PCIE,
        node=_H100_NODE,
        source="NVIDIA H100 datasheet (PCIe, no NVLink bridge)",
        aliases=("H100-PCIe",),
    ),
    GpuRow(
        name="H200",
        device_name_pattern=r"\bH200$",
        memory_gib=139.75,
        matmul_tflops=989,
        memory_gb_per_s=4800,
        compute_capability=(9, 0),
        platform=_HOPPER_NVLINK,
        node=_H100_NODE,
        source="NVIDIA H200 datasheet (SXM5); 788 TFLOPS and 4.3 TB/s were measured on one",
        aliases=("H200-141GB", "H200-SXM"),
    ),
    GpuRow(
        name="B200",
        device_name_pattern=r"\bB200$",
        memory_gib=178.5,
        matmul_tflops=2250,
        memory_gb_per_s=8000,
        compute_capability=(10, 0),
        platform=_BLACKWELL_NVLINK,
        node=_H100_NODE,
        source="NVIDIA DGX B200 datasheet, per GPU",
        aliases=("B200-180GB", "B200-192GB"),
    ),
    GpuRow(
        name="L40S",
        device_name_pattern=r"\bL40S$",
        memory_gib=44.4,
        matmul_tflops=362,
        memory_gb_per_s=864,
        compute_capability=(8, 9),
        platform=_GEN4_PCIE,
        node=_CLOUD_PCIE_NODE,
        source="NVIDIA L40S datasheet (dense)",
        aliases=("L40S-48GB",),
    ),
    GpuRow(
        name="A10G",
        device_name_pattern=r"\bA10G$",
        memory_gib=22.1,
        matmul_tflops=70,
        memory_gb_per_s=600,
        compute_capability=(8, 6),
        platform=_GEN4_PCIE,
        node=_CLOUD_PCIE_NODE,
        source="NVIDIA A10G datasheet, AWS g5",
        aliases=("A10G-24GB",),
    ),
    GpuRow(
        name="A10",
        device_name_pattern=r"\bA10$",
        memory_gib=22.1,
        matmul_tflops=125,
        memory_gb_per_s=600,
        compute_capability=(8, 6),
        platform=_GEN4_PCIE,
        node=_CLOUD_PCIE_NODE,
        source="NVIDIA A10 datasheet",
        aliases=("A10-24GB",),
    ),
    GpuRow(
        name="L4",
        device_name_pattern=r"\bL4$",
        memory_gib=22.1,
        matmul_tflops=121,
        memory_gb_per_s=300,
        compute_capability=(8, 9),
        platform=_GEN4_PCIE,
        node=_CLOUD_PCIE_NODE,
        source="NVIDIA L4 datasheet (dense)",
        aliases=("L4-24GB",),
    ),
    GpuRow(
        name="T4",
        device_name_pattern=r"\bT4$",
        memory_gib=14.68,
        matmul_tflops=65,
        memory_gb_per_s=320,
        compute_capability=(7, 5),
        platform=_TURING_PCIE,
        node=_T4_NODE,
        source="NVIDIA T4 datasheet",
        aliases=("T4-16GB",),
    ),
    GpuRow(
        name="RTX-3090",
        device_name_pattern=r"RTX 3090$",
        memory_gib=23.7,
        matmul_tflops=71,
        memory_gb_per_s=936,
        compute_capability=(8, 6),
        platform=_GEN4_PCIE,
        node=_WORKSTATION,
        source="NVIDIA GA102 whitepaper (fp32 accumulation, no NVLink bridge)",
        aliases=("3090", "RTX-3090-24GB"),
    ),
    GpuRow(
        name="RTX-4090",
        device_name_pattern=r"RTX 4090$",
        memory_gib=23.6,
        matmul_tflops=165,
        memory_gb_per_s=1008,
        compute_capability=(8, 9),
        platform=_GEN4_PCIE,
        node=_WORKSTATION,
        source="NVIDIA Ada whitepaper (fp32 accumulation); peer-to-peer copies are off",
        aliases=("4090", "RTX-4090-24GB"),
    ),
    GpuRow(
        name="RTX-A6000",
        device_name_pattern=r"RTX A6000$",
        memory_gib=47.5,
        matmul_tflops=154.8,
        memory_gb_per_s=768,
        compute_capability=(8, 6),
        platform=_GEN4_PCIE,
        node=_WORKSTATION,
        source="NVIDIA GA102 whitepaper (dense, no NVLink bridge)",
        aliases=("A6000",),
    ),
    GpuRow(
        name="MI250X",
        device_name_pattern=r"Instinct MI250X",
        memory_gib=64.0,
        matmul_tflops=191,
        memory_gb_per_s=1638,
        compute_capability=(9, 0),
        platform=_MI250X_FABRIC,
        node=_A100_40_NODE,
        source="AMD MI250X datasheet, one of its two dies (which torch sees as a GPU)",
    ),
    GpuRow(
        name="MI300X",
        device_name_pattern=r"Instinct MI300X",
        memory_gib=191.8,
        matmul_tflops=1307,
        memory_gb_per_s=5300,
        compute_capability=(9, 4),
        platform=_MI300X_FABRIC,
        node=_H100_NODE,
        source="AMD MI300X datasheet",
        aliases=("MI300X-192GB",),
    ),
)
