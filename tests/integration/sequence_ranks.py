"""Ranks that compute a loss and its gradient on parts of sequences, and compare with the whole.

For each kind of model and both sizes of a group, ``results-N.json`` of the folder gets the largest
differences that rank N has found.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from worker_runs import SMALL_CONFIG, VOCAB_SIZE

from launcher.errors import ModelError
from launcher.strategy import Attention
from launcher.worker.batches import RightPadding
from launcher.worker.loss import use_chunked_loss
from launcher.worker.sequence import CutSequences, SequenceGroup
from launcher.worker.tokenization import IGNORE_INDEX

# Four heads and two key heads: groups of four ranks must copy each key head once.
SMALL = {**SMALL_CONFIG, "use_cache": False}  # as transformers' trainer sets it
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "phi": {"num_key_value_heads": 4},
    "phi3": {"num_key_value_heads": 4, "sliding_window": None},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {
        "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2
    },
    "gemma3_text": {"head_dim": 8, "sliding_window": 64},
    "gpt_neox": {"num_key_value_heads": 4},
}  # fmt: skip
# A window that the whole sequence passes and a rank's part does not; own calls of the kernel;
# a score cap, which needs eager attention.
REFUSED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 16},
    "falcon": {},
    "gemma2": {"head_dim": 8},
    "llama": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
    },
    "qwen2": {"num_attention_heads": 6, "hidden_size": 48, "num_key_value_heads": 3},
}


def main(arguments: Sequence[str]) -> int:
    """Compare on this rank and write down what was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", type=Path, required=True)
    folder = parser.parse_args(arguments).run_dir
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    found = {}
    for size in (2, 4):
        group = SequenceGroup(size)
        for model_type in ARCHITECTURES:
            found[f"{model_type} {size}"] = differences(model_type, group)
        found[f"chunked {size}"] = differences("llama", group, is_chunked=True)
    refused = {name: refusal(name, SequenceGroup(2)) for name in REFUSED}
    text = json.dumps({"differences": found, "refused": refused, "alone": alone(SequenceGroup(2))})
    (folder / f"results-{dist.get_rank()}.json").write_text(text)
    dist.barrier()
    dist.destroy_process_group()
    return 0


def differences(
    model_type: str, group: SequenceGroup, *, is_chunked: bool = False
) -> tuple[float, float]:
    """Return by how much the loss is off, and the gradient relative to its largest element."""
    model = small_model(model_type, ARCHITECTURES[model_type])
    if is_chunked:
        use_chunked_loss(model, max_tokens=2**24)
    batches = [examples(share) for share in range(group.num_groups)]
    padding = RightPadding(pad_token_id=0, multiple_of=group.size)
    whole = [padding(batch) for batch in batches]
    num_items = sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in whole)
    expected = [loss_and_gradient(model, batch, num_items) for batch in whole]
    with shared_attention(model, group):
        mine = CutSequences(padding, group)(batches[group.index])
        loss, gradient = loss_and_gradient(model, mine, num_items)
    dist.all_reduce(loss)
    dist.all_reduce(gradient)
    expected_gradient = sum(item[1] for item in expected)
    return (
        abs(float(loss) - sum(float(item[0]) for item in expected)),
        float((gradient - expected_gradient).abs().max() / expected_gradient.abs().max()),
    )


def alone(group: SequenceGroup) -> float:
    """Return by how much the loss of whole sequences is off while the exchange is paused."""
    model = small_model("llama", {})
    batch = RightPadding(pad_token_id=0)(examples(0))
    expected, _ = loss_and_gradient(model, batch, 10)
    with shared_attention(model, group), group.paused():
        found, _ = loss_and_gradient(model, batch, 10)
    return abs(float(found - expected))


def refusal(model_type: str, group: SequenceGroup) -> str:
    """Return with what words a model is refused, when it is made or in its first attention."""
    model = small_model(model_type, REFUSED[model_type])
    attention = Attention.eager if model_type == "gemma2" else Attention.sdpa
    padding = RightPadding(pad_token_id=0, multiple_of=group.size)
    try:
        with shared_attention(model, group, attention):
            loss_and_gradient(model, CutSequences(padding, group)(examples(0)), 10)
    except ModelError as error:
        return error.problem
    return ""


class shared_attention:  # noqa: N801 - reads as the context that it is
    """Share attention inside the context, and take the exchange off again."""

    def __init__(
        self, model: Any, group: SequenceGroup, attention: Attention = Attention.sdpa
    ) -> None:
        self._settings = model, group, attention

    def __enter__(self) -> None:
        model, group, attention = self._settings
        group.share_attention(model, attention)

    def __exit__(self, *_: object) -> None:
        ALL_ATTENTION_FUNCTIONS._local_mapping.pop("sdpa", None)


def small_model(model_type: str, changes: dict[str, Any]) -> Any:
    """Return a model of a few kB, the same on every rank."""
    config = AutoConfig.for_model(model_type, **{**SMALL, **changes})
    attention = "eager" if model_type == "gemma2" else "sdpa"
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def examples(share: int) -> list[dict[str, list[int]]]:
    """Return two sequences whose labels stand in the second half of one and the first of other."""
    generator = torch.Generator().manual_seed(share)
    made = []
    for length, counted in ((30, range(17, 28)), (21, range(2, 6))):
        tokens = torch.randint(1, VOCAB_SIZE, (length,), generator=generator).tolist()
        labels = [token if place in counted else IGNORE_INDEX for place, token in enumerate(tokens)]
        made.append({"input_ids": tokens, "labels": labels})
    return made


def loss_and_gradient(
    model: Any, batch: dict[str, torch.Tensor], num_items: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch's part of the mean loss over ``num_items`` tokens, and its gradient."""
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=num_items).loss
    loss.backward()
    gradient = torch.cat([
        torch.zeros_like(item).flatten() if item.grad is None else item.grad.flatten()
        for item in model.parameters()
    ])  # fmt: skip
    return loss.detach(), gradient
