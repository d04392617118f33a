"""A recipe whose paths hold on every node and from every folder."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from launcher.errors import DataError, RecipeError
from launcher.model_source import weights_source
from launcher.recipe_sections import Recipe

DEFAULT_PARENT = Path("runs")
"""Of run directories, where nothing names another one."""
# As huggingface_hub checks repository ids (utils/_validators.py), but with an owner.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*[A-Za-z0-9]", re.ASCII)
DATA_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
# Endings that say a missing "data/train.jsonl" was meant as a file.
_FILE_ENDINGS = (*DATA_ENDINGS, ".txt", ".gz", ".zst")


def is_hub_id(path: str) -> bool:
    """Return whether a data path can name a hub data set (``owner/name``) and no file here."""
    return (
        _HUB_ID.fullmatch(path) is not None
        and not path.lower().endswith(_FILE_ENDINGS)
        and not Path(path).exists()
    )


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """Return the recipe with catalogue names and relative paths resolved from here."""
    source = weights_source(recipe.model.name_or_path)
    folder = Path(source).expanduser()
    if folder.is_dir():
        source = str(folder.resolve())
    data = recipe.data
    template = data.chat_template
    if template is not None and Path(template).expanduser().is_file():
        template = _absolute(template)
    data = replace(
        data,
        path=data.path and _absolute(data.path),
        eval_path=data.eval_path and _absolute(data.eval_path),
        sources=tuple(replace(item, path=_absolute(item.path)) for item in data.sources),
        chat_template=template,
    )
    measured, hostfile = recipe.cluster.measured, recipe.cluster.hostfile
    cluster = replace(
        recipe.cluster,
        measured=measured and str(Path(measured).resolve()),
        hostfile=hostfile and str(Path(hostfile).resolve()),
    )
    nvme_path = recipe.strategy.nvme_path
    return replace(
        recipe,
        model=replace(recipe.model, name_or_path=source),
        data=data,
        cluster=cluster,
        strategy=replace(recipe.strategy, nvme_path=nvme_path and _file(nvme_path)),
    )


def check_names_data(recipe: Recipe) -> None:
    """Raise RecipeError when there is nothing to train on."""
    if not recipe.data.has_training_data and not recipe.model.random_weights:
        raise RecipeError(
            "no training data is named",
            where="data.path",
            fix="set data.path to a file, a folder or a hub id (or model.random_weights for a "
            "benchmark)",
        )


def check_data_paths(recipe: Recipe) -> None:
    """Look whether the data that a recipe names is there, as far as that shows without reading.

    Raises:
        DataError: a file or folder does not exist.
    """
    data = recipe.data
    named = {"data.path": data.path, "data.eval_path": data.eval_path}
    named |= {f"data.sources[{i}].path": item.path for i, item in enumerate(data.sources)}
    for key, path in named.items():
        if path is None or is_hub_id(path):
            continue
        place = Path(path).expanduser()
        if not place.exists():
            problem = "there is no such data file"
        elif place.is_dir() and not any(
            file.suffix.lower() in DATA_ENDINGS for file in place.rglob("*")
        ):
            problem = f"no file in this folder ends in {', '.join(DATA_ENDINGS)}"
        else:
            continue
        fix = f"correct {key}; a relative path starts where zerofit was started"
        raise DataError(problem, where=path, fix=fix)


def _absolute(path: str) -> str:
    return path if is_hub_id(path) else _file(path)


def _file(path: str) -> str:
    return str(Path(path).expanduser().resolve())
