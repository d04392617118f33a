"""Checks of what is installed: Python, the training stack, compilers, DeepSpeed's needs."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from ctypes.util import find_library
from dataclasses import dataclass
from pathlib import Path

from launcher.dispatch.check import Check, fail, ok, warn
from launcher.dispatch.probe import ProbedMachine
from launcher.job_script import is_readable_by_jit


@dataclass(frozen=True, slots=True, kw_only=True)
class _Package:
    name: str
    extra: str
    is_required: bool
    why: str


_PACKAGES = (
    _Package(name="torch", extra="train", is_required=True, why=""),
    _Package(name="deepspeed", extra="train", is_required=True, why=""),
    _Package(name="transformers", extra="train", is_required=True, why=""),
    _Package(name="peft", extra="train", is_required=True, why=""),
    _Package(name="accelerate", extra="train", is_required=True, why=""),
    _Package(name="datasets", extra="train", is_required=True, why=""),
    _Package(name="bitsandbytes", extra="qlora", is_required=False, why="qlora, 8-bit Adam"),
    _Package(name="flash-attn", extra="flash", is_required=False, why="flash_attention_2"),
    _Package(name="liger-kernel", extra="liger", is_required=False, why="Liger's kernels"),
    _Package(name="mpi4py", extra="mpi", is_required=False, why="starting ranks with mpirun"),
)


def check_python() -> Iterator[Check]:
    """Python's version and folder."""
    yield ok("python", f"{sys.version.split()[0]} ({sys.executable})")


def check_packages() -> Iterator[Check]:
    """Versions of the training stack, read without importing any of it."""
    for package in _PACKAGES:
        version = _version(package.name)
        if version is not None:
            yield ok(package.name, version)
        elif package.is_required:
            yield fail(package.name, "not installed", f"pip install 'zerofit[{package.extra}]'")
        else:
            yield ok(
                package.name,
                f"not installed; for {package.why}: pip install 'zerofit[{package.extra}]'",
            )


def check_torch_build(
    machine: ProbedMachine, *, torch_version: str | None = None
) -> Iterator[Check]:
    """Whether torch's build can use the GPUs and the driver of this machine.

    ``torch_version`` is the installed one unless it is given.
    """
    version = torch_version or _version("torch")
    if version is None:
        return
    cuda = _cuda_of_torch(version)
    if not machine.gpus:
        yield ok("torch build", f"{version}; no GPU here, ranks run on the processor")
    elif version.endswith("+cpu"):
        yield fail(
            "torch build",
            f"{version} cannot use the GPUs of this machine",
            "pip install --force-reinstall torch, from PyPI and not from its CPU index",
        )
    elif cuda and machine.cuda_version and cuda[0] > machine.cuda_version[0]:
        yield fail(
            "torch build",
            f"{version} needs CUDA {cuda[0]}, the driver supports {machine.cuda_version[0]}."
            f"{machine.cuda_version[1]}",
            f"update the driver, or install torch for CUDA {machine.cuda_version[0]}",
        )
    else:
        yield ok("torch build", version)


def check_deepspeed_launcher() -> Iterator[Check]:
    """Whether the ``deepspeed`` program is beside the interpreter, where jobs look for it."""
    program = Path(sys.executable).parent / "deepspeed"
    if program.exists():
        yield ok("deepspeed launcher", str(program))
    elif _version("deepspeed") is not None:
        yield fail(
            "deepspeed launcher",
            f"{program} is missing",
            f"reinstall it: {sys.executable} -m pip install --force-reinstall --no-deps deepspeed",
        )


def check_compilers(machine: ProbedMachine) -> Iterator[Check]:
    """Compilers of DeepSpeed's kernels, which are built when they are first used."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler:
        yield ok("C++ compiler", f"{compiler} {_first_version([compiler, '-dumpfullversion'])}")
    else:
        # Without it even init_distributed fails on a processor (DeepSpeed's shm_comm kernel).
        yield fail("C++ compiler", "g++ not found", "apt-get install g++")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    ninja = shutil.which("ninja", path=path)
    if ninja:
        yield ok("ninja", f"{ninja} {_first_version([ninja, '--version'])}")
    else:
        yield fail("ninja", "not found", "pip install ninja")
    if machine.gpus:
        yield from _check_nvcc()


def check_arch_list(environ: Mapping[str, str] = os.environ) -> Iterator[Check]:
    """Whether DeepSpeed's JIT can read ``TORCH_CUDA_ARCH_LIST``."""
    value = environ.get("TORCH_CUDA_ARCH_LIST", "")
    if not value.strip():
        yield ok("TORCH_CUDA_ARCH_LIST", "not set")
    elif is_readable_by_jit(value):
        yield ok("TORCH_CUDA_ARCH_LIST", value)
    else:
        plain = sorted(set(re.findall(r"\d+\.\d+", value)), key=float)
        yield warn(
            "TORCH_CUDA_ARCH_LIST",
            f"{value}: DeepSpeed's kernel builder reads numbers like 9.0 only",
            "job.sh sets a readable value; for other uses: export TORCH_CUDA_ARCH_LIST="
            + (f"'{';'.join(plain)}'" if plain else "9.0, or whatever your GPU has"),
        )


def check_numactl() -> Iterator[Check]:
    """``numactl``, with which ranks are bound to the cores near their GPU."""
    program = shutil.which("numactl")
    if program:
        yield ok("numactl", program)
    else:
        yield ok("numactl", "not installed; only --bind_cores_to_rank needs it")


def check_libaio() -> Iterator[Check]:
    """``libaio``, which offload to NVMe is built on."""
    library = find_library("aio")
    header = any(
        Path(folder, "libaio.h").exists() for folder in ("/usr/include", "/usr/local/include")
    )
    if library and header:
        yield ok("libaio", library)
    else:
        yield ok("libaio", "not installed; offload to nvme needs it: apt-get install libaio-dev")


def _check_nvcc() -> Iterator[Check]:
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    torch_cuda = _cuda_of_torch(_version("torch") or "")
    fix = "install the CUDA toolkit of torch's version, or set CUDA_HOME to it"
    if nvcc is None:
        yield warn("nvcc", "not found; DeepSpeed cannot build FusedAdam and CPUAdam", fix)
        return
    version = _first_version([nvcc, "--version"], pattern=r"release (\d+\.\d+)")
    if torch_cuda and version and int(version.split(".")[0]) != torch_cuda[0]:
        yield warn(
            "nvcc", f"{version}, and torch is built for CUDA {torch_cuda[0]}.{torch_cuda[1]}", fix
        )
    else:
        yield ok("nvcc", f"{nvcc} {version}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda_of_torch(version: str) -> tuple[int, int] | None:
    """Return the CUDA version in torch's local version, such as ``+cu130``; PyPI has none."""
    match = re.search(r"\+cu(\d+)(\d)$", version)
    return (int(match.group(1)), int(match.group(2))) if match else None


def _first_version(command: list[str], *, pattern: str = r"(\d+(?:\.\d+)+)") -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    match = re.search(pattern, done.stdout + done.stderr)
    return match.group(1) if match else ""
