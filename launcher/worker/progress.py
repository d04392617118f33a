"""Rank 0's progress: what people watch, and ``trainer_log.jsonl``."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from launcher import run_dir
from launcher.units import format_bytes, format_seconds
from launcher.worker.peak_memory import PeakRecorder
from launcher.worker.stop_request import StopOnRequest

logger = logging.getLogger(__name__)


class Progress(TrainerCallback):  # type: ignore[misc]
    """Rank 0's progress: one line a logged step, and ``trainer_log.jsonl``.

    Tokens per second are those of all ranks, taken to be ``world_size`` times this rank's.
    """

    def __init__(self, recorder: PeakRecorder, *, folder: Path, world_size: int) -> None:
        self._recorder = recorder
        self._path = folder / run_dir.TRAINER_LOG
        self._world_size = world_size
        self._bar: Any = None
        self._started = 0.0
        self._first_step = 0
        self._last_time = 0.0
        self._last_tokens = 0
        self.losses: list[float] = []
        self.eval_losses: list[float] = []

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Start the clock, and a bar where someone watches; take up an earlier attempt's log."""
        self._started = self._last_time = time.perf_counter()
        self._first_step = state.global_step
        if state.is_world_process_zero and self._path.exists():
            self._take_up_log(state.global_step)
        if state.is_world_process_zero and sys.stderr.isatty():
            from tqdm import tqdm  # type: ignore[import-untyped]

            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step")

    def _take_up_log(self, global_step: int) -> None:
        """Drop what was logged after the checkpoint that training goes on from; keep the rest."""
        lines = self._path.read_text(encoding="utf-8").splitlines()
        entries = [json.loads(line) for line in lines if line.endswith("}")]
        kept = [entry for entry in entries if global_step and entry["step"] <= global_step]
        run_dir.write_text(self._path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self.losses = [entry["loss"] for entry in kept if "loss" in entry]
        self.eval_losses = [entry["eval_loss"] for entry in kept if "eval_loss" in entry]

    def first_and_last_losses(self) -> dict[str, float | None]:
        """Return the losses of results.json; ``None`` where none was logged."""
        before, after = (
            (self.eval_losses[0], self.eval_losses[-1]) if self.eval_losses else (None, None)
        )
        first, last = (self.losses[0], self.losses[-1]) if self.losses else (None, None)
        return {
            "eval_loss_before": before,
            "eval_loss_after": after,
            "train_loss_first": first,
            "train_loss_last": last,
        }

    def on_step_end(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        """Advance the bar."""
        if self._bar is not None:
            self._bar.update(1)

    def on_log(self, _args: Any, state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
        """Write the line and the record of one log entry."""
        logs = {} if logs is None else logs
        if "loss" in logs:
            self.losses.append(logs["loss"])
        if "eval_loss" in logs:
            self.eval_losses.append(logs["eval_loss"])
        if not state.is_world_process_zero:
            return
        now = time.perf_counter()
        if "loss" in logs:
            tokens = self._recorder.num_tokens
            seconds = max(now - self._last_time, 1e-9)
            # Into the trainer's own mapping, which trackers see after this callback.
            logs["tokens_per_s"] = round((tokens - self._last_tokens) * self._world_size / seconds)
            logs["peak_allocated_bytes"] = self._recorder.peak_allocated_bytes
            self._last_tokens = tokens
        self._last_time = now
        elapsed = now - self._started
        pace = elapsed / max(1, state.global_step - self._first_step)
        entry = {
            "step": state.global_step,
            "total_steps": state.max_steps,
            "seconds": round(elapsed, 3),
            "remaining_seconds": round(pace * (state.max_steps - state.global_step), 3),
            **logs,
        }
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
        self._show(entry)

    def on_train_end(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _show(self, entry: Mapping[str, Any]) -> None:
        if "loss" in entry:
            step, max_steps = entry["step"], entry["total_steps"]
            peak = format_bytes(entry["peak_allocated_bytes"])
            if self._bar is not None:  # which shows the time that is left itself
                self._bar.set_postfix_str(
                    f"loss {entry['loss']:.4f}, {entry['tokens_per_s']:,} tok/s, peak {peak}"
                )
                return
            logger.info(
                "step %d/%d %s loss %.4f  lr %.2e  %s tok/s  peak %s  %s left",
                step,
                max_steps,
                _bar(step / max_steps),
                entry["loss"],
                entry.get("learning_rate", float("nan")),
                f"{entry['tokens_per_s']:,}",
                peak,
                format_seconds(entry["remaining_seconds"]),
            )
        elif "eval_loss" in entry:
            line = f"held-out loss {entry['eval_loss']:.4f} at step {entry['step']}"
            if self._bar is not None:
                self._bar.write(line, file=sys.stderr)
            else:
                logger.info("%s", line)


def _bar(fraction: float, *, width: int = 16) -> str:
    """Return a bar that also reads well in a log, where nothing can be drawn over."""
    done = round(fraction * width)
    return "█" * done + "░" * (width - done)


class LastEvaluation(TrainerCallback):  # type: ignore[misc]
    """Evaluates what was trained, unless its last step was: before trackers end their runs.

    After that, transformers' trackers begin another run, without name or parameters.
    """

    def __init__(self, trainer: Any, stop: StopOnRequest) -> None:
        self._trainer = trainer
        self._stop = stop

    def on_train_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Evaluate; all ranks do or none."""
        if self._stop.stopped_at is not None or self._trainer.eval_dataset is None:
            return
        logged = [entry["step"] for entry in state.log_history if "eval_loss" in entry]
        if state.global_step not in logged:
            self._trainer.evaluate()
