"""The Slurm allocation that a process runs in, by Slurm's variables."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.errors import SetupError


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """What Slurm's variables say about the allocation that this process runs in."""

    job_id: str
    num_nodes: int
    gpus_per_node: int | None
    """``None`` when the variables name no GPUs."""
    tasks_per_node: int | None
    cpus_of_nodes: tuple[int, ...] = ()
    """That the job may use on each node; empty when the variables do not say."""
    cpus_per_task: int = 1


def current_allocation(environ: Mapping[str, str] = os.environ) -> Allocation | None:
    """Return the allocation that this process is in; ``None`` outside of Slurm.

    Raises:
        SetupError: the number of nodes is none.

    Source: sbatch(1) and salloc(1), OUTPUT ENVIRONMENT VARIABLES, Slurm 22.05.
    """
    if not environ.get("SLURM_JOB_ID", "").isdigit() or "SLURM_JOB_NODELIST" not in environ:
        return None
    # The end of 'h100:2'.
    gpus = _number(r"\d+$", environ.get("SLURM_GPUS_ON_NODE") or environ.get("SLURM_GPUS_PER_NODE"))
    tasks = environ.get("SLURM_NTASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    return Allocation(
        job_id=environ["SLURM_JOB_ID"],
        num_nodes=_num_nodes(environ),
        gpus_per_node=gpus,
        # '2(x4)': two on each of four nodes.
        tasks_per_node=_number(r"^\d+", tasks),
        cpus_of_nodes=_counts(environ.get("SLURM_JOB_CPUS_PER_NODE", "")),
        cpus_per_task=_number(r"^\d+$", environ.get("SLURM_CPUS_PER_TASK")) or 1,
    )


def _counts(text: str) -> tuple[int, ...]:
    """Return the counts that '4(x2),8' stands for; none where it is anything else."""
    if not re.fullmatch(r"\d{1,6}(\(x\d{1,6}\))?(,\d{1,6}(\(x\d{1,6}\))?)*", text, re.ASCII):
        return ()
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return tuple(int(count) for count, times in parts for _ in range(int(times or 1)))


def _num_nodes(environ: Mapping[str, str]) -> int:
    value = environ.get("SLURM_JOB_NUM_NODES") or environ.get("SLURM_NNODES") or "1"
    if not re.fullmatch("[0-9]{1,9}", value) or int(value) == 0:
        raise SetupError(
            f"SLURM_JOB_NUM_NODES is {value!r}, which is no number of nodes",
            where="environment",
            fix="unset Slurm's variables outside of a job",
        )
    return int(value)


def _number(pattern: str, text: str | None) -> int | None:
    """Return the number above 0 that a pattern finds, if there is one."""
    match = re.search(pattern, text or "", re.ASCII)
    return int(match[0][-9:]) or None if match else None
