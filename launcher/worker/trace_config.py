"""DeepSpeed's configuration and optimizer for a model whose widths are divided by K."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from launcher.ds_config import merge
from launcher.ds_keys import not_knobs
from launcher.strategy import Offload, Optimizer, Precision, Strategy
from launcher.workload import Workload

# What watches or logs a run: no byte of it, but files and a service of the user's.
_WATCHING = frozenset({
    "autotuning", "comms_logger", "csv_monitor", "dump_state", "flops_profiler",
    "memory_breakdown", "tensorboard", "wall_clock_breakdown", "wandb",
})  # fmt: skip


def deepspeed_config(
    workload: Workload, strategy: Strategy, *, scale: int, raw_deepspeed: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the DeepSpeed configuration with every count of elements divided by scale**2.

    Raw keys that are part of the strategy are taken from there; the others go in as they are,
    less those that watch or log.
    """
    knobs, area = strategy.zero, scale**2

    def elements(count: int) -> int:
        return max(count // area // 2 * 2, 2) if count else 0

    zero: dict[str, Any] = {
        "stage": strategy.zero_stage,
        "reduce_bucket_size": elements(knobs.reduce_bucket_size),
        "allgather_bucket_size": elements(knobs.allgather_bucket_size),
        "contiguous_gradients": knobs.contiguous_gradients,
        "reduce_scatter": knobs.reduce_scatter,
    }
    if knobs.overlap_comm is not None:
        zero["overlap_comm"] = knobs.overlap_comm
    if strategy.zero_stage == 3:
        zero |= {
            "sub_group_size": elements(knobs.sub_group_size),
            "stage3_max_live_parameters": elements(knobs.stage3_max_live_parameters),
            "stage3_max_reuse_distance": elements(knobs.stage3_max_reuse_distance),
            "stage3_prefetch_bucket_size": elements(knobs.stage3_prefetch_bucket_size),
            "zero_hpz_partition_size": knobs.zero_hpz_partition_size,
        }
    # Page-locking changes no bytes on the device, and the CPU accelerator cannot do it.
    if strategy.offload_optimizer is Offload.cpu:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if strategy.offload_param is Offload.cpu:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": strategy.micro_batch_size_per_gpu,
        "gradient_accumulation_steps": strategy.gradient_accumulation_steps,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    if workload.precision is not Precision.fp32:
        # A static loss scale: bytes are those of a dynamic one, and no step is skipped.
        static = {"loss_scale": 1.0} if workload.precision is Precision.fp16 else {}
        config[workload.precision.value] = {"enabled": True, **static}
    if strategy.grad_accum_dtype is not None:
        config["data_types"] = {"grad_accum_dtype": strategy.grad_accum_dtype.value}
    if knobs.communication_data_type is not None:
        config["communication_data_type"] = knobs.communication_data_type
    raw = {key: value for key, value in raw_deepspeed.items() if key not in _WATCHING}
    return merge(config, not_knobs(raw))


def make_optimizer(params: list[torch.nn.Parameter], strategy: Strategy) -> torch.optim.Optimizer:
    """Return AdamW over the two parameter groups that transformers' Trainer makes.

    Offloaded states belong to DeepSpeedCPUAdam, whose C++ update has no temporaries; an
    optimizer with its states alone stands in for it.

    Source: transformers 5.23 ``trainer.py``, ``create_optimizer``: vectors get no decay.
    """
    is_matrix = [len(getattr(param, "ds_shape", param.shape)) > 1 for param in params]
    halves = [
        [param for param, matrix in zip(params, is_matrix, strict=True) if matrix is wanted]
        for wanted in (True, False)
    ]
    groups = [{"params": half} for half in halves if half]
    if strategy.offload_optimizer is Offload.none:
        kind = strategy.optimizer
        return torch.optim.AdamW(
            groups, fused=kind is Optimizer.adamw, foreach=kind is Optimizer.adamw_foreach
        )

    class StateOnlyAdam(torch.optim.Optimizer):
        """Adam's two moments, made at the first step; values never change."""

        def step(self, _closure: Any = None) -> None:  # type: ignore[override]
            for param in (p for group in self.param_groups for p in group["params"]):
                if param.grad is not None and not self.state[param]:
                    for name in ("exp_avg", "exp_avg_sq"):
                        self.state[param][name] = torch.zeros_like(param.data)

    return StateOnlyAdam(groups, {"lr": 1e-4, "betas": (0.9, 0.999), "weight_decay": 0.0})
