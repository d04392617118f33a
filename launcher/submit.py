"""From plans to Slurm jobs: one run, several as an array, or a run that is waited for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from launcher import run_dir as rd
from launcher.backends import choose_backend, slurm_backend
from launcher.data_view import describe_data
from launcher.dispatch import slurm_commands as slurm
from launcher.dispatch.base import JobHandle, write_files
from launcher.dispatch.interruptions import Interruptions
from launcher.dispatch.slurm import SlurmBackend, check_accepted, handle_of, keep_handles
from launcher.dispatch.worker_command import check_train_extra
from launcher.errors import DoesNotFitError, RecipeError, list_problems
from launcher.launch import create_run, prepare_run_data, remove_run, run_files
from launcher.prepare import Prepared
from launcher.recipe_paths import DEFAULT_PARENT, check_data_paths, with_absolute_paths
from launcher.recipe_sections import Recipe
from launcher.sbatch_script import render_array

Say = Callable[[str], None]


def goes_to_slurm(recipe: Recipe) -> bool:
    """Return whether ``zerofit train`` submits this recipe as a job of its own."""
    if recipe.cluster.backend != "slurm":
        return False
    return isinstance(choose_backend(recipe), SlurmBackend)


def train_on_slurm(
    prepared: Prepared, output_dir: Path | None, *, say: Say, console: BinaryIO
) -> Path:
    """Submit a run, show its log until it ends, and return the run directory.

    Raises:
        LauncherError: as :func:`submit_run`; or the job failed (exit status 4).
        InterruptionError: Ctrl-C; says whether the job goes on.
    """
    backend = slurm_backend(prepared.recipe)
    handle = submit_run(prepared, output_dir, say=say, tokenize=True)
    with Interruptions() as interruptions:
        backend.wait(handle, interruptions=interruptions, console=console)
    return handle.run_dir


def submit_run(
    prepared: Prepared, output_dir: Path | None, *, say: Say, tokenize: bool
) -> JobHandle:
    """Make a run directory, tokenise the data, and submit the run.

    Args:
        prepared: a plan that fits.
        output_dir: the directory to make; ``None`` leaves it to the recipe, or picks a name.
        say: shows a line of text.
        tokenize: whether to do it here, so that wrong data is found before the job waits; else
            the job does it before its ranks start.

    Raises:
        RejectedError: Slurm does not take the job; nothing is left behind.
        LauncherError: it cannot be prepared; nothing is left behind.
    """
    backend = slurm_backend(prepared.recipe)
    _check(prepared, backend, tokenize=tokenize)
    backend = backend.in_partition()
    run_dir, _, _ = create_run(prepared, output_dir, backend=backend)
    with _removed_if_not_submitted(run_dir, say):
        check_accepted(run_dir)
        say(f"run directory: {run_dir}")
        backend = _prepare_run(prepared, run_dir, backend, say=say, tokenize=tokenize)
        request = backend.render(prepared.plan, run_dir=run_dir, files=run_files(prepared))
        handle = backend.submit(request, run_dir=run_dir)
    minutes = backend.job(prepared.plan, run_dir).time_limit_minutes
    limit = "the partition's own time limit"
    if backend.settings.time is not None:
        limit = f"time limit {backend.settings.time}"
    elif minutes is not None:
        limit = f"time limit {minutes} minutes, from the predicted run time"
        if minutes == backend.partition_minutes:
            limit = f"time limit {minutes} minutes, all that the partition allows"
    say(f"submitted job {handle.job_id} ({limit})")
    num_jobs = backend.num_jobs(prepared.plan)
    if num_jobs > 1:
        say(
            f"the run is predicted to need {num_jobs} jobs of that length: each saves before its "
            "end, and the next one goes on"
        )
    return handle


def submit_array(
    prepared: Sequence[Prepared],
    output_dir: Path | None,
    *,
    say: Say,
    tokenize: bool,
    max_parallel: int | None,
) -> list[JobHandle]:
    """Submit several runs as one job array; each has its own run directory below one folder.

    Raises:
        RecipeError: the runs need different nodes, so they cannot be one array.
        LauncherError: as :func:`submit_run`.
    """
    backends = [slurm_backend(item.recipe) for item in prepared]
    _check_same_shape(prepared, backends)
    # One partition's limit holds for all: they have the same settings.
    minutes = backends[0].in_partition().partition_minutes
    backends = [replace(backend, partition_minutes=minutes) for backend in backends]
    for item, backend in zip(prepared, backends, strict=True):
        _check(item, backend, tokenize=tokenize)
    now = datetime.now(UTC).astimezone()
    folder = rd.create_folder(output_dir or DEFAULT_PARENT / f"sweep-{now:%Y%m%d-%H%M%S}")
    with _removed_if_not_submitted(folder, say):
        jobs, ready, run_dirs = [], [], []
        for index, (item, backend) in enumerate(zip(prepared, backends, strict=True)):
            name = rd.default_name(item.plan.workload.model.name, item.recipe.method.value, now)
            run_dir, _, _ = create_run(item, folder / f"{index:02d}-{name}", backend=backend)
            say(f"run directory {index}: {run_dir}")
            known = _prepare_run(item, run_dir, backend, say=say, tokenize=tokenize)
            write_files(known.render(item.plan, run_dir=run_dir, files=run_files(item)), run_dir)
            jobs.append(known.job(item.plan, run_dir))
            ready.append(known)
            run_dirs.append(run_dir)
        array = render_array(jobs, folder=PurePosixPath(folder), max_parallel=max_parallel)
        write_files(array, folder)
        job_id = slurm.submit(array.argv, env=array.env, cwd=folder)
        handles = [
            handle_of(f"{job_id}_{index}", run_id=known.run_id, run_dir=run_dir)
            for index, (known, run_dir) in enumerate(zip(ready, run_dirs, strict=True))
        ]
        keep_handles(handles, job_id=job_id, folder=folder)
    say(f"submitted job array {job_id}: {len(handles)} runs in {folder}")
    return handles


def _prepare_run(
    prepared: Prepared, run_dir: Path, backend: SlurmBackend, *, say: Say, tokenize: bool
) -> SlurmBackend:
    """Tokenise, and return the backend that knows how long the run will take."""
    if not tokenize or not prepared.recipe.data.has_training_data:
        return backend
    summary = prepare_run_data(with_absolute_paths(prepared.recipe), run_dir)
    for line in describe_data(summary):
        say(line)
    optim = prepared.recipe.optim
    epochs = summary.train.num_sequences / optim.global_batch_size * optim.num_train_epochs
    return backend.with_steps(optim.max_steps or math.ceil(epochs))


def _check(prepared: Prepared, backend: SlurmBackend, *, tokenize: bool) -> None:
    if not prepared.plan.fits:
        raise DoesNotFitError(
            "no strategy fits", where=prepared.recipe.model.name_or_path, fix="see `zerofit plan`"
        )
    backend.check_place(prepared.plan)
    check_data_paths(with_absolute_paths(prepared.recipe))
    if tokenize and prepared.recipe.data.has_training_data:
        check_train_extra()


def _check_same_shape(prepared: Sequence[Prepared], backends: Sequence[SlurmBackend]) -> None:
    """Raise RecipeError unless one request for nodes suits all: that is what an array is."""
    shapes = [
        (_shape(item), replace(backend.settings, job_name=None, time=None))
        for item, backend in zip(prepared, backends, strict=True)
    ]
    problems = [
        f"recipe {index + 1} needs {shape[0]}, the first one {shapes[0][0]}"
        if shape[0] != shapes[0][0]
        else f"recipe {index + 1} has other slurm settings than the first one"
        for index, shape in enumerate(shapes)
        if shape != shapes[0]
    ]
    if problems:
        raise RecipeError(
            list_problems(problems),
            where="job array",
            fix="submit them one by one, or give them equal cluster and slurm sections",
        )


def _shape(prepared: Prepared) -> str:
    cluster = prepared.plan.cluster
    return f"{cluster.num_nodes} nodes with {cluster.gpus_per_node} x {cluster.gpu.name}"


@contextmanager
def _removed_if_not_submitted(folder: Path, say: Say) -> Iterator[None]:
    try:
        yield
    except BaseException:
        remove_run(folder)
        say(f"removed {folder}: nothing has run in it")
        raise
