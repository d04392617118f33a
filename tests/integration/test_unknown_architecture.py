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

from launcher.config_facts import SUPPORTED_MODEL_TYPES
from launcher.errors import ModelError
from launcher.hardware import default_cluster, find_gpu
from launcher.model_spec import spec_from_config, spec_from_facts
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
    # Experts in every layer.
    "olmoe": {
        "model_type": "olmoe", **WIDTHS, "num_key_value_heads": 8, "intermediate_size": 256,
        "num_experts": 8, "num_experts_per_tok": 2, "eos_token_id": None,
    },
    # The first two layers dense, the others with a shared expert beside those that are chosen from
    # groups; keys and values from one narrow tensor, values narrower than keys.
    "deepseek_v3": {
        "model_type": "deepseek_v3", **WIDTHS, "num_key_value_heads": 8, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
        "moe_intermediate_size": 256, "first_k_dense_replace": 2, "q_lora_rank": 128,
        "kv_lora_rank": 64, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
    },
    # Biased experts, attention with sinks, in a window in every other layer.
    "gpt_oss": {
        "model_type": "gpt_oss", **WIDTHS, "num_key_value_heads": 2, "intermediate_size": 256,
        "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 64, "sliding_window": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "eos_token_id": None,
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
    "olmo2 LoRA eager": ("olmo2", *EAGER),
    "stablelm LoRA ZeRO-3": ("stablelm", *ZERO_3),
    "starcoder2 LoRA ZeRO-3": ("starcoder2", *ZERO_3),
    "gpt2 full": ("gpt2", *FULL),
    "olmoe full": ("olmoe", *FULL),
    # Not under ZeRO-3, whose fake gathers bring numbers that no router can do anything with.
    "deepseek_v3 full": ("deepseek_v3", Method.full, 2, Checkpointing.full, Attention.sdpa),
    "gpt_oss LoRA eager": ("gpt_oss", *EAGER),
}
CUDA_ONLY = {"cuBLAS workspace"}


def request(case: str) -> TraceRequest:
    name, method, stage, checkpointing, attention = CASES[case]
    answer = traced(name, method, attention)
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
def traced(name: str, method: Method, attention: Attention) -> dict[str, Any]:
    return run_request(
        {
            "hf_config": CONFIGS[name],
            "max_seq_len": TOKENS,
            "precision": "bf16",
            "lora": None if method is Method.full else asdict(LORA),
            "attentions": ["eager" if attention is Attention.eager else "fused"],
            "is_frozen_and_plain": method is Method.lora,
        }
    )


@functools.cache
def engine() -> dict[str, dict[str, Any]]:
    """Return what the real engine says of every case."""
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
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    return dict(zip(CASES, answers, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_weights_of_an_unknown_architecture_are_exact(name: str) -> None:
    from launcher.worker.model_facts import facts_of, whole_model

    real = whole_model(CONFIGS[name])
    model = spec_from_facts(facts_of(real), name=name)
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
    found = engine()[case]
    measured = max(found["phases"][name] for name in ("forward", "loss", "backward", "step"))
    assert predicted == pytest.approx(measured, rel=0.05)
    assert found["num_trainable_params"] == made.workload.num_trainable_params


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "llama4_text"])
def test_adapters_of_all_linear_layers_leave_fused_experts_alone(name: str) -> None:
    """PEFT 0.21's own all-linear trains experts of the first three, by changes of whole tensors."""
    from launcher.worker.model_facts import expert_names, facts_of, whole_model
    from launcher.worker.trace_model import add_adapters

    config = {
        **WIDTHS, "num_local_experts": 4, "num_experts": 4, "num_key_value_heads": 8,
        "num_hidden_layers": 2, "mlp_only_layers": [1], "head_dim": 64, "model_type": name,
    }  # fmt: skip
    real = whole_model(CONFIGS.get(name, config))
    is_known = name in SUPPORTED_MODEL_TYPES
    model = (
        spec_from_config(config, name=name)
        if is_known
        else spec_from_facts(facts_of(real), name=name)
    )
    work = Workload(model=model, method=Method.lora, max_seq_len=8, global_batch_size=1, lora=LORA)
    adapted = add_adapters(real, LORA, scale=1)
    trained = {name: p.numel() for name, p in adapted.named_parameters() if p.requires_grad}
    assert not any("experts.lora" in name or "router" in name for name in trained)
    assert sum(trained.values()) == work.num_trainable_params
    assert sorted(model.expert_names) == expert_names(real)


def test_a_model_of_more_than_text_is_planned_where_its_language_model_is_trained_alone() -> None:
    text = {**WIDTHS, "model_type": "llama4_text", "num_local_experts": 4, "head_dim": 64}
    answer = run_request(
        {
            "hf_config": {"model_type": "llama4", "text_config": text},
            "max_seq_len": TOKENS,
            "precision": "bf16",
            "lora": None,
            "attentions": ["fused"],
            "is_frozen_and_plain": False,
        }
    )
    assert answer["facts"]["model_type"] == "llama4_text"
    assert answer["facts"]["num_moe_layers"] == WIDTHS["num_hidden_layers"]


def test_a_model_whose_pictures_are_loaded_too_is_refused() -> None:
    config = {"model_type": "llava", "text_config": {"model_type": "llama", **WIDTHS}}
    with pytest.raises(ModelError, match="more than text"):
        run_request({"hf_config": config})


def test_the_command_plans_a_folder_with_an_unknown_architecture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["olmoe"]), encoding="utf-8")
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
    assert plan["model"]["model_type"] == "olmoe"
    assert plan["fits"]
