"""``zerofit trace``: the real engine as one rank of the job."""

from __future__ import annotations

import json

import click

from launcher.commands.options import json_option, recipe_args, recipe_flags
from launcher.commands.planned import prepare_from
from launcher.console import out


@click.command()
@recipe_args
@recipe_flags
@click.option(
    "--rank",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Which rank of the planned job.",
)
@click.option(
    "--scale",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Divide the model's widths by this; bytes are scaled back.",
)
@json_option
def trace(
    *,
    args: tuple[str, ...],
    options: dict[str, str | None],
    rank: int,
    scale: int,
    as_json: bool,
) -> None:
    """Run the real DeepSpeed engine as one rank of the job, on this processor, and count bytes.

    No GPU is needed. It shows how far the closed form of `plan` is from the engine itself.
    """
    from launcher.engine_trace import render_comparison, trace_engine_of

    comparison = trace_engine_of(prepare_from(args, options), rank=rank, scale=scale)
    if as_json:
        print(json.dumps(comparison.to_json(), indent=1))
    else:
        out.print(render_comparison(comparison))
