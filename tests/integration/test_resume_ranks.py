"""Checkpoints of real ranks: killed in mid-save, damaged, full disks, other ranks and stages."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from worker_runs import (
    NUM_STEPS,
    WAIT_SECONDS,
    Nursery,
    Outcome,
    environment,
    make_model,
    small_buckets,
    write_chats,
    write_run,
)

from launcher import run_dir as rd
from launcher.failure_kind import EXIT_STATUS, FailureKind
from launcher.run_checkpoints import MANIFEST
from launcher.strategy import Optimizer, ZeroStage
from launcher.worker.checkpoints import find_newest

pytestmark = pytest.mark.integration

# Sums over ranks in another order: float32 has 24 bits, a loss near 5 so a last place of 5e-7;
# eight steps of Adam, whose normalised steps pass on rounding but do not amplify it, stay below
# ten times that.
REDUCTION_TOLERANCE = 5e-6
# bitsandbytes' 8 bits: losses of these runs were off by up to 4.4e-4; without the moments, by 0.37
# after step 3 and by 0.05 after step 6.
ROUNDING_TOLERANCE = 3e-3


def continued(
    nursery: Nursery,
    before: Outcome,
    folder: Path,
    *,
    step: int,
    world_size: int,
    stage: ZeroStage,
    sequence_parallel_size: int = 1,
    optimizer: Optimizer = Optimizer.adamw,
) -> Outcome:
    """Go on from a checkpoint of another run in a new directory, and return what came of it."""
    recipe = (before.folder / rd.RECIPE).read_text()
    num_shares = world_size // sequence_parallel_size
    micro_batch_size = min(2, 8 // num_shares)
    strategy = small_buckets(
        zero_stage=stage,
        micro_batch_size_per_gpu=micro_batch_size,
        gradient_accumulation_steps=8 // (micro_batch_size * num_shares),
        sequence_parallel_size=sequence_parallel_size,
        optimizer=optimizer,
    )
    write_run(folder, recipe, strategy, world_size=world_size)
    shutil.copytree(before.folder / "data", folder / "data", symlinks=True)
    name = f"checkpoints/checkpoint-{step}"
    shutil.copytree(before.folder / name, folder / name)
    for name in (rd.TRAINER_LOG, "sample_before.json"):
        if (before.folder / name).exists():
            shutil.copy(before.folder / name, folder / name)
    outcome = nursery.train(folder, world_size=world_size)
    assert outcome.returncode == 0, outcome.stderr
    assert f"checkpoint-{step}" in outcome.stderr
    return outcome


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_resumed_run_has_the_losses_of_one_that_was_never_interrupted(
    nursery: Nursery, chat_run: Callable[[ZeroStage], Outcome], tmp_path: Path, stage: ZeroStage
) -> None:
    whole = chat_run(stage)
    # Step 6 is the second of the second epoch.
    resumed = continued(nursery, whole, tmp_path / "run", step=6, world_size=2, stage=stage)
    assert resumed.losses == pytest.approx(whole.losses, abs=1e-5)
    assert resumed.peaks[0].steps_done == NUM_STEPS - 6
    results, expected = resumed.read(rd.RESULTS), whole.read(rd.RESULTS)
    assert results["eval_loss_before"] == expected["eval_loss_before"]
    assert results["eval_loss_after"] == pytest.approx(expected["eval_loss_after"], abs=1e-5)
    assert results["sample"] == expected["sample"]


def test_lora_goes_from_2_ranks_to_1_and_back_and_from_zero_2_to_no_partitions_to_zero_3(
    nursery: Nursery, chat_run: Callable[[ZeroStage], Outcome], tmp_path: Path
) -> None:
    whole = chat_run(2)
    alone = continued(nursery, whole, tmp_path / "alone", step=3, world_size=1, stage=0)
    assert "converting it from 2 rank(s) at ZeRO-2 to 1 at ZeRO-0" in alone.stderr
    assert alone.losses == pytest.approx(whole.losses, abs=REDUCTION_TOLERANCE)
    both = continued(nursery, alone, tmp_path / "both", step=6, world_size=2, stage=3)
    assert "converting it from 1 rank(s) at ZeRO-0 to 2 at ZeRO-3" in both.stderr
    assert both.losses == pytest.approx(whole.losses, abs=REDUCTION_TOLERANCE)
    # The conversion itself is not kept.
    assert sorted(path.name for path in (both.folder / rd.CHECKPOINTS).iterdir()) == [
        "checkpoint-6", "checkpoint-8", "final",
    ]  # fmt: skip


def test_lora_goes_from_2_ranks_to_4_and_from_zero_3_to_zero_2_to_zero_1(
    nursery: Nursery, chat_run: Callable[[ZeroStage], Outcome], tmp_path: Path
) -> None:
    whole = chat_run(3)
    four = continued(nursery, whole, tmp_path / "four", step=3, world_size=4, stage=2)
    assert four.losses == pytest.approx(whole.losses, abs=REDUCTION_TOLERANCE)
    alone = continued(nursery, four, tmp_path / "alone", step=6, world_size=1, stage=1)
    assert alone.losses == pytest.approx(whole.losses, abs=REDUCTION_TOLERANCE)


@pytest.fixture(scope="module")
def full_run(nursery: Nursery, workplace: Path) -> Outcome:
    """Return a full fine-tune on one rank, whose norms do not decay and whose weights do."""
    recipe = f"""
model: {{name_or_path: {workplace / "model"}, precision: fp32}}
method: full
max_seq_len: 128
data: {{path: {workplace / "train.jsonl"}}}
optim:
  {{global_batch_size: 8, max_steps: {NUM_STEPS}, learning_rate: 0.01, warmup_ratio: 0.0,
    weight_decay: 0.1, save_steps: 3, save_total_limit: null}}
"""
    strategy = small_buckets(
        zero_stage=1, micro_batch_size_per_gpu=2, gradient_accumulation_steps=4
    )
    folder = write_run(workplace / "full", recipe, strategy, world_size=1)
    nursery.tokenize(folder)
    outcome = nursery.train(folder, world_size=1)
    assert outcome.returncode == 0, outcome.stderr
    return outcome


def test_a_full_fine_tune_goes_from_1_rank_to_2_and_from_zero_1_to_zero_3_to_zero_2(
    nursery: Nursery, full_run: Outcome, tmp_path: Path
) -> None:
    both = continued(nursery, full_run, tmp_path / "both", step=3, world_size=2, stage=3)
    assert both.losses == pytest.approx(full_run.losses, abs=REDUCTION_TOLERANCE)
    alone = continued(nursery, both, tmp_path / "alone", step=6, world_size=1, stage=2)
    assert alone.losses == pytest.approx(full_run.losses, abs=REDUCTION_TOLERANCE)


def test_a_full_fine_tune_goes_from_1_rank_to_4_and_to_2_that_share_sequences(
    nursery: Nursery, full_run: Outcome, tmp_path: Path
) -> None:
    four = continued(
        nursery, full_run, tmp_path / "four", step=3, world_size=4, stage=1,
        sequence_parallel_size=4,
    )  # fmt: skip
    assert four.losses == pytest.approx(full_run.losses, abs=REDUCTION_TOLERANCE)
    two = continued(
        nursery, four, tmp_path / "two", step=6, world_size=2, stage=2, sequence_parallel_size=2
    )
    assert two.losses == pytest.approx(full_run.losses, abs=REDUCTION_TOLERANCE)


@pytest.mark.parametrize(
    ("stage", "next_stage"),
    [(3, 2), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in [(2, 0), (0, 3), (1, 1)])],
)
def test_moments_are_rounded_to_8_bits_and_go_from_2_ranks_to_1(
    nursery: Nursery, full_run: Outcome, tmp_path: Path, stage: ZeroStage, next_stage: ZeroStage
) -> None:
    rounded = Optimizer.adamw_8bit
    both = continued(
        nursery, full_run, tmp_path / "both", step=3, world_size=2, stage=stage, optimizer=rounded
    )
    assert both.losses == pytest.approx(full_run.losses, abs=ROUNDING_TOLERANCE)
    alone = continued(
        nursery, both, tmp_path / "alone", step=6, world_size=1, stage=next_stage, optimizer=rounded
    )
    assert alone.losses == pytest.approx(both.losses, abs=ROUNDING_TOLERANCE)


def test_moments_wait_on_the_host_and_are_rounded_piece_by_piece(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch
    from bitsandbytes.functional import quantize_blockwise
    from bitsandbytes.optim import AdamW8bit

    from launcher.worker import eight_bit_states

    monkeypatch.setattr(eight_bit_states, "_PIECE_ELEMENTS", 1024)
    parameter = torch.nn.Parameter(torch.zeros(5000))
    optimizer = AdamW8bit([parameter])
    eight_bit_states.keep_moments_on_host(optimizer)
    moments = {"exp_avg": torch.randn(5000), "exp_avg_sq": torch.rand(5000)}
    for name, moment in moments.items():
        loaded = moment.clone()
        optimizer.state[parameter][name] = loaded
        assert loaded.untyped_storage().nbytes() == 0
    optimizer.state[parameter]["step"] = torch.tensor(3.0)
    eight_bit_states.round_states(optimizer)
    state = optimizer.state[parameter]
    assert state["step"] == 3
    for number, moment in enumerate(moments.values(), start=1):
        whole, scales = quantize_blockwise(moment, code=state[f"qmap{number}"], blocksize=256)
        assert torch.equal(state[f"state{number}"], whole)
        assert torch.equal(state[f"absmax{number}"], scales.absmax)


def test_a_disk_that_takes_no_more_ends_the_run_and_names_what_is_left(
    full_run: Outcome, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(full_run.folder, folder)
    for step in (6, 8):
        shutil.rmtree(folder / f"checkpoints/checkpoint-{step}")
    kept = folder / "checkpoints" / "checkpoint-3"
    # The optimizer's states are 112,448 parameters x 12 bytes.
    limit = 10**6
    done = subprocess.run(
        [sys.executable, "-m", "launcher.worker.train", "--run-dir", str(folder)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_SECONDS,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == EXIT_STATUS[FailureKind.storage]
    assert "[rank 0] error: " in done.stderr
    assert "the run could not be saved" in done.stderr
    assert f"nothing is lost up to {kept}" in done.stderr
    assert "Traceback" not in done.stderr
    found, skipped = find_newest(folder / rd.CHECKPOINTS)
    assert found is not None
    assert (found.path, skipped) == (kept, [])
    assert rd.read_status(folder).state == "failed"


def test_dropout_goes_on_where_it_was(nursery: Nursery, workplace: Path, tmp_path: Path) -> None:
    recipe = f"""
model: {{name_or_path: {workplace / "model"}, precision: fp32}}
max_seq_len: 64
data: {{path: {workplace / "train.jsonl"}}}
lora: {{dropout: 0.3}}
optim:
  {{global_batch_size: 4, max_steps: 4, learning_rate: 0.02, save_steps: 2,
    lr_scheduler_type: polynomial}}
"""
    strategy = small_buckets(zero_stage=1, micro_batch_size_per_gpu=4)
    folder = write_run(tmp_path / "run", recipe, strategy, world_size=1)
    nursery.tokenize(folder)
    whole = nursery.train(folder, world_size=1).losses
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    assert nursery.train(folder, world_size=1).losses == pytest.approx(whole, abs=1e-5)


def stopped_in_mid_save(rank: psutil.Process, unfinished: Path) -> bool:
    """Stop a rank as soon as it saves; return whether its checkpoint is really half there."""
    while not list(unfinished.glob("checkpoint-*")):
        assert rank.is_running()
        time.sleep(0.001)
    rank.suspend()
    staged = list(unfinished.glob("checkpoint-*"))
    return bool(staged) and not (staged[0] / MANIFEST).exists()


def test_a_rank_killed_in_mid_save_loses_nothing_and_one_rank_goes_on(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    write_chats(tmp_path / "train.jsonl", 32)
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{name_or_path: {tmp_path / 'model'}}}\nmax_seq_len: 64\n"
        "data: {path: train.jsonl}\ncluster: {gpus_per_node: 2}\nrecovery: {max_attempts: 1}\n"
        "optim: {max_steps: 40, global_batch_size: 4, save_steps: 1, save_total_limit: 3}\n"
    )
    zerofit = [sys.executable, "-m", "launcher.cli"]
    run = tmp_path / "run"
    with subprocess.Popen(
        [*zerofit, "train", "recipe.yaml", "--output-dir", "run"],
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as started:  # fmt: skip
        while not list(run.glob("checkpoints/checkpoint-[3-9]")):
            assert started.poll() is None, started.communicate()
            time.sleep(0.05)
        rank = psutil.Process(json.loads(rd.rank_file(run, 0).read_text())["pid"])
        while not stopped_in_mid_save(rank, run / "checkpoints/.unfinished"):
            rank.resume()
        rank.send_signal(signal.SIGKILL)
        _, stderr = started.communicate(timeout=WAIT_SECONDS)
    assert started.returncode == 4, stderr
    assert list((run / "checkpoints/.unfinished").iterdir())
    newest, skipped = find_newest(run / "checkpoints")
    assert newest is not None
    assert skipped == []
    broken = next(newest.path.glob("global_step*/*optim_states.pt"))
    os.truncate(broken, broken.stat().st_size // 2)
    done = subprocess.run(
        [*zerofit, "resume", "run", "cluster.gpus_per_node=1", "optim.save_steps=10"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False,
        timeout=WAIT_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"skipped {newest.path.name}: global_step{newest.step}/" in done.stdout
    assert (
        f"continuing from {newest.path.with_name(f'checkpoint-{newest.step - 1}')}" in done.stdout
    )
    steps = [json.loads(line)["step"] for line in (run / rd.TRAINER_LOG).read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 41))
    assert (run / "attempts" / "1" / rd.PLAN).is_file()
    again = subprocess.run(
        [*zerofit, "resume", "run"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False,
        timeout=WAIT_SECONDS,
    )  # fmt: skip
    assert again.returncode == 2
    assert "this run has finished" in again.stderr
