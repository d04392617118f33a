from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from data_inputs import data_summary, split_summary

from launcher.data_cache import (
    SUMMARY,
    cache_dir,
    find_prepared,
    load_summary,
    remember,
    summary_to_json,
)
from launcher.errors import DataError
from launcher.recipe import parse_recipe
from launcher.recipe_paths import check_data_paths, is_hub_id, with_absolute_paths
from launcher.recipe_sections import Recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    model = tmp_path / "model"
    model.mkdir()
    (model / "tokenizer.json").write_text("{}")
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    overrides = [f"model.name_or_path={model}", f"data.path={tmp_path / 'train.jsonl'}"]
    return parse_recipe("", source="test", overrides=overrides)


@pytest.fixture
def cache(tmp_path: Path, recipe: Recipe) -> Path:
    """A cache that holds the recipe's data."""
    folder = tmp_path / "cache"
    (folder / "k1").mkdir(parents=True)
    (folder / "k1" / SUMMARY).write_text(json.dumps(summary_to_json(data_summary())))
    remember(recipe, folder, "k1")
    return folder


def test_a_plan_finds_what_was_prepared(recipe: Recipe, cache: Path) -> None:
    assert find_prepared(recipe, cache) == (cache / "k1", data_summary())


@pytest.mark.parametrize("changed", ["data", "tokenizer", "length", "packing", "time"])
def test_what_has_changed_since_is_not_found(
    tmp_path: Path, recipe: Recipe, cache: Path, changed: str
) -> None:
    if changed == "data":
        (tmp_path / "train.jsonl").write_text('{"text": "ab"}\n')
    elif changed == "tokenizer":
        (tmp_path / "model" / "tokenizer.json").write_text("{ }")
    elif changed == "time":
        os.utime(tmp_path / "train.jsonl", (1, 1))
    elif changed == "length":
        recipe = replace(recipe, max_seq_len=77)
    else:
        recipe = replace(recipe, data=replace(recipe.data, packing=True))
    assert find_prepared(recipe, cache) is None


def test_a_file_more_in_a_folder_is_a_change(tmp_path: Path, recipe: Recipe, cache: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "a"}\n')
    recipe = replace(recipe, data=replace(recipe.data, path=str(folder)))
    remember(recipe, cache, "k1")
    assert find_prepared(recipe, cache) is not None
    (folder / "b.jsonl").write_text('{"text": "b"}\n')
    assert find_prepared(recipe, cache) is None


@pytest.mark.parametrize("damage", ["gone", "half", "other version"])
def test_a_damaged_entry_is_as_if_there_were_none(recipe: Recipe, cache: Path, damage: str) -> None:
    path = cache / "k1" / SUMMARY
    if damage == "gone":
        path.unlink()
    else:
        path.write_text(path.read_text()[:50] if damage == "half" else '{"format": "text"}')
    assert find_prepared(recipe, cache) is None


def test_a_summary_of_another_version_is_an_error_for_the_ranks(cache: Path) -> None:
    (cache / "k1" / SUMMARY).write_text('{"format": "text"}')
    with pytest.raises(DataError, match="another version of zerofit"):
        load_summary(cache / "k1")


def test_half_a_summary_is_an_error_for_the_ranks_and_no_traceback(cache: Path) -> None:
    (cache / "k1" / SUMMARY).write_text('{"format": ')
    with pytest.raises(DataError, match="cannot be read: ") as caught:
        load_summary(cache / "k1")
    assert "tokenise the data anew" in caught.value.fix


def test_a_summary_survives_json() -> None:
    whole = data_summary(eval=split_summary(path="eval.jsonl"), notes=("a", "b"))
    assert summary_to_json(whole)["eval"]["path"] == "eval.jsonl"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"ZEROFIT_CACHE": "/big"}, "/big/data"),
        ({"XDG_CACHE_HOME": "/home/x/c"}, "/home/x/c/zerofit/data"),
        ({}, str(Path("~/.cache/zerofit/data").expanduser())),
    ],
)
def test_the_cache_is_where_the_environment_says(
    environment: dict[str, str], expected: str
) -> None:
    assert str(cache_dir(environment)) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("HuggingFaceH4/ultrachat_200k", True),
        ("data/train.jsonl", False),
        ("./owner/name", False),
        ("/owner/name", False),
        ("owner/name/more", False),
        ("name", False),
        ("data/train.jsonl.gz", False),
    ],
)
def test_only_an_owner_and_a_name_are_a_hub_id(path: str, expected: bool) -> None:
    assert is_hub_id(path) is expected


def test_what_is_there_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert not is_hub_id("owner/name")


def test_every_path_of_a_recipe_becomes_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.jinja").write_text("x")
    text = (
        "model: {name_or_path: llama2-7b}\n"
        "data: {sources: [{path: a.jsonl}, {path: owner/name}], eval_path: b.csv, "
        "chat_template: t.jinja}\n"
        "strategy: {nvme_path: drive}\n"
    )
    whole = with_absolute_paths(parse_recipe(text, source="test"))
    assert whole.strategy.nvme_path == str(tmp_path / "drive")
    data = whole.data
    assert [source.path for source in data.sources] == [str(tmp_path / "a.jsonl"), "owner/name"]
    assert data.eval_path == str(tmp_path / "b.csv")
    assert data.chat_template == str(tmp_path / "t.jinja")


def test_a_missing_source_is_named_by_its_key(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    text = (
        "model: {name_or_path: x}\n"
        f"data: {{sources: [{{path: {tmp_path}/a.jsonl}}, {{path: {tmp_path}/b.jsonl}}]}}\n"
    )
    with pytest.raises(DataError, match=r"correct data\.sources\[1\]\.path"):
        check_data_paths(parse_recipe(text, source="test"))
