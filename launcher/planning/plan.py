"""A plan as data: what will run, what it should need, and the reasons; and its JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from launcher.checkpoint_time import USUAL_RATE, SaveRate
from launcher.errors import RunDirError
from launcher.hardware import ClusterSpec, SiteConstants
from launcher.predict.memory import MemoryEstimate
from launcher.predict.run_cost import RunEstimate
from launcher.predict.site_constants import host_slowness
from launcher.predict.step_time import TimeEstimate
from launcher.strategy import (
    Attention,
    Checkpointing,
    Loss,
    Offload,
    Optimizer,
    Precision,
    Strategy,
    ZeroKnobs,
)
from launcher.workload import Workload

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One choice and its reason, in a sentence for someone who has never used ZeRO."""

    field: str
    value: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A strategy that was not taken, because it cannot work, does not fit, or is slower."""

    strategy: Strategy
    reason: str
    fits: bool
    device_used_bytes: int | None
    step_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A strategy with what it is predicted to need."""

    strategy: Strategy
    memory: MemoryEstimate
    time: TimeEstimate
    fits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What will run, what it should need, and why."""

    workload: Workload
    cluster: ClusterSpec
    strategy: Strategy
    fits: bool
    memory: MemoryEstimate
    time: TimeEstimate
    limit_bytes: int
    """Device memory that a rank may use, safety margin taken off."""
    safety_margin_bytes: int
    decisions: tuple[Decision, ...]
    rejected: tuple[Rejected, ...]
    ladder: tuple[Candidate, ...]
    """Progressively more frugal strategies to fall back to, the plan itself left out."""
    suggestions: tuple[str, ...] = ()
    """When nothing fits: the smallest changes that would."""
    unpredicted_keys: tuple[str, ...] = ()
    """Raw DeepSpeed keys that move memory or time in ways that no number here follows."""
    run: RunEstimate | None = None
    """The whole run; ``None`` while the number of its steps is not known."""
    price_per_gpu_hour: float | None = None
    speedup_over_one_node: float | None = 1.0
    """Over one node at its own best, at equal global batch; ``None``: one is not enough."""
    save_rate: SaveRate = USUAL_RATE

    @property
    def checkpoint_seconds(self) -> float:
        """Predicted time in which all ranks together write a checkpoint."""
        return self.memory.checkpoint_bytes / self.save_rate.bytes_per_s

    @property
    def headroom_bytes(self) -> int:
        """Device memory left above the prediction, the safety margin taken off."""
        return self.limit_bytes - self.memory.device_used_bytes


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON values; docs/plan-json.md describes the keys."""
    workload, cluster, model = plan.workload, plan.cluster, plan.workload.model
    return {
        "schema_version": SCHEMA_VERSION,
        "fits": plan.fits,
        "model": {
            "name": model.name,
            "model_type": model.model_type,
            "is_traced": model.traced is not None,
            "num_params": model.num_params,
            "num_trainable_params": workload.num_trainable_params,
        },
        "method": workload.method.value,
        "precision": workload.precision.value,
        "max_seq_len": workload.max_seq_len,
        "global_batch_size": workload.global_batch_size,
        "gpu": cluster.gpu.name,
        "device_type": cluster.gpu.device_type,
        "num_nodes": cluster.num_nodes,
        "gpus_per_node": cluster.gpus_per_node,
        "world_size": cluster.world_size,
        "strategy": strategy_to_json(plan.strategy),
        "memory": _memory_to_json(plan.memory),
        "limit_bytes": plan.limit_bytes,
        "safety_margin_bytes": plan.safety_margin_bytes,
        "headroom_bytes": plan.headroom_bytes,
        "time": asdict(plan.time),
        "decisions": [asdict(decision) for decision in plan.decisions],
        "rejected": [
            {**asdict(item), "strategy": strategy_to_json(item.strategy)} for item in plan.rejected
        ],
        "ladder": [rung_to_json(item) for item in plan.ladder],
        "suggestions": list(plan.suggestions),
        "unpredicted_keys": list(plan.unpredicted_keys),
        "run": None if plan.run is None else asdict(plan.run),
        "price_per_gpu_hour": plan.price_per_gpu_hour,
        "speedup_over_one_node": plan.speedup_over_one_node,
        "checkpoint": {
            "bytes": plan.memory.checkpoint_bytes,
            "write_seconds": plan.checkpoint_seconds,
            "write_bytes_per_s": plan.save_rate.bytes_per_s,
            "source": plan.save_rate.source,
        },
        "calibrated": None if cluster.site is None else _site_to_json(cluster.site),
        "host_slowness": host_slowness(cluster),
    }


def rung_to_json(rung: Candidate | Plan) -> dict[str, Any]:
    """Return JSON values that say what a strategy to fall back to costs and saves."""
    return {
        "strategy": strategy_to_json(rung.strategy),
        "device_used_bytes": rung.memory.device_used_bytes,
        "step_seconds": rung.time.step_seconds,
    }


def _site_to_json(site: SiteConstants) -> dict[str, Any]:
    return {
        "num_runs": site.num_runs,
        "fitted_at": site.fitted_at,
        "constants": dict(site.values),
    }


def _memory_to_json(memory: MemoryEstimate) -> dict[str, Any]:
    return {
        "peak_allocated_bytes": memory.peak_allocated_bytes,
        "peak_reserved_bytes": memory.peak_reserved_bytes,
        "device_used_bytes": memory.device_used_bytes,
        "host_bytes_per_node": memory.host_bytes_per_node,
        "host_components": dict(memory.host_components),
        "nvme_bytes_per_node": memory.nvme_bytes_per_node,
        "checkpoint_bytes": memory.checkpoint_bytes,
        "phases": {
            phase.phase: {
                "allocated_bytes": phase.allocated_bytes,
                "moment": phase.moment,
                "components": dict(phase.components),
            }
            for phase in memory.phases
        },
    }


def strategy_to_json(strategy: Strategy) -> dict[str, Any]:
    """Return a strategy as JSON values that :func:`strategy_from_json` reads back."""
    return {key: getattr(value, "value", value) for key, value in asdict(strategy).items()}


def strategy_from_json(value: Mapping[str, Any]) -> Strategy:
    """Read back :func:`strategy_to_json`.

    Raises:
        RunDirError: a key is unknown or missing, or a value is not one of its choices.
    """
    enums: dict[str, type[StrEnum]] = {
        "offload_optimizer": Offload,
        "offload_param": Offload,
        "gradient_checkpointing": Checkpointing,
        "attention": Attention,
        "loss": Loss,
        "optimizer": Optimizer,
        "grad_accum_dtype": Precision,
    }
    try:
        content: dict[str, Any] = {
            key: enums[key](item) if key in enums and item is not None else item
            for key, item in value.items()
        }
        return Strategy(**{**content, "zero": ZeroKnobs(**content["zero"])})
    except (TypeError, ValueError, KeyError) as error:
        raise RunDirError(
            f"the strategy cannot be read: {error}",
            where="plan.json",
            fix="write the plan anew with the same version of zerofit",
        ) from None
