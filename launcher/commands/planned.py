"""From a command's arguments to a plan, and a plan on the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

from launcher.console import out
from launcher.errors import DoesNotFitError

if TYPE_CHECKING:
    from launcher.planning.plan import Plan
    from launcher.prepare import Prepared


def prepare_from(args: Sequence[str], options: Mapping[str, str | None] | None = None) -> Prepared:
    """Read the recipe that arguments and flags describe, and plan it."""
    from launcher.prepare import prepare, read_recipe

    recipe, source = read_recipe(args, options or {})
    return prepare(recipe, source=source)


def fitting(args: Sequence[str], *, as_json: bool = False) -> Prepared:
    """Return what is prepared; when it does not fit, show the plan and leave."""
    prepared = prepare_from(args)
    if not prepared.plan.fits:
        show_plan(prepared.plan, as_json=as_json)
        leave_unfit()
    return prepared


def leave_unfit() -> NoReturn:
    """Leave with the exit status of what does not fit; the plan has been shown."""
    raise SystemExit(DoesNotFitError.exit_code)


def show_plan(plan: Plan, *, as_json: bool, show_all: bool = False) -> None:
    """Print a plan."""
    from launcher.planning.plan import plan_to_json
    from launcher.planning.view import render_plan

    if as_json:
        print(json.dumps(plan_to_json(plan), indent=1))
    else:
        out.print(render_plan(plan, show_all=show_all))
