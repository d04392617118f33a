"""The data step as a program, the cache that it fills, and what makes use of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from data_recipes import recipe_of, texts
from worker_runs import environment, make_model, make_tokenizer, write_chats

from launcher.data_cache import SUMMARY, TRAIN
from launcher.errors import DataError
from launcher.recipe import render_recipe
from launcher.recipe_sections import Recipe
from launcher.worker.chat_templates import load_tokenizer
from launcher.worker.data import prepare_data

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def data_program(recipe: Recipe, folder: Path) -> list[str]:
    (folder / "recipe.yaml").write_text(render_recipe(recipe))
    argv = [sys.executable, "-m", "launcher.worker.data", "--recipe", str(folder / "recipe.yaml")]
    return [*argv, "--cache", str(folder / "cache")]


def test_a_killed_program_leaves_nothing_that_counts_and_of_two_later_ones_one_tokenises(
    tmp_path: Path, model: Path
) -> None:
    data = write_chats(tmp_path / "train.jsonl", 100_000)
    argv = data_program(recipe_of(model, f"{{path: {data}}}"), tmp_path)
    cache = tmp_path / "cache"
    with subprocess.Popen(argv, env=environment(), stdout=-3, stderr=-3) as program:
        while program.poll() is None and not list(cache.glob(f".new-*/{TRAIN}")):
            time.sleep(0.05)
        program.send_signal(signal.SIGKILL)
    assert program.returncode == -signal.SIGKILL
    assert not list(cache.glob(f"*/{SUMMARY}"))
    assert list(cache.glob(".new-*"))
    write_chats(data, 2000)  # so that the next programs have another key
    both = [
        subprocess.Popen(argv, env=environment(), stdout=-1, stderr=-1, text=True) for _ in range(2)
    ]
    ended = [(*program.communicate(timeout=900), program.returncode) for program in both]
    assert [status for *_, status in ended] == [0, 0], ended
    assert ended[0][0] == ended[1][0]
    assert json.loads(ended[0][0])["train"]["num_records"] == 2000
    assert sum("from the cache" in said for _, said, _ in ended) == 1
    assert not list(cache.glob(".new-*"))


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launcher.worker import data as data_module

    path = texts(tmp_path / "train.jsonl", "a")
    plain = data_module._make

    def make(*arguments: Any) -> None:
        plain(*arguments)
        os.utime(path, (1, 1))

    monkeypatch.setattr(data_module, "_make", make)
    recipe = recipe_of(model, f"{{path: {path}}}")
    with pytest.raises(DataError, match="changed while it was read"):
        prepare_data(recipe, load_tokenizer(recipe), tmp_path / "cache")
    assert [p for p in (tmp_path / "cache").iterdir() if p.is_dir()] == []


def test_a_token_beyond_the_models_embeddings_is_an_error(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from launcher.worker.data import main

    small = make_model(tmp_path / "small", vocab_size=258)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(small)
    recipe = recipe_of(small, f"{{path: {texts(tmp_path / 'train.jsonl', 'a <new> b')}}}")
    (tmp_path / "recipe.yaml").write_text(render_recipe(recipe))
    arguments = ["--recipe", str(tmp_path / "recipe.yaml"), "--cache", str(tmp_path / "cache")]
    # Known from the cache as well.
    for _ in range(2):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert "the data has token 260, the model's embedding has 258 rows (0 to 257)" in said
        assert "model.resize_token_embeddings(len(tokenizer))" in said


def zerofit(*args: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher.cli", *args],
        env={**environment(), "ZEROFIT_CACHE": str(folder / "zerofit")},
        capture_output=True, text=True, check=False, cwd=folder, timeout=600,
    )  # fmt: skip


def test_what_is_prepared_is_shown_planned_for_and_not_tokenised_again(
    tmp_path: Path, model: Path
) -> None:
    write_chats(tmp_path / "train.jsonl", 50)
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{name_or_path: {model}}}\nmax_seq_len: 256\ndata: {{path: train.jsonl}}\n"
        "cluster: {gpu: A100-80GB, gpus_per_node: 2}\n"
    )
    before = json.loads(zerofit("plan", "recipe.yaml", "--json", folder=tmp_path).stdout)
    assert before["max_seq_len"] == 256
    assert "training" not in before
    done = zerofit("data", "prepare", "recipe.yaml", "--png", "lengths.png", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "train: 50 examples" in done.stdout
    assert "█" in done.stdout
    assert "100 %" in done.stdout
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    # "<|user|>\ncount to 5<|end|>\n<|assistant|>\n1 2 3 4 5<|end|>\n": one token for each of
    # the 23 bytes and of the four special tokens.
    after = json.loads(zerofit("plan", "recipe.yaml", "--json", folder=tmp_path).stdout)
    assert after["max_seq_len"] == after["training"]["longest_tokens"] == 27
    # 50 examples in batches of 8.
    assert after["training"]["num_steps"] == 7
    again = zerofit("data", "prepare", "recipe.yaml", "--json", folder=tmp_path)
    assert "from the cache" in again.stderr
    assert [plan["percentile"] for plan in json.loads(again.stdout)["plans"]] == [50, 95, 99, 100]


def test_data_that_cannot_be_used_ends_prepare_with_2(tmp_path: Path, model: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"prompt": "b", "completion": "c"}\n')
    recipe = f"model: {{name_or_path: {model}}}\nmax_seq_len: 512\ndata: {{path: train.jsonl}}\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    done = zerofit("data", "prepare", "recipe.yaml", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "train.jsonl line 2: this record is prompt_completion" in done.stderr
    assert "Traceback" not in done.stderr
    # The model is made for 512 tokens: said before anything is tokenised.
    done = zerofit("data", "prepare", "recipe.yaml", "max_seq_len=513", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "max_seq_len is 513" in done.stderr


def test_an_export_names_every_source_and_hashes_them_together(tmp_path: Path) -> None:
    from hashlib import sha256

    from launcher.worker.export import _data
    from launcher.worker.model_card import _data_line

    one, other = texts(tmp_path / "a.jsonl", "a"), texts(tmp_path / "b.jsonl", "b")
    data = recipe_of(tmp_path, f"{{sources: [{{path: {one}}}, {{path: {other}}}]}}").data
    both = "".join(sha256(path.read_bytes()).hexdigest() for path in (one, other))
    expected = sha256(both.encode()).hexdigest()
    assert _data(data) == {"path": f"{one}, {other}", "sha256": expected}
    assert _data_line(_data(data)).startswith("`a.jsonl, b.jsonl`, SHA-256 ")
    one.unlink()
    assert _data(data)["sha256"] is None
    assert _data(recipe_of(tmp_path, "{}").data) == {"path": None, "sha256": None}
