"""Checks of this machine: GPUs, driver, memory, shared memory, disks, limits, name."""

from __future__ import annotations

import os
import resource
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

from launcher.dispatch.check import Check, ok, warn
from launcher.dispatch.probe import ProbedMachine
from launcher.dispatch.process_group import SHARED_MEMORY, shared_memory_leftovers
from launcher.hardware import match_device_name
from launcher.units import GIB, MIB, format_bytes

# Docker's default of 64 MiB is less than one rank's all-reduce buffer (69 MB, DeepSpeed's
# csrc/cpu/comm/shm.cpp); NCCL and data loaders use the same folder.
_SMALL_SHARED_MEMORY_BYTES = GIB
_SMALL_DISK_BYTES = 20 * GIB
_BUSY_FRACTION = 0.1
_FEW_OPEN_FILES = 1024
_LITTLE_LOCKED_BYTES = 64 * MIB


def check_gpus(machine: ProbedMachine) -> Iterator[Check]:
    """Each GPU, whether it is known and free."""
    if not machine.gpus:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        note = f" (CUDA_VISIBLE_DEVICES={hidden!r})" if hidden is not None else ""
        yield ok("GPUs", f"none{note}; ranks run on the processor")
        return
    for gpu in machine.gpus:
        name = f"GPU {gpu.index}"
        capability = "{}.{}".format(*gpu.compute_capability)
        value = (
            f"{gpu.device_name}, {format_bytes(gpu.memory_bytes)}, "
            f"{format_bytes(gpu.free_bytes)} free, compute capability {capability}"
        )
        if match_device_name(gpu.device_name) is None:
            yield warn(name, value, "not in zerofit's table: name a similar one, cluster.gpu=NAME")
        elif gpu.free_bytes < (1 - _BUSY_FRACTION) * gpu.memory_bytes:
            yield warn(name, value, "other programs use it (`nvidia-smi`); plans count free memory")
        else:
            yield ok(name, value)
    names = {gpu.device_name for gpu in machine.gpus}
    if len(names) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        yield warn(
            "GPU order",
            "the GPUs differ, and CUDA counts the fastest first",
            "export CUDA_DEVICE_ORDER=PCI_BUS_ID, so that numbers mean what nvidia-smi shows",
        )


def check_driver(machine: ProbedMachine) -> Iterator[Check]:
    """NVIDIA's driver and the newest CUDA that it supports."""
    if machine.driver_version is None:
        yield ok("NVIDIA driver", "none")
    else:
        cuda = "{}.{}".format(*machine.cuda_version) if machine.cuda_version else "unknown"
        yield ok("NVIDIA driver", f"{machine.driver_version}, CUDA up to {cuda}")


def check_host(machine: ProbedMachine) -> Iterator[Check]:
    """Cores and memory that a job may use, cgroup limits included."""
    yield ok("cores", f"{machine.num_cores}, NUMA nodes {machine.num_numa_nodes}")
    value = (
        f"{format_bytes(machine.memory_bytes)}, {format_bytes(machine.available_bytes)} available"
    )
    if machine.available_bytes < machine.memory_bytes / 4:
        yield warn("host memory", value, "other programs hold most of it; plans count what is free")
    else:
        yield ok("host memory", value)


def check_shared_memory(folder: Path = SHARED_MEMORY) -> Iterator[Check]:
    """Size of /dev/shm and what earlier runs left there."""
    usage = shutil.disk_usage(folder)
    value = f"{format_bytes(usage.total)}, {format_bytes(usage.free)} free"
    if usage.free < _SMALL_SHARED_MEMORY_BYTES:
        yield warn(
            str(folder),
            value,
            f"mount -o remount,size=8G {folder}; in Docker: --shm-size=8g or --ipc=host",
        )
    else:
        yield ok(str(folder), value)
    leftovers = list(shared_memory_leftovers(folder=folder))
    if leftovers:
        size_bytes = sum(path.stat().st_size for path in leftovers)
        yield warn(
            f"{folder} leftovers",
            f"{len(leftovers)} buffers of DeepSpeed runs, {format_bytes(size_bytes)}",
            f"when no run of yours is active: rm "
            f"{folder}/deepspeed_allreduce_buffer_{os.getuid()}_*",
        )


def check_disks(environ: Mapping[str, str] = os.environ) -> Iterator[Check]:
    """Free space where runs, models and built kernels go."""
    home = Path(environ.get("HOME") or Path.home())
    cache = Path(environ.get("XDG_CACHE_HOME") or home / ".cache")
    folders = {
        "this folder": Path.cwd(),
        "ZEROFIT_HOME": Path(environ.get("ZEROFIT_HOME") or home / ".cache" / "zerofit"),
        "HF_HOME": Path(environ.get("HF_HOME") or cache / "huggingface"),
        "TORCH_EXTENSIONS_DIR": Path(
            environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions"
        ),
    }
    for label, folder in folders.items():
        existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        name = f"disk of {label}"
        usage = shutil.disk_usage(existing)
        value = f"{folder}: {format_bytes(usage.free)} free of {format_bytes(usage.total)}"
        if not os.access(existing, os.W_OK):
            yield warn(name, f"{folder}: not writable", f"set {label} to a folder that is")
        elif usage.free < _SMALL_DISK_BYTES:
            yield warn(name, value, "checkpoints and models of 7B take 14 GB and more each")
        else:
            yield ok(name, value)


def check_limits(machine: ProbedMachine) -> Iterator[Check]:
    """``ulimit -l`` (locked memory) and ``ulimit -n`` (open files)."""
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if locked == resource.RLIM_INFINITY:
        yield ok("ulimit -l", "unlimited")
    elif machine.gpus and locked < _LITTLE_LOCKED_BYTES:
        yield warn(
            "ulimit -l",
            format_bytes(locked),
            "InfiniBand and offload to nvme need more: set memlock to unlimited in "
            "/etc/security/limits.conf",
        )
    else:
        yield ok("ulimit -l", format_bytes(locked))
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < _FEW_OPEN_FILES:
        yield warn("ulimit -n", str(files), f"ulimit -n {hard}")
    else:
        yield ok("ulimit -n", str(files))


def check_hostname() -> Iterator[Check]:
    """Whether this machine's own name leads to an address that other machines could use."""
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        yield warn(
            "host name",
            f"{host} does not resolve",
            f"add it to /etc/hosts: echo '127.0.0.1 {host}' >> /etc/hosts (one machine), or with "
            "the address that the other hosts use",
        )
        return
    if address.startswith("127."):
        # gloo on several hosts would connect to itself.
        yield ok("host name", f"{host} is {address}; with several hosts it must be a real address")
    else:
        yield ok("host name", f"{host} is {address}")
