"""From a plan to a run directory with its data, and to its ranks."""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

from launcher import run_dir as rd
from launcher.backends import choose_backend
from launcher.data_cache import (
    DATA,
    DataSummary,
    cache_dir,
    fill_run_directory,
    find_prepared,
    summary_from_json,
)
from launcher.data_view import describe_data
from launcher.dispatch.base import Backend, run_to_end, write_files
from launcher.dispatch.preflight import Needs
from launcher.dispatch.worker_command import check_trackers, check_train_extra, run_worker
from launcher.ds_config import build_ds_config
from launcher.errors import LauncherError
from launcher.job_script import JobRequest
from launcher.planning.plan import plan_to_json
from launcher.prepare import Prepared
from launcher.recipe import parse_recipe, render_recipe
from launcher.recipe_paths import (
    DEFAULT_PARENT,
    check_data_paths,
    check_names_data,
    is_hub_id,
    with_absolute_paths,
)
from launcher.recipe_sections import Recipe
from launcher.sbatch_script import NEEDS
from launcher.strategy import Method
from launcher.units import MIB, format_bytes

# What a run depends on; recorded with it, so that a result can be traced to versions.
_STACK = (
    "zerofit", "torch", "deepspeed", "transformers", "accelerate", "peft", "datasets",
    "bitsandbytes", "flash-attn", "liger-kernel",
)  # fmt: skip


# Tokenizer, logs, peaks and generated files, beside the weights.
_SMALL_FILES_BYTES = 64 * MIB


def check_can_start(prepared: Prepared) -> None:
    """Look whether the job can be started from here, before anything is written.

    Raises:
        SetupError: the training stack, a GPU, or a program is missing.
        LauncherError: as :func:`create_run`.
    """
    check_train_extra()
    check_trackers(prepared.recipe.tracking.report_to)
    recipe = _resolved(prepared.recipe)
    check_data_paths(recipe)
    choose_backend(recipe).check_place(prepared.plan)


def create_run(
    prepared: Prepared, output_dir: Path | None, *, backend: Backend | None = None
) -> tuple[Path, Backend, JobRequest]:
    """Make the run directory with all files of the job in it; start nothing.

    Args:
        prepared: a plan that fits.
        output_dir: the directory to make; ``None`` leaves it to the recipe, or picks a name.
        backend: where it will run; by default as the recipe says.

    Raises:
        LauncherError: the directory exists or cannot be written, the data is missing, or the
            job cannot be rendered for this place. Nothing is left behind then.
    """
    recipe = _resolved(prepared.recipe)
    backend = backend or choose_backend(recipe)
    target = output_dir or (Path(recipe.output_dir) if recipe.output_dir else None)
    needed_bytes = disk_bytes(prepared)
    if target is not None:
        run_dir = rd.create(target, needed_bytes=needed_bytes)
    else:
        run_dir = rd.create_default(
            DEFAULT_PARENT,
            model=prepared.plan.workload.model.name,
            method=prepared.plan.workload.method.value,
            when=_now(),
            needed_bytes=needed_bytes,
        )
    try:
        request = backend.render(prepared.plan, run_dir=run_dir, files=run_files(prepared))
        write_files(request, run_dir)
        if recipe.model.random_weights:
            config_dir = run_dir / rd.MODEL_CONFIG
            config_dir.mkdir()
            rd.write_json(config_dir / "config.json", dict(prepared.model_config))
    except BaseException:
        remove_run(run_dir)
        raise
    return run_dir, backend, request


def render_again(prepared: Prepared, run_dir: Path) -> tuple[Backend, JobRequest]:
    """Return the job of a run directory that exists; write and start nothing.

    Raises:
        LauncherError: the job cannot be rendered for this place.
    """
    backend = choose_backend(_resolved(prepared.recipe))
    return backend, backend.render(prepared.plan, run_dir=run_dir, files=run_files(prepared))


def _now() -> datetime:
    return datetime.now(UTC).astimezone()


def disk_bytes(prepared: Prepared) -> int:
    """Return the disk space that a run needs for what it saves."""
    optim, workload = prepared.recipe.optim, prepared.plan.workload
    is_saved = not (prepared.recipe.model.random_weights and workload.method is Method.full)
    final = workload.num_trainable_params * workload.precision.bytes_per_element
    needed = _SMALL_FILES_BYTES + (final if is_saved else 0)
    if optim.save_steps is not None:
        # Those that are kept, and one more while it is being written.
        needed += ((optim.save_total_limit or 1) + 1) * prepared.plan.memory.checkpoint_bytes
    return needed


def dry_run(
    prepared: Prepared, output_dir: Path | None, *, backend: Backend | None = None
) -> tuple[Path, JobRequest]:
    """Return the run directory that :func:`create_run` would make, and what would run in it."""
    recipe = _resolved(prepared.recipe)
    backend = backend or choose_backend(recipe)
    workload = prepared.plan.workload
    name = rd.default_name(workload.model.name, workload.method.value, _now())
    target = output_dir or Path(recipe.output_dir or DEFAULT_PARENT / name)
    run_dir = target if target.is_absolute() else Path.cwd() / target
    return run_dir, backend.render(prepared.plan, run_dir=run_dir, files=run_files(prepared))


def describe_job(run_dir: Path, request: JobRequest) -> str:
    """Return what a dry run found, as text."""
    parts = [f"would write {len(request.files)} files into {run_dir}:"]
    for name, text in request.files.items():
        shown = text if name != rd.PLAN else f"({format_bytes(len(text))}; see zerofit plan)\n"
        parts.append(f"--- {name}\n{shown.rstrip()}")
    parts.append(f"and run there: {' '.join(request.argv)}")
    return "\n".join(parts)


def job_to_json(run_dir: Path, request: JobRequest) -> dict[str, Any]:
    """Return what a dry run found, for scripts."""
    return {
        "run_dir": str(run_dir),
        "files": dict(request.files),
        "argv": list(request.argv),
        "env": dict(request.env),
    }


def start_run(
    run_dir: Path,
    backend: Backend,
    request: JobRequest,
    *,
    say: Callable[[str], None],
    console: BinaryIO | None,
    saves: bool = True,
) -> None:
    """Tokenise the data, and run the job once, with its output on the terminal.

    Args:
        run_dir: as for :func:`prepare_data`.
        backend: where to run.
        request: what to run.
        say: shows a line of text.
        console: where the job's output is copied; ``None`` leaves it in the log.
        saves: as :func:`~launcher.dispatch.base.run_to_end`.

    Raises:
        LauncherError: the data cannot be used (exit status 2), or the job failed (4).
    """
    prepare_data(run_dir, request, say=say)
    run_to_end(backend, request, run_dir=run_dir, console=console, saves=saves)


def prepare_data(run_dir: Path, request: JobRequest, *, say: Callable[[str], None]) -> None:
    """Tokenise the data of a run, where it has any.

    Args:
        run_dir: made by :func:`create_run`; removed again when tokenising fails or is
            interrupted, so that the same command can be given again.
        request: what will run.
        say: shows a line of text.

    Raises:
        LauncherError: the data cannot be used.
    """
    recipe = parse_recipe(request.files[rd.RECIPE], source=rd.RECIPE)
    if recipe.data.has_training_data:
        try:
            summary = prepare_run_data(recipe, run_dir)
        except LauncherError:
            remove_run(run_dir)
            say(f"removed {run_dir}: nothing has run in it")
            raise
        for line in describe_data(summary):
            say(line)


def prepare_run_data(recipe: Recipe, run_dir: Path) -> DataSummary:
    """Fill a run's data folder: from the cache where no file changed since, else by the worker.

    Raises:
        LauncherError: the data cannot be used.
    """
    paths = [recipe.data.path, recipe.data.eval_path, *(s.path for s in recipe.data.sources)]
    # A hub data set can change without a file of this machine changing.
    if all(Path(path).exists() for path in paths if path is not None):
        found = find_prepared(recipe, cache_dir())
        if found is not None:
            # Anything that goes wrong here, the worker says better.
            with contextlib.suppress(OSError):
                fill_run_directory(found[0], run_dir / DATA)
                return found[1]
    return summary_from_json(run_worker("launcher.worker.data", ["--run-dir", str(run_dir)]))


def _resolved(recipe: Recipe) -> Recipe:
    check_names_data(recipe)
    return with_absolute_paths(recipe)


def remove_run(run_dir: Path) -> None:
    """Remove a run directory that was made a moment ago and that nothing has run in."""
    shutil.rmtree(run_dir, ignore_errors=True)
    if run_dir.parent.name == DEFAULT_PARENT.name:
        with contextlib.suppress(OSError):
            run_dir.parent.rmdir()  # unless it holds other runs


def run_files(prepared: Prepared) -> dict[str, str]:
    """Return the files of a run by name, whatever the backend."""
    recipe, plan = _resolved(prepared.recipe), prepared.plan
    ds_config = build_ds_config(
        recipe, plan.workload, plan.strategy, world_size=plan.cluster.world_size
    )
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "packages": {name: _version(name) for name in _STACK},
    }
    return {
        rd.RECIPE: render_recipe(recipe),
        rd.PLAN: json.dumps(plan_to_json(plan), indent=1) + "\n",
        rd.DS_CONFIG: json.dumps(ds_config, indent=2) + "\n",
        rd.ENVIRONMENT: json.dumps(environment, indent=1) + "\n",
        NEEDS: json.dumps(needs_of(prepared).to_json(), indent=1) + "\n",
    }


def needs_of(prepared: Prepared) -> Needs:
    """Return what a plan and its recipe need of every node."""
    recipe, plan = with_absolute_paths(prepared.recipe), prepared.plan
    data, has_gpus = recipe.data, plan.cluster.gpu.device_type == "cuda"
    named = [data.path, data.eval_path, *(source.path for source in data.sources)]
    paths = [Path(path) for path in named if path is not None and not is_hub_id(path)]
    model = Path(recipe.model.name_or_path)
    if model.is_dir():
        paths.append(model)
    run_dir = Path(recipe.output_dir) if recipe.output_dir else DEFAULT_PARENT / "run"
    return Needs(
        paths=tuple(paths),
        run_parent=_existing(run_dir.absolute()),
        disk_bytes=disk_bytes(prepared),
        host_memory_bytes=plan.memory.host_bytes_per_node,
        gpus_per_node=plan.cluster.gpus_per_node if has_gpus else None,
        gpu_memory_bytes=plan.memory.device_used_bytes if has_gpus else 0,
    )


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
