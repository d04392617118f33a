"""From a command line to a matrix: models and lengths brought together with a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher.errors import RecipeError, RunDirError
from launcher.model_source import resolve_model
from launcher.model_spec import ModelSpec
from launcher.planning.matrix import STUDY_CONTEXTS, STUDY_MODELS, Matrix, make_matrix
from launcher.planning.planner import Choice, choose_strategy
from launcher.prepare import packages, read_recipe, resolve_cluster, why_no_recipe
from launcher.recipe_sections import Recipe
from launcher.resolve import resolve_workload


def read_matrix_recipe(
    args: Sequence[str], options: dict[str, str | None], *, models: str | None
) -> tuple[Recipe, str, tuple[str, ...]]:
    """Return the recipe, what to call its source, and the names of the matrix's models.

    Without ``models`` the matrix is about the recipe's model, or the study's four when it
    names none.

    Args:
        args: as :func:`launcher.prepare.read_recipe` takes them.
        options: likewise.
        models: names separated by commas.
    """
    names = _split(models)
    has_model = options.get("model.name_or_path") is not None or any(
        why_no_recipe(arg) is None or arg.startswith("model.name_or_path=") for arg in args
    )
    if not names and not has_model:
        names = STUDY_MODELS
    if names and not has_model:
        options = {**options, "model.name_or_path": names[0]}
    # The lengths are the matrix's own: one of the recipe's would only be checked in vain.
    recipe, source = read_recipe(args, options)
    return recipe, source, names or (recipe.model.name_or_path,)


def prepare_matrix(
    recipe: Recipe, *, source: str, models: Sequence[str], contexts: str | None
) -> Matrix:
    """Plan every model at every length, with everything else as the recipe says.

    Args:
        recipe: method, batch, cluster and fixed strategy fields.
        source: what to call the recipe in errors.
        models: one row each.
        contexts: tokens, separated by commas; the study's five by default.

    Raises:
        LauncherError: a model, the cluster or a value cannot be used.
    """
    specs = [resolve_model(name, revision=recipe.model.revision)[0] for name in models]
    stretched = recipe.model.max_position_embeddings
    if stretched is not None:
        specs = [replace(spec, max_position_embeddings=stretched) for spec in specs]
    cluster = resolve_cluster(recipe.cluster)

    def choose(model: ModelSpec, tokens: int) -> Choice:
        cell = replace(recipe, max_seq_len=tokens)
        return choose_strategy(
            resolve_workload(cell, model, cluster.gpu, source=source),
            cluster,
            fixed=recipe.strategy,
            raw_deepspeed=recipe.deepspeed,
            packages=packages(recipe),
        )

    lengths = STUDY_CONTEXTS if contexts is None else _lengths(contexts)
    return make_matrix(specs, lengths, method=recipe.method, cluster=cluster, choose=choose)


def write_output(path: Path, content: bytes) -> None:
    """Write a file that the user named; an older one is replaced.

    Raises:
        RunDirError: it cannot be written.
    """
    try:
        path.write_bytes(content)
    except OSError as error:
        raise RunDirError(
            f"cannot be written: {error.strerror}", where=str(path), fix="name another file"
        ) from None


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def _lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part.replace("_", "")) for part in _split(text))
    except ValueError:
        raise RecipeError(
            f"{text!r} are not whole numbers",
            where="--contexts",
            fix="separate tokens by commas, for example --contexts 1024,4096",
        ) from None
