"""When Slurm says that the time is nearly up: save a checkpoint after this step, and end."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from launcher import run_dir
from launcher.sbatch_script import REQUEUE_MARKER
from launcher.worker.interruption import stop_was_requested

logger = logging.getLogger(__name__)


class StopOnRequest(TrainerCallback):  # type: ignore[misc]
    """Stops all ranks after the same step, with a checkpoint, once one of them was asked to."""

    def __init__(self, device: torch.device) -> None:
        # Nobody asks elsewhere, and the ranks need not agree after each step.
        self._may_be_asked = "SLURM_JOB_ID" in os.environ
        self._device = device
        self.stopped_at: int | None = None
        """The optimizer step after which training stopped, if it was asked to."""

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        """Agree with the other ranks, which the signal reaches at other moments."""
        if not self._may_be_asked or state.global_step >= state.max_steps:
            return
        was_asked = torch.tensor(int(stop_was_requested()), device=self._device)
        dist.all_reduce(was_asked, op=dist.ReduceOp.MAX)
        if was_asked.item():
            self.stopped_at = state.global_step
            control.should_save = True
            control.should_training_stop = True


def leave_for_restart(folder: Path, *, step: int, rank: int) -> None:
    """Say that the checkpoint is there and that the job may be started again; all ranks call it."""
    dist.barrier()
    if rank == 0:
        reason = f"the time limit is near: saved after step {step}"
        logger.info("%s", reason)
        run_dir.write_status(folder, "interrupted", reason=reason)
        # Read by the job script, which asks Slurm to start the job again.
        (folder / REQUEUE_MARKER).touch()
    dist.destroy_process_group()
