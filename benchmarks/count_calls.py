"""Count what one layer makes the host do in a micro-step: the numbers behind predict/host_work.py.

    python benchmarks/count_calls.py > benchmarks/count_calls.jsonl

DeepSpeed's real engine trains tiny models of the same structure on this processor, with two and
with three layers; the difference is one layer's. Operations are counted below autograd, where a
GPU's would be launched; views are not among them. One JSON object a line, of one micro-step.
"""

from __future__ import annotations

import collections
import json
import os
import sys
import warnings
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from importlib import import_module
from importlib.metadata import version
from typing import Any
from unittest.mock import patch

from launcher.model_source import load_catalogue_entry
from launcher.model_spec import spec_from_config
from launcher.strategy import Attention, Checkpointing, Method, Precision, Strategy, ZeroKnobs
from launcher.workload import LoraSpec, Workload

CASES: tuple[dict[str, Any], ...] = (
    {"model": "llama3.2-1b"},
    {"model": "llama3.2-1b", "checkpointing": "full"},
    {"model": "llama3.2-1b", "attention": "eager"},
    {"model": "llama3.2-1b", "precision": "fp32"},
    {"model": "llama3.2-1b", "zero_stage": 3},
    {"model": "llama3.2-1b", "zero_stage": 3, "checkpointing": "full"},
    {"model": "llama3.2-1b", "zero_stage": 3, "method": "lora"},
    {"model": "qwen3-0.6b", "zero_stage": 3},
    {"model": "gemma3-1b", "zero_stage": 3},
    {"model": "phi-2", "zero_stage": 3},
    {"model": "phi-3-mini-4k", "zero_stage": 3},
    {"model": "pythia-6.9b", "zero_stage": 3},
    {"model": "pythia-6.9b", "zero_stage": 3, "method": "lora", "checkpointing": "full"},
    {"model": "falcon-7b", "zero_stage": 3},
)
_VIEWS = frozenset({
    "view", "t", "transpose", "slice", "unsqueeze", "expand", "detach", "alias", "as_strided",
    "_unsafe_view", "permute", "select", "split", "narrow", "squeeze", "unbind", "empty",
    "split_with_sizes", "_reshape_alias", "chunk", "empty_like", "new_empty", "empty_strided",
    "new_empty_strided", "set_", "resize_", "_local_scalar_dense", "is_pinned",
})  # fmt: skip
"""Calls that start no kernel; ``_local_scalar_dense`` waits for one."""
_SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "vocab_size": 256,
          "ffn_hidden_size": 256, "num_attention_heads": 4}  # fmt: skip
_TOKENS = 32


def tiny_config(config: Mapping[str, Any], *, num_layers: int) -> dict[str, Any]:
    """Return a configuration of the same structure whose widths are tiny."""
    sizes: dict[str, Any] = {name: size for name, size in _SIZES.items() if name in config}
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    if "num_key_value_heads" in config:
        is_whole = heads == config["num_attention_heads"]
        sizes["num_key_value_heads"] = 4 if is_whole else min(heads, 2)
    if config.get("layer_types"):
        sizes["layer_types"] = config["layer_types"][:num_layers]
    ends = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    return {**config, **sizes, **ends, "num_hidden_layers": num_layers}


def count(case: Mapping[str, Any], *, num_layers: int) -> dict[str, int]:
    """Train a tiny model for three steps and return the counts of the last."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    counts: collections.Counter[str] = collections.Counter()
    phase = "forward"

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if function.overloadpacket.__name__ not in _VIEWS:
                counts[f"{phase}_operations"] += 1
            return function(*args, **(kwargs or {}))

    with ExitStack() as stack:
        engine = _engine(case, stack, num_layers=num_layers)
        from deepspeed.runtime.zero.partitioned_param_coordinator import (
            PartitionedParameterCoordinator,
        )

        fetch = PartitionedParameterCoordinator.fetch_sub_module

        def counted(*args: Any, **kwargs: Any) -> Any:
            counts["fetches"] += 1
            return fetch(*args, **kwargs)

        patched = patch.object(PartitionedParameterCoordinator, "fetch_sub_module", counted)
        stack.enter_context(patched)
        stack.enter_context(Operations())
        ids = torch.randint(0, 250, (1, _TOKENS))
        for _ in range(3):
            counts.clear()
            phase = "forward"
            loss = engine(input_ids=ids, labels=ids).loss
            phase = "backward"
            engine.backward(loss)
            phase = "step"
            engine.step()
        counts["trained_tensors"] = sum(p.requires_grad for p in engine.module.parameters())
    return dict(counts)


def _engine(case: Mapping[str, Any], stack: ExitStack, *, num_layers: int) -> Any:
    """Return DeepSpeed's engine around the tiny model, as one rank of one."""
    import deepspeed
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from launcher.worker import model as worker_model
    from launcher.worker.trace_config import deepspeed_config, make_optimizer
    from launcher.worker.trace_engine import fake_rank
    from launcher.worker.trace_model import TORCH_DTYPE, add_adapters

    stack.enter_context(fake_rank(0, 1))
    raw = load_catalogue_entry(case["model"]).config
    workload = Workload(
        model=spec_from_config(raw, name=case["model"]),
        method=Method(case.get("method", "full")),
        precision=Precision(case.get("precision", "bf16")),
        max_seq_len=_TOKENS,
        global_batch_size=1,
        lora=LoraSpec(r=4),
    )
    strategy = Strategy(
        zero_stage=case.get("zero_stage", 2),
        gradient_checkpointing=Checkpointing(case.get("checkpointing", "none")),
        attention=Attention(case.get("attention", "sdpa")),
        zero=ZeroKnobs(
            reduce_bucket_size=10**7,
            stage3_param_persistence_threshold=200,
            stage3_prefetch_bucket_size=30_000,
        ),
    )
    settings = deepspeed_config(workload, strategy, scale=1, raw_deepspeed={})
    is_partitioned = strategy.zero_stage == 3
    birth = deepspeed.zero.Init(config_dict_or_path=settings) if is_partitioned else nullcontext()
    config = AutoConfig.for_model(**tiny_config(raw, num_layers=num_layers))
    config.use_cache = False
    config._attn_implementation = strategy.attention.value
    with birth:
        base = AutoModelForCausalLM.from_config(config, dtype=TORCH_DTYPE[workload.precision])
    base.train()
    is_lora = workload.method is Method.lora
    model = add_adapters(base, workload.lora, scale=1) if is_lora else base
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        worker_model.enable_checkpointing(
            base, strategy.gradient_checkpointing, device=torch.device("cpu")
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(trained, strategy)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def count_in_child(case: Mapping[str, Any], *, num_layers: int) -> dict[str, int]:
    """Count in a forked process: an engine leaves hooks and a process group behind."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)
        with os.fdopen(writer, "w") as stream:
            json.dump(count(case, num_layers=num_layers), stream)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    if os.waitpid(child, 0)[1]:
        raise SystemExit(f"counting failed: {case}")
    return dict(json.loads(text))


def main() -> None:
    """Print one line for each case."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    for name in ("launcher.worker.trace_engine", "deepspeed", "peft", "torch._dynamo"):
        import_module(name)
    names = ("deepspeed", "peft", "torch", "transformers")
    print(json.dumps({"versions": {name: version(name) for name in names}}))
    for case in CASES:
        two, three = (count_in_child(case, num_layers=layers) for layers in (2, 3))
        layer = {name: three[name] - two.get(name, 0) for name in sorted(three)}
        print(json.dumps({**case, "layer": layer}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
