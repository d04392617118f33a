"""How long a checkpoint takes to be written, by a usual rate or one that earlier saves had."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveRate:
    """How fast the ranks of a run write a checkpoint together."""

    bytes_per_s: float
    source: str
    """Where the rate comes from, in words."""


USUAL_RATE = SaveRate(
    bytes_per_s=200e6, source="usual for a shared file system under load; no save was timed here"
)
"""A local drive is ten times faster.

Prior: no measurement of this cluster. Each checkpoint that a run saves is timed in its ranks'
files, phase ``save``.
"""
STEP_FACTOR = 1.7
"""A step took up to 1.62 times its predicted time (README, the worst of 60 runs)."""
PATIENCE_FACTOR = 4.0
"""A predicted time is not a promise: ranks that save are given so many times as long."""


def save_seconds(write_seconds: float, *, step_seconds: float) -> float:
    """Return how long ranks take from being asked to having saved.

    They finish the step that they are in, and write.

    Args:
        write_seconds: for the checkpoint of all ranks together, which share one file system.
        step_seconds: predicted for one optimizer step.
    """
    return STEP_FACTOR * step_seconds + write_seconds
