"""When a run is asked to stop: save a checkpoint after this step, on all ranks, and end."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from launcher import run_dir
from launcher.sbatch_parts import REQUEUE_MARKER
from launcher.stop_file import ask_to_stop, clear_stop, is_asked_to_stop, stop_reason
from launcher.worker.interruption import stop_was_requested

logger = logging.getLogger(__name__)

SECONDS_TO_ASK = 1.0
"""The launcher looks for signals every 0.2 s (launcher/dispatch/watch.py), on a busy machine less
often; ranks that it ends without asking wait as long, of the 2.5 s that they have."""
_LOOK_SECONDS = 0.1
SLURM_SECONDS_TO_ASK = 5.0
"""Rank 0 asks Slurm, whose controller answers in less than a second unless it is very busy; ranks
that are to end because another one failed wait as long, and must be gone within 10 s."""
_PREEMPTED = re.compile(r" PreemptTime=\d")


class NothingToSaveError(Exception):
    """The ranks were asked to stop, and have done nothing since the newest checkpoint."""


class EvaluationCutShortError(Exception):
    """The ranks were asked to stop in the middle of an evaluation."""


class StopRequest:
    """Whether any rank was asked to stop, by a signal to it or by the file in the run directory."""

    def __init__(self, folder: Path, device: torch.device, *, rank: int) -> None:
        self._folder, self._device, self._rank = folder, device, rank

    def was_made(self) -> bool:
        """Return the same answer on every rank; all of them call it.

        Ranks hear of a request at different moments, and must stop at the same one. Rank 0 looks
        for the file, so that a step costs one listing and not one a rank.
        """
        here = stop_was_requested() or (self._rank == 0 and is_asked_to_stop(self._folder))
        anywhere = torch.tensor(int(here), device=self._device)
        dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
        return bool(anywhere.item())

    def check_before_training(self) -> None:
        """Raise NothingToSaveError if there was a request; all ranks call it."""
        if self.was_made():
            raise NothingToSaveError


class StopOnRequest(TrainerCallback):  # type: ignore[misc]
    """Stops all ranks after the same step, with a checkpoint, once one of them was asked to."""

    def __init__(self, request: StopRequest) -> None:
        self._request = request
        self._begun_at = 0
        self.stopped_at: int | None = None
        """The optimizer step after which training stopped, if it was asked to."""

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Look before the first step, which can come long after the start."""
        self._begun_at = state.global_step
        self._request.check_before_training()

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save and stop; an evaluation that is due now is made when the run goes on."""
        if state.global_step < state.max_steps and self._request.was_made():
            self._stop(state, control)
            control.should_save, control.should_evaluate = True, False

    def on_save(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop after a checkpoint that was being saved anyway."""
        is_open = self.stopped_at is None and state.global_step < state.max_steps
        if is_open and self._request.was_made():
            self._stop(state, control)

    def on_prediction_step(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave an evaluation; what was trained before it is saved."""
        if not self._request.was_made():
            return
        if state.global_step == self._begun_at:
            raise NothingToSaveError
        self._stop(state, control)
        control.should_save = True
        raise EvaluationCutShortError

    def _stop(self, state: Any, control: Any) -> None:
        self.stopped_at = state.global_step
        control.should_training_stop = True


def leave_for_restart(folder: Path, *, step: int | None, rank: int) -> None:
    """Say that the run can go on from what is saved; all ranks call it.

    Args:
        folder: the run directory.
        step: optimizer step that was saved; ``None`` when there was nothing to save.
        rank: of this process.
    """
    dist.barrier()
    if rank == 0:
        saved = "before its first step" if step is None else f"saved after step {step}"
        asked_by = stop_reason(folder) if is_asked_to_stop(folder) else "SIGUSR1"
        reason = f"{asked_by}: {saved}"
        logger.info("%s", reason)
        run_dir.write_status(folder, "interrupted", reason=reason)
        if "SLURM_JOB_ID" in os.environ:
            # Read by the job script, which asks Slurm to start the job again.
            (folder / REQUEUE_MARKER).touch()
        clear_stop(folder)
    dist.destroy_process_group()


def is_stopping(folder: Path, *, rank: int) -> Callable[[], bool]:
    """Return what tells a thread of a rank whether the ranks were asked to save and end.

    A Slurm job that is preempted with a GraceTime gets no other word than SIGTERM to its ranks,
    just as when another rank has failed: rank 0 asks which of the two it is, and asks all ranks
    to stop.
    """

    def is_asked() -> bool:
        if stop_was_requested() or is_asked_to_stop(folder):
            return True
        # Who sends SIGTERM to all processes at once reaches a rank before the launcher has asked.
        job = os.environ.get("SLURM_JOB_ID")
        if _is_asked_within(SECONDS_TO_ASK, folder) or job is None:
            return is_asked_to_stop(folder)
        if rank == 0:
            if is_preempted(job):
                ask_to_stop(folder, "preemption by Slurm")
            return is_asked_to_stop(folder)
        return _is_asked_within(SLURM_SECONDS_TO_ASK, folder)

    return is_asked


def _is_asked_within(seconds: float, folder: Path) -> bool:
    deadline = time.monotonic() + seconds
    while not is_asked_to_stop(folder) and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
    return is_asked_to_stop(folder)


def is_preempted(job: str) -> bool:
    """Return whether Slurm says that it takes the job's nodes away; not where it does not answer.

    Source: ``scontrol show job`` of Slurm 22.05 has ``PreemptTime=None`` until then.
    """
    try:
        shown = subprocess.run(
            ["scontrol", "show", "job", "-o", job],
            capture_output=True,
            text=True,
            check=False,
            timeout=SLURM_SECONDS_TO_ASK,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.warning("Slurm cannot be asked whether the job is preempted: %s", error)
        return False
    return bool(_PREEMPTED.search(shown.stdout))
