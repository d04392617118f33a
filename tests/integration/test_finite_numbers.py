"""A batch whose loss is NaN, on real ranks: it ends the run and is named, or is left out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from worker_runs import Nursery, Outcome, make_model_with_nan, small_buckets, write_run

from launcher.strategy import ZeroStage
from launcher.worker.finite import MAX_SKIPPED_IN_A_ROW, LossScaleError, NumberCheck

pytestmark = pytest.mark.integration

NUM_EXAMPLES = 16
BAD_ROW = 5
STEPS_PER_EPOCH = 2


@pytest.fixture(scope="module")
def bad_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose embedding of the letter Z is NaN, and one example of 16 with that letter."""
    root = tmp_path_factory.mktemp("bad")
    make_model_with_nan(root / "model", "Z")
    texts = [f"number {index}" + "Z" * (index == BAD_ROW) for index in range(NUM_EXAMPLES)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (root / "train.jsonl").write_text("".join(lines))
    return root


def trained(
    nursery: Nursery, place: Path, folder: Path, *, on_nan: str, stage: ZeroStage, method: str
) -> Outcome:
    recipe = f"""
model: {{name_or_path: {place / "model"}, precision: fp32}}
method: {method}
max_seq_len: 64
data: {{path: {place / "train.jsonl"}}}
optim: {{global_batch_size: 8, num_train_epochs: 2, learning_rate: 0.01, save_steps: 1}}
recovery: {{on_nan: {on_nan}}}
"""
    strategy = small_buckets(
        zero_stage=stage, micro_batch_size_per_gpu=2, gradient_accumulation_steps=2
    )
    write_run(folder, recipe, strategy, world_size=2)
    nursery.tokenize(folder)
    return nursery.train(folder)


def bad_batches(outcome: Outcome) -> list[dict[str, object]]:
    return [json.loads(p.read_text()) for p in sorted((outcome.folder / "bad_batches").iterdir())]


def test_a_nan_ends_the_run_with_the_batch_of_each_rank_recorded(
    nursery: Nursery, bad_place: Path, tmp_path: Path
) -> None:
    outcome = trained(nursery, bad_place, tmp_path / "run", on_nan="stop", stage=2, method="lora")
    assert outcome.returncode != 0
    records = bad_batches(outcome)
    assert [record["rank"] for record in records] == [0, 1]
    micro_batches = [item for record in records for item in record["micro_batches"]]  # type: ignore[attr-defined]
    assert len({row for item in micro_batches for row in item["rows"]}) == 8
    assert all((item["loss"] == "nan") == (BAD_ROW in item["rows"]) for item in micro_batches)
    assert "NotFiniteError" in {peaks.failure.type for peaks in outcome.peaks if peaks.failure}
    assert outcome.read("status.json")["state"] == "failed"
    # What was saved before is whole, and nothing was saved after.
    step = records[0]["step"]
    assert isinstance(step, int)
    saved = {path.name for path in (outcome.folder / "checkpoints").glob("checkpoint-*")}
    assert saved == {f"checkpoint-{number}" for number in range(1, step)}


@pytest.mark.parametrize(("stage", "method"), [(0, "full"), (2, "lora"), (3, "full")])
def test_a_nan_costs_its_own_step_alone_when_it_shall_be_skipped(
    nursery: Nursery, bad_place: Path, tmp_path: Path, stage: ZeroStage, method: str
) -> None:
    outcome = trained(nursery, bad_place, tmp_path / "r", on_nan="skip", stage=stage, method=method)
    assert outcome.returncode == 0, outcome.stderr
    records = bad_batches(outcome)
    steps = {record["step"] for record in records}
    # Once in each of the two epochs.
    assert {(step + 1) // STEPS_PER_EPOCH for step in steps} == {1, 2}  # type: ignore[operator]
    assert len(records) == 4
    assert outcome.stderr.count("skipped: step") == 2
    assert len(outcome.losses) == 2 * STEPS_PER_EPOCH
    assert all(map(math.isfinite, outcome.losses))
    if method == "lora":
        from safetensors.torch import load_file

        final = load_file(outcome.folder / "checkpoints" / "final" / "adapter_model.safetensors")
        assert all(tensor.isfinite().all() for tensor in final.values())


def fp16_check(folder: Path) -> NumberCheck:
    return NumberCheck(folder, rank=0, on_nan="stop", is_scaled=True)


def test_a_loss_scale_that_cannot_fall_any_more_is_named_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.runtime.fp16 import loss_scaler

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)  # rank 0 prints each overflow
    scaler = loss_scaler.DynamicLossScaler(
        init_scale=2**12, scale_window=1000, min_scale=1, delayed_shift=2,
        consecutive_hysteresis=False,
    )  # fmt: skip
    # 12 halvings after one overflow that hysteresis forgives, and then no more.
    for _ in range(13):
        scaler.update_scale(overflow=True)
    assert MAX_SKIPPED_IN_A_ROW > 13
    with pytest.raises(Exception, match="minimum") as caught:
        scaler.update_scale(overflow=True)
    error = fp16_check(tmp_path).collapse_of(caught.value, step=14)
    assert error is not None
    assert "loss scale has collapsed at step 14" in error.problem
    assert "bf16" in error.fix
    assert fp16_check(tmp_path).collapse_of(ValueError("another"), step=14) is None


def test_overflows_of_fp16_are_normal_until_too_many_come_in_a_row(tmp_path: Path) -> None:
    check = fp16_check(tmp_path)
    for step in range(1, 20):
        check.add_loss(torch.tensor(2.5))
        check.end_step(math.inf, step=step, batch=[[0]])
    check.add_loss(torch.tensor(2.5))
    with pytest.raises(LossScaleError, match="at step 20: 20 steps in a row overflowed"):
        check.end_step(math.inf, step=20, batch=[[0]])
    assert list(tmp_path.iterdir()) == []
