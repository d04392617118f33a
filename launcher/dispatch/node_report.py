"""What one node of a cluster has, as one line of JSON: ``python -m launcher.dispatch.node_report``.

Run on every node before a job, through ssh or srun. It imports no torch.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.dispatch.host_guard import describe_listener
from launcher.dispatch.probe import probe_machine
from launcher.dispatch.process_group import SHARED_MEMORY
from launcher.errors import LauncherError

# Read whole up to this size; of larger files only blocks, so that 140 GB of weights on a network
# file system take a second and not half an hour.
_WHOLE_BYTES = 2**24
_BLOCK_BYTES = 2**16
_NUM_BLOCKS = 16
MISSING = "missing"
_PACKAGES = ("zerofit", "torch", "deepspeed", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """One node; bytes are of now, versions ``None`` where something is not installed."""

    host: str
    clock_seconds: float
    """Unix time when the report was made."""
    gpu_names: tuple[str, ...]
    smallest_gpu_free_bytes: int | None
    driver: str | None
    cuda: str | None
    versions: dict[str, str | None]
    memory_available_bytes: int
    shared_memory_free_bytes: int
    disk_free_bytes: int | None
    """Of the disk that the run directory will be on."""
    hashes: dict[str, str]
    """By path; "missing" where there is nothing."""
    listener: str | None
    """Who has the port that the ranks want to meet at."""
    locked_memory_bytes: int | None
    """``ulimit -l``; ``None`` is unlimited."""
    open_files: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report of this node."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--run-parent", type=Path)
    parser.add_argument("--path", type=Path, action="append", default=[])
    options = parser.parse_args(arguments)
    try:
        report = make_report(options.path, run_parent=options.run_parent, port=options.port)
    except LauncherError as error:
        print(json.dumps({"problem": error.problem}))  # noqa: T201  read by the launcher
        return 1
    print(json.dumps(asdict(report)))  # noqa: T201
    return 0


def make_report(paths: Sequence[Path], *, run_parent: Path | None, port: int) -> NodeReport:
    """Look at this node.

    Args:
        paths: files and folders that all nodes must see alike.
        run_parent: folder that the run directory will be in.
        port: where the ranks want to meet.

    Raises:
        SetupError: ``CUDA_VISIBLE_DEVICES`` cannot be understood.
    """
    hashes = {str(path): hash_tree(path) for path in paths}
    machine = probe_machine()
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return NodeReport(
        host=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        gpu_names=tuple(gpu.device_name for gpu in machine.gpus),
        smallest_gpu_free_bytes=min((gpu.free_bytes for gpu in machine.gpus), default=None),
        driver=machine.driver_version,
        cuda="{}.{}".format(*machine.cuda_version) if machine.cuda_version else None,
        versions=_versions(),
        memory_available_bytes=machine.available_bytes,
        shared_memory_free_bytes=shutil.disk_usage(SHARED_MEMORY).free,
        disk_free_bytes=_disk_free(run_parent) if run_parent else None,
        hashes=hashes,
        listener=describe_listener(port),
        locked_memory_bytes=None if locked == resource.RLIM_INFINITY else locked,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        clock_seconds=time.time(),
    )


def report_from_json(value: dict[str, Any]) -> NodeReport:
    """Read a report back."""
    return NodeReport(**{**value, "gpu_names": tuple(value["gpu_names"])})


def hash_tree(path: Path) -> str:
    """Return a hash of a file, or of a folder's names and contents; "missing" without either.

    Files above 16 MiB count by their size and 16 blocks spread over them.
    """
    digest = hashlib.sha256()
    try:
        for file in _files(path):
            size = file.stat().st_size
            name = "" if file == path else str(file.relative_to(path))
            digest.update(f"{name}\0{size}\0".encode())
            with file.open("rb") as stream:
                for block in _blocks(size):
                    stream.seek(block)
                    digest.update(
                        stream.read(_WHOLE_BYTES if size <= _WHOLE_BYTES else _BLOCK_BYTES)
                    )
    except FileNotFoundError:
        return MISSING
    except OSError as error:
        return f"unreadable: {error.strerror}"
    return digest.hexdigest()[:16]


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    yield from sorted(file for file in path.rglob("*") if file.is_file())


def _blocks(size: int) -> Iterator[int]:
    if size <= _WHOLE_BYTES:
        yield 0
        return
    for index in range(_NUM_BLOCKS):
        yield (size - _BLOCK_BYTES) * index // (_NUM_BLOCKS - 1)


def _disk_free(folder: Path) -> int | None:
    existing = next((p for p in (folder, *folder.parents) if p.exists()), None)
    return shutil.disk_usage(existing).free if existing else None


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        versions[name] = _version(name)
    # torch brings NCCL as a package named after the major version of CUDA.
    versions["nccl"] = _version("nvidia-nccl-cu13") or _version("nvidia-nccl-cu12")
    return versions


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
