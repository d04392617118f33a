"""What this machine has, and how it becomes a cluster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launcher.dispatch.probe import (
    ProbedGpu,
    ProbedMachine,
    cgroup_cores,
    cgroup_memory,
    cluster_of,
    parse_visible_gpus,
    probe_machine,
)
from launcher.errors import HardwareError, SetupError
from launcher.units import GIB, MIB

# NVML on one H100 (driver 580.159): total 81559 MiB, reserved 480 MiB; torch's total_memory
# on the same machine was 85017493504 bytes, exactly the difference.
H100 = ProbedGpu(
    index=0,
    device_name="NVIDIA H100 80GB HBM3",
    memory_bytes=85_017_493_504,
    free_bytes=80 * GIB,
    compute_capability=(9, 0),
)
GPU_MACHINE = ProbedMachine(
    host="node1",
    gpus=(H100, replace(H100, index=1, free_bytes=40 * GIB)),
    driver_version="580.159.04",
    cuda_version=(13, 0),
    num_cores=16,
    num_numa_nodes=1,
    memory_bytes=128 * GIB,
    available_bytes=100 * GIB,
)
CPU_MACHINE = replace(
    GPU_MACHINE, gpus=(), num_cores=4, memory_bytes=16 * GIB, available_bytes=8 * GIB
)


def test_gpus_take_their_rates_from_the_table_and_their_memory_from_the_driver() -> None:
    cluster = cluster_of(GPU_MACHINE)
    assert (cluster.num_nodes, cluster.gpus_per_node) == (1, 2)
    assert cluster.gpu.name == "H100-80GB"
    assert cluster.gpu.memory_bytes == 85_017_493_504
    assert cluster.free_memory_bytes == 40 * GIB
    assert cluster.host_memory_bytes == 128 * GIB


def test_only_the_gpus_that_are_asked_for_count() -> None:
    cluster = cluster_of(GPU_MACHINE, gpus_per_node=1)
    assert (cluster.gpus_per_node, cluster.free_memory_bytes) == (1, 80 * GIB)


def test_different_gpus_are_refused() -> None:
    other = replace(H100, index=1, device_name="Tesla V100-SXM2-32GB")
    with pytest.raises(HardwareError, match="differ"):
        cluster_of(replace(GPU_MACHINE, gpus=(H100, other)))


def test_an_unknown_gpu_is_never_guessed() -> None:
    unknown = replace(H100, device_name="Voodoo 2")
    with pytest.raises(HardwareError, match="'Voodoo 2' is not in the table"):
        cluster_of(replace(GPU_MACHINE, gpus=(unknown,)))


def test_without_gpus_two_ranks_share_the_processor_and_its_memory() -> None:
    cluster = cluster_of(CPU_MACHINE)
    assert cluster.gpu.device_type == "cpu"
    assert cluster.gpus_per_node == 2
    assert cluster.gpu.memory_bytes == 8 * GIB
    assert cluster.free_memory_bytes == 4 * GIB
    assert cluster_of(replace(CPU_MACHINE, num_cores=1)).gpus_per_node == 1


def test_this_machine_can_be_probed() -> None:
    machine = probe_machine(environ={})
    assert machine.num_cores >= 1
    assert 0 < machine.available_bytes <= machine.memory_bytes


@pytest.mark.parametrize(
    ("value", "indices"),
    [(None, None), ("", ()), ("-1", ()), ("0", (0,)), ("3, 1", (3, 1))],
)
def test_visible_gpus_are_read(value: str | None, indices: tuple[int, ...] | None) -> None:
    assert parse_visible_gpus(value) == indices


@pytest.mark.parametrize("value", ["GPU-8932f937", "MIG-1", "0;1", "a"])
def test_gpus_that_deepspeed_cannot_select_are_refused(value: str) -> None:
    with pytest.raises(SetupError, match="CUDA_VISIBLE_DEVICES"):
        parse_visible_gpus(value)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_tightest_cgroup_v2_limit_counts_without_page_cache(tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    write(membership, "0::/user.slice/job\n")
    root = tmp_path / "cgroup"
    write(root / "user.slice" / "job" / "memory.max", "max\n")
    write(root / "user.slice" / "memory.max", f"{4 * GIB}\n")
    write(root / "user.slice" / "memory.current", f"{3 * GIB}\n")
    write(root / "user.slice" / "memory.stat", f"anon 5\ninactive_file {GIB}\n")
    write(root / "user.slice" / "cpu.max", "250000 100000\n")
    assert cgroup_memory(root=root, membership=membership) == (4 * GIB, 2 * GIB)
    assert cgroup_cores(root=root, membership=membership) == 2.5


def test_cgroup_v1_limits_are_read(tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    write(membership, "4:memory:/docker/x\n1:cpu,cpuacct:/docker/x\n0::/\n")
    root = tmp_path / "cgroup"
    # A container often sees only its own part of the tree, mounted at the root.
    write(root / "memory" / "memory.limit_in_bytes", f"{512 * MIB}\n")
    write(root / "memory" / "memory.usage_in_bytes", f"{100 * MIB}\n")
    write(root / "cpu" / "docker" / "x" / "cpu.cfs_quota_us", "-1\n")
    write(root / "cpu" / "docker" / "x" / "cpu.cfs_period_us", "100000\n")
    assert cgroup_memory(root=root, membership=membership) == (512 * MIB, 100 * MIB)
    assert cgroup_cores(root=root, membership=membership) is None


def test_no_cgroup_limit_is_no_limit(tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    write(membership, "4:memory:/\n")
    # What Linux 6.18 shows for "none" (2**63 rounded down to pages).
    write(tmp_path / "memory" / "memory.limit_in_bytes", "9223372036854771712\n")
    assert cgroup_memory(root=tmp_path, membership=membership) == (None, 0)
    assert cgroup_memory(root=tmp_path, membership=tmp_path / "missing") == (None, 0)
