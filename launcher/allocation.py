"""The Slurm allocation that a process runs in, by Slurm's variables."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """What Slurm's variables say about the allocation that this process runs in."""

    job_id: str
    num_nodes: int
    gpus_per_node: int | None
    """``None`` when the variables name no GPUs."""
    tasks_per_node: int | None


def current_allocation(environ: Mapping[str, str] = os.environ) -> Allocation | None:
    """Return the allocation that this process is in; ``None`` outside of Slurm.

    Source: sbatch(1) and salloc(1), OUTPUT ENVIRONMENT VARIABLES, Slurm 22.05.
    """
    if not environ.get("SLURM_JOB_ID", "").isdigit() or "SLURM_JOB_NODELIST" not in environ:
        return None
    gpus = _last_number(environ.get("SLURM_GPUS_ON_NODE") or environ.get("SLURM_GPUS_PER_NODE"))
    tasks = environ.get("SLURM_NTASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    return Allocation(
        job_id=environ["SLURM_JOB_ID"],
        num_nodes=int(environ.get("SLURM_JOB_NUM_NODES") or environ.get("SLURM_NNODES") or 1),
        gpus_per_node=gpus or None,
        # '2(x4)': two on each of four nodes.
        tasks_per_node=int(re.match(r"\d*", tasks)[0] or 0) or None if tasks else None,  # type: ignore[index]
    )


def _last_number(text: str | None) -> int | None:
    """Return the number at the end of ``2`` or ``h100:2``."""
    match = re.search(r"(\d+)$", text or "")
    return int(match[1]) if match else None
