"""The text of a new recipe: what was asked for, and where to change the rest."""

from __future__ import annotations

from launcher.planning.plan import Plan
from launcher.planning.wording import label
from launcher.recipe import render_recipe
from launcher.recipe_sections import Recipe
from launcher.units import format_gib, format_seconds


def new_recipe_text(recipe: Recipe, plan: Plan) -> str:
    """Return a recipe in YAML with comments that lead a newcomer through it."""
    rank = "GPU" if plan.cluster.gpu.device_type == "cuda" else "rank"
    fits = "fits" if plan.fits else "DOES NOT FIT"
    used = format_gib(plan.memory.device_used_bytes)
    pace = f"{format_seconds(plan.time.step_seconds)} per optimizer step"
    lines = [
        f"# {plan.workload.model.name} on {plan.cluster.world_size} x {plan.cluster.gpu.name}",
        f"# Planned: {label(plan.strategy)}",
        f"#   {fits}: {used} of {format_gib(plan.limit_bytes)} per {rank}, {pace}",
        "# Whatever is left out has a default or is chosen anew by `zerofit plan`.",
        "",
        render_recipe(recipe).rstrip(),
    ]
    # Named although they are defaults: the first things that a newcomer changes.
    defaults = Recipe()
    if recipe.method is defaults.method:
        lines.append(f"method: {recipe.method.value}  # full, lora or qlora")
    if recipe.max_seq_len == defaults.max_seq_len:
        lines.append(f"max_seq_len: {recipe.max_seq_len}")
    if not recipe.data.has_training_data:
        lines += [
            "",
            "# data:",
            "#   path: train.jsonl        # messages, sharegpt, alpaca, prompt/completion or text",
            "#   eval_path: heldout.jsonl",
        ]
    lines += [
        "",
        "# optim: {learning_rate: 2e-4, num_train_epochs: 1, global_batch_size: 8}",
        "# lora: {r: 16, alpha: 32, dropout: 0.0, target_modules: [all-linear]}",
        "# strategy: {zero_stage: 2, micro_batch_size_per_gpu: 4}   # to decide it yourself",
        "# strategy: {optimizer: [adamw, adamw_8bit]}   # what the planner may choose among",
        "# deepspeed: {zero_optimization: {reduce_bucket_size: 50000000}}   # raw DeepSpeed keys",
    ]
    return "\n".join(lines) + "\n"
