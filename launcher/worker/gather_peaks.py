"""Bring every rank's peaks to rank 0: through MPI under mpirun, else through torch.

Each rank's file has the same; a network file system may show them to rank 0 seconds later.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from launcher.peaks import RankPeaks, peaks_from_json, peaks_to_json
from launcher.units import format_bytes
from launcher.worker.ranks import Ranks

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


def gather_peaks(own: RankPeaks, ranks: Ranks) -> list[RankPeaks]:
    """Return all ranks' peaks on rank 0, and an empty list on the others; all must call it.

    Args:
        own: this rank's.
        ranks: which this is; the process group is up.
    """
    import torch.distributed as dist

    value = peaks_to_json(own)
    gathered: list[Any] | None = None
    communicator = _mpi_communicator(ranks) if is_under_mpi(os.environ) else None
    if communicator is not None:
        gathered = communicator.gather(value, root=0)
        if ranks.rank == 0:
            logger.info("peaks of %d ranks came through MPI", len(gathered or ()))
    else:
        gathered = [None] * ranks.world_size if ranks.rank == 0 else None
        dist.gather_object(value, gathered)
    return [peaks_from_json(item) for item in gathered or ()]


def is_under_mpi(environment: Mapping[str, str]) -> bool:
    """Return whether MPI can be initialised here.

    Under srun only with ``--mpi=pmix``: with pmi2 Open MPI ends the process in MPI_Init.
    """
    if "OMPI_COMM_WORLD_SIZE" in environment or "PMIX_RANK" in environment:
        return True
    return "PMI_SIZE" in environment and "SLURM_PROCID" not in environment


def sum_over_ranks(value: int, device: torch.device) -> int:
    """Return the sum of all ranks' values on every rank; all must call it."""
    import torch
    import torch.distributed as dist

    total = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return int(total.item())


def log_fullest_rank(own: RankPeaks, ranks: Ranks) -> None:
    """Say on rank 0 which rank needed most; all must call it."""
    peaks = gather_peaks(own, ranks)
    if ranks.rank != 0:
        return
    allocated = {
        (peak.rank, phase): measured.peak_allocated_bytes
        for peak in peaks
        for phase, measured in peak.phases.items()
    }
    rank, phase = max(allocated, key=lambda key: allocated[key])
    logger.info(
        "fullest rank: %d of %d, %s allocated in phase %s",
        rank,
        len(peaks),
        format_bytes(allocated[rank, phase]),
        phase,
    )


def _mpi_communicator(ranks: Ranks) -> Any:
    """Return MPI's communicator of all ranks; ``None``, and a line that says why, without one."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: no MPI library can be loaded
        logger.info("peaks are gathered by torch, not MPI: %s (pip install 'zerofit[mpi]')", error)
        return None
    # A library of another MPI than mpirun's makes each rank a world of its own.
    if MPI.COMM_WORLD.Get_size() != ranks.world_size:
        logger.info("peaks are gathered by torch: mpi4py uses another MPI than mpirun")
        return None
    return MPI.COMM_WORLD
