"""``zerofit render``, ``zerofit train`` and ``zerofit demo``: from a plan to a run."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import click

from launcher.commands.export import export_run
from launcher.commands.options import json_option, output_dir_option, recipe_args, recipe_flags
from launcher.commands.planned import (
    fitting,
    leave_unfit,
    prepare_from,
    show_dry_run,
    show_plan,
)
from launcher.commands.report import show_report
from launcher.console import say, say_aside


@click.command()
@recipe_args
@recipe_flags
@output_dir_option
@json_option
def render(
    *,
    args: tuple[str, ...],
    options: dict[str, str | None],
    output_dir: Path | None,
    as_json: bool,
) -> None:
    """Write a run's files (DeepSpeed config, job script, plan) and start nothing.

    `bash RUN/job.sh`, or `sbatch RUN/job.sbatch`, then tokenises the data and trains.
    """
    from launcher.launch import create_run

    prepared = fitting(args, options, as_json=as_json)
    run_dir, _, request = create_run(prepared, output_dir)
    script = run_dir / request.argv[-1]
    if as_json:
        print(json.dumps({"run_dir": str(run_dir), "job_script": str(script)}))
    else:
        say(f"wrote {run_dir}; start it with: {shlex.join((request.argv[0], str(script)))}")


@click.command()
@recipe_args
@recipe_flags
@output_dir_option
@click.option("--dry-run", is_flag=True, help="Print what would run; write and start nothing.")
@click.option(
    "--anyway",
    is_flag=True,
    help="Start although it is predicted not to fit; what runs out of memory is recovered from.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print JSON at the end; what the job prints goes to stderr.",
)
def train(
    *,
    args: tuple[str, ...],
    options: dict[str, str | None],
    output_dir: Path | None,
    dry_run: bool,
    anyway: bool,
    as_json: bool,
) -> None:
    """Plan, write the run directory, and train: here, on a hostfile's hosts, or through Slurm.

    Ctrl-C ends all ranks; SIGTERM, SIGUSR1 or a file RUN/stop let them save a checkpoint first. A
    job of its own in Slurm goes on, unless Ctrl-C comes twice. Exit status 3 when no strategy
    fits, 4 when the job failed.
    """
    if dry_run:
        made = fitting(args, options, as_json=as_json)
        show_dry_run(made, output_dir, as_json=as_json)
        return
    run_dir = _train(args, output_dir, options, anyway=anyway, as_json=as_json)
    if as_json:
        print(json.dumps({"run_dir": str(run_dir), "state": "finished"}))
    else:
        say(f"finished; next: zerofit report {shlex.quote(str(run_dir))}")


@click.command()
@output_dir_option
def demo(*, output_dir: Path | None) -> None:
    """Fine-tune a real model (SmolLM2-135M) on real text, on this machine, in minutes."""
    from launcher.demo import write_demo_recipe
    from launcher.prepare import resolve_cluster
    from launcher.recipe_sections import ClusterSection

    world_size = resolve_cluster(ClusterSection()).world_size
    recipe = str(write_demo_recipe(world_size=world_size, say=say))
    say(f"\n$ zerofit plan {shlex.quote(recipe)}")
    prepared = prepare_from((recipe,))
    show_plan(prepared.plan, as_json=False)
    if not prepared.plan.fits:
        leave_unfit()
    say(f"\n$ zerofit train {shlex.quote(recipe)}")
    run = _train((recipe,), output_dir, {})
    say(f"\n$ zerofit report {shlex.quote(str(run))}")
    show_report(run, as_json=False)
    say(f"\n$ zerofit export {shlex.quote(str(run))}")
    export_run(run, output=None, kind="adapter", as_json=False)


def _train(
    args: tuple[str, ...],
    output_dir: Path | None,
    options: dict[str, str | None],
    *,
    anyway: bool = False,
    as_json: bool = False,
) -> Path:
    from launcher.again import find_earlier_run, has_finished
    from launcher.recovery.supervise import resume_to_end, train_to_end
    from launcher.resume import prepare_resume
    from launcher.submit import goes_to_slurm, train_on_slurm

    # With --json, stdout is for the result alone.
    show, stream = (say_aside, sys.stderr) if as_json else (say, sys.stdout)
    prepared = prepare_from(args, options) if anyway else fitting(args, options, as_json=as_json)
    earlier = find_earlier_run(prepared, output_dir)
    if earlier is not None:
        if has_finished(earlier):
            show(f"{earlier}: this run has finished already")
            return earlier
        show(f"{earlier}: going on with the run that is there")
        return resume_to_end(earlier, prepare_resume(earlier, ()), say=show, console=stream.buffer)
    if not prepared.plan.fits:
        from launcher.planning.wording import label

        show(f"started although it is predicted not to fit: {label(prepared.plan.strategy)}")
    if goes_to_slurm(prepared.recipe):
        return train_on_slurm(prepared, output_dir, say=show, console=stream.buffer)
    return train_to_end(prepared, output_dir, say=show, console=stream.buffer)
