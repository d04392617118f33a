"""``zerofit export``: the trained weights, verified."""

from __future__ import annotations

import json
from pathlib import Path

import click

from launcher.commands.options import existing_or_new, json_option, run_arg
from launcher.console import say


@click.command()
@run_arg
@click.option("--output", "-o", type=existing_or_new, help="New folder.")
@click.option(
    "--kind",
    type=click.Choice(["adapter", "merged", "full"]),
    help="The adapter, the base model with it merged in, or the model that was trained as a "
    "whole. Left out: the adapter, or the whole model where there is none.",
)
@json_option
def export(*, run: Path, output: Path | None, kind: str | None, as_json: bool) -> None:
    """Write the trained weights as a Hugging Face folder, and verify them.

    Checked: every tensor is there, none is empty or NaN, the folder loads again, and the logits
    on a prompt equal the trained model's. With --kind merged there is also a folder "merged"
    below it, with the whole model.
    """
    export_run(run, output=output, kind=kind, as_json=as_json)


def export_run(run: Path, *, output: Path | None, kind: str | None, as_json: bool) -> None:
    """Export a run's weights and print what was verified."""
    from launcher.dispatch.worker_command import check_train_extra, run_worker
    from launcher.recipe import parse_recipe
    from launcher.run_dir import EXPORT, RECIPE, check_is_run, read_text

    check_is_run(run)
    check_train_extra()
    if kind is None:
        method = parse_recipe(read_text(run / RECIPE), source=str(run / RECIPE)).method
        kind = "full" if method == "full" else "adapter"
    target = output or run / EXPORT / kind
    flags = ["--run-dir", str(run), "--out", str(target), "--kind", kind]
    result = run_worker("launcher.worker.export", flags)
    if as_json:
        print(json.dumps(result, indent=1))
        return
    say(f"exported and verified: {result['out']}")
    for check in result["checks"]:
        say(f"  {check['name']}: {check['result']}")
