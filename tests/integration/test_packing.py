"""Packed examples give what they give alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from worker_runs import SMALL_CONFIG, VOCAB_SIZE, Nursery, make_model, small_buckets, write_run

from launcher.resolve import PACKABLE
from launcher.worker.batches import PackedRows, RightPadding
from launcher.worker.packing import pack
from launcher.worker.tokenization import IGNORE_INDEX

pytestmark = pytest.mark.integration

# Of the architectures in the catalogue.
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "phi": {"num_key_value_heads": 4},
    "phi3": {"num_key_value_heads": 4, "sliding_window": 8},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {
        "head_dim": 8,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "num_experts_per_tok": 2,
    },
    "gemma2": {"head_dim": 8, "sliding_window": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8},
    "gpt_neox": {"num_key_value_heads": 4},
}
_WITHOUT_SDPA = {"gemma2"}  # its score cap


def examples() -> list[dict[str, Any]]:
    """Return nine examples of 3 to 30 tokens, of whose tokens about half count."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for length in (30, 17, 3, 11, 25, 8, 14, 5, 20):
        tokens = torch.randint(1, VOCAB_SIZE, (length,), generator=generator).tolist()
        labels = [IGNORE_INDEX] * (length // 2) + tokens[length // 2 :]
        made.append({"input_ids": tokens, "labels": labels})
    return made


def packed(members: list[dict[str, Any]]) -> dict[str, Any]:
    """Return several examples as one row, as the data program writes it."""
    return {
        "input_ids": [token for member in members for token in member["input_ids"]],
        "labels": [label for member in members for label in member["labels"]],
        "example_lengths": [len(member["input_ids"]) for member in members],
    }


def small_model(model_type: str, *, attention: str = "sdpa") -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**SMALL_CONFIG, **_ARCHITECTURES[model_type]}
    config = AutoConfig.for_model(model_type, **settings)
    config.use_cache = False  # as transformers' trainer sets it
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def loss_and_gradient(model: Any, batches: list[dict[str, torch.Tensor]]) -> tuple[float, Any]:
    """Return what a step over all batches gives, its loss a mean over all tokens that count."""
    num_items = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(**batch, num_items_in_batch=num_items).loss
        loss.backward()
        total += loss.item()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return total, gradient


def test_every_architecture_that_may_be_packed_is_compared() -> None:
    assert set(_ARCHITECTURES) == PACKABLE


@pytest.mark.parametrize(
    ("model_type", "attention"),
    [
        (model_type, attention)
        for model_type in _ARCHITECTURES
        for attention in ("sdpa", "eager")
        if attention == "eager" or model_type not in _WITHOUT_SDPA
    ],
)
def test_packing_gives_the_loss_and_gradient_of_the_same_examples_alone(
    model_type: str, attention: str
) -> None:
    model = small_model(model_type, attention=attention)
    alone = [RightPadding(pad_token_id=0)([example]) for example in examples()]
    rows = [
        packed([examples()[i] for i in members])
        for members in pack([len(e["input_ids"]) for e in examples()], 40)
    ]
    assert len(rows) < len(alone)
    collate = PackedRows(pad_token_id=0, is_one_row=False)
    together = [collate(rows[:2]), collate(rows[2:])]
    loss, gradient = loss_and_gradient(model, alone)
    packed_loss, packed_gradient = loss_and_gradient(model, together)
    assert packed_loss == pytest.approx(loss, abs=1e-5)
    torch.testing.assert_close(packed_gradient, gradient, rtol=1e-3, atol=1e-6)


def test_two_ranks_with_packing_have_the_losses_of_two_ranks_without(
    nursery: Nursery, tmp_path: Path
) -> None:
    make_model(tmp_path / "model")
    # With the end token 60, 36 and 20 tokens, four times each: four rows of 128, by hand.
    texts = [chr(97 + i) * (length - 1) for i in range(4) for length in (60, 36, 20)]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    losses = {}
    for packing, batch in (("false", 12), ("true", 4)):
        recipe = f"""
model: {{name_or_path: {tmp_path / "model"}, precision: fp32}}
method: full
max_seq_len: 128
data: {{path: {tmp_path / "train.jsonl"}, packing: {packing}}}
optim: {{global_batch_size: {batch}, max_steps: 4, learning_rate: 0.01}}
"""
        # Every step sees all examples: once in batches of six, once of two rows.
        strategy = small_buckets(
            zero_stage=2, micro_batch_size_per_gpu=batch // 4, gradient_accumulation_steps=2
        )
        folder = write_run(tmp_path / packing, recipe, strategy, world_size=2)
        nursery.tokenize(folder)
        outcome = nursery.train(folder)
        assert outcome.returncode == 0, outcome.stderr
        losses[packing] = outcome.losses
    assert len(losses["false"]) == 4
    assert losses["false"][-1] < losses["false"][0] - 0.5
    assert losses["true"] == pytest.approx(losses["false"], abs=1e-5)
