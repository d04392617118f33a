"""What several files of integration tests share: forked ranks, and runs on real ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from worker_runs import (
    NUM_STEPS,
    Nursery,
    Outcome,
    make_model,
    small_buckets,
    tokenize_data,
    train,
    write_chats,
    write_run,
)

from launcher.strategy import ZeroStage


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Ranks that are forked from one program, which imports the training stack once."""
    started = Nursery()
    yield started
    started.close()


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer, and data to train and to judge it with."""
    root = tmp_path_factory.mktemp("worker")
    make_model(root / "model")
    write_chats(root / "train.jsonl", 30)
    write_chats(root / "eval.jsonl", 8)
    return root


@pytest.fixture(scope="session")
def chat_run(nursery: Nursery, workplace: Path) -> Callable[[ZeroStage], Outcome]:
    """Return a function that trains on two ranks at a ZeRO stage, once each.

    ZeRO-2 is started by DeepSpeed's own launcher; the ranks of the others are forked.
    """
    done: dict[ZeroStage, Outcome] = {}

    def run(stage: ZeroStage) -> Outcome:
        if stage not in done:
            recipe = f"""
model: {{name_or_path: {workplace / "model"}, precision: fp32}}
method: lora
max_seq_len: 128
data: {{path: {workplace / "train.jsonl"}, eval_path: {workplace / "eval.jsonl"}}}
optim:
  {{global_batch_size: 8, max_steps: {NUM_STEPS}, learning_rate: 0.02, warmup_ratio: 0.0,
    weight_decay: 0.1, save_steps: 3, save_total_limit: null}}
lora: {{r: 8, alpha: 16}}
"""
            strategy = small_buckets(
                zero_stage=stage, micro_batch_size_per_gpu=2, gradient_accumulation_steps=2
            )
            folder = workplace / f"zero{stage}"
            write_run(folder, recipe, strategy, world_size=2)
            if stage == 2:
                prepared = tokenize_data(folder)
                assert prepared.returncode == 0, prepared.stderr
                done[stage] = train(folder)
            else:
                nursery.tokenize(folder)
                done[stage] = nursery.train(folder)
        return done[stage]

    return run
