"""From a command's arguments to a plan, and a plan on the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, NoReturn

from launcher.console import out, say
from launcher.errors import DoesNotFitError

if TYPE_CHECKING:
    from pathlib import Path

    from launcher.dispatch.base import Backend
    from launcher.planning.plan import Plan
    from launcher.prepare import Prepared


def prepare_from(args: Sequence[str], options: Mapping[str, str | None] | None = None) -> Prepared:
    """Read the recipe that arguments and flags describe, and plan it."""
    from launcher.prepare import prepare, read_recipe

    recipe, source = read_recipe(args, options or {})
    return prepare(recipe, source=source)


def fitting(
    args: Sequence[str], options: Mapping[str, str | None], *, as_json: bool = False
) -> Prepared:
    """Return what is prepared; when it does not fit, show the plan and leave."""
    prepared = prepare_from(args, options)
    if not prepared.plan.fits:
        show_prepared(prepared, as_json=as_json)
        leave_unfit()
    return prepared


def leave_unfit() -> NoReturn:
    """Leave with the exit status of what does not fit; the plan has been shown."""
    raise SystemExit(DoesNotFitError.exit_code)


def show_prepared(prepared: Prepared, *, as_json: bool, show_all: bool = False) -> None:
    """Print a plan, and what its data means for it where that is known."""
    if prepared.data is None:
        show_plan(prepared.plan, as_json=as_json, show_all=show_all)
        return
    from launcher.epoch import describe_training, training_of
    from launcher.planning.plan import plan_to_json

    recipe = prepared.recipe
    training = training_of(prepared.data, prepared.plan, recipe.optim)
    if as_json:
        print(json.dumps({**plan_to_json(prepared.plan), "training": asdict(training)}, indent=1))
        return
    show_plan(prepared.plan, as_json=False, show_all=show_all)
    say("")
    for line in describe_training(training, max_seq_len=recipe.max_seq_len):
        say(line)


def show_plan(plan: Plan, *, as_json: bool, show_all: bool = False) -> None:
    """Print a plan."""
    from launcher.planning.plan import plan_to_json
    from launcher.planning.view import render_plan

    if as_json:
        print(json.dumps(plan_to_json(plan), indent=1))
    else:
        out.print(render_plan(plan, show_all=show_all))


def show_dry_run(
    prepared: Prepared,
    output_dir: Path | None,
    *,
    as_json: bool,
    backend: Backend | None = None,
) -> None:
    """Print what would be written and run."""
    from launcher.launch import describe_job, dry_run, job_to_json

    run_dir, request = dry_run(prepared, output_dir, backend=backend)
    if as_json:
        print(json.dumps(job_to_json(run_dir, request), indent=1))
    else:
        say(describe_job(run_dir, request))
