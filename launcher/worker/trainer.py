"""transformers' Trainer, measured: its arguments from the recipe and plan, and its hooks."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from launcher import run_dir
from launcher.recipe_sections import Recipe
from launcher.strategy import Loss, Precision, Strategy
from launcher.units import format_seconds
from launcher.worker.batches import LongestFirst
from launcher.worker.peak_memory import PeakRecorder

logger = logging.getLogger(__name__)

FINAL = "final"
"""Folder below ``checkpoints`` with the trained weights and the tokenizer."""
SYNTHETIC_STEPS = 20
"""Optimizer steps of a run without data whose recipe names no ``max_steps``."""


def training_arguments(
    recipe: Recipe,
    strategy: Strategy,
    ds_config: Mapping[str, Any],
    *,
    folder: Path,
    precision: Precision,
    device: torch.device,
) -> TrainingArguments:
    """Return the trainer's arguments; making them starts the process group.

    They also announce the DeepSpeed configuration to transformers, and must be alive while
    the model is made: that is how ZeRO-3 partitions weights as they are created.
    """
    optim = recipe.optim
    default_steps = SYNTHETIC_STEPS if recipe.data.path is None else -1
    return TrainingArguments(
        output_dir=str(folder / run_dir.CHECKPOINTS),
        deepspeed=dict(ds_config),
        use_cpu=device.type == "cpu",
        bf16=precision is Precision.bf16,
        fp16=precision is Precision.fp16,
        per_device_train_batch_size=strategy.micro_batch_size_per_gpu,
        per_device_eval_batch_size=strategy.micro_batch_size_per_gpu,
        gradient_accumulation_steps=strategy.gradient_accumulation_steps,
        learning_rate=optim.learning_rate,
        num_train_epochs=optim.num_train_epochs,
        max_steps=optim.max_steps or default_steps,
        lr_scheduler_type=optim.lr_scheduler_type,
        # Below 1, transformers takes it as a share of all steps.
        warmup_steps=min(optim.warmup_ratio, math.nextafter(1, 0)),
        weight_decay=optim.weight_decay,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        max_grad_norm=optim.max_grad_norm,
        seed=optim.seed,
        logging_steps=optim.logging_steps,
        # Replaces NaN losses silently, and asks the GPU about each micro-step's loss.
        logging_nan_inf_filter=False,
        eval_strategy="steps" if optim.eval_steps and recipe.data.eval_path else "no",
        eval_steps=optim.eval_steps,
        # The engine exists only inside train(), so the first evaluation happens there.
        eval_on_start=recipe.data.eval_path is not None,
        prediction_loss_only=True,
        save_strategy="steps" if optim.save_steps else "no",
        save_steps=optim.save_steps or 500,
        save_total_limit=optim.save_total_limit,
        use_liger_kernel=strategy.liger_kernels or strategy.loss is Loss.liger,
        liger_kernel_config=liger_settings(strategy),
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        report_to=[],
        disable_tqdm=True,
        log_level="error",
    )


def liger_settings(strategy: Strategy) -> dict[str, bool]:
    """Return which Liger kernels replace the model's own: its modules, its loss, or both.

    All are named, because those left out are on; transformers drops what a model lacks.
    """
    return {
        "rope": strategy.liger_kernels,
        "rms_norm": strategy.liger_kernels,
        "layer_norm": strategy.liger_kernels,
        "swiglu": strategy.liger_kernels,
        "geglu": strategy.liger_kernels,
        "cross_entropy": False,
        "fused_linear_cross_entropy": strategy.loss is Loss.liger,
    }


class MeasuredTrainer(Trainer):  # type: ignore[misc]
    """A trainer whose saving and evaluating are phases, and whose order is longest first."""

    def __init__(
        self,
        *,
        recorder: PeakRecorder,
        lengths: list[int] | None,
        zero_stage: int,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._recorder = recorder
        self._lengths = lengths
        self._zero_stage = zero_stage
        plain_prepare = self.accelerator.prepare

        def prepare(*objects: Any, **keywords: Any) -> Any:
            if not any(isinstance(item, torch.nn.Module) for item in objects):
                return plain_prepare(*objects, **keywords)
            with recorder.during("init"):
                prepared = plain_prepare(*objects, **keywords)
            recorder.watch_engine(prepared[0])
            return prepared

        # accelerate calls deepspeed.initialize inside; the engine exists from here on.
        self.accelerator.prepare = prepare

    def _get_train_sampler(self, *_arguments: Any) -> Sampler[int] | None:
        if self._lengths is None:
            return torch.utils.data.SequentialSampler(self.train_dataset)
        group_size = (
            self.args.train_batch_size
            * self.args.gradient_accumulation_steps
            * self.args.world_size
        )
        return LongestFirst(self._lengths, group_size=group_size, seed=self.args.seed)

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Evaluate on the held-out set, as a phase of its own."""
        with self._recorder.during("eval"):
            metrics: dict[str, float] = super().evaluate(*arguments, **options)
        return metrics

    def _save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        with self._recorder.during("save"):
            super()._save_checkpoint(*arguments, **options)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:  # noqa: FBT001, FBT002
        """Save the trained weights; adapters alone where only they are trained."""
        with self._recorder.during("save"):
            is_adapter = hasattr(self.model, "peft_config")
            if is_adapter and self._zero_stage < 3:
                # Every rank holds the whole adapter. transformers would first copy the whole
                # base model to the host on every rank (trainer.py:save_model, 5.23).
                self._save(output_dir)
            else:
                super().save_model(output_dir, _internal_call=_internal_call)


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

    def on_step_end(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        """Advance the bar."""
        if self._bar is not None:
            self._bar.update(1)

    def on_log(self, _args: Any, state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
        """Write the line and the record of one log entry."""
        entry = dict(logs or {})
        if "loss" in entry:
            self.losses.append(entry["loss"])
        if "eval_loss" in entry:
            self.eval_losses.append(entry["eval_loss"])
        if not state.is_world_process_zero:
            return
        now = time.perf_counter()
        if "loss" in entry:
            tokens = self._recorder.num_tokens
            seconds = max(now - self._last_time, 1e-9)
            entry["tokens_per_s"] = round((tokens - self._last_tokens) * self._world_size / seconds)
            self._last_tokens = tokens
        self._last_time = now
        entry = {"step": state.global_step, "seconds": round(now - self._started, 3), **entry}
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
        self._show(entry, state.max_steps, now - self._started)

    def on_train_end(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _show(self, entry: Mapping[str, Any], max_steps: int, seconds: float) -> None:
        if "loss" in entry:
            step = entry["step"]
            pace = seconds / max(1, step - self._first_step)
            left = format_seconds(pace * (max_steps - step))
            if self._bar is not None:
                self._bar.set_postfix_str(
                    f"loss {entry['loss']:.4f}, {entry['tokens_per_s']:,} tok/s"
                )
                return
            logger.info(
                "step %d/%d %s loss %.4f  lr %.2e  %s tok/s  %s left",
                step,
                max_steps,
                _bar(step / max_steps),
                entry["loss"],
                entry.get("learning_rate", float("nan")),
                f"{entry['tokens_per_s']:,}",
                left,
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


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Tell the recorder when training begins and when each optimizer step ends."""

    def __init__(self, recorder: PeakRecorder) -> None:
        self._recorder = recorder

    def on_train_begin(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        """Start the first step's clock."""
        self._recorder.begin_training()

    def on_step_end(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        """End a step."""
        self._recorder.end_step()


def without_built_in_progress(trainer: Trainer) -> None:
    """Remove transformers' own progress bar and log printer."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
