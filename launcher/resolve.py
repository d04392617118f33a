"""Hold a recipe against its model and cluster: what fits together becomes a workload."""

from __future__ import annotations

from launcher.ds_keys import check_keys
from launcher.errors import RecipeError, did_you_mean, list_problems
from launcher.hardware import GpuSpec
from launcher.model_spec import ModelSpec
from launcher.recipe_sections import Recipe
from launcher.strategy import Method, Precision
from launcher.workload import ALL_LINEAR, ATTENTION_ONLY, LoraSpec, QuantizationSpec, Workload

PACKABLE = frozenset(
    {
        "gemma2", "gemma3_text", "gpt_neox", "llama", "mistral", "mixtral", "phi", "phi3", "qwen2",
        "qwen3", "qwen3_moe",
    }
)  # fmt: skip
"""Architectures that keep packed examples apart, by an integration test with each of them.

Not among them is Falcon: transformers 5.23 ``models/falcon/modeling_falcon.py`` makes its mask
without ``position_ids``, so a packed example sees those before it.
"""


def resolve_workload(recipe: Recipe, model: ModelSpec, gpu: GpuSpec, *, source: str) -> Workload:
    """Return what the recipe trains on this model and this kind of GPU.

    Raises:
        RecipeError: the length is beyond the model's limit, a LoRA target names no module, or
            a raw DeepSpeed key is unknown.
    """
    check_keys(recipe.deepspeed, where=f"{source}: deepspeed")
    problems = []
    limit_tokens = recipe.model.max_position_embeddings or model.max_position_embeddings
    if recipe.max_seq_len > limit_tokens:
        problems.append(
            f"max_seq_len is {recipe.max_seq_len:,}, {model.name} was made for {limit_tokens:,} "
            "tokens: lower it, or set model.max_position_embeddings if its positions stretch"
        )
    if recipe.data.packing and model.model_type not in PACKABLE:
        problems.append(
            f"data.packing: that {model.model_type} keeps packed examples apart is not known "
            f"(it is of {', '.join(sorted(PACKABLE))}); leave packing off"
        )
    if recipe.method is not Method.full:
        problems.extend(_unknown_targets(recipe.lora.target_modules, model))
    if problems:
        raise RecipeError(
            list_problems(problems), where=source, fix="correct the values named above"
        )
    return Workload(
        model=model,
        method=recipe.method,
        max_seq_len=recipe.max_seq_len,
        global_batch_size=recipe.optim.global_batch_size,
        has_padding=recipe.data.packing,
        precision=recipe.model.precision or default_precision(gpu),
        lora=lora_of(recipe),
        quantization=QuantizationSpec(
            kind=recipe.quantization.kind, double_quant=recipe.quantization.double_quant
        ),
        has_random_weights=recipe.model.random_weights,
    )


def lora_of(recipe: Recipe) -> LoraSpec:
    """Return the recipe's adapters."""
    return LoraSpec(
        r=recipe.lora.r,
        alpha=recipe.lora.alpha,
        dropout=recipe.lora.dropout,
        target_modules=tuple(recipe.lora.target_modules),
        use_dora=recipe.lora.use_dora,
    )


def default_precision(gpu: GpuSpec) -> Precision:
    """Return bf16 where the GPU has it, else fp16; fp32 on a processor.

    torch.cuda.is_bf16_supported() says yes on V100 and T4, where bf16 is emulated and slow.
    """
    if gpu.device_type == "cpu":
        return Precision.fp32
    return Precision.bf16 if gpu.has_bf16 else Precision.fp16


def _unknown_targets(targets: tuple[str, ...], model: ModelSpec) -> list[str]:
    shorthands = {ALL_LINEAR, ATTENTION_ONLY}
    modules = {weight.module for weight in model.weights if weight.role == "linear"}
    modules -= set(model.expert_names)
    if len(targets) == 1 and targets[0] in shorthands:
        return []
    return [
        f"lora.target_modules: {model.name} has no linear module {target!r}: "
        f"{did_you_mean(target, modules | shorthands)}"
        for target in targets
        if target not in modules
    ]
