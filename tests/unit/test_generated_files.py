"""recipes/ and ds_configs/ are what their generators write today.

After a change of the planner or the prediction, write them anew and look at the difference:

    python benchmarks/make_recipes.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
import yaml
from generators import ROOT, script

from launcher.ds_keys import TOP_LEVEL_KEYS, ZERO_KEYS
from launcher.recipe import parse_recipe


@pytest.fixture(scope="module")
def files() -> Mapping[str, str]:
    found = script("make_recipes").generated_files()
    assert isinstance(found, dict)
    return found


def test_nothing_is_missing_and_nothing_is_left_over(files: Mapping[str, str]) -> None:
    folders = [ROOT / "recipes", ROOT / "ds_configs"]
    there = {
        str(path.relative_to(ROOT))
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert there == set(files)
    assert sum(name.endswith(".yaml") for name in there) > 80
    assert sum(name.endswith(".json") for name in there) == 32


def test_every_file_is_what_its_generator_writes(files: Mapping[str, str]) -> None:
    stale = [
        name for name, text in files.items() if (ROOT / name).read_text(encoding="utf-8") != text
    ]
    assert stale == []


def test_every_recipe_is_tabulated_and_one_of_each_kind_of_hardware_parses(
    files: Mapping[str, str],
) -> None:
    recipes = {name: text for name, text in files.items() if name.endswith(".yaml")}
    for name in recipes:
        assert f"]({name.removeprefix('recipes/')})" in files["recipes/README.md"]
    by_folder = {name.split("/")[1]: name for name in recipes}
    for folder, name in by_folder.items():
        gpu = parse_recipe(recipes[name], source=name).cluster.gpu
        assert gpu is not None
        assert folder.startswith(gpu.lower())


def test_the_reference_set_spans_256_to_131072_tokens(files: Mapping[str, str]) -> None:
    lengths = {
        yaml.safe_load(text).get("max_seq_len")
        for name, text in files.items()
        if name.endswith(".yaml")
    }
    assert {256, 131_072} <= lengths


def test_every_deepspeed_file_has_only_keys_that_deepspeed_reads(files: Mapping[str, str]) -> None:
    for name, text in files.items():
        if not name.endswith(".json"):
            continue
        config = json.loads(text)
        assert set(config) <= TOP_LEVEL_KEYS
        assert set(config["zero_optimization"]) <= ZERO_KEYS
        assert "auto" not in text
        assert f"zero{config['zero_optimization']['stage']}" in name


def test_the_fault_table_is_what_was_measured() -> None:
    module = script("make_fault_table")
    assert module.PAGE.read_text(encoding="utf-8") == module.page()
    assert len(module.ROWS.read_text(encoding="utf-8").splitlines()) >= 4
