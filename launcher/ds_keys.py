"""DeepSpeed's own configuration keys: which exist, and which ones move predicted memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, get_args

from launcher.errors import RecipeError, did_you_mean, list_problems
from launcher.strategy import CommunicationType, ZeroKnobs

# Keys that the plan itself decides: a second source for them would let file and plan differ.
PLANNED_KEYS = {
    "train_batch_size": "optim.global_batch_size",
    "train_micro_batch_size_per_gpu": "strategy.micro_batch_size_per_gpu",
    "gradient_accumulation_steps": "optim.global_batch_size",
    "gradient_clipping": "optim.max_grad_norm",
    "bf16": "model.precision",
    "fp16": "model.precision",
    "data_types": "strategy.grad_accum_dtype",
    "optimizer": "strategy.optimizer",
    "scheduler": "optim.lr_scheduler_type",
}
PLANNED_ZERO_KEYS = {
    "stage": "strategy.zero_stage",
    "offload_optimizer": "strategy.offload_optimizer",
    "offload_param": "strategy.offload_param",
}

# deepspeed 0.19.8 runtime/config.py and runtime/constants.py; DeepSpeed ignores other names, and
# refuses those of features that were removed (_REMOVED_TOP_LEVEL_CONFIG_KEYS).
TOP_LEVEL_KEYS = frozenset(
    {
        "activation_checkpointing", "aio", "autotuning", "checkpoint", "comms_logger",
        "communication_data_type", "compile", "csv_monitor",
        "data_efficiency", "dataloader_drop_last", "disable_allgather", "disable_python_gc",
        "dump_state", "flops_profiler",
        "gradient_allreduce_op", "gradient_predivide_factor", "log_level", "memory_breakdown",
        "prescale_gradients",
        "seq_parallel_communication_data_type",
        "steps_per_print", "tensorboard", "timers", "torch_autocast", "use_node_local_storage",
        "wall_clock_breakdown", "wandb", "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer", "zero_optimization",
        *PLANNED_KEYS,
    }
)  # fmt: skip

# deepspeed 0.19.8 runtime/zero/config.py, class DeepSpeedZeroConfig. Its short names of stage-3
# keys are left out: the configuration has the long ones, which DeepSpeed would take.
ZERO_KEYS = frozenset(
    {
        "allgather_bucket_size", "allgather_partitions",
        "compute_grad_norm", "contiguous_gradients", "elastic_checkpoint", "enable_sanity_checks",
        "ignore_unused_parameters",
        "leaf_module", "legacy_stage1", "load_from_fp32_weights", "log_trace_cache_warnings",
        "memory_efficient_linear",
        "override_module_apply", "overlap_comm", "parameter_alignment",
        "pipeline_loading_checkpoint", "reduce_bucket_size",
        "reduce_scatter", "round_robin_gradients", "stage3_allgather_sequential",
        "stage3_gather_16bit_weights_on_model_save", "stage3_max_live_parameters",
        "stage3_max_reuse_distance", "stage3_model_persistence_threshold",
        "stage3_module_granularity_threshold",
        "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size",
        "stage3_use_all_reduce_for_fetch_params", "sub_group_size",
        "use_multi_rank_bucket_allreduce", "zenflow",
        "zero_hpz_partition_size", "zero_quantized_gradients",
        "zero_quantized_nontrainable_weights", "zero_quantized_weights",
        *PLANNED_ZERO_KEYS,
    }
)  # fmt: skip

# What moves memory or time and has no formula here, with DeepSpeed's default.
_UNPREDICTED: Mapping[str, Any] = {
    "compile": None,
    "data_efficiency": None,
    "torch_autocast": None,
    "zero_optimization.leaf_module": None,
    # Without it, autograd keeps gathered weights from forward to backward: whole models.
    "zero_optimization.memory_efficient_linear": True,
    "zero_optimization.stage3_model_persistence_threshold": None,
    "zero_optimization.stage3_module_granularity_threshold": 0,
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": False,
    "zero_optimization.zenflow": None,
    "zero_optimization.zero_quantized_gradients": False,
    "zero_optimization.zero_quantized_nontrainable_weights": False,
    "zero_optimization.zero_quantized_weights": False,
}

# deepspeed 0.19.8 runtime/zero/config.py: gt=0, where the others have ge=0; of hpZ, 1 is none.
_NEVER_ZERO = frozenset({"reduce_bucket_size", "zero_hpz_partition_size"})
_MOST_ELEMENTS = 2**63 - 1  # what torch counts to

# The one knob outside zero_optimization; its values: runtime/config.py.
_REDUCED_IN = "communication_data_type"
_KNOBS = {item.name for item in fields(ZeroKnobs)} - {"pin_memory", _REDUCED_IN}


def check_keys(raw: Mapping[str, Any], *, where: str) -> None:
    """Refuse raw keys that DeepSpeed would ignore or that the plan decides elsewhere.

    Raises:
        RecipeError: all such keys at once, each with the key to use instead.
    """
    zero = raw.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise RecipeError(
            f"'zero_optimization' is a section, not {zero!r}",
            where=where,
            fix="write keys below it",
        )
    checks = [("", raw, PLANNED_KEYS, TOP_LEVEL_KEYS)]
    checks.append(("zero_optimization.", zero, PLANNED_ZERO_KEYS, ZERO_KEYS))
    problems = []
    for prefix, section, planned, known in checks:
        for key in section:
            if key in planned:
                problems.append(f"'{prefix}{key}' is planned: set {planned[key]} instead")
            elif key not in known:
                problems.append(f"unknown key '{prefix}{key}': {did_you_mean(str(key), known)}")
    for name in sorted(_KNOBS & set(zero)):
        value, default = zero[name], getattr(ZeroKnobs(), name)
        is_switch, least = isinstance(default, bool) or default is None, int(name in _NEVER_ZERO)
        if isinstance(value, bool) is not is_switch or (
            not is_switch
            and not (isinstance(value, int | float) and least <= value <= _MOST_ELEMENTS)
        ):
            counted = "ranks" if name == "zero_hpz_partition_size" else "elements"
            wanted = "true or false" if is_switch else f"a count of {counted}, {least} or more"
            problems.append(f"'zero_optimization.{name}' is {value!r}, it must be {wanted}")
    if raw.get(_REDUCED_IN) not in (None, *get_args(CommunicationType)):
        wanted = ", ".join(get_args(CommunicationType))
        problems.append(f"'{_REDUCED_IN}' is {raw[_REDUCED_IN]!r}, it must be one of {wanted}")
    if problems:
        raise RecipeError(list_problems(problems), where=where, fix="correct the keys named above")


def apply_to_knobs(knobs: ZeroKnobs, raw: Mapping[str, Any]) -> ZeroKnobs:
    """Return the knobs as DeepSpeed will see them once the raw keys are merged in."""
    zero = raw.get("zero_optimization", {})
    changes: dict[str, Any] = {
        name: zero[name] if isinstance(zero[name], bool) else int(zero[name])
        for name in _KNOBS & set(zero)
    }
    if raw.get(_REDUCED_IN) is not None:
        changes[_REDUCED_IN] = raw[_REDUCED_IN]
    if not changes:
        return knobs
    return replace(knobs, **changes)


def not_knobs(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the raw keys without those that :func:`apply_to_knobs` has put into a strategy."""
    zero = {
        key: value for key, value in raw.get("zero_optimization", {}).items() if key not in _KNOBS
    }
    taken = ("zero_optimization", _REDUCED_IN)
    others = {key: value for key, value in raw.items() if key not in taken}
    return {**others, "zero_optimization": zero} if zero else others


def unpredicted_keys(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the raw keys whose effect on memory and time no prediction follows."""
    zero = raw.get("zero_optimization", {})
    given = {**raw, **{f"zero_optimization.{key}": value for key, value in zero.items()}}
    return tuple(
        name
        for name, default in _UNPREDICTED.items()
        if given.get(name, default) not in (default, {"enabled": False})
    )
