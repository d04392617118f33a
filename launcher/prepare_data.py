"""``zerofit data prepare``: tokenise outside the job, and plan for the lengths that were found."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.data_cache import DataSummary, summary_from_json
from launcher.data_view import draw_lengths
from launcher.dispatch.worker_command import run_worker
from launcher.errors import RecipeError
from launcher.prepare import Prepared, prepare
from launcher.recipe import render_recipe
from launcher.recipe_paths import check_data_paths, with_absolute_paths
from launcher.recipe_sections import Recipe
from launcher.run_dir import RECIPE

PICTURE = "lengths.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedData:
    """Tokenised data in the cache."""

    folder: Path
    summary: DataSummary
    picture: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanAtLength:
    """What a run needs whose longest sequence is that of a percentile of the records."""

    percentile: int
    tokens: int
    prepared: Prepared | None
    """``None``: the model takes no such length."""


def prepare_data(recipe: Recipe, *, picture: Path | None) -> PreparedData:
    """Tokenise a recipe's data into the cache, unless it is there, and draw its lengths.

    Args:
        recipe: names the data.
        picture: where the histogram goes; ``None`` puts it beside the tokenised data.

    Raises:
        LauncherError: the data, the tokenizer or the machine cannot be used.
    """
    if not recipe.data.has_training_data:
        raise RecipeError(
            "no training data is named",
            where="data.path",
            fix="set data.path to a file, a folder or a hub id",
        )
    whole = with_absolute_paths(recipe)
    check_data_paths(whole)
    with tempfile.TemporaryDirectory(prefix="zerofit-") as folder:
        path = Path(folder) / RECIPE
        path.write_text(render_recipe(whole), encoding="utf-8")
        printed = run_worker("launcher.worker.data", ["--recipe", str(path)])
    summary, entry = summary_from_json(printed), Path(printed["folder"])
    target = picture or entry / PICTURE
    image = draw_lengths(summary.train, max_seq_len=summary.max_seq_len)
    try:
        target.write_bytes(image)
    except OSError as error:
        raise RecipeError(
            f"the picture cannot be written: {error.strerror}",
            where=str(target),
            fix="choose another file with --png",
        ) from None
    return PreparedData(folder=entry, summary=summary, picture=target)


def plans_at_lengths(recipe: Recipe, summary: DataSummary, *, source: str) -> list[PlanAtLength]:
    """Plan the recipe at the percentiles of the records' lengths before truncation.

    Raises:
        LauncherError: the recipe cannot be planned at any length.
    """
    plans = []
    for percentile, tokens in summary.train.whole_length_percentiles.items():
        try:
            prepared = prepare(replace(recipe, max_seq_len=max(1, tokens)), source=source)
        except RecipeError:
            if tokens <= recipe.max_seq_len:
                raise
            prepared = None  # beyond the model's limit, or what resolve_workload says of it
        plans.append(PlanAtLength(percentile=int(percentile), tokens=tokens, prepared=prepared))
    return plans
