"""The GPU table: lookup, device names, and default clusters."""

from __future__ import annotations

import re

import pytest

from launcher.errors import HardwareError
from launcher.gpu_table import GPU_ROWS
from launcher.hardware import cpu_spec, default_cluster, find_gpu, gpu_names, match_device_name
from launcher.units import GIB


@pytest.mark.parametrize("name", gpu_names())
def test_every_gpu_is_found_by_its_own_name(name: str) -> None:
    assert find_gpu(name).name == name


def test_no_name_or_alias_is_used_twice() -> None:
    names = [re.sub(r"[\s_-]", "", n).lower() for row in GPU_ROWS for n in (row.name, *row.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("spelling", "name"),
    [("H100", "H100-80GB"), ("rtx4090", "RTX-4090"), ("a100 80gb", "A100-80GB"), ("t4", "T4")],
)
def test_spelling_of_a_gpu_name_is_forgiven(spelling: str, name: str) -> None:
    assert find_gpu(spelling).name == name


def test_name_sold_in_several_sizes_is_not_guessed() -> None:
    with pytest.raises(HardwareError, match="say which: V100-16GB, V100-32GB"):
        find_gpu("V100")


def test_unknown_gpu_suggests_the_nearest() -> None:
    with pytest.raises(HardwareError, match="did you mean 'RTX-4090'"):
        find_gpu("RTX4900")


def test_empty_gpu_name_is_an_error() -> None:
    with pytest.raises(HardwareError):
        find_gpu("")


# Names as nvidia-smi prints them.
@pytest.mark.parametrize(
    ("device_name", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H100 PCIe", "H100-80GB-PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB-PCIe"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB-PCIe"),
        ("Tesla V100-SXM2-16GB", "V100-16GB"),
        ("Tesla V100-SXM2-32GB", "V100-32GB"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A10", "A10"),
        ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 3090", "RTX-3090"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA RTX A6000", "RTX-A6000"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_driver_names_are_recognised(device_name: str, name: str) -> None:
    assert match_device_name(device_name) == name


@pytest.mark.parametrize(
    "device_name",
    ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GH200 480GB", "NVIDIA H200 NVL", "NVIDIA L40"],
)
def test_relatives_with_other_numbers_are_not_confused(device_name: str) -> None:
    assert match_device_name(device_name) is None


@pytest.mark.parametrize("name", ["V100-16GB", "V100-32GB", "T4"])
def test_volta_and_turing_have_neither_bf16_nor_flash_attention(name: str) -> None:
    gpu = find_gpu(name)
    assert not gpu.has_bf16
    assert not gpu.has_flash_attention_2


@pytest.mark.parametrize("row", GPU_ROWS, ids=lambda row: row.name)
def test_memory_is_what_torch_reports_never_more_than_the_label(row: object) -> None:
    gpu = find_gpu(row.name)  # type: ignore[attr-defined]
    digits = re.search(r"-(\d+)GB", gpu.name)
    if digits:
        assert gpu.memory_bytes <= int(digits.group(1)) * GIB
    assert gpu.source


def test_default_cluster_is_the_papers_v100_node() -> None:
    # Azure ND40rs_v2: 8 x V100-32GB, 672 GiB, 100 Gb/s InfiniBand at 0.85 of line rate.
    cluster = default_cluster(find_gpu("V100-32GB"))
    assert cluster.world_size == 8
    assert cluster.host_memory_bytes == 672 * GIB
    assert cluster.inter_node_bytes_per_s == pytest.approx(10.625e9)


def test_given_values_win_over_the_usual_node() -> None:
    cluster = default_cluster(
        find_gpu("H100"),
        num_nodes=2,
        gpus_per_node=4,
        host_memory_bytes=512 * GIB,
        inter_node_bytes_per_s=1e9,
        free_memory_bytes=70 * GIB,
    )
    assert (cluster.num_nodes, cluster.gpus_per_node, cluster.world_size) == (2, 4, 8)
    assert cluster.host_memory_bytes == 512 * GIB
    assert cluster.inter_node_bytes_per_s == 1e9
    assert cluster.free_memory_bytes == 70 * GIB


def test_impossible_cluster_is_refused() -> None:
    with pytest.raises(HardwareError, match=r"cluster\.num_nodes"):
        default_cluster(find_gpu("H100"), num_nodes=0)


def test_cpu_ranks_can_do_bf16_and_have_no_device_context() -> None:
    cpu = cpu_spec(8 * GIB, num_cores=2)
    assert cpu.has_bf16
    assert not cpu.has_flash_attention_2
    assert cpu.context_bytes == 0
    assert cpu.matmul_flops_per_s == 160e9  # 2 cores x 32 operations x 2.5 GHz
    assert default_cluster(cpu).world_size == 1
