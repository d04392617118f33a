"""From a command line to a plan: recipe, model and cluster brought together."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.allocation import current_allocation
from launcher.config_facts import is_unknown
from launcher.data_cache import DataSummary, cache_dir, find_prepared
from launcher.epoch import longest_tokens, training_of
from launcher.errors import HardwareError, RecipeError, SetupError
from launcher.given_file import read_given
from launcher.hardware import ClusterSpec, GpuSpec, default_cluster, find_gpu, gpu_names
from launcher.hostfile import equal_slots
from launcher.measured_rates import rates_from_json, with_measured_rates
from launcher.model_source import find_config
from launcher.model_spec import spec_from_config
from launcher.planning.ceiling import NO_CEILING, Ceiling
from launcher.planning.plan import Plan
from launcher.planning.planner import can_fit, choose_strategy, make_plan
from launcher.planning.search import Packages
from launcher.predict.run_cost import run_estimate
from launcher.predict.site_constants import with_site_constants
from launcher.recipe import parse_recipe
from launcher.recipe_paths import DEFAULT_PARENT, with_absolute_paths
from launcher.recipe_sections import ClusterSection, Recipe, StrategySection
from launcher.resolve import resolve_workload
from launcher.saves_timed import rate_beside
from launcher.site_file import read_constants, site_path
from launcher.units import GIB
from launcher.workload import Workload

_NO_RECIPE_FIX = "name a recipe file; `zerofit init` writes one"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A recipe with everything that it was resolved to."""

    recipe: Recipe
    plan: Plan
    model_config: Mapping[str, Any]
    """The model's Hugging Face configuration."""
    data: DataSummary | None = None
    """What the cache holds for the recipe's data; the plan is for its longest sequence."""


def read_recipe(args: Sequence[str], options: Mapping[str, str | None]) -> tuple[Recipe, str]:
    """Return the recipe that the arguments and flags describe, and what to call its source.

    Args:
        args: at most one recipe file, and ``key=value`` overrides, in any order.
        options: values given by options of their own, by dotted recipe key; ``None`` is none.

    Raises:
        RecipeError: the file or a value cannot be used.
    """
    files = [arg for arg in args if "=" not in arg or why_no_recipe(arg) is None]
    if len(files) > 1:
        raise RecipeError(
            f"{len(files)} recipe files are named: {', '.join(files)}",
            where="command line",
            fix="name one recipe, and overrides as key=value",
        )
    overrides = [arg for arg in args if arg not in files]
    given = {key: value for key, value in options.items() if value is not None}
    if not files:
        source = "command line"
        return parse_recipe("", source=source, options=given, overrides=overrides), source
    path = Path(files[0])
    if problem := why_no_recipe(files[0]):
        raise RecipeError(
            problem,
            where=str(path),
            fix=_NO_RECIPE_FIX,
        )
    text = read_given(path, error=RecipeError, fix=_NO_RECIPE_FIX)
    return parse_recipe(text, source=str(path), options=given, overrides=overrides), str(path)


def why_no_recipe(arg: str) -> str | None:
    """Return why a command's argument cannot be a recipe file; ``None`` when it is a file."""
    try:
        if Path(arg).is_file():
            return None
        return "this is not a file" if Path(arg).exists() else "there is no such recipe"
    except OSError as error:
        # An override may be longer than a file's name can be.
        return f"this is not a file: {error.strerror}"


def prepare(recipe: Recipe, *, source: str, ceiling: Ceiling = NO_CEILING) -> Prepared:
    """Resolve the recipe's model and cluster, and plan it.

    Args:
        recipe: what to train.
        source: what to call the recipe in errors.
        ceiling: what an attempt that ran out of memory has taught.

    Raises:
        LauncherError: the model, the GPU or a value cannot be used.
    """
    name, model_config = find_config(recipe.model.name_or_path, revision=recipe.model.revision)
    cluster = resolve_cluster(recipe.cluster)
    found = find_prepared(with_absolute_paths(recipe), cache_dir())
    max_seq_len = longest_tokens(found[1]) if found else recipe.max_seq_len
    if is_unknown(model_config):
        from launcher.trace_unknown import trace_model

        model = trace_model(
            model_config, replace(recipe, max_seq_len=max_seq_len), cluster.gpu, name=name
        )
    else:
        model = spec_from_config(model_config, name=name)
    workload = replace(
        resolve_workload(recipe, model, cluster.gpu, source=source), max_seq_len=max_seq_len
    )

    choices: dict[str, Any] = {
        "raw_deepspeed": recipe.deepspeed,
        "packages": packages(recipe),
        "ceiling": ceiling,
    }

    plan = make_plan(workload, cluster, fixed=recipe.strategy, **choices)
    plan = replace(plan, speedup_over_one_node=_speedup_over_one_node(plan, recipe, choices))

    def fits(changed: Workload, place: ClusterSpec, fixed: StrategySection) -> bool:
        # What was learnt on one GPU says nothing of another.
        known = choices if place.gpu == cluster.gpu else choices | {"ceiling": NO_CEILING}
        return can_fit(changed, place, fixed=fixed, **known)

    if not plan.fits:
        from launcher.planning.advice import suggest_changes

        counts = {"num_nodes": cluster.num_nodes, "gpus_per_node": cluster.gpus_per_node}
        larger = tuple(default_cluster(gpu, **counts) for gpu in _larger_gpus(cluster.gpu))
        changes = suggest_changes(plan, recipe.strategy, larger, fits)
        plan = replace(plan, suggestions=tuple(changes))
    summary = found[1] if found else None
    return Prepared(
        recipe=recipe,
        plan=_with_run(plan, recipe, summary),
        model_config=model_config,
        data=summary,
    )


def _with_run(plan: Plan, recipe: Recipe, summary: DataSummary | None) -> Plan:
    """Add the whole run's time and cost where its steps are known."""
    price, num_steps = recipe.cluster.price_per_gpu_hour, recipe.optim.max_steps
    seconds = None if num_steps is None else plan.time.run_seconds(num_steps)
    if summary is not None:
        training = training_of(summary, plan, recipe.optim)
        num_steps, seconds = training.num_steps, training.seconds
    run = None
    if num_steps is not None and seconds is not None:
        run = run_estimate(num_steps, seconds, plan.cluster, price_per_gpu_hour=price)
    target = Path(recipe.output_dir).parent if recipe.output_dir else DEFAULT_PARENT
    return replace(
        plan,
        run=run,
        price_per_gpu_hour=price,
        save_rate=rate_beside(target),
    )


def _speedup_over_one_node(plan: Plan, recipe: Recipe, choices: Mapping[str, Any]) -> float | None:
    """Return how much faster all nodes are than one of them at its own best, at equal batch.

    Below 1 the network costs more than the added GPUs bring. ``None``: one node cannot do it.
    """
    if plan.cluster.num_nodes == 1:
        return 1.0
    one_node = replace(plan.cluster, num_nodes=1)
    try:
        alone = choose_strategy(plan.workload, one_node, fixed=recipe.strategy, **choices)
    except RecipeError:
        # What the recipe fixes needs all nodes: groups of GPUs larger than a node, for one.
        return None
    return alone.best.time.step_seconds / plan.time.step_seconds if alone.fits else None


def resolve_cluster(section: ClusterSection) -> ClusterSpec:
    """Return the cluster that the recipe names, else the Slurm allocation, else this machine.

    Raises:
        LauncherError: the GPU is unknown, the hostfile cannot be used, or inside a Slurm
            allocation nothing says which GPUs it has.
    """
    num_nodes, gpus_per_node = section.num_nodes, section.gpus_per_node
    allocation = current_allocation() if section.backend in ("auto", "slurm") else None
    if allocation is not None and section.hostfile is None:
        num_nodes = num_nodes or allocation.num_nodes
        gpus_per_node = gpus_per_node or allocation.gpus_per_node or allocation.tasks_per_node
        if section.gpu is None and allocation.gpus_per_node and not _has_gpus():
            raise SetupError(
                f"job {allocation.job_id} has {allocation.gpus_per_node} GPUs on each node, and "
                "this machine has none to look at",
                where="this allocation",
                fix="say which GPUs they are: cluster.gpu=H100-80GB",
            )
    if section.hostfile is not None:
        from launcher.dispatch.deepspeed import read_hosts

        hosts = read_hosts(section)
        num_nodes = num_nodes or len(hosts)
        gpus_per_node = gpus_per_node or equal_slots(hosts, source=section.hostfile)
    if section.gpu is None:
        from launcher.dispatch.probe import cluster_of, probe_machine

        cluster = cluster_of(probe_machine(), num_nodes=num_nodes, gpus_per_node=gpus_per_node)
    else:
        cluster = default_cluster(
            find_gpu(section.gpu), num_nodes=num_nodes or 1, gpus_per_node=gpus_per_node or 1
        )
    if section.host_memory_gib is not None:
        cluster = replace(cluster, host_memory_bytes=int(section.host_memory_gib * GIB))
    if section.measured is not None:
        fix = "write it: zerofit doctor --hostfile HOSTFILE --output FILE"
        text = read_given(Path(section.measured), error=HardwareError, fix=fix)
        rates = rates_from_json(text, source=section.measured)
        cluster = with_measured_rates(cluster, rates)
    if (site := read_constants(site_path(), cluster.gpu.name)) is not None:
        cluster = with_site_constants(cluster, site)
    if section.inter_node_gbit_per_s is not None:
        cluster = replace(cluster, inter_node_bytes_per_s=section.inter_node_gbit_per_s * 1e9 / 8)
    return cluster


def _has_gpus() -> bool:
    from launcher.dispatch.probe import probe_machine

    return bool(probe_machine().gpus)


def _larger_gpus(gpu: GpuSpec) -> list[GpuSpec]:
    """Return the known GPUs with more memory, smallest first, those of the same make before."""
    known = [find_gpu(name) for name in gpu_names()]
    larger = [other for other in known if other.memory_bytes > 1.05 * gpu.memory_bytes]
    is_amd = gpu.name.startswith("MI")
    return sorted(
        larger, key=lambda other: (other.name.startswith("MI") != is_amd, other.memory_bytes)
    )


def packages(recipe: Recipe) -> Packages:
    """Return which optional packages the planner may choose.

    On this machine they must be installed. Elsewhere Liger is assumed; flash-attn, which has to
    be built for each version of torch, is not.
    """
    is_elsewhere = recipe.cluster.gpu is not None

    def is_here(name: str) -> bool:
        return not is_elsewhere and importlib.util.find_spec(name) is not None

    return Packages(
        has_liger=is_elsewhere or is_here("liger_kernel"), has_flash_attn=is_here("flash_attn")
    )
