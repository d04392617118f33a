from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_inputs import data_summary

from launcher.data_cache import DATA, SUMMARY, TRAIN, cache_dir, remember, summary_to_json
from launcher.data_view import describe_data
from launcher.errors import DataError
from launcher.launch import disk_bytes, prepare_run_data
from launcher.prepare import prepare
from launcher.recipe import parse_recipe
from launcher.recipe_paths import check_data_paths, with_absolute_paths
from launcher.units import MIB

SMALL_FILES_BYTES = 64 * MIB
# Counted in the published checkpoint's tensors, and LoRA r=16 on its seven linear modules:
# 32 layers x 16 x (4 x (4096 + 4096) + 3 x (4096 + 11008)).
LLAMA2_7B_PARAMS = 6_738_415_616
LLAMA2_7B_LORA_PARAMS = 39_976_960


def needed(**overrides: str) -> tuple[int, int]:
    """Return the disk space of a run of llama2-7b in bf16, and of one checkpoint of it."""
    options = {"model.name_or_path": "llama2-7b", "cluster.gpu": "A100-80GB"}
    options |= {"cluster.gpus_per_node": "8"}
    settings = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    recipe = parse_recipe("", source="test", options=options, overrides=settings)
    prepared = prepare(recipe, source="test")
    return disk_bytes(prepared), prepared.plan.memory.checkpoint_bytes


def test_without_save_steps_only_the_final_weights_need_room() -> None:
    assert needed(method="lora")[0] == SMALL_FILES_BYTES + 2 * LLAMA2_7B_LORA_PARAMS
    assert needed(method="full")[0] == SMALL_FILES_BYTES + 2 * LLAMA2_7B_PARAMS


def test_random_weights_that_are_all_trained_are_not_saved() -> None:
    assert needed(method="full", model__random_weights="true")[0] == SMALL_FILES_BYTES


def test_with_save_steps_the_kept_checkpoints_and_the_one_being_written_need_room() -> None:
    total, checkpoint = needed(method="lora", optim__save_steps="10", optim__save_total_limit="4")
    assert checkpoint > 0
    assert total == SMALL_FILES_BYTES + 2 * LLAMA2_7B_LORA_PARAMS + 5 * checkpoint


def test_the_data_is_described_in_sentences() -> None:
    assert "\n".join(describe_data(data_summary(notes=("a note",)))) == (
        "data: messages records\n"
        "  train: 1,500 examples of 30,000 tokens (25 % count in the loss), 12 truncated, "
        "15 dropped\n"
        "    tokens each: half have at most 18, 95 % 60, 99 % 100, the longest 128\n"
        "  note: a note"
    )


@pytest.mark.parametrize("key", ["path", "eval_path"])
def test_each_data_file_is_looked_for_before_anything_is_written(key: str) -> None:
    recipe = parse_recipe(
        "", source="test", options={"model.name_or_path": "x", f"data.{key}": "/no/such.jsonl"}
    )
    with pytest.raises(DataError, match=f"correct data.{key}"):
        check_data_paths(recipe)


def test_a_relative_hostfile_holds_from_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = parse_recipe("model: {name_or_path: gpt}\ncluster: {hostfile: hosts}", source="r")
    assert with_absolute_paths(recipe).cluster.hostfile == str(tmp_path.resolve() / "hosts")


def test_data_files_may_have_endings_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "TRAIN.JSONL").write_text('{"text": "a"}\n')
    recipe = parse_recipe(f"model: {{name_or_path: gpt}}\ndata: {{path: {tmp_path}}}", source="r")
    check_data_paths(recipe)


def test_data_that_was_tokenised_before_starts_no_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZEROFIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("launcher.launch.run_worker", lambda *_: pytest.fail("it was started"))
    (tmp_path / "model").mkdir()
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    paths = [f"model.name_or_path={tmp_path / 'model'}", f"data.path={tmp_path / 'train.jsonl'}"]
    recipe = parse_recipe("", source="test", overrides=paths)
    entry = cache_dir() / "k1"
    entry.mkdir(parents=True)
    (entry / TRAIN).write_bytes(b"rows")
    (entry / SUMMARY).write_text(json.dumps(summary_to_json(data_summary())))
    remember(recipe, cache_dir(), "k1")
    (tmp_path / "run").mkdir()
    assert prepare_run_data(recipe, tmp_path / "run") == data_summary()
    assert (tmp_path / "run" / DATA / TRAIN).read_bytes() == b"rows"
