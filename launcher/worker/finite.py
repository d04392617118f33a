"""Numbers that go wrong: NaN or infinite losses and gradients, and a collapsing loss scale.

DeepSpeed looks at the norm of all gradients before each step, in every optimizer but torch's
own (0.19.8 ``is_invalid_grad_norm``), and leaves the step out when it is not finite. The norm is
the same on all ranks, so all of them take the same decision here without another collective, and
looking at the losses then waits for nothing: they were computed before the norm.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from launcher import run_dir
from launcher.errors import JobFailedError
from launcher.failure_kind import FailureKind

logger = logging.getLogger(__name__)

BAD_BATCHES = "bad_batches"
"""Folder of the run directory: ``bad_batches/step-000007-rank-00001.json``."""
MAX_SKIPPED_IN_A_ROW = 20
"""fp16: from 2^12, where we start, 12 halvings and a hysteresis of 2 reach the least scale, 1
(DeepSpeed 0.19.8 ``fp16/loss_scaler.py``); a later scale may have doubled a few times.
Skipping on request: what spoils so many steps in a row is not one batch."""
# The rank whose loss was not finite shall be the first to say so; the others only see the norm.
_OTHERS_FIRST_SECONDS = 2.0
_AT_LEAST_SCALE = "Current loss scale already at minimum"


class NotFiniteError(JobFailedError):
    """A loss or the gradients' norm is NaN or infinite."""

    kind = FailureKind.nan


class LossScaleError(JobFailedError):
    """fp16's loss scale has collapsed: gradients overflow at every scale."""

    kind = FailureKind.nan


class NumberCheck:
    """Looks at every step's losses and gradient norm once the engine has taken the step.

    Args:
        folder: the run directory.
        rank: this rank.
        on_nan: end the run, or leave the step out and go on.
        is_scaled: fp16, where a gradient that overflows is normal now and then.
    """

    def __init__(
        self, folder: Path, *, rank: int, on_nan: Literal["stop", "skip"], is_scaled: bool
    ) -> None:
        self._folder = folder
        self._rank = rank
        self._on_nan = on_nan
        self._is_scaled = is_scaled
        self._losses: list[torch.Tensor] = []
        self._skipped_in_a_row = 0

    def add_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Keep the loss of a micro-step, a detached scalar; return what the log may add up.

        A sum that took in a NaN stays one, so a step that is left out counts as nothing there.
        """
        self._losses.append(loss)
        return torch.nan_to_num(loss, 0.0, 0.0, 0.0) if self._on_nan == "skip" else loss

    def end_step(
        self, grad_norm: float | None, *, step: int, batch: Sequence[Sequence[int]]
    ) -> None:
        """Judge a step that the engine has taken, or left out.

        Args:
            grad_norm: of all ranks; ``None`` where the engine computes none.
            step: the optimizer step, counted from 1.
            batch: row numbers of this rank's micro-batches in the tokenised data.

        Raises:
            NotFiniteError: the numbers are not finite, and the recipe does not skip such steps,
                or too many were skipped in a row.
            LossScaleError: too many steps in a row overflowed in fp16.
        """
        losses = torch.stack(self._losses).tolist()
        self._losses.clear()
        norm_is_finite = grad_norm is None or math.isfinite(grad_norm)
        losses_are_finite = all(map(math.isfinite, losses))
        if norm_is_finite and losses_are_finite:
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        if self._is_scaled and losses_are_finite and self._skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
            return
        if self._is_scaled and losses_are_finite:
            raise self._collapse(f"{self._skipped_in_a_row} steps in a row overflowed", step=step)
        path = self._record(losses, grad_norm, step=step, batch=batch)
        error = self._describe(losses, grad_norm, step=step, batch=batch, path=path)
        if self._on_nan == "stop" or self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            if losses_are_finite:
                time.sleep(_OTHERS_FIRST_SECONDS)
            raise error
        logger.warning("skipped: %s", error.problem)

    def collapse_of(self, error: Exception, *, step: int) -> LossScaleError | None:
        """Return what DeepSpeed's word for a loss scale that cannot fall means, else ``None``."""
        if not str(error).startswith(_AT_LEAST_SCALE):
            return None
        return self._collapse("it is at its least value, and gradients overflow", step=step)

    def _collapse(self, why: str, *, step: int) -> LossScaleError:
        return LossScaleError(
            f"fp16's loss scale has collapsed at step {step}: {why}",
            where=f"rank {self._rank}",
            fix="use model.precision bf16 where the GPU has it, else fp32, or a lower "
            "optim.learning_rate, in a new run",
        )

    def _record(
        self,
        losses: list[float],
        grad_norm: float | None,
        *,
        step: int,
        batch: Sequence[Sequence[int]],
    ) -> Path:
        path = self._folder / BAD_BATCHES / f"step-{step:06d}-rank-{self._rank:05d}.json"
        path.parent.mkdir(exist_ok=True)
        # JSON has no NaN: the words stand there as text.
        content: dict[str, Any] = {
            "step": step,
            "rank": self._rank,
            "action": self._on_nan,
            "grad_norm": _word(grad_norm),
            "micro_batches": [
                {"loss": _word(loss), "rows": list(rows)}
                for loss, rows in zip(losses, batch, strict=True)
            ],
        }
        run_dir.write_json(path, content)
        return path

    def _describe(
        self,
        losses: list[float],
        grad_norm: float | None,
        *,
        step: int,
        batch: Sequence[Sequence[int]],
        path: Path,
    ) -> NotFiniteError:
        bad = [rows for loss, rows in zip(losses, batch, strict=True) if not math.isfinite(loss)]
        if bad:
            rows = ", ".join(str(row) for micro_batch in bad for row in micro_batch)
            what = f"the loss of rows {rows} of the tokenised data is not finite"
        else:
            what = f"the norm of the gradients is {_word(grad_norm)}"
        again = f", {self._skipped_in_a_row} steps in a row" if self._skipped_in_a_row > 1 else ""
        return NotFiniteError(
            f"step {step}: {what}{again}; this rank's batch is in {path.relative_to(self._folder)}",
            where=f"rank {self._rank}",
            fix="look at these rows, or lower optim.learning_rate; recovery.on_nan=skip leaves "
            "such steps out",
        )


def _word(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


def watch_plain_optimizer(engine: Any) -> None:
    """Let a torch optimizer leave out a step whose gradients are not finite.

    DeepSpeed's own optimizers do; without ZeRO in fp32 it takes torch's as it is, whose weights
    one NaN would spoil. The engine counts a step as skipped where ``overflow`` says so.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "_global_grad_norm"):
        return
    plain_step = optimizer.step

    def step(*arguments: Any, **options: Any) -> Any:
        grads = [
            parameter.grad
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        optimizer.overflow = not bool(torch.nn.utils.get_total_norm(grads).isfinite())
        # Of finite gradients it gives none, as before.
        optimizer._global_grad_norm = math.inf if optimizer.overflow else None
        return None if optimizer.overflow else plain_step(*arguments, **options)

    optimizer.step = step
