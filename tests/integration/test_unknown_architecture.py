"""Architectures without formulas: traced, planned, and held against the real DeepSpeed engine."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from launcher.hardware import default_cluster, find_gpu
from launcher.model_spec import spec_from_facts
from launcher.predict.memory import estimate_memory
from launcher.strategy import Attention, Checkpointing, Method, Strategy, ZeroKnobs, ZeroStage
from launcher.traced_layer import traced_from_json
from launcher.worker.trace import TraceRequest, request_to_json
from launcher.worker.trace_architecture import run_request
from launcher.workload import LoraSpec, Workload

pytestmark = [
    pytest.mark.integration,
    # PEFT says that it corrects its own default for GPT-2's Conv1D.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning"),
]

TOKENS, RANKS, BATCH = 512, 4, 2
WIDTHS = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
}
CONFIGS: dict[str, dict[str, Any]] = {
    # Norms after attention and MLP, and of whole q and k.
    "olmo2": {"model_type": "olmo2", **WIDTHS},
    # LayerNorm, rotary embedding on a quarter of each head.
    "stablelm": {"model_type": "stablelm", **WIDTHS, "num_key_value_heads": 8},
    # Biases everywhere, a plain MLP, two key-value heads.
    "starcoder2": {"model_type": "starcoder2", **WIDTHS, "num_key_value_heads": 2},
    # Conv1D instead of Linear, learned positions, its own names for widths, tied embeddings.
    "gpt2": {
        "model_type": "gpt2", "n_embd": 512, "n_layer": 6, "n_head": 8, "n_positions": 1024,
        "vocab_size": 4096, "attn_pdrop": 0.0,
    },
}  # fmt: skip
LORA = LoraSpec(r=16)
# As transformers' "auto" for a hidden size of 512.
KNOBS = ZeroKnobs(
    reduce_bucket_size=262_144,
    stage3_prefetch_bucket_size=235_929,
    stage3_param_persistence_threshold=5120,
)
FULL = (Method.full, 2, Checkpointing.none, Attention.sdpa)
ZERO_3 = (Method.lora, 3, Checkpointing.none, Attention.sdpa)
EAGER = (Method.lora, 2, Checkpointing.full, Attention.eager)
CASES: dict[str, tuple[str, Method, ZeroStage, Checkpointing, Attention]] = {
    "olmo2 full": ("olmo2", *FULL),
    "olmo2 LoRA eager": ("olmo2", *EAGER),
    "stablelm full": ("stablelm", *FULL),
    "stablelm LoRA ZeRO-3": ("stablelm", *ZERO_3),
    "starcoder2 LoRA ZeRO-3": ("starcoder2", *ZERO_3),
    "gpt2 full": ("gpt2", *FULL),
    "gpt2 LoRA eager": ("gpt2", *EAGER),
}
CUDA_ONLY = {"cuBLAS workspace"}


def request(case: str) -> TraceRequest:
    name, method, stage, checkpointing, attention = CASES[case]
    answer = traced(name, method)
    return TraceRequest(
        hf_config=CONFIGS[name],
        workload=Workload(
            model=spec_from_facts(answer["facts"], name=name, traced=traced_from_json(answer)),
            method=method,
            max_seq_len=TOKENS,
            global_batch_size=RANKS * BATCH,
            lora=LORA,
        ),
        strategy=Strategy(
            zero_stage=stage,
            gradient_checkpointing=checkpointing,
            attention=attention,
            micro_batch_size_per_gpu=BATCH,
            zero=KNOBS,
        ),
        world_size=RANKS,
        scale=1,
    )


@functools.cache
def traced(name: str, method: Method) -> dict[str, Any]:
    return run_request(
        {
            "hf_config": CONFIGS[name],
            "max_seq_len": TOKENS,
            "precision": "bf16",
            "lora": None if method is Method.full else asdict(LORA),
            "attentions": ["fused", "eager"],
            "is_frozen_and_plain": method is Method.lora,
        }
    )


@functools.cache
def engine() -> dict[str, dict[str, int]]:
    """Return the real engine's bytes by phase, for every case."""
    lines = [json.dumps(request_to_json(request(case))) + "\n" for case in CASES]
    done = subprocess.run(
        [sys.executable, "-m", "launcher.worker.trace", "-"],
        input="".join(lines),
        capture_output=True,
        text=True,
        timeout=900,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    answers = [json.loads(line)["phases"] for line in done.stdout.splitlines()]
    return dict(zip(CASES, answers, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_weights_of_an_unknown_architecture_are_exact(name: str) -> None:
    from launcher.worker.model_facts import whole_model

    real = whole_model(CONFIGS[name])
    model = spec_from_facts(traced(name, Method.full)["facts"], name=name)
    assert model.num_params == sum(param.numel() for param in real.parameters())
    assert sum(weight.count for weight in model.weights) == len(list(real.parameters()))


@pytest.mark.parametrize("case", CASES)
def test_a_traced_architecture_is_planned_within_5_percent_of_the_engine(case: str) -> None:
    made = request(case)
    cluster = default_cluster(find_gpu("A100-80GB"), gpus_per_node=RANKS)
    estimate = estimate_memory(made.workload, made.strategy, cluster)
    predicted = max(
        sum(size for part, size in phase.components.items() if part not in CUDA_ONLY)
        for phase in estimate.phases
        if phase.phase in ("forward", "loss", "backward", "step")
    )
    measured = max(engine()[case][phase] for phase in ("forward", "loss", "backward", "step"))
    assert predicted == pytest.approx(measured, rel=0.05)


def test_the_command_plans_a_folder_with_an_unknown_architecture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["olmo2"]), encoding="utf-8")
    command = ["plan", "--model", str(tmp_path), "--gpu", "A100-80GB", "--max-seq-len", "512"]
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli", *command, "--method", "full", "--json"],
        capture_output=True,
        text=True,
        timeout=900,
        check=True,
    )
    plan = json.loads(done.stdout)
    assert plan["model"]["is_traced"]
    assert plan["model"]["model_type"] == "olmo2"
    assert plan["fits"]
