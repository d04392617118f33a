"""Every method, ZeRO stage and offload trains on two ranks, and to the same losses.

The model is tiny and random; the text is real: docstrings of Python's standard library. Where a
combination cannot be trained on a processor: paged optimizers and Liger's kernels are CUDA code,
fp16 is refused by DeepSpeed there, and so are the fused attention kernels that are pinned on a
GPU; benchmarks/trainer_h100.yaml has those.
"""

from __future__ import annotations

import inspect
import json
import shutil
import string
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from worker_runs import Nursery, Outcome, make_model, small_buckets, write_run

from launcher import run_dir
from launcher.strategy import Checkpointing, Loss, Offload, Optimizer

pytestmark = pytest.mark.integration

NUM_STEPS = 6
METHODS = ("full", "lora", "qlora")
LEARNING_RATE = {"full": 0.005, "lora": 0.01, "qlora": 0.01}
HOST = {"offload_optimizer": Offload.cpu}
STAGES: dict[str, dict[str, Any]] = {
    "zero-0": {"zero_stage": 0},
    "zero-1": {"zero_stage": 1},
    "zero-2": {"zero_stage": 2},
    "zero-3": {"zero_stage": 3},
    "zero-1 optimizer offload": {"zero_stage": 1, **HOST},
    "zero-2 optimizer offload": {"zero_stage": 2, **HOST},
    "zero-3 optimizer offload": {"zero_stage": 3, **HOST},
    "zero-3 both offloads": {"zero_stage": 3, **HOST, "offload_param": Offload.cpu},
}
Train = Callable[..., Outcome]


def write_docstrings(path: Path) -> Path:
    """Write the docstrings of a few modules as plain text records."""
    members = [value for module in (textwrap, string, json) for value in vars(module).values()]
    texts = [text for value in members if (text := inspect.getdoc(value)) and len(text) > 80]
    lines = [json.dumps({"text": " ".join(text.split())[:120]}) for text in sorted(set(texts))]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def train(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Return a function that trains on two ranks, once for the same arguments."""
    root = tmp_path_factory.mktemp("methods")
    make_model(root / "model")
    write_docstrings(root / "train.jsonl")
    done: dict[str, Outcome] = {}

    def run(
        method: str, *, more: str = "", precision: str = "fp32", model: str = "", **strategy: Any
    ) -> Outcome:
        key = repr((method, more, precision, model, sorted(strategy.items())))
        if key in done:
            return done[key]
        recipe = f"""
model: {{name_or_path: {root / "model"}, precision: {precision}{model}}}
method: {method}
max_seq_len: 128
data: {{path: {root / "train.jsonl"}}}
optim:
  {{global_batch_size: 8, max_steps: {NUM_STEPS}, learning_rate: {LEARNING_RATE[method]}}}
{more}
"""
        folder = root / str(len(done))
        chosen = small_buckets(
            micro_batch_size_per_gpu=2, gradient_accumulation_steps=2, **strategy
        )
        write_run(folder, recipe, chosen, world_size=2)
        if done:
            shutil.copytree(root / "0" / "data", folder / "data")
        else:
            nursery.tokenize(folder)
        done[key] = nursery.train(folder)
        return done[key]

    return run


def assert_learns(outcome: Outcome) -> None:
    assert outcome.returncode == 0, outcome.stderr
    assert run_dir.read_status(outcome.folder).state == "finished"
    assert len(outcome.losses) == NUM_STEPS
    # A model that knows nothing has ln(300) = 5.70.
    assert outcome.losses[0] == pytest.approx(5.70, abs=0.1)
    assert outcome.losses[-1] < outcome.losses[0] - 0.15


# Adapters take the same ways to the host as whole models; one of each is quick enough.
SLOW = {("lora", stage) for stage in STAGES if "optimizer offload" in stage} | {
    ("qlora", stage) for stage in STAGES if "zero-2" not in stage and "offload" in stage
}


@pytest.mark.parametrize(
    ("method", "stage"),
    [
        pytest.param(method, stage, marks=[pytest.mark.slow] if (method, stage) in SLOW else [])
        for method in METHODS
        for stage in STAGES
    ],
)
def test_every_stage_and_offload_learns_as_training_without_zero_does(
    train: Train, method: str, stage: str
) -> None:
    outcome = train(method, **STAGES[stage])
    assert_learns(outcome)
    # Partitions are summed in another order: the last bits of fp32 differ.
    assert outcome.losses == pytest.approx(train(method, zero_stage=0).losses, abs=2e-4)


DORA = "lora: {use_dora: true}"
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "DoRA, ZeRO-2": ("lora", {"more": DORA, "zero_stage": 2}),
    "DoRA, ZeRO-3": ("lora", {"more": DORA, "zero_stage": 3}),
    "DoRA on nf4, ZeRO-2": ("qlora", {"more": DORA, "zero_stage": 2}),
    "DoRA on nf4, ZeRO-3": ("qlora", {"more": DORA, "zero_stage": 3}),
    "rsLoRA on attention with dropout": (
        "lora",
        {
            "more": "lora: {use_rslora: true, dropout: 0.1, target_modules: [attention]}",
            "zero_stage": 3,
        },
    ),
    "LoRA on named modules": (
        "lora",
        {"more": "lora: {r: 8, alpha: 64, target_modules: [q_proj, down_proj]}", "zero_stage": 2},
    ),
    "int8": ("qlora", {"more": "quantization: {kind: int8}", "zero_stage": 2}),
    "nf4 without double quantization, ZeRO-3": (
        "qlora",
        {"more": "quantization: {double_quant: false}", "zero_stage": 3},
    ),
    "nf4 in bf16, ZeRO-3": ("qlora", {"precision": "bf16", "zero_stage": 3}),
    "8-bit AdamW, ZeRO-2": ("full", {"optimizer": Optimizer.adamw_8bit, "zero_stage": 2}),
    "chunked loss and offloaded checkpoints, ZeRO-3": (
        "lora",
        {
            "loss": Loss.chunked,
            "gradient_checkpointing": Checkpointing.cpu_offload,
            "zero_stage": 3,
        },
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_learns(train: Train, variant: str) -> None:
    method, choices = VARIANTS[variant]
    assert_learns(train(method, **choices))


def test_dora_on_4_bit_weights_has_the_same_losses_whether_they_are_sharded(train: Train) -> None:
    whole, sharded = (train("qlora", more=DORA, zero_stage=stage) for stage in (2, 3))
    assert sharded.losses == pytest.approx(whole.losses, abs=2e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("stage", [2, 3])
def test_dora_trains_its_magnitudes(train: Train, stage: int) -> None:
    from safetensors.torch import load_file

    folder = train("lora", more=DORA, zero_stage=stage).folder / "checkpoints" / "final"
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["use_dora"] is True
    weights = load_file(folder / "adapter_model.safetensors")
    base = load_file(folder.parents[2] / "model" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    trained = weights[f"base_model.model.{name}.lora_magnitude_vector"]
    # It starts as the norm of each row of the weight (arXiv:2402.09353, section 4.1).
    initial = base[f"{name}.weight"].norm(dim=1)
    assert trained.shape == initial.shape
    assert 0 < (trained - initial).abs().max() < 0.2


def test_the_targets_of_a_recipe_are_the_modules_that_carry_adapters(train: Train) -> None:
    named = train("lora", **VARIANTS["LoRA on named modules"][1])
    settings = json.loads(
        (named.folder / "checkpoints" / "final" / "adapter_config.json").read_text()
    )
    assert (settings["r"], settings["lora_alpha"]) == (8, 64)
    assert sorted(settings["target_modules"]) == ["down_proj", "q_proj"]
    attention = train("lora", **VARIANTS["rsLoRA on attention with dropout"][1])
    settings = json.loads(
        (attention.folder / "checkpoints" / "final" / "adapter_config.json").read_text()
    )
    assert sorted(settings["target_modules"]) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert (settings["use_rslora"], settings["lora_dropout"]) == (True, 0.1)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("stage", ["zero-1", "zero-2", "zero-3", "zero-3 both offloads"])
def test_a_full_fine_tune_is_exported_whole_from_every_stage(
    train: Train, tmp_path: Path, stage: str
) -> None:
    from safetensors.torch import load_file

    from launcher.worker.export import export_run

    export = export_run(train("full", **STAGES[stage]).folder, tmp_path / "out", kind="full")
    # Two layers of nine tensors, embedding, last norm and head; 112,448 numbers (see
    # test_worker_train.py).
    assert export["tensors"]["num_tensors"] == 2 * 9 + 3
    assert export["tensors"]["num_params"] == 112_448
    assert export["logits"]["from_checkpoint"] == 0.0
    plain = train("full", zero_stage=0).folder / "checkpoints" / "final" / "model.safetensors"
    trained = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in load_file(plain).items():
        assert (trained[name] - value).abs().max() < 2e-3, name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("method", "choices"),
    [
        ("qlora", STAGES["zero-3"]),
        VARIANTS["DoRA, ZeRO-3"],
        VARIANTS["rsLoRA on attention with dropout"],
    ],
    ids=["QLoRA", "DoRA", "rsLoRA"],
)
def test_an_adapter_that_zero_3_trained_is_merged(
    train: Train, tmp_path: Path, method: str, choices: dict[str, Any]
) -> None:
    from launcher.worker.export import export_run

    export = export_run(train(method, **choices).folder, tmp_path / "out", kind="merged")
    assert export["logits"]["from_base"] > 0.01
    assert export["logits"]["merged_from_adapter"] < 1e-4
