"""What this machine has: GPUs by NVML, processors and memory within the limits of its cgroup."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from launcher.errors import HardwareError, SetupError
from launcher.hardware import (
    ClusterSpec,
    cpu_spec,
    default_cluster,
    find_gpu,
    gpu_names,
    match_device_name,
)

# Enough to exercise ZeRO; more ranks on one processor only divide the same cores.
DEFAULT_CPU_RANKS = 2
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_CGROUP_OF_PROCESS = Path("/proc/self/cgroup")
_NUMA_NODES = Path("/sys/devices/system/node")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbedGpu:
    """One GPU as the driver reports it; ``index`` is NVML's, in the order of the PCI bus."""

    index: int
    device_name: str
    memory_bytes: int
    """Without what the driver keeps for itself: what torch reports as total."""
    free_bytes: int
    compute_capability: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbedMachine:
    """This machine, as a job that is started here may use it."""

    host: str
    gpus: tuple[ProbedGpu, ...]
    """Those that ``CUDA_VISIBLE_DEVICES`` allows."""
    driver_version: str | None
    cuda_version: tuple[int, int] | None
    """Newest CUDA that the driver supports."""
    num_cores: int
    num_numa_nodes: int
    memory_bytes: int
    available_bytes: int
    has_avx512: bool = False


def probe_machine(*, environ: Mapping[str, str] = os.environ) -> ProbedMachine:
    """Probe this machine; takes a few milliseconds and imports no torch.

    Raises:
        SetupError: ``CUDA_VISIBLE_DEVICES`` cannot be understood.
    """
    gpus, driver_version, cuda_version = _probe_gpus()
    wanted = parse_visible_gpus(environ.get("CUDA_VISIBLE_DEVICES"))
    if wanted is not None:
        by_index = {gpu.index: gpu for gpu in gpus}
        gpus = tuple(by_index[index] for index in wanted if index in by_index)
    memory = psutil.virtual_memory()
    limit_bytes, used_bytes = cgroup_memory()
    total = min(memory.total, limit_bytes) if limit_bytes else memory.total
    available = min(memory.available, limit_bytes - used_bytes) if limit_bytes else memory.available
    quota = cgroup_cores()
    num_cores = len(os.sched_getaffinity(0))
    return ProbedMachine(
        host=socket.gethostname(),
        gpus=gpus,
        driver_version=driver_version,
        cuda_version=cuda_version,
        num_cores=max(1, min(num_cores, int(quota))) if quota else num_cores,
        num_numa_nodes=len(list(_NUMA_NODES.glob("node[0-9]*"))) or 1,
        memory_bytes=total,
        available_bytes=max(0, available),
        has_avx512=_has_avx512(),
    )


def cluster_of(
    machine: ProbedMachine, *, num_nodes: int | None = None, gpus_per_node: int | None = None
) -> ClusterSpec:
    """Describe nodes like this machine as a cluster.

    Args:
        machine: what was probed.
        num_nodes: 1 by default.
        gpus_per_node: by default all GPUs; on a machine without, two ranks on the processor.

    Raises:
        HardwareError: the GPUs differ from each other, or are not in the table.
    """
    if not machine.gpus:
        return _cpu_cluster(machine, num_nodes or 1, gpus_per_node)
    names = {gpu.device_name for gpu in machine.gpus}
    if len(names) > 1:
        listed = ", ".join(f"{gpu.index}: {gpu.device_name}" for gpu in machine.gpus)
        raise HardwareError(
            f"the GPUs of this machine differ ({listed})",
            where="this machine",
            fix="choose equal ones, for example CUDA_VISIBLE_DEVICES=0,1 with "
            "CUDA_DEVICE_ORDER=PCI_BUS_ID",
        )
    device_name = machine.gpus[0].device_name
    name = match_device_name(device_name)
    if name is None:
        raise HardwareError(
            f"the GPU {device_name!r} is not in the table",
            where="this machine",
            fix=f"name the most similar one, cluster.gpu=NAME: {', '.join(gpu_names())}",
        )
    used = machine.gpus[: gpus_per_node or len(machine.gpus)]
    smallest = min(gpu.memory_bytes for gpu in used)
    return default_cluster(
        replace(
            find_gpu(name),
            memory_bytes=smallest,
            compute_capability=machine.gpus[0].compute_capability,
        ),
        num_nodes=num_nodes or 1,
        gpus_per_node=gpus_per_node or len(machine.gpus),
        host_memory_bytes=machine.memory_bytes,
        free_memory_bytes=min(gpu.free_bytes for gpu in used),
    )


def parse_visible_gpus(value: str | None) -> tuple[int, ...] | None:
    """Return the indices in ``CUDA_VISIBLE_DEVICES``; ``None`` when it is not set.

    DeepSpeed replaces the variable, so its content has to be said again in ``--include``,
    which takes indices only.

    Raises:
        SetupError: it names GPUs by UUID, or MIG slices.
    """
    if value is None:
        return None
    entries = [entry.strip() for entry in value.split(",") if entry.strip()]
    if entries == ["-1"]:
        return ()
    if not all(entry.isascii() and entry.isdigit() for entry in entries):
        raise SetupError(
            f"CUDA_VISIBLE_DEVICES={value} does not consist of indices",
            where="environment",
            fix="DeepSpeed's launcher takes indices only: write for example 0,1 "
            "(`nvidia-smi -L` lists them)",
        )
    return tuple(int(entry) for entry in entries)


def cgroup_memory(
    *, root: Path = _CGROUP_ROOT, membership: Path = _CGROUP_OF_PROCESS
) -> tuple[int | None, int]:
    """Return the memory limit of this process's cgroup and what is used of it, in bytes.

    The tightest limit of the cgroup and its parents; ``None`` when there is none. Page cache,
    which the kernel gives back when asked, does not count as used.

    Source: Linux ``admin-guide/cgroup-v2.rst`` (memory.max, memory.current, memory.stat) and
    ``cgroup-v1/memory.rst`` (memory.limit_in_bytes, memory.usage_in_bytes).
    """
    limits: list[tuple[int, int]] = []
    for folder in _cgroup_folders("memory", root, membership):
        for limit_name, usage_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit = _read_int(folder / limit_name)
            # cgroup v1 says "none" with the largest number of whole pages.
            if limit is not None and limit < 2**62:
                used = (_read_int(folder / usage_name) or 0) - _inactive_file(folder)
                limits.append((limit, max(0, used)))
    return min(limits, key=lambda item: item[0] - item[1]) if limits else (None, 0)


def cgroup_cores(
    *, root: Path = _CGROUP_ROOT, membership: Path = _CGROUP_OF_PROCESS
) -> float | None:
    """Return how many cores' worth of time this process's cgroup may use, if it is limited.

    Source: ``cpu.max`` (cgroup v2), ``cpu.cfs_quota_us`` over ``cpu.cfs_period_us`` (v1).
    """
    quotas: list[float] = []
    for folder in _cgroup_folders("cpu", root, membership):
        words = _read_words(folder / "cpu.max")
        if not words:
            words = _read_words(folder / "cpu.cfs_quota_us")
            words += _read_words(folder / "cpu.cfs_period_us")
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas) if quotas else None


def _cgroup_folders(controller: str, root: Path, membership: Path) -> list[Path]:
    """Return this process's cgroup and its parents, for cgroup v1 or v2."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    folders: list[Path] = []
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers == "":
            base = root
        elif controller in controllers.split(","):
            base = root / controller
        else:
            continue
        here = base / path.lstrip("/")
        folders += [p for p in (here, *here.parents) if p == base or base in p.parents]
    return folders


def _has_avx512() -> bool:
    """Return whether Linux lists AVX-512 among the processor's flags."""
    try:
        return " avx512f " in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def _cpu_cluster(machine: ProbedMachine, num_nodes: int, gpus_per_node: int | None) -> ClusterSpec:
    ranks = gpus_per_node or min(DEFAULT_CPU_RANKS, machine.num_cores)
    rank = cpu_spec(
        machine.memory_bytes // ranks,
        num_cores=max(1, machine.num_cores // ranks),
        flops_per_cycle=64 if machine.has_avx512 else 32,
    )
    return default_cluster(
        rank,
        num_nodes=num_nodes,
        gpus_per_node=ranks,
        host_memory_bytes=machine.memory_bytes,
        free_memory_bytes=machine.available_bytes // ranks,
    )


def _probe_gpus() -> tuple[tuple[ProbedGpu, ...], str | None, tuple[int, int] | None]:
    """Ask NVML; a machine without its library or driver has no GPUs."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return (), None, None
    try:
        gpus = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            gpus.append(
                ProbedGpu(
                    index=index,
                    device_name=pynvml.nvmlDeviceGetName(handle),
                    memory_bytes=memory.total - memory.reserved,
                    free_bytes=memory.free,
                    compute_capability=(major, minor),
                )
            )
        cuda = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        return (
            tuple(gpus),
            pynvml.nvmlSystemGetDriverVersion(),
            (cuda // 1000, cuda % 1000 // 10),
        )
    finally:
        pynvml.nvmlShutdown()


def _inactive_file(folder: Path) -> int:
    for line in _read_words(folder / "memory.stat", by_line=True):
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file") and value.isdigit():
            return int(value)
    return 0


def _read_words(path: Path, *, by_line: bool = False) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return []
    return text.splitlines() if by_line else text.split()


def _read_int(path: Path) -> int | None:
    words = _read_words(path)
    return int(words[0]) if words and words[0].isdigit() else None
