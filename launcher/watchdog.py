"""How long a rank may get no further before it counts as hung."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.checkpoint_time import PATIENCE_FACTOR
from launcher.failure_kind import EXIT_STATUS, FailureKind

HUNG_EXIT_STATUS = EXIT_STATUS[FailureKind.hang]
"""What a rank that hangs ends itself with."""
STEP_FACTOR = 10.0
"""Of the predicted step time; the worst run measured took 1.62 times its prediction (README)."""
FLOOR_SECONDS = 100.0
"""torchtitan's limit for a collective after the first step (``comm.train_timeout_seconds``)."""
PHASE_SECONDS = 1800.0
"""When DeepSpeed's collectives give up, and with them the ranks that wait for this one
(0.19.8 ``constants.py``: ``default_pg_timeout``)."""
_TRAINING_PHASES = frozenset({None, "forward", "loss", "backward", "step"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Seconds without progress after which a rank is hung; 0 waits for ever."""

    training_seconds: float
    """Within a micro-step: forward, loss, backward, step, or between two of them."""
    phase_seconds: float
    """In phases without micro-steps (load, init, eval, save), and in the first step, which
    compiles kernels and allocates all that the run needs."""

    def limit_seconds(self, phase: str | None, *, steps_done: int) -> float:
        """Return how long a rank may stay where it is."""
        if phase in _TRAINING_PHASES and steps_done > 0:
            return self.training_seconds
        return self.phase_seconds


def patience(
    *,
    watchdog_seconds: float | None,
    phase_seconds: float | None,
    step_seconds: float | None,
    write_seconds: float | None = None,
) -> Patience:
    """Return what holds for a run.

    Args:
        watchdog_seconds: the recipe's limit in training, if it has one.
        phase_seconds: the recipe's limit in other phases, if it has one.
        step_seconds: predicted time of an optimizer step, if there is a prediction.
        write_seconds: predicted time of writing a checkpoint, if there is one.
    """
    default = max(FLOOR_SECONDS, STEP_FACTOR * (step_seconds or 0.0))
    training = default if watchdog_seconds is None else watchdog_seconds
    slowest = max(PHASE_SECONDS, training, PATIENCE_FACTOR * (write_seconds or 0.0))
    other = slowest if phase_seconds is None else phase_seconds
    # Who turns the watchdog off means all of it.
    return Patience(training_seconds=training, phase_seconds=other if training else 0.0)
