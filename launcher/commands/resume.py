"""``zerofit resume``: go on with a run that stopped."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import click

from launcher.commands.options import run_arg
from launcher.commands.planned import leave_unfit, show_plan
from launcher.console import say, say_aside


@click.command()
@run_arg
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]…")
@click.option("--dry-run", is_flag=True, help="Show the plan it would go on with; start nothing.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print JSON at the end; what the job prints goes to stderr.",
)
def resume(*, run: Path, overrides: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Go on with a run from its newest complete checkpoint.

    The number of GPUs and the ZeRO stage may be others than before, for example
    cluster.gpus_per_node=1 or strategy.zero_stage=3: the checkpoint is converted. Global batch
    size, order of the data and schedule stay.
    """
    from launcher.recovery.supervise import resume_to_end
    from launcher.resume import prepare_resume

    prepared = prepare_resume(run, overrides)
    if dry_run or not prepared.plan.fits:
        show_plan(prepared.plan, as_json=as_json)
        if not prepared.plan.fits:
            leave_unfit()
        return
    show, stream = (say_aside, sys.stderr) if as_json else (say, sys.stdout)
    run_dir = resume_to_end(run, prepared, say=show, console=stream.buffer)
    if as_json:
        print(json.dumps({"run_dir": str(run_dir), "state": "finished"}))
    else:
        say(f"finished; next: zerofit report {shlex.quote(str(run_dir))}")
