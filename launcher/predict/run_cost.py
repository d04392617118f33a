"""Time and cost of a whole run, from its steps."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.hardware import ClusterSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEstimate:
    """Time and cost of a whole run."""

    num_steps: int
    seconds: float
    gpu_hours: float
    cost: float | None
    """In the price's currency; ``None`` without a price."""


def run_estimate(
    num_steps: int,
    seconds: float,
    cluster: ClusterSpec,
    *,
    price_per_gpu_hour: float | None = None,
) -> RunEstimate:
    """Return what a run takes of a cluster; start, evaluation and saving come on top.

    Args:
        num_steps: optimizer steps.
        seconds: of all of them.
        cluster: gives the number of GPUs paid for.
        price_per_gpu_hour: in any currency; the cost comes back in the same.
    """
    gpu_hours = seconds * cluster.world_size / 3600
    cost = None if price_per_gpu_hour is None else gpu_hours * price_per_gpu_hour
    return RunEstimate(num_steps=num_steps, seconds=seconds, gpu_hours=gpu_hours, cost=cost)
