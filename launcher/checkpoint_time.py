"""How long a checkpoint takes to be written, before one was."""

from __future__ import annotations

WRITE_BYTES_PER_S = 200e6
"""A shared file system under load; a local drive is ten times faster.

Prior: no measurement of this cluster. Each checkpoint that a run saves is timed in its ranks'
files, phase ``save``.
"""
STEP_FACTOR = 1.7
"""A step took up to 1.62 times its predicted time (README, the worst of 60 runs)."""


def save_seconds(checkpoint_bytes: int, *, step_seconds: float) -> float:
    """Return how long ranks take from being asked to having saved.

    They finish the step that they are in, and write.

    Args:
        checkpoint_bytes: of all ranks together, which share one file system.
        step_seconds: predicted for one optimizer step.
    """
    return STEP_FACTOR * step_seconds + checkpoint_bytes / WRITE_BYTES_PER_S
