from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from worker_runs import (
    NUM_STEPS,
    WAIT_SECONDS,
    Nursery,
    Outcome,
    environment,
    free_port,
    small_buckets,
    train_alone,
    write_run,
)

from launcher import run_dir
from launcher.predict.memory import PHASES
from launcher.strategy import Attention, Checkpointing, Loss, ZeroStage

pytestmark = pytest.mark.integration

STAGES: tuple[ZeroStage, ...] = (1, 2, 3)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_train_and_finish(
    chat_run: Callable[[ZeroStage], Outcome], stage: ZeroStage
) -> None:
    outcome = chat_run(stage)
    assert outcome.returncode == 0, outcome.stderr
    assert run_dir.read_status(outcome.folder).state == "finished"
    assert [peaks.state for peaks in outcome.peaks] == ["finished", "finished"]


@pytest.mark.parametrize("stage", STAGES)
def test_the_loss_falls(chat_run: Callable[[ZeroStage], Outcome], stage: ZeroStage) -> None:
    outcome = chat_run(stage)
    assert len(outcome.losses) == NUM_STEPS
    # A model that knows nothing has ln(300) = 5.70; the text's few characters are learnt fast.
    assert outcome.losses[0] == pytest.approx(5.70, abs=0.1)
    assert outcome.losses[-1] < outcome.losses[0] - 0.5
    results = outcome.read(run_dir.RESULTS)
    assert results["eval_loss_after"] < results["eval_loss_before"] - 0.5
    assert results["train_loss_last"] == outcome.losses[-1]


@pytest.mark.parametrize("stage", [1, 3])
def test_partitioning_changes_no_loss(
    chat_run: Callable[[ZeroStage], Outcome], stage: ZeroStage
) -> None:
    assert chat_run(stage).losses == pytest.approx(chat_run(2).losses, abs=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_every_rank_writes_every_phase(
    chat_run: Callable[[ZeroStage], Outcome], stage: ZeroStage
) -> None:
    peaks = chat_run(stage).peaks
    assert [peak.rank for peak in peaks] == [0, 1]
    for peak in peaks:
        assert tuple(peak.phases) == PHASES
        assert all(phase.peak_allocated_bytes > 0 for phase in peak.phases.values())
        assert all(phase.host_rss_bytes > 0 for phase in peak.phases.values())
        assert peak.phases["forward"].count == NUM_STEPS * 2
        assert peak.phases["step"].count == NUM_STEPS
        assert peak.steps_done == len(peak.step_seconds) == NUM_STEPS
        assert peak.tokens_per_step > 0


@pytest.mark.parametrize("stage", STAGES)
def test_evaluation_needs_less_than_training(
    chat_run: Callable[[ZeroStage], Outcome], stage: ZeroStage
) -> None:
    # The same micro-batch and the same loss without a gradient; the sample answers count as well.
    for peak in chat_run(stage).peaks:
        training = max(peak.phases[name].peak_allocated_bytes for name in ("loss", "backward"))
        assert 0 < peak.phases["eval"].peak_allocated_bytes < training


def test_partitioned_parameters_need_less_while_loading(
    chat_run: Callable[[ZeroStage], Outcome],
) -> None:
    # Rank 0 too, which deals the weights out: they stay in their file. fp32 weights at ZeRO-2:
    # embedding and head 300 x 64, two layers of 64 x (2 x 64 + 2 x 32 + 3 x 128) and five norms
    # of 64: 112,448 numbers of 4 bytes; ZeRO-3 keeps half of them on each rank.
    for rank in (0, 1):
        replicated = chat_run(2).peaks[rank].phases["load"].peak_allocated_bytes
        partitioned = chat_run(3).peaks[rank].phases["load"].peak_allocated_bytes
        assert replicated >= 4 * 112_448
        assert partitioned < 0.75 * replicated


# PEFT 0.21 asks transformers 5.23 for the property by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("stage", STAGES)
def test_the_saved_adapter_holds_what_was_trained(
    chat_run: Callable[[ZeroStage], Outcome], workplace: Path, stage: ZeroStage
) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final = chat_run(stage).folder / "checkpoints" / "final"
    weights = load_file(final / "adapter_model.safetensors")
    # Two matrices for each of seven linear modules in each of two layers; B starts as zeros.
    assert len(weights) == 2 * 7 * 2
    assert all(value.numel() > 0 for value in weights.values())
    assert all(value.abs().max() > 0 for value in weights.values())
    base = AutoModelForCausalLM.from_pretrained(workplace / "model")
    assert PeftModel.from_pretrained(base, final).num_parameters() > 0
    assert AutoTokenizer.from_pretrained(final).chat_template


def test_the_adapter_is_the_same_at_every_stage(
    chat_run: Callable[[ZeroStage], Outcome],
) -> None:
    import torch
    from safetensors.torch import load_file

    two, three = (
        load_file(chat_run(stage).folder / "checkpoints" / "final" / "adapter_model.safetensors")
        for stage in (2, 3)
    )
    for name, value in two.items():
        torch.testing.assert_close(value, three[name], atol=1e-3, rtol=1e-2)


def test_rank_0_reports_progress_results_and_the_fullest_rank(
    chat_run: Callable[[ZeroStage], Outcome],
) -> None:
    outcome = chat_run(2)
    lines = [line for line in outcome.stderr.splitlines() if f"step 3/{NUM_STEPS} " in line]
    assert len(lines) == 1  # rank 0 alone speaks
    assert "loss " in lines[0]
    assert "held-out loss" in outcome.stderr
    assert "fullest rank: " in outcome.stderr
    results = outcome.read(run_dir.RESULTS)
    assert results["sample"]["prompt"] == "count to 1"
    assert results["sample"]["before"] != results["sample"]["after"]
    assert results["tokens_seen"] > 0
    assert results["train_seconds"] > 0
    entry = json.loads((outcome.folder / run_dir.TRAINER_LOG).read_text().splitlines()[1])
    assert {"step", "seconds", "loss", "learning_rate", "grad_norm", "tokens_per_s"} <= set(entry)


def benchmark(folder: Path, model: Path, *, method: str = "lora", **strategy: Any) -> Path:
    """Write a run of random weights and random tokens for one rank."""
    recipe = f"""
model: {{name_or_path: nowhere/nothing, precision: bf16, random_weights: true}}
method: {method}
max_seq_len: 32
optim: {{global_batch_size: 2, max_steps: 3, save_steps: 2}}
"""
    write_run(
        folder,
        recipe,
        small_buckets(micro_batch_size_per_gpu=2, **strategy),
        world_size=1,
    )
    copy = folder / "model_config"
    copy.mkdir()
    (copy / "config.json").write_text((model / "config.json").read_text())
    return folder


@pytest.mark.parametrize(
    ("method", "strategy"),
    [
        (
            "full",
            {
                "zero_stage": 3,
                "loss": Loss.chunked,
                "gradient_checkpointing": Checkpointing.cpu_offload,
            },
        ),
        (
            "lora",
            {
                "zero_stage": 2,
                "attention": Attention.eager,
                "gradient_checkpointing": Checkpointing.full,
            },
        ),
        ("qlora", {"zero_stage": 2}),
    ],
    ids=["full", "lora", "qlora"],
)
def test_a_benchmark_needs_no_weights_no_data_and_no_tokenizer(
    nursery: Nursery, workplace: Path, tmp_path: Path, method: str, strategy: dict[str, Any]
) -> None:
    folder = benchmark(tmp_path / "run", workplace / "model", method=method, **strategy)
    outcome = nursery.train(folder, world_size=1)
    assert outcome.returncode == 0, outcome.stderr
    (peaks,) = outcome.peaks
    assert peaks.steps_done == 3
    assert peaks.tokens_per_step == 2 * 32
    assert (folder / "checkpoints" / "checkpoint-2").is_dir()


def test_an_interrupted_run_continues_from_its_checkpoint(
    nursery: Nursery, workplace: Path, tmp_path: Path
) -> None:
    folder = benchmark(tmp_path / "run", workplace / "model", zero_stage=2)
    assert nursery.train(folder, world_size=1).returncode == 0
    # The last step is saved whatever the interval; without it, the run looks interrupted.
    shutil.rmtree(folder / "checkpoints" / "checkpoint-3")
    # Without a launcher, as nobody has set the variables of a rank.
    again = train_alone(folder)
    assert again.returncode == 0, again.stderr
    assert "continuing from" in again.stderr
    # Of three steps, the checkpoint holds two.
    assert again.peaks[0].steps_done == 1


def test_a_package_that_is_missing_ends_the_run_without_a_traceback(
    nursery: Nursery, workplace: Path, tmp_path: Path
) -> None:
    folder = benchmark(
        tmp_path / "run",
        workplace / "model",
        zero_stage=2,
        attention=Attention.flash_attention_2,
    )
    outcome = nursery.train(folder, world_size=1)
    assert outcome.returncode == 1
    assert "[rank 0] error: " in outcome.stderr
    assert "pip install 'zerofit[flash]'" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    (peaks,) = outcome.peaks
    assert peaks.state == "failed"
    assert peaks.failure is not None
    assert peaks.failure.type == "SetupError"
    assert run_dir.read_status(folder).state == "failed"


def test_a_bug_ends_the_run_with_one_traceback(
    nursery: Nursery, workplace: Path, tmp_path: Path
) -> None:
    folder = benchmark(tmp_path / "run", workplace / "model", zero_stage=2)
    config = json.loads((folder / run_dir.DS_CONFIG).read_text())
    run_dir.write_json(folder / run_dir.DS_CONFIG, {**config, "train_batch_size": 7})
    outcome = nursery.train(folder, world_size=1)
    assert outcome.returncode == 1
    assert outcome.stderr.count("Traceback (most recent call last)") == 1
    assert outcome.peaks[0].state == "failed"


def test_a_rank_that_waits_for_others_says_that_it_was_interrupted(
    workplace: Path, tmp_path: Path
) -> None:
    folder = benchmark(tmp_path / "run", workplace / "model", zero_stage=2)
    places = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    with subprocess.Popen(
        [sys.executable, "-m", "launcher.worker.train", "--run-dir", str(folder)],
        env={**environment(), **places},
    ) as process:
        # Rank 0 listens there for the others.
        rank = psutil.Process(process.pid)
        deadline = time.monotonic() + WAIT_SECONDS
        while int(places["MASTER_PORT"]) not in {
            item.laddr.port for item in rank.net_connections()
        }:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=WAIT_SECONDS) == 128 + signal.SIGTERM
    outcome = Outcome(returncode=143, stderr="", stdout="", folder=folder)
    assert outcome.peaks[0].state == "interrupted"
