"""The next plan after hosts were lost: the same training on the hosts that are left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from launcher.dispatch.deepspeed import all_hosts
from launcher.dispatch.guards import LOST_AFTER_SECONDS
from launcher.dispatch.process_group import KILL_GRACE_SECONDS
from launcher.hostfile import render_filter
from launcher.prepare import Prepared, prepare
from launcher.recipe_sections import ClusterSection
from launcher.recovery.next_rung import loadable, what_may_change, with_plan

FENCE_SECONDS = LOST_AFTER_SECONDS + KILL_GRACE_SECONDS + 2.0
"""A host that is cut off ends its ranks by itself after so long (launcher/dispatch/host_guard.py);
until then they could still write into a run directory that they reach over another network."""


class NoOtherHostsError(Exception):
    """Why the hosts that are left cannot take over; one sentence."""


def on_other_hosts(run_dir: Path, prepared: Prepared, lost: tuple[str, ...]) -> Prepared:
    """Return the plan for the hosts that are left: spare ones, or fewer where the recipe allows it.

    Global batch size, order of the data, schedule, method and precision stay.

    Args:
        run_dir: of the run; with a checkpoint in it, only plans that can load it count.
        prepared: what ran when the hosts were lost.
        lost: their names in the hostfile.

    Raises:
        NoOtherHostsError: too few are left, or nothing fits on them.
        LauncherError: the hostfile cannot be read any more.
    """
    section = prepared.recipe.cluster
    if section.hostfile is None or not lost:
        raise NoOtherHostsError("no hostfile names other hosts")
    num_wanted = prepared.plan.cluster.num_nodes
    left = _without(lost, section, num_nodes=num_wanted)
    return _on(left, run_dir, prepared, num_wanted=num_wanted)


def on_nodes_left(
    run_dir: Path, prepared: Prepared, num_left: int, *, num_wanted: int | None = None
) -> Prepared:
    """Return the plan for the nodes that a Slurm job has, as :func:`on_other_hosts` does.

    Args:
        run_dir: as there.
        prepared: as there.
        num_left: nodes that can be used.
        num_wanted: that the run has at best; by default as many as it had.

    Raises:
        NoOtherHostsError: too few are left, or nothing fits on them.
    """
    num_wanted = num_wanted or prepared.plan.cluster.num_nodes
    section = replace(prepared.recipe.cluster, num_nodes=min(num_left, num_wanted))
    return _on(section, run_dir, prepared, num_wanted=num_wanted)


def _on(section: ClusterSection, run_dir: Path, prepared: Prepared, *, num_wanted: int) -> Prepared:
    """Return the plan for as many of the section's nodes as are of use, the most first."""
    recipe, gpus_per_node = prepared.recipe, prepared.plan.cluster.gpus_per_node
    left = section.num_nodes or 0
    least = recipe.recovery.min_nodes or num_wanted
    shared_by = prepared.plan.strategy.sequence_parallel_size
    sizes = [
        number
        for number in range(left, least - 1, -1)
        if (number * gpus_per_node) % shared_by == 0
        and recipe.optim.global_batch_size % (number * gpus_per_node // shared_by) == 0
    ]
    if left < least:
        allows = "recovery.min_nodes" if recipe.recovery.min_nodes else "without recovery.min_nodes"
        raise NoOtherHostsError(f"{left} of {num_wanted} hosts are left; {allows}: {least}")
    for number in sizes:
        fewer = replace(recipe, cluster=replace(section, num_nodes=number))
        chosen = with_plan(fewer, prepared.plan).strategy
        kept = replace(chosen, micro_batch_size_per_gpu=None)
        for free in [kept, *what_may_change(fewer)]:
            fixed = loadable(free, prepared.plan.strategy, run_dir)
            found = prepare(replace(fewer, strategy=fixed), source=str(run_dir))
            if found.plan.fits:
                return replace(found, recipe=with_plan(fewer, found.plan))
    raise NoOtherHostsError(f"no plan with this global batch fits on {least} to {left} hosts")


def _without(lost: tuple[str, ...], section: ClusterSection, *, num_nodes: int) -> ClusterSection:
    """Return the section for at most ``num_nodes`` hosts, of which none is lost; 0 for none."""
    left = [host for host in all_hosts(section) if host.name not in lost]
    if not left:
        return replace(section, num_nodes=0)
    return replace(
        section, include=render_filter(left), exclude=None, num_nodes=min(num_nodes, len(left))
    )
