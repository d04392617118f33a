"""Ranks that share sequences train as ranks do that have whole ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sequence_ranks import ARCHITECTURES, REFUSED
from worker_runs import Nursery, Outcome, small_buckets, write_run

from launcher import run_dir as rd
from launcher.strategy import Checkpointing, Loss, ZeroStage

pytestmark = pytest.mark.integration

# A loss near 5 has a last place of 5e-7 in float32; sums are taken in another order, and eight
# steps of Adam pass that on.
TOLERANCE = 5e-6


@pytest.fixture(scope="module")
def parts(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of four ranks has found out about parts of sequences."""
    folder = tmp_path_factory.mktemp("parts")
    outcome = nursery.run(folder, "sequence_ranks", world_size=4)
    assert outcome.returncode == 0, outcome.stderr
    return [json.loads((folder / f"results-{rank}.json").read_text()) for rank in range(4)]


def test_parts_of_sequences_add_up_to_the_loss_and_gradient_of_the_whole(parts: list[Any]) -> None:
    for rank in parts:
        assert len(rank["differences"]) == 2 * (len(ARCHITECTURES) + 1)
        for name, (loss, gradient) in rank["differences"].items():
            assert loss < 2e-6, name
            assert gradient < 1e-5, name


def test_a_rank_that_is_alone_for_a_while_runs_whole_sequences(parts: list[Any]) -> None:
    assert all(rank["alone"] < 1e-6 for rank in parts)


def test_what_attention_by_parts_would_get_wrong_is_refused(parts: list[Any]) -> None:
    for rank in parts:
        assert rank["refused"].keys() == REFUSED.keys()
        assert "mask" in rank["refused"]["mistral"]
        assert "itself" in rank["refused"]["falcon"]
        assert "eager" in rank["refused"]["gemma2"]
        assert "length" in rank["refused"]["llama"]
        assert "3 key heads" in rank["refused"]["qwen2"]


def test_two_groups_of_two_ranks_train_and_judge_as_two_ranks_do(
    nursery: Nursery, chat_run: Callable[[ZeroStage], Outcome], tmp_path: Path
) -> None:
    whole = chat_run(3)
    recipe = (whole.folder / rd.RECIPE).read_text()
    strategy = small_buckets(
        zero_stage=3,
        micro_batch_size_per_gpu=2,
        gradient_accumulation_steps=2,
        sequence_parallel_size=2,
        loss=Loss.chunked,
        gradient_checkpointing=Checkpointing.full,
    )
    folder = write_run(tmp_path / "run", recipe, strategy, world_size=4)
    nursery.tokenize(folder)
    outcome = nursery.train(folder, world_size=4)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.losses == pytest.approx(whole.losses, abs=TOLERANCE)
    assert "no sample answer" in outcome.stderr
    found, expected = outcome.read(rd.RESULTS), whole.read(rd.RESULTS)
    for name in ("eval_loss_before", "eval_loss_after"):
        assert found[name] == pytest.approx(expected[name], abs=TOLERANCE)
