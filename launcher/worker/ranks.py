"""Which process this is, on which device, and how it reaches the others."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import SetupError
from launcher.strategy import Precision
from launcher.worker.program import QUIET_ENVIRONMENT
from launcher.worker.weights_only import load_weights_only

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Which process this is, as its launcher says."""

    rank: int
    local_rank: int
    world_size: int


# Open MPI 4 (mpirun(1), "Environment Variables") and MPICH's hydra (pmi_proxy).
_MPI_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),
)


def ranks_from_environment(environment: Mapping[str, str]) -> Ranks:
    """Return this process's place among the ranks.

    Launchers of DeepSpeed and torch set RANK; under ``srun`` Slurm's variables say it, under
    Open MPI's and MPICH's ``mpirun`` theirs; a process started by hand is the only one.

    Raises:
        SetupError: several ranks and no MASTER_ADDR to meet at.
    """
    if "RANK" in environment:
        return Ranks(
            rank=int(environment["RANK"]),
            local_rank=int(environment.get("LOCAL_RANK", "0")),
            world_size=int(environment.get("WORLD_SIZE", "1")),
        )
    if "SLURM_PROCID" in environment and "MASTER_ADDR" in environment:
        return Ranks(
            rank=int(environment["SLURM_PROCID"]),
            local_rank=int(environment.get("SLURM_LOCALID", "0")),
            world_size=int(environment["SLURM_NTASKS"]),
        )
    for rank, local_rank, world_size in _MPI_VARIABLES:
        if rank in environment:
            found = Ranks(
                rank=int(environment[rank]),
                local_rank=int(environment.get(local_rank, "0")),
                world_size=int(environment[world_size]),
            )
            if found.world_size > 1 and "MASTER_ADDR" not in environment:
                raise SetupError(
                    "mpirun has started several ranks that do not know where to meet",
                    where="MASTER_ADDR",
                    fix="mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500 …, with the host of rank "
                    "0; `zerofit train` with cluster.launcher=openmpi does it",
                )
            return found
    return Ranks(rank=0, local_rank=0, world_size=1)


def prepare_environment(ranks: Ranks) -> None:
    """Set what the training stack reads when it is imported."""
    places = {
        "RANK": str(ranks.rank),
        "LOCAL_RANK": str(ranks.local_rank),
        "WORLD_SIZE": str(ranks.world_size),
        "MASTER_ADDR": "127.0.0.1",
    }
    for name, value in {**QUIET_ENVIRONMENT, **places}.items():
        os.environ.setdefault(name, value)
    find_programs_beside_python()
    if ranks.world_size == 1:
        os.environ.setdefault("MASTER_PORT", "0")
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def find_programs_beside_python() -> None:
    """Put the folder of this Python first in PATH, as job.sh does on the host that it runs on.

    DeepSpeed builds its kernels with the first ninja there. The shells that ssh opens may know
    none, or another one, by whose log all that this one has compiled counts as changed.
    """
    folder, path = str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)
    if path.partition(os.pathsep)[0] != folder:
        os.environ["PATH"] = f"{folder}{os.pathsep}{path}"


def choose_device(ranks: Ranks, precision: Precision) -> torch.device:
    """Return this rank's device and make it the process's own.

    Raises:
        SetupError: the precision needs a GPU, or there are fewer GPUs than ranks here.
    """
    import torch

    if not torch.cuda.is_available():
        if precision is Precision.fp16:
            raise SetupError(
                "fp16 needs a GPU, and there is none",
                where="this machine",
                fix="set model.precision to fp32 or bf16",
            )
        return torch.device("cpu")
    if ranks.local_rank >= torch.cuda.device_count():
        raise SetupError(
            f"local rank {ranks.local_rank} has no GPU: {torch.cuda.device_count()} are visible",
            where=f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '(unset)')}",
            fix="start as many ranks on a host as it has GPUs",
        )
    torch.cuda.set_device(ranks.local_rank)
    # Now, so that the allocator can be asked for its counters from here on.
    torch.cuda.init()  # type: ignore[no-untyped-call]
    return torch.device("cuda", ranks.local_rank)


def start_process_group(device: torch.device) -> None:
    """Connect the ranks, before ZeRO-3 partitions the first weight.

    accelerate would do it too, but on CPU in a way that DeepSpeed does not see: its
    ``zero.Init`` then believes that this rank is alone (deepspeed 0.19 ``runtime/config.py``).
    """
    import deepspeed

    load_weights_only()
    backend = "nccl" if device.type == "cuda" else "gloo"
    # Each rank prints that DeepSpeed's kernel for shared memory was built (comm/torch.py).
    with contextlib.redirect_stdout(io.StringIO()):
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    if device.type == "cpu":
        _unlink_shared_memory()


def _unlink_shared_memory(folder: Path = Path("/dev/shm")) -> None:  # noqa: S108  POSIX memory
    """Remove the name of this rank's buffer of DeepSpeed's CPU all-reduce; its memory stays.

    DeepSpeed never removes it: 69 MB per rank would stay behind after each run.

    Source: DeepSpeed 0.19.8 ``csrc/cpu/comm/shm.cpp``:
    ``deepspeed_allreduce_buffer_<uid>_<address>_<port>_<rank>``.
    """
    import torch.distributed as dist

    dist.barrier()  # every rank has opened the others' buffers when it comes here
    ending = f"_{os.environ.get('MASTER_PORT')}_{dist.get_rank()}"
    for path in folder.glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*{ending}"):
        path.unlink(missing_ok=True)
