"""Plan to DeepSpeed JSON: every number resolved, nothing left to "auto"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.recipe_sections import Recipe
from launcher.strategy import Offload, Precision, Strategy
from launcher.workload import Workload


def build_ds_config(
    recipe: Recipe, workload: Workload, strategy: Strategy, *, world_size: int
) -> dict[str, Any]:
    """Return a complete DeepSpeed configuration that also runs without zerofit.

    Optimizer and scheduler are left to transformers, which builds both from its arguments
    (transformers 5.23 integrations/deepspeed.py:deepspeed_optim_sched).

    Returns:
        JSON values; ``zero_optimization`` counts are elements. Raw keys of the recipe's
        ``deepspeed`` section are merged in last.
    """
    config: dict[str, Any] = {
        # Where ranks share sequences, DeepSpeed takes each rank's parts for samples.
        "train_batch_size": (
            strategy.micro_batch_size_per_gpu * strategy.gradient_accumulation_steps * world_size
        ),
        "train_micro_batch_size_per_gpu": strategy.micro_batch_size_per_gpu,
        "gradient_accumulation_steps": strategy.gradient_accumulation_steps,
        "gradient_clipping": recipe.optim.max_grad_norm,
        "steps_per_print": 2**31 - 1,  # rank 0 shows progress itself
        "wall_clock_breakdown": False,
        # The optimizer is torch's fused AdamW, which DeepSpeed has not listed as tested.
        "zero_allow_untested_optimizer": True,
        "zero_optimization": _zero_section(recipe, strategy),
    }
    if workload.precision is Precision.bf16:
        config["bf16"] = {"enabled": True}
    if workload.precision is Precision.fp16:
        # Start low enough that the first steps are not all skipped while the scale falls.
        config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 12}
    if strategy.grad_accum_dtype is not None:
        config["data_types"] = {"grad_accum_dtype": strategy.grad_accum_dtype.value}
    return merge(config, recipe.deepspeed)


def _zero_section(recipe: Recipe, strategy: Strategy) -> dict[str, Any]:
    knobs = strategy.zero
    section: dict[str, Any] = {
        "stage": strategy.zero_stage,
        "overlap_comm": knobs.overlaps(strategy.zero_stage),
        "contiguous_gradients": knobs.contiguous_gradients,
        "reduce_scatter": knobs.reduce_scatter,
        "reduce_bucket_size": knobs.reduce_bucket_size,
        "allgather_bucket_size": knobs.allgather_bucket_size,
    }
    if strategy.zero_stage == 3:
        section |= {
            "sub_group_size": knobs.sub_group_size,
            "stage3_max_live_parameters": knobs.stage3_max_live_parameters,
            "stage3_max_reuse_distance": knobs.stage3_max_reuse_distance,
            "stage3_prefetch_bucket_size": knobs.stage3_prefetch_bucket_size,
            "stage3_param_persistence_threshold": knobs.stage3_param_persistence_threshold,
            # Without it a full fine-tune saves nothing but sharded states.
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    for key, device in (
        ("offload_optimizer", strategy.offload_optimizer),
        ("offload_param", strategy.offload_param),
    ):
        if device is Offload.none:
            continue
        section[key] = {"device": device.value, "pin_memory": knobs.pin_memory}
        if device is Offload.nvme:
            section[key]["nvme_path"] = recipe.strategy.nvme_path
    return section


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``over`` merged in, section by section."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged
