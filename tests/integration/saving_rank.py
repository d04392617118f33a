"""One rank of two that hold a model in parts and save it; the nursery forks it."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from memory_above_start import AnonymousMemory
from transformers import LlamaConfig, LlamaForCausalLM

from launcher.worker.weight_files import save_model

CONFIG = {
    "vocab_size": 64, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 8,
}  # fmt: skip
FILE_BYTES = 20_000_000


def main(arguments: Sequence[str]) -> int:
    """Save a model of ZeRO-3 in files of 20 MB, and say how much memory that took."""
    folder = Path(arguments[1])
    _map_each_tensor()
    deepspeed.init_distributed("gloo", verbose=False)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 1000},
            "zero_allow_untested_optimizer": True,
        },
    )
    model.config.save_pretrained(folder / f"saved-{dist.get_rank()}")
    with AnonymousMemory() as memory:
        save_model(
            engine,
            folder / f"saved-{dist.get_rank()}",
            is_writer=dist.get_rank() == 0,
            file_bytes=FILE_BYTES,
        )
    (folder / f"peak-{dist.get_rank()}.json").write_text(json.dumps(memory.peak_bytes))
    # All parts are where training looks for them.
    loss = engine(input_ids=torch.ones(1, 4, dtype=torch.int64), labels=torch.ones(1, 4).long())
    engine.backward(loss.loss)
    engine.step()
    dist.barrier()
    dist.destroy_process_group()
    return 0


def _map_each_tensor() -> None:
    """Have malloc ask the system for each tensor, and hand it back.

    Otherwise tensors wander through holes of the heap that nothing has touched yet, and what a
    process holds grows by up to 60 MB that are not in use. Source: mallopt(3), M_MMAP_THRESHOLD.
    """
    assert ctypes.CDLL(None).mallopt(-3, 128 * 1024) == 1


def whole_model() -> LlamaForCausalLM:
    """Return what the ranks hold in parts, before they trained."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**CONFIG))
