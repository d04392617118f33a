"""``zerofit plan`` and ``zerofit init``: before anything runs."""

from __future__ import annotations

import gc
import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from launcher.commands.options import (
    existing_or_new,
    flags_of,
    json_option,
    recipe_args,
    recipe_flags,
)
from launcher.commands.planned import leave_unfit, prepare_from, show_prepared
from launcher.console import out, say


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Look for no garbage: that took a seventh of a plan, which ends before there is any."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@click.command()
@recipe_args
@recipe_flags
@json_option
@click.option("--all", "show_all", is_flag=True, help="Show every rejected kind.")
@click.option("--matrix", is_flag=True, help="Plan every model at every length instead.")
@click.option("--models", help="Of the matrix, separated by commas.")
@click.option("--contexts", metavar="TOKENS,…", help="Of the matrix, separated by commas.")
@click.option("--csv", type=existing_or_new, help="Write the matrix to this file.")
@click.option("--png", type=existing_or_new, help="Draw the matrix into this file.")
@_without_garbage_collection()
def plan(
    *,
    args: tuple[str, ...],
    options: dict[str, str | None],
    as_json: bool,
    show_all: bool,
    matrix: bool,
    models: str | None,
    contexts: str | None,
    csv: Path | None,
    png: Path | None,
) -> None:
    """Predict memory and time, choose the strategy, and say why.

    Nothing is started. Exit status 3 when no strategy fits. With --matrix: the best strategy
    for each model and each length, as a table, JSON, CSV or a picture.
    """
    if matrix or models or contexts or csv or png:
        if show_all:
            raise click.UsageError("--all is of one plan; a matrix keeps no rejected kinds")
        _plan_matrix(
            args, options, models=models, contexts=contexts, csv=csv, png=png, as_json=as_json
        )
        return
    prepared = prepare_from(args, options)
    show_prepared(prepared, as_json=as_json, show_all=show_all)
    if not prepared.plan.fits:
        leave_unfit()
    if not as_json:
        missing = () if prepared.recipe.data.has_training_data else ("--data", "FILE")
        words = ("zerofit", "train", *args, *flags_of(options), *missing)
        say(f"\nNext: {shlex.join(words)}")


def _plan_matrix(
    args: tuple[str, ...],
    options: dict[str, str | None],
    *,
    models: str | None,
    contexts: str | None,
    csv: Path | None,
    png: Path | None,
    as_json: bool,
) -> None:
    from launcher.planning.matrix import matrix_to_csv, matrix_to_json
    from launcher.prepare_matrix import prepare_matrix, read_matrix_recipe, write_output

    recipe, source, names = read_matrix_recipe(args, options, models=models)
    made = prepare_matrix(recipe, source=source, models=names, contexts=contexts)
    if as_json:
        print(json.dumps(matrix_to_json(made), indent=1))
    else:
        from launcher.planning.matrix_view import render_matrix

        out.print(render_matrix(made))
    # Shown before it is written: a file that cannot be written costs no matrix.
    if csv is not None:
        write_output(csv, matrix_to_csv(made).encode())
    if png is not None:
        from launcher.planning.matrix_view import draw_matrix

        write_output(png, draw_matrix(made))


@click.command()
@click.argument("path", type=existing_or_new, default=Path("recipe.yaml"))
@recipe_flags
def init(*, path: Path, options: dict[str, str | None]) -> None:
    """Write a recipe for a model, a length and hardware; edit it, then plan or train it."""
    from launcher.init_recipe import new_recipe_text
    from launcher.recipe_paths import check_data_paths
    from launcher.run_dir import create_file

    prepared = prepare_from((), options)
    check_data_paths(prepared.recipe)
    create_file(path, new_recipe_text(prepared.recipe, prepared.plan))
    say(f"wrote {path}; next: {shlex.join(('zerofit', 'plan', str(path)))}")
