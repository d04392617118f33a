"""``zerofit data``: training data before any job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.commands.options import existing_or_new, json_option, recipe_args
from launcher.console import out, say

if TYPE_CHECKING:
    from rich.table import Table

    from launcher.prepare_data import PlanAtLength


@click.group()
def data() -> None:
    """Look at training data, and tokenise it outside the job."""


@data.command(name="prepare")
@recipe_args
@click.option("--png", type=existing_or_new, help="Draw the lengths into this file.")
@json_option
def prepare_command(*, args: tuple[str, ...], png: Path | None, as_json: bool) -> None:
    """Tokenise and pack a recipe's data into the cache; show its lengths and what they need.

    The job and `zerofit plan` find it there. Nothing is trained.
    """
    from launcher.data_view import describe_data, histogram_lines
    from launcher.prepare import prepare, read_recipe
    from launcher.prepare_data import plans_at_lengths, prepare_data

    recipe, source = read_recipe(args, {})
    prepare(recipe, source=source)  # what no plan can use is not tokenised first
    prepared = prepare_data(recipe, picture=png)
    plans = plans_at_lengths(recipe, prepared.summary, source=source)
    if as_json:
        from launcher.data_cache import summary_to_json

        print(
            json.dumps(
                {
                    "folder": str(prepared.folder),
                    "picture": str(prepared.picture),
                    **summary_to_json(prepared.summary),
                    "plans": [_plan_to_json(plan) for plan in plans],
                },
                indent=1,
            )
        )
        return
    for line in describe_data(prepared.summary):
        say(line)
    say("\nTokens of a record, before truncation")
    for line in histogram_lines(prepared.summary.train, max_seq_len=recipe.max_seq_len):
        say(line)
    say("\nWhat max_seq_len would need to keep a share of the records whole")
    out.print(_plans_table(plans))
    say(f"tokenised data: {prepared.folder}")
    say(f"picture: {prepared.picture}")


def _plans_table(plans: list[PlanAtLength]) -> Table:
    from rich.table import Table

    from launcher.planning.wording import label
    from launcher.units import format_gib, format_seconds

    table = Table.grid(padding=(0, 2, 0, 2))
    for justify in ("right", "right", "right", "right", "left"):
        table.add_column(justify=justify)
    table.add_row("share", "tokens", "memory", "step", "plan")
    for item in plans:
        cells = [f"{item.percentile} %", f"{item.tokens:,}"]
        if item.prepared is None:
            table.add_row(*cells, "", "", "longer than the model takes")
            continue
        plan = item.prepared.plan
        verdict = label(plan.strategy) if plan.fits else f"DOES NOT FIT: {label(plan.strategy)}"
        table.add_row(
            *cells,
            format_gib(plan.memory.device_used_bytes),
            format_seconds(plan.time.step_seconds),
            verdict,
        )
    return table


def _plan_to_json(item: PlanAtLength) -> dict[str, object]:
    found: dict[str, object] = {"percentile": item.percentile, "tokens": item.tokens}
    if item.prepared is None:
        return {**found, "fits": None}
    plan = item.prepared.plan
    return {
        **found,
        "fits": plan.fits,
        "device_used_bytes": plan.memory.device_used_bytes,
        "step_seconds": plan.time.step_seconds,
    }
