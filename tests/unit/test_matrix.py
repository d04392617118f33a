"""Model size against context length, as a table, CSV, JSON and a picture."""

from __future__ import annotations

import csv
import io
import json
from functools import cache
from pathlib import Path

import pytest
from planning_inputs import cluster, model, workload
from rich.console import Console

from launcher.errors import RecipeError, RunDirError
from launcher.model_spec import ModelSpec
from launcher.planning.matrix import Matrix, make_matrix, matrix_to_csv, matrix_to_json
from launcher.planning.matrix_view import draw_matrix, render_matrix
from launcher.planning.planner import Choice, choose_strategy
from launcher.prepare_matrix import prepare_matrix, read_matrix_recipe, write_output
from launcher.recipe_sections import StrategySection
from launcher.strategy import Method, Optimizer


def choose(spec: ModelSpec, tokens: int) -> Choice:
    place = cluster("V100-32GB")
    return choose_strategy(workload(spec.name, place=place, tokens=tokens), place)


@cache
def matrix() -> Matrix:
    return make_matrix(
        [model("llama2-7b"), model("llama2-70b")],
        (512, 4096, 8192),
        method=Method.lora,
        cluster=cluster("V100-32GB"),
        choose=choose,
    )


def test_a_cell_is_what_the_planner_chooses() -> None:
    cell = matrix().rows[0][0]
    assert cell.best is not None
    assert cell.best.strategy == choose(model("llama2-7b"), 512).best.strategy


def test_lengths_beyond_the_models_own_limit_are_not_planned() -> None:
    # Llama 2 was made for 4,096 tokens.
    cell = matrix().rows[0][2]
    assert not cell.fits
    assert cell.best is None
    assert cell.note == "beyond the model's 4,096 tokens"


def test_csv_has_a_line_for_each_cell_and_units_in_its_header() -> None:
    rows = list(csv.DictReader(io.StringIO(matrix_to_csv(matrix()))))
    assert len(rows) == 6
    assert rows[0]["model"] == "llama2-7b"
    assert int(rows[0]["device_used_bytes"]) > 13e9  # 2 bytes for each of 6.74e9 parameters
    assert rows[0]["fits"] == "True"
    assert rows[2]["zero_stage"] == ""
    assert rows[2]["note"] == "beyond the model's 4,096 tokens"


def test_json_is_the_same_data() -> None:
    content = json.loads(json.dumps(matrix_to_json(matrix())))
    assert [cell["max_seq_len"] for cell in content["cells"]] == [512, 4096, 8192] * 2
    assert content["gpu"] == "V100-32GB"


def shown(made: Matrix) -> str:
    stream = io.StringIO()
    Console(width=80, file=stream, color_system=None).print(render_matrix(made))
    return stream.getvalue()


@cache
def long_matrix() -> Matrix:
    """Seven lengths, of which the last fits where GPUs share it; and a model that is too large."""
    place = cluster("V100-32GB", nodes=2)

    def choose_there(spec: ModelSpec, tokens: int) -> Choice:
        work = workload(spec.name, place=place, tokens=tokens, method=Method.full)
        return choose_strategy(work, place)

    return make_matrix(
        [model("llama3.1-8b"), model("falcon-180b")],
        (128, 256, 384, 512, 640, 768, 131_072),
        method=Method.full,
        cluster=place,
        choose=choose_there,
    )


def test_the_table_fits_80_columns() -> None:
    text = shown(matrix())
    assert "llama2-70b" in text
    assert "ZeRO-3" in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_more_lengths_than_a_line_holds_continue_below() -> None:
    text = shown(long_matrix())
    assert max(len(line) for line in text.splitlines()) <= 80
    assert text.count("falcon-180b") == 2
    assert "…" not in text
    assert all(f" {tokens:,} " in text for tokens in long_matrix().contexts)


def test_a_cell_says_that_gpus_share_sequences_and_what_is_missing() -> None:
    made = long_matrix()
    best, missing = made.rows[0][-1].best, made.rows[1][0].best
    assert best is not None
    degree = best.strategy.sequence_parallel_size
    assert degree > 1
    assert f"shared by {degree}" in shown(made)
    assert missing is not None
    assert not missing.fits
    assert f"{missing.memory.device_used_bytes / 2**30:,.1f} GiB" in shown(made)
    last = list(csv.DictReader(io.StringIO(matrix_to_csv(made))))[6]
    assert last["sequence_parallel_size"] == str(degree)


def test_a_cell_says_which_optimizer_it_takes_when_it_is_not_the_usual_one() -> None:
    place = cluster("A100-40GB")
    fixed = StrategySection(optimizer=Optimizer.adamw_8bit)

    def choose_rounded(spec: ModelSpec, tokens: int) -> Choice:
        work = workload(spec.name, place=place, method=Method.full, tokens=tokens)
        return choose_strategy(work, place, fixed=fixed)

    made = make_matrix(
        [model("llama2-7b")], (512,), method=Method.full, cluster=place, choose=choose_rounded
    )
    assert "8-bit Adam" in shown(made)


def test_the_picture_is_a_png() -> None:
    image = draw_matrix(matrix())
    assert image.startswith(b"\x89PNG\r\n\x1a\n")


def test_the_studys_grid_is_the_default() -> None:
    recipe, source, names = read_matrix_recipe(
        ["cluster.gpu=A100-80GB", "cluster.gpus_per_node=8"], {}, models=None
    )
    made = prepare_matrix(recipe, source=source, models=names, contexts=None)
    assert [row[0].model.name for row in made.rows] == [
        "llama2-7b", "llama2-13b", "llama2-70b", "falcon-180b",
    ]  # fmt: skip
    assert made.contexts == (256, 512, 1024, 2048, 4096)


def test_a_named_model_is_the_only_row() -> None:
    options: dict[str, str | None] = {"model.name_or_path": "llama3.2-1b"}
    _, _, names = read_matrix_recipe([], options, models=None)
    assert names == ("llama3.2-1b",)


def test_models_and_lengths_are_separated_by_commas() -> None:
    recipe, source, names = read_matrix_recipe(
        ["cluster.gpu=H100", "method=full"], {}, models="llama3.2-1b, llama3.2-3b"
    )
    made = prepare_matrix(recipe, source=source, models=names, contexts="1024,2_048")
    assert names == ("llama3.2-1b", "llama3.2-3b")
    assert made.contexts == (1024, 2048)
    assert made.method is Method.full


@pytest.mark.parametrize("contexts", ["", "0", "-1", "many", "1024;2048", "1.5"])
def test_lengths_that_are_none_are_an_error(contexts: str) -> None:
    recipe, source, names = read_matrix_recipe(["cluster.gpu=H100"], {}, models="llama3.2-1b")
    with pytest.raises(RecipeError, match="--contexts"):
        prepare_matrix(recipe, source=source, models=names, contexts=contexts)


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="cannot be written"):
        write_output(tmp_path / "missing" / "matrix.csv", b"x")
