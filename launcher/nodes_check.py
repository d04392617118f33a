"""Which nodes to check before a job, and what the job needs of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from launcher.allocation import current_allocation
from launcher.dispatch.deepspeed import read_hostfile, read_hosts
from launcher.dispatch.preflight import Needs, Preflight, check_allocation, check_hosts
from launcher.launch import needs_of
from launcher.machine_file import hosts_of_node_list
from launcher.prepare import prepare, read_recipe


def check_nodes(args: Sequence[str], hostfile: Path | None, *, measure: bool) -> Preflight | None:
    """Check the hosts of a hostfile, or of the recipe's, or the nodes of this Slurm allocation.

    Args:
        args: at most one recipe, and overrides; may be empty.
        hostfile: used in place of the recipe's.
        measure: whether to measure rates, too.

    Returns:
        ``None`` when none is named: this machine is meant.

    Raises:
        LauncherError: the recipe or the hostfile cannot be used.
    """
    prepared = None
    if args:
        options = {"cluster.hostfile": str(hostfile) if hostfile else None}
        recipe, source = read_recipe(args, options)
        prepared = prepare(recipe, source=source)
    needs = needs_of(prepared) if prepared is not None else Needs()
    if hostfile is not None and prepared is None:
        return check_hosts(read_hostfile(hostfile), needs, measure=measure)
    if prepared is not None and prepared.recipe.cluster.hostfile is not None:
        return check_hosts(read_hosts(prepared.recipe.cluster), needs, measure=measure)
    allocation = current_allocation()
    if allocation is None:
        return None
    ranks = needs.gpus_per_node or allocation.gpus_per_node or allocation.tasks_per_node or 1
    names = hosts_of_node_list(os.environ["SLURM_JOB_NODELIST"], where="SLURM_JOB_NODELIST")
    return check_allocation(names, needs, ranks_per_node=ranks, measure=measure)
