"""``zerofit submit``: runs as Slurm jobs."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.commands.options import output_dir_option, recipe_args, recipe_flags
from launcher.commands.planned import fitting, show_dry_run
from launcher.console import say, say_aside
from launcher.errors import RecipeError

if TYPE_CHECKING:
    from launcher.prepare import Prepared


@click.command()
@recipe_args
@recipe_flags
@output_dir_option
@click.option("--array", is_flag=True, help="Submit several recipes as one job array.")
@click.option(
    "--max-parallel", type=click.IntRange(min=1), help="Runs of an array at the same time."
)
@click.option(
    "--tokenize-in-job",
    is_flag=True,
    help="Leave tokenising to the job, where this machine must not compute.",
)
@click.option("--dry-run", is_flag=True, help="Print what would run; write and submit nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON at the end.")
def submit(
    *,
    args: tuple[str, ...],
    options: dict[str, str | None],
    output_dir: Path | None,
    array: bool,
    max_parallel: int | None,
    tokenize_in_job: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write the run directory and submit the run to Slurm; return at once.

    What the job asks for comes from the recipe's `slurm` section and ~/.config/zerofit/site.yaml.
    With --array: several recipes, and overrides that hold for all of them. Exit status 3 when no
    strategy fits, 4 when Slurm does not take the job.
    """
    show = say_aside if as_json else say
    if max_parallel is not None and not array:
        raise click.UsageError("--max-parallel belongs to --array")
    if array and dry_run:
        raise click.UsageError("--dry-run shows one run: leave --array out")
    if array:
        prepared = _prepare_each(args, options, as_json=as_json)
        from launcher.submit import submit_array

        handles = submit_array(
            prepared,
            output_dir,
            say=show,
            tokenize=not tokenize_in_job,
            max_parallel=max_parallel,
        )
    else:
        made = fitting(args, options, as_json=as_json)
        _note_hardware(made)
        if dry_run:
            from launcher.backends import slurm_backend

            show_dry_run(made, output_dir, backend=slurm_backend(made.recipe), as_json=as_json)
            return
        from launcher.submit import submit_run

        handles = [submit_run(made, output_dir, say=show, tokenize=not tokenize_in_job)]
    if as_json:
        runs = [{"job_id": item.job_id, "run_dir": str(item.run_dir)} for item in handles]
        print(json.dumps(runs if array else runs[0]))
    elif not array:
        say(f"next: zerofit logs -f {shlex.quote(str(handles[0].run_dir))}")


def _prepare_each(
    args: tuple[str, ...], options: dict[str, str | None], *, as_json: bool
) -> list[Prepared]:
    from launcher.prepare import why_no_recipe

    recipes = [arg for arg in args if "=" not in arg or why_no_recipe(arg) is None]
    overrides = [arg for arg in args if arg not in recipes]
    if not recipes:
        raise RecipeError(
            "no recipe is named", where="command line", fix="zerofit submit --array a.yaml b.yaml"
        )
    return [fitting((recipe, *overrides), options, as_json=as_json) for recipe in recipes]


def _note_hardware(prepared: Prepared) -> None:
    """Say which hardware was assumed, where only this machine could be looked at."""
    if prepared.recipe.cluster.gpu is None:
        cluster = prepared.plan.cluster
        say_aside(
            f"cluster.gpu is not set: planned for nodes like this machine, with "
            f"{cluster.gpus_per_node} x {cluster.gpu.name}"
        )
