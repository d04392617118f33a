"""Write recipes/ and ds_configs/: the planner's printed output for a reference set.

    python benchmarks/make_recipes.py

A test regenerates every file and compares.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from launcher.ds_config import build_ds_config
from launcher.hardware import ClusterSpec, default_cluster, find_gpu
from launcher.model_source import load_catalogue_entry
from launcher.model_spec import ModelSpec, spec_from_config
from launcher.planning.planner import Choice, choose_strategy
from launcher.planning.wording import METHOD_NAME, label
from launcher.recipe import render_recipe
from launcher.recipe_sections import (
    ClusterSection,
    LoraSection,
    ModelSection,
    OptimSection,
    Recipe,
    StrategySection,
)
from launcher.resolve import resolve_workload
from launcher.strategy import Checkpointing, Method, Offload, Precision, ZeroStage
from launcher.units import GIB, format_seconds

ROOT = Path(__file__).resolve().parents[1]
RECIPES, DS_CONFIGS = "recipes", "ds_configs"

STUDY_MODELS = ("llama2-7b", "llama2-13b", "llama2-70b", "falcon-180b")
STUDY_CONTEXTS = (256, 512, 1024, 2048, 4096)
# arXiv:2406.02290, section 3: rank 64, alpha 32 on the attention's input projections.
STUDY_LORA = LoraSection(r=64, alpha=32, target_modules=("q_proj", "v_proj"))
FALCON_LORA = replace(STUDY_LORA, target_modules=("query_key_value",))
LATER_GPUS = ("A100-40GB", "A100-80GB", "H100-80GB", "H200")
LATER_CONTEXTS = (1024, 4096)
SMALL_MODELS = (
    "phi-2", "phi-3-mini-4k", "phi-3-mini-128k", "phi-4-mini", "smollm2-135m", "smollm2-1.7b",
    "llama3.2-1b", "llama3.2-3b",
)  # fmt: skip
SMALL_GPUS = ("RTX-4090", "H100-80GB")
SMALL_CONTEXTS = (2048, 8192, 32768, 131072)

# Stage, optimizer and parameter offload of each file in ds_configs/.
DS_KINDS: dict[str, tuple[ZeroStage, Offload, Offload]] = {
    "zero1": (1, Offload.none, Offload.none),
    "zero1_offload_optimizer": (1, Offload.cpu, Offload.none),
    "zero2": (2, Offload.none, Offload.none),
    "zero2_offload_optimizer": (2, Offload.cpu, Offload.none),
    "zero3": (3, Offload.none, Offload.none),
    "zero3_offload_optimizer": (3, Offload.cpu, Offload.none),
    "zero3_offload_all": (3, Offload.cpu, Offload.cpu),
    "zero3_nvme": (3, Offload.nvme, Offload.nvme),
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One recipe of the reference set and what it plans to."""

    recipe: Recipe
    cluster: ClusterSpec
    choice: Choice

    @property
    def folder(self) -> str:
        """Hardware: ``v100-32gb-x8``."""
        return f"{self.cluster.gpu.name.lower()}-x{self.cluster.world_size}"

    @property
    def name(self) -> str:
        """File name: model, method, tokens."""
        recipe = self.recipe
        return f"{recipe.model.name_or_path}-{recipe.method.value}-{recipe.max_seq_len}.yaml"


def reference_set() -> Iterator[Entry]:
    """Plan every recipe; what does not fit is tried as QLoRA, and left out if that fails too."""
    for model in STUDY_MODELS:
        for tokens in STUDY_CONTEXTS:
            yield from _study_entry("V100-32GB", model, tokens)
    for gpu in LATER_GPUS:
        for model in STUDY_MODELS:
            limit = spec_of(model).max_position_embeddings
            for tokens in sorted({min(tokens, limit) for tokens in LATER_CONTEXTS}):
                yield from _study_entry(gpu, model, tokens)
    for gpu in SMALL_GPUS:
        for model in SMALL_MODELS:
            for tokens in SMALL_CONTEXTS:
                place = ClusterSection(gpu=gpu, num_nodes=1, gpus_per_node=1)
                yield from _entry(model, tokens, place, LoraSection())


def _study_entry(gpu: str, model: str, tokens: int) -> Iterator[Entry]:
    # The study ran Falcon-180B on two nodes of V100; later nodes have more memory.
    num_nodes = 2 if model == "falcon-180b" and gpu in ("V100-32GB", "A100-40GB") else 1
    place = ClusterSection(gpu=gpu, num_nodes=num_nodes, gpus_per_node=8)
    return _entry(model, tokens, place, FALCON_LORA if "falcon" in model else STUDY_LORA)


def _entry(
    model_name: str, tokens: int, place: ClusterSection, lora: LoraSection
) -> Iterator[Entry]:
    model = spec_of(model_name)
    if tokens > model.max_position_embeddings:
        return
    cluster = default_cluster(
        find_gpu(str(place.gpu)), num_nodes=place.num_nodes or 1, gpus_per_node=place.gpus_per_node
    )
    for method in (Method.lora, Method.qlora):
        recipe = Recipe(
            model=ModelSection(name_or_path=model_name),
            method=method,
            max_seq_len=tokens,
            lora=lora,
            optim=OptimSection(global_batch_size=max(8, cluster.world_size)),
            cluster=place,
        )
        workload = resolve_workload(recipe, model, cluster.gpu, source="reference set")
        choice = choose_strategy(workload, cluster, fixed=recipe.strategy)
        if choice.fits:
            yield Entry(recipe=recipe, cluster=cluster, choice=choice)
            return


@cache
def spec_of(name: str) -> ModelSpec:
    """Return a catalogue model's spec."""
    return spec_from_config(load_catalogue_entry(name).config, name=name)


def recipe_text(entry: Entry) -> str:
    """Return a recipe file: what it plans to as a comment, then the recipe."""
    best, cluster = entry.choice.best, entry.cluster
    used, limit = best.memory.device_used_bytes, entry.choice.space.limit_bytes
    path = f"{RECIPES}/{entry.folder}/{entry.name}"
    recipe, gpus = entry.recipe, f"{cluster.world_size} x {cluster.gpu.name}"
    what = f"{METHOD_NAME[recipe.method]} of {recipe.model.name_or_path}"
    pace = f"{format_seconds(best.time.step_seconds)} per step"
    lines = [
        f"# {what}, {recipe.max_seq_len:,} tokens, on {gpus}",
        f"# Planned: {label(best.strategy)}",
        f"#   {used / GIB:.1f} of {limit / GIB:.1f} GiB per GPU, {pace}",
        f"# zerofit plan {path}",
        f"# zerofit train {path} data.path=train.jsonl",
        "",
        render_recipe(recipe),
    ]
    return "\n".join(lines)


def readme_text(entries: list[Entry]) -> str:
    """Return recipes/README.md: one table for each kind of hardware."""
    lines = [
        "# Recipes",
        "",
        f"{len(entries)} recipes, written by `benchmarks/make_recipes.py` from the planner itself;",
        "a test regenerates them. They set no strategy: `zerofit plan RECIPE` chooses and explains",
        "it. Make one for any other model, length and hardware with `zerofit init`.",
        "",
        "Where LoRA does not fit, the recipe is QLoRA; where that does not fit either, there is",
        "none. Memory is what nvidia-smi would show per GPU.",
    ]
    for folder in dict.fromkeys(entry.folder for entry in entries):
        here = [entry for entry in entries if entry.folder == folder]
        cluster = here[0].cluster
        limit = here[0].choice.space.limit_bytes / GIB
        lines += [
            "",
            f"## {cluster.world_size} x {cluster.gpu.name} ({limit:.1f} GiB usable each)",
            "",
            "| model | tokens | method | strategy | GiB | s/step | tokens/s per GPU |",
            "|---|---:|---|---|---:|---:|---:|",
        ]
        for entry in here:
            best = entry.choice.best
            lines.append(
                f"| [{entry.recipe.model.name_or_path}]({folder}/{entry.name}) | "
                f"{entry.recipe.max_seq_len:,} | {METHOD_NAME[entry.recipe.method]} | "
                f"{label(best.strategy)} | {best.memory.device_used_bytes / GIB:.1f} | "
                f"{best.time.step_seconds:.3g} | {best.time.tokens_per_second_per_gpu:,.0f} |"
            )
    return "\n".join(lines) + "\n"


def ds_config_files() -> Iterator[tuple[str, str]]:
    """Yield a DeepSpeed file for each kind of strategy, method and precision: Llama-2-7B, 8 GPUs.

    Buckets and thresholds follow the model's size; the rest serves any model.
    """
    cluster = default_cluster(find_gpu("A100-80GB"), gpus_per_node=8)
    model = spec_of("llama2-7b")
    for method in (Method.lora, Method.full):
        for precision in (Precision.bf16, Precision.fp16):
            for kind, (stage, optimizer_to, param_to) in DS_KINDS.items():
                section = StrategySection(
                    zero_stage=stage,
                    offload_optimizer=optimizer_to,
                    offload_param=param_to,
                    gradient_checkpointing=Checkpointing.full,
                    micro_batch_size_per_gpu=1,
                    nvme_path="/local_nvme" if optimizer_to is Offload.nvme else None,
                )
                recipe = Recipe(
                    model=ModelSection(name_or_path=model.name, precision=precision),
                    method=method,
                    strategy=section,
                )
                workload = resolve_workload(recipe, model, cluster.gpu, source="reference set")
                strategy = choose_strategy(workload, cluster, fixed=section).best.strategy
                config = build_ds_config(recipe, workload, strategy, world_size=cluster.world_size)
                name = f"{DS_CONFIGS}/{method.value}_{precision.value}_{kind}.json"
                yield name, json.dumps(config, indent=2) + "\n"


def generated_files() -> dict[str, str]:
    """Return every generated file's text by its path below the repository."""
    entries = list(reference_set())
    files = {f"{RECIPES}/{entry.folder}/{entry.name}": recipe_text(entry) for entry in entries}
    files[f"{RECIPES}/README.md"] = readme_text(entries)
    files.update(ds_config_files())
    return files


def main() -> None:
    """Write what has changed and remove what is no longer generated."""
    files = generated_files()
    for folder in (RECIPES, DS_CONFIGS):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and str(path.relative_to(ROOT)) not in files:
                path.unlink()
    for name, text in files.items():
        path = ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    print(f"wrote {len(files)} files")


if __name__ == "__main__":
    main()
