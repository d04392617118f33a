"""Start a run directory again: go on with the run in it, or say that it has finished."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher import run_dir as rd
from launcher.errors import RunDirError, list_problems
from launcher.prepare import Prepared
from launcher.recipe import parse_recipe
from launcher.recipe_paths import with_absolute_paths
from launcher.resume import CHANGEABLE


def find_earlier_run(prepared: Prepared, output_dir: Path | None) -> Path | None:
    """Return the directory that a command names if there is a run of this recipe in it.

    Args:
        prepared: what the command would start.
        output_dir: what it names; ``None`` leaves it to the recipe.

    Raises:
        RunDirError: the run there is another training.
    """
    target = output_dir or (
        Path(prepared.recipe.output_dir) if prepared.recipe.output_dir else None
    )
    if target is None or not (target / rd.STATUS).is_file() or not (target / rd.RECIPE).is_file():
        return None
    path = target / rd.RECIPE
    there = _keys(asdict(parse_recipe(rd.read_text(path), source=str(path))))
    here = _keys(asdict(with_absolute_paths(prepared.recipe)))
    differing = [
        f"{key} is {there[key]!r} there and {here[key]!r} here"
        for key in sorted(here)
        if here[key] != there[key] and not key.startswith(("output_dir", *CHANGEABLE))
    ]
    if differing:
        raise RunDirError(
            f"the run there is another training: {list_problems(differing)}",
            where=str(target),
            fix="choose another folder; a run never overwrites an earlier one",
        )
    return target.absolute()


def has_finished(run_dir: Path) -> bool:
    """Return whether there is nothing left to do.

    Raises:
        RunDirError: the state cannot be read.
    """
    return rd.read_status(run_dir).state == "finished"


def _keys(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            found |= _keys(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
