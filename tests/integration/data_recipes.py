"""Recipes of a line or two for tests of the data step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launcher.data_cache import TRAIN, DataSummary, load_summary
from launcher.recipe import parse_recipe
from launcher.recipe_sections import Recipe
from launcher.worker.chat_templates import load_tokenizer
from launcher.worker.data import prepare_data
from launcher.worker.data_writer import read_rows


def recipe_of(model: Path, data: str, **changes: Any) -> Recipe:
    overrides = [f"{key}={value}" for key, value in changes.items()]
    text = f"model: {{name_or_path: {model}}}\ndata: {data}\n"
    return parse_recipe(text, source="test", overrides=overrides)


def tokens_of(recipe: Recipe, cache: Path) -> tuple[list[str], DataSummary]:
    """Return the training rows as text, and the summary."""
    tokenizer = load_tokenizer(recipe)
    folder = prepare_data(recipe, tokenizer, cache)
    rows = read_rows(folder / TRAIN)
    return [tokenizer.decode(row["input_ids"]) for row in rows], load_summary(folder)


def lines(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def texts(path: Path, *values: str) -> Path:
    return lines(path, [{"text": value} for value in values])
