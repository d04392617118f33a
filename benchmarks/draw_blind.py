"""Draw the cases of a blind test of the predictor, so that nobody has chosen them.

    python benchmarks/draw_blind.py > benchmarks/blind_h100.yaml
    python benchmarks/draw_blind.py --draw second > benchmarks/blind2_h100.yaml
    python benchmarks/draw_blind.py --draw third > benchmarks/blind3_h100.yaml
    python benchmarks/draw_blind.py --draw fourth > benchmarks/blind4_h100.yaml
    python benchmarks/draw_blind.py --draw two-gpus > benchmarks/blind_h200x2.yaml

Every dimension is drawn at random with a fixed seed. A draw is put back when zerofit refuses it,
predicts that it does not fit, that a step takes over 3 s or the host needs over 100 GB (from the
third on: 2 s and 35 GB), or when it needs bitsandbytes and enough such cases were drawn (their
start is long); its method is kept, so that full fine-tuning does not give way to what always fits.
No length stands in h100.yaml, whose runs the constants were fitted on, or in an earlier draw, whose
misses were looked at. What fits depends on the predictor of the day, so the written file is the
record and not this program.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import dataclass
from typing import Any

import yaml

from launcher.errors import LauncherError
from launcher.model_source import catalogue_names, resolve_model
from launcher.prepare import prepare
from launcher.recipe import parse_recipe


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What one blind test draws from."""

    seed: int
    num_cases: int
    max_cold_cases: int
    params: tuple[float, float]
    lengths_tokens: tuple[int, ...]
    gpu: str = "H100-80GB"
    num_gpus: int = 1
    host_memory_gib: int = 128
    max_step_seconds: float = 3.0
    max_host_bytes: float = 100e9
    num_steps: int = 6


DRAWS = {
    "first": Draw(
        seed=20261122, num_cases=24, max_cold_cases=8, params=(0.1e9, 8.5e9),
        lengths_tokens=(384, 640, 768, 1280, 1536, 3072, 5120, 6144, 10240, 12288),
    ),
    "second": Draw(
        seed=20261123, num_cases=20, max_cold_cases=8, params=(0.1e9, 8.5e9),
        lengths_tokens=(320, 448, 896, 1152, 1792, 2304, 3584, 4608, 7168, 9216, 14336),
    ),
    "third": Draw(
        seed=20261125, num_cases=24, max_cold_cases=6, params=(0.1e9, 8.5e9),
        lengths_tokens=(576, 704, 960, 1088, 1408, 1664, 1920, 2560, 3328, 3840, 5632, 8704, 11264),
        max_step_seconds=2.0, max_host_bytes=35e9, num_steps=8,
    ),
    "fourth": Draw(
        seed=20261126, num_cases=24, max_cold_cases=6, params=(0.1e9, 8.5e9),
        lengths_tokens=(
            832, 1216, 1344, 1472, 2176, 2688, 2944, 3456, 4352, 4864, 6656, 7680, 9728, 13312,
        ),
        max_step_seconds=2.0, max_host_bytes=35e9, num_steps=8,
    ),
    "two-gpus": Draw(
        seed=20261124, num_cases=12, max_cold_cases=4, params=(2.5e9, 8.5e9),
        lengths_tokens=(320, 448, 896, 1152, 1792, 2304, 3584, 4608, 7168),
        gpu="H200", num_gpus=2, host_memory_gib=256,
    ),
}  # fmt: skip


def weighted(draw: random.Random, **weights: float) -> str:
    """Return one of the names by its weight."""
    return draw.choices(list(weights), list(weights.values()))[0]


def draw_case(
    draw: random.Random, source: Draw, models: list[str], *, method: str
) -> dict[str, Any]:
    """Return a recipe with every dimension but the method drawn, as JSON values."""
    # On several GPUs stage 3 is what differs most.
    stages = {"0": 0.1, "1": 0.25, "2": 0.35, "3": 0.3}
    if source.num_gpus > 1:
        stages = {"1": 0.25, "2": 0.3, "3": 0.45}
    stage = int(weighted(draw, **stages))
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
        "max_seq_len": draw.choice(source.lengths_tokens),
        "optim": {"global_batch_size": micro_batch * accumulation * source.num_gpus},
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


def is_usable(case: dict[str, Any], source: Draw) -> bool:
    """Return whether zerofit plans the case, and expects it to fit and to be short."""
    text = yaml.safe_dump(case)
    overrides = [
        f"cluster.gpu={source.gpu}", f"cluster.gpus_per_node={source.num_gpus}",
        "model.random_weights=true",
    ]  # fmt: skip
    try:
        plan = prepare(parse_recipe(text, source="draw", overrides=overrides), source="draw").plan
    except LauncherError:
        return False
    return (
        plan.fits
        and plan.time.step_seconds < source.max_step_seconds
        and plan.memory.host_bytes_per_node < source.max_host_bytes
    )


def main() -> None:
    """Print the sweep file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", choices=DRAWS, default="first")
    name = parser.parse_args().draw
    source = DRAWS[name]
    sizes = {name: resolve_model(name)[0].num_params for name in catalogue_names()}
    low, high = source.params
    models = sorted(name for name, size in sizes.items() if low <= size <= high)
    draw = random.Random(source.seed)  # noqa: S311  a draw that can be repeated is wanted
    cases: dict[str, dict[str, Any]] = {}
    num_cold = num_drawn = 0
    method = ""
    while len(cases) < source.num_cases:
        num_drawn += 1
        method = method or weighted(draw, full=0.35, lora=0.45, qlora=0.2)
        case = draw_case(draw, source, models, method=method)
        is_cold = case["method"] == "qlora" or "8bit" in case["strategy"]["optimizer"]
        is_one_too_many = is_cold and num_cold == source.max_cold_cases
        if is_one_too_many or not is_usable(case, source):
            if is_one_too_many and method == "qlora":
                method = ""
            continue
        method = ""
        num_cold += is_cold
        cases[name_of(case)] = case
    print("# Written by benchmarks/draw_blind.py: a random draw, made before any of it was run.")
    print(
        f"# Seed {source.seed}; {num_drawn} draws for {len(cases)} cases of {len(models)} models."
    )
    content = {
        "defaults": {
            "model": {"random_weights": True},
            "cluster": {
                "gpus_per_node": source.num_gpus, "host_memory_gib": source.host_memory_gib,
            },
            "optim": {"max_steps": source.num_steps},
        },
        "cases": [{"name": name, **case} for name, case in cases.items()],
    }  # fmt: skip
    yaml.safe_dump(content, sys.stdout, sort_keys=False, default_flow_style=None, width=100)


if __name__ == "__main__":
    main()
