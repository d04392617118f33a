"""Draw the cases of blind_h100.yaml: a blind test of the predictor that nobody has chosen.

    python benchmarks/draw_blind.py > benchmarks/blind_h100.yaml

Every dimension is drawn at random with a fixed seed. A draw is put back when zerofit refuses it,
predicts that it does not fit, that a step takes over 3 s or the host needs over 100 GB, or when
it needs bitsandbytes and enough such cases were drawn (their start-up is long); its method is
kept, so that full fine-tuning does not give way to what always fits. None of the lengths is one
of h100.yaml, whose runs the constants were fitted on.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import yaml

from launcher.errors import LauncherError
from launcher.model_source import catalogue_names, resolve_model
from launcher.prepare import prepare
from launcher.recipe import parse_recipe

SEED = 20261122
NUM_CASES = 24
MAX_COLD_CASES = 8
PARAMS = (0.1e9, 8.5e9)
MAX_STEP_SECONDS = 3.0
MAX_HOST_BYTES = 100e9
LENGTHS = (384, 640, 768, 1280, 1536, 3072, 5120, 6144, 10240, 12288)


def weighted(draw: random.Random, **weights: float) -> str:
    """Return one of the names by its weight."""
    return draw.choices(list(weights), list(weights.values()))[0]


def draw_case(draw: random.Random, models: list[str], *, method: str) -> dict[str, Any]:
    """Return a recipe with every dimension but the method drawn, as JSON values."""
    stage = int(weighted(draw, **{"0": 0.1, "1": 0.25, "2": 0.35, "3": 0.3}))
    loss = weighted(draw, full=0.45, chunked=0.25, liger=0.3)
    micro_batch, accumulation = draw.choice((1, 2, 3, 4, 6)), draw.choice((1, 1, 1, 2, 3))
    offload = weighted(draw, none=0.7, cpu=0.3) if stage else "none"
    offload_param = weighted(draw, none=0.6, cpu=0.4) if stage == 3 and offload == "cpu" else "none"
    optimizer = "adamw"
    if offload == "none":
        optimizer = weighted(
            draw, adamw=0.6, adamw_8bit=0.12, paged_adamw_8bit=0.12, adamw_foreach=0.1,
            adamw_single=0.06,
        )  # fmt: skip
    case: dict[str, Any] = {
        "model": {
            "name_or_path": draw.choice(models),
            "precision": weighted(draw, bf16=0.75, fp16=0.2, fp32=0.05),
        },
        "method": method,
        "max_seq_len": draw.choice(LENGTHS),
        "optim": {"global_batch_size": micro_batch * accumulation},
        "strategy": {
            "zero_stage": stage,
            "gradient_checkpointing": weighted(draw, none=0.35, full=0.45, cpu_offload=0.2),
            "attention": weighted(draw, sdpa=0.85, eager=0.15),
            "loss": loss,
            "liger_kernels": loss == "liger" or draw.random() < 0.15,
            "optimizer": optimizer,
            "micro_batch_size_per_gpu": micro_batch,
            "offload_optimizer": offload,
            "offload_param": offload_param,
        },
    }
    if method != "full":
        targets = draw.choice((["all-linear"], ["attention"], ["q_proj", "v_proj"]))
        rank = draw.choice((4, 8, 32, 64, 128))
        case["lora"] = {
            "r": rank, "alpha": 2 * rank, "dropout": draw.choice((0.0, 0.1)),
            "target_modules": targets,
        }  # fmt: skip
    if method == "qlora":
        kind = draw.choice(("nf4", "nf4", "int8"))
        case["quantization"] = {"kind": kind, "double_quant": draw.random() < 0.5}
    return case


def name_of(case: dict[str, Any]) -> str:
    """Return a name that says the main choices."""
    strategy = case["strategy"]
    parts = [
        case["model"]["name_or_path"], case["method"], f"z{strategy['zero_stage']}",
        f"{case['max_seq_len']}x{strategy['micro_batch_size_per_gpu']}",
    ]  # fmt: skip
    plain = {
        "gradient_checkpointing": "none", "attention": "sdpa", "loss": "full",
        "optimizer": "adamw", "offload_optimizer": "none", "offload_param": "none",
    }  # fmt: skip
    words = {"full": "gc", "cpu_offload": "gc-cpu"}
    for key, usual in plain.items():
        if (value := strategy[key]) != usual:
            word = words[value] if key == "gradient_checkpointing" else value
            parts.append(f"off-{key[8:11]}" if key.startswith("offload") else word)
    if case["model"]["precision"] != "bf16":
        parts.append(case["model"]["precision"])
    return "-".join(parts).replace("_", "")


def is_usable(case: dict[str, Any]) -> bool:
    """Return whether zerofit plans the case, and expects it to fit and to be short."""
    text = yaml.safe_dump(case)
    overrides = ["cluster.gpu=H100-80GB", "cluster.gpus_per_node=1", "model.random_weights=true"]
    try:
        plan = prepare(parse_recipe(text, source="draw", overrides=overrides), source="draw").plan
    except LauncherError:
        return False
    return (
        plan.fits
        and plan.time.step_seconds < MAX_STEP_SECONDS
        and plan.memory.host_bytes_per_node < MAX_HOST_BYTES
    )


def main() -> None:
    """Print the sweep file."""
    sizes = {name: resolve_model(name)[0].num_params for name in catalogue_names()}
    models = sorted(name for name, size in sizes.items() if PARAMS[0] <= size <= PARAMS[1])
    draw = random.Random(SEED)  # noqa: S311  a draw that can be repeated is what is wanted
    cases: dict[str, dict[str, Any]] = {}
    num_cold = num_drawn = 0
    method = ""
    while len(cases) < NUM_CASES:
        num_drawn += 1
        method = method or weighted(draw, full=0.35, lora=0.45, qlora=0.2)
        case = draw_case(draw, models, method=method)
        is_cold = case["method"] == "qlora" or "8bit" in case["strategy"]["optimizer"]
        if (is_cold and num_cold == MAX_COLD_CASES) or not is_usable(case):
            if is_cold and num_cold == MAX_COLD_CASES and method == "qlora":
                method = ""
            continue
        method = ""
        num_cold += is_cold
        cases[name_of(case)] = case
    print("# Written by benchmarks/draw_blind.py: a random draw, made before any of it was run.")
    print(f"# Seed {SEED}; {num_drawn} draws for {len(cases)} cases of {len(models)} models.")
    content = {
        "defaults": {
            "model": {"random_weights": True},
            "cluster": {"gpus_per_node": 1, "host_memory_gib": 128},
            "optim": {"max_steps": 6},
        },
        "cases": [{"name": name, **case} for name, case in cases.items()],
    }
    yaml.safe_dump(content, sys.stdout, sort_keys=False, default_flow_style=None, width=100)


if __name__ == "__main__":
    main()
