"""Which backend runs a recipe."""

from __future__ import annotations

from launcher.allocation import current_allocation
from launcher.dispatch.allocation import AllocationBackend
from launcher.dispatch.base import Backend
from launcher.dispatch.deepspeed import HostfileBackend, is_only_this_machine, read_hosts
from launcher.dispatch.local import LocalBackend
from launcher.dispatch.slurm import SlurmBackend
from launcher.errors import RecipeError
from launcher.recipe_sections import Recipe, SlurmSection
from launcher.site_file import read_site, site_path, with_site


def choose_backend(recipe: Recipe) -> Backend:
    """Return where a recipe runs; ``auto`` takes the allocation that this process is in.

    Raises:
        LauncherError: the hostfile, the site file or the choice cannot be used.
    """
    has_data = recipe.data.has_training_data
    allocation = current_allocation()
    is_auto = recipe.cluster.backend == "auto" and recipe.cluster.hostfile is None
    if allocation is not None and (is_auto or recipe.cluster.backend == "slurm"):
        return AllocationBackend.inside(allocation, _slurm_settings(recipe), has_data=has_data)
    if recipe.cluster.backend == "slurm":
        return slurm_backend(recipe)
    if recipe.cluster.hostfile is None:
        if recipe.cluster.backend == "deepspeed":
            raise RecipeError(
                "the deepspeed backend needs to know its hosts",
                where="cluster.hostfile",
                fix="name a hostfile with lines like 'node1 slots=8', or use the local backend",
            )
        return LocalBackend.here(has_data=has_data)
    hosts = read_hosts(recipe.cluster)
    if recipe.cluster.backend == "local" and not is_only_this_machine(hosts):
        raise RecipeError(
            "the hostfile names other hosts than this machine",
            where="cluster.backend",
            fix="use backend deepspeed, or leave the hostfile out",
        )
    if is_only_this_machine(hosts):
        return LocalBackend.here(has_data=has_data)
    return HostfileBackend.for_hosts(hosts, recipe.cluster, has_data=has_data)


def slurm_backend(recipe: Recipe) -> SlurmBackend:
    """Return the backend that submits to Slurm, with the site's settings.

    Raises:
        RecipeError: the site file cannot be used, or the recipe names hosts.
    """
    if recipe.cluster.hostfile is not None:
        raise RecipeError(
            "Slurm chooses the hosts, so there is no use for a hostfile",
            where="cluster.hostfile",
            fix="leave it out; sbatch's --nodelist in slurm.extra names nodes",
        )
    return SlurmBackend(
        settings=_slurm_settings(recipe),
        num_steps=recipe.optim.max_steps,
        min_nodes=recipe.recovery.min_nodes,
        has_data=recipe.data.has_training_data,
    )


def _slurm_settings(recipe: Recipe) -> SlurmSection:
    return with_site(recipe.slurm, read_site(site_path()))
