"""transformers' Trainer, measured: its arguments from the recipe and plan, and its hooks."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from launcher import run_dir
from launcher.errors import RecipeError
from launcher.recipe_sections import Recipe
from launcher.strategy import Loss, Precision, Strategy
from launcher.worker import batch_record, checkpoints
from launcher.worker.batches import LongestFirst, RankBatches
from launcher.worker.finite import NumberCheck, watch_plain_optimizer
from launcher.worker.peak_memory import PeakRecorder
from launcher.worker.resume import Resumption, load_converted
from launcher.worker.sequence import SequenceGroup
from launcher.worker.stop_request import EvaluationCutShortError
from launcher.worker.weight_files import save_model, trained_tensors

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
    evaluates_first: bool = False,
) -> TrainingArguments:
    """Return the trainer's arguments; making them starts the process group.

    They also announce the DeepSpeed configuration to transformers, and must be alive while
    the model is made: that is how ZeRO-3 partitions weights as they are created.
    """
    optim = recipe.optim
    default_steps = -1 if recipe.data.has_training_data else SYNTHETIC_STEPS
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
        eval_on_start=evaluates_first,
        prediction_loss_only=True,
        save_strategy="steps" if optim.save_steps else "no",
        save_steps=optim.save_steps or 500,
        # Old checkpoints are removed by us, once the new one is complete.
        save_total_limit=None,
        use_liger_kernel=strategy.liger_kernels or strategy.loss is Loss.liger,
        liger_kernel_config=liger_settings(strategy),
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        report_to=list(recipe.tracking.report_to),
        run_name=recipe.tracking.run_name or folder.resolve().name,
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
    """A trainer whose phases are measured, whose order is known, and whose saving is atomic."""

    def __init__(
        self,
        *,
        recorder: PeakRecorder,
        lengths: list[int] | None,
        layout: checkpoints.Layout,
        save_total_limit: int | None,
        numbers: NumberCheck,
        sequences: SequenceGroup | None = None,
        resumption: Resumption | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._recorder = recorder
        self._lengths = lengths
        self._layout = layout
        self._save_total_limit = save_total_limit
        self._numbers = numbers
        self._sequences = sequences
        self._share = (self.args.process_index, self.args.world_size)
        if sequences is not None:
            self._share = (sequences.index, sequences.num_groups)
        self._batches: RankBatches | None = None
        self._is_staging = False
        self._last_saved = resumption.path if resumption and not resumption.is_converted else None
        Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
        self._folder_inode = Path(self.args.output_dir).stat().st_ino
        if batch_record.VARIABLE in os.environ:
            folder = Path(self.args.output_dir).parent
            rank = self.args.process_index
            self.add_callback(batch_record.BatchRecord(self._batch_of_step, folder, rank=rank))
        plain_prepare = self.accelerator.prepare

        def prepare(*objects: Any, **keywords: Any) -> Any:
            if not any(isinstance(item, torch.nn.Module) for item in objects):
                return plain_prepare(*objects, **keywords)
            with recorder.during("init"):
                prepared = plain_prepare(*objects, **keywords)
            recorder.watch_engine(prepared[0])
            watch_plain_optimizer(prepared[0])
            if resumption is not None and resumption.is_converted:
                load_converted(prepared[0], resumption)
            return prepared

        # accelerate calls deepspeed.initialize inside; the engine exists from here on.
        self.accelerator.prepare = prepare

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return this rank's part of the batches; accelerate is not asked to deal them out."""
        index, num_shares = self._share
        order: Sampler[int] = SequentialSampler(self.train_dataset)
        if self._lengths is not None:
            group_size = (
                self.args.train_batch_size * self.args.gradient_accumulation_steps * num_shares
            )
            order = LongestFirst(self._lengths, group_size=group_size, seed=self.args.seed)
        self._batches = RankBatches(
            order,
            micro_batch_size=self.args.train_batch_size,
            gradient_accumulation_steps=self.args.gradient_accumulation_steps,
            share=index,
            num_shares=num_shares,
        )
        return DataLoader(
            self.train_dataset,
            batch_sampler=self._batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return this rank's part of the held-out batches; a group's ranks read the same ones."""
        if self._sequences is None:
            dealt: DataLoader[Any] = super().get_eval_dataloader(eval_dataset)
            return dealt
        batches = DataLoader(
            self.eval_dataset,
            batch_size=self.args.eval_batch_size,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self._sequences.deal(batches, self.args.device)

    def prediction_step(self, *arguments: Any, **options: Any) -> Any:
        """Return a held-out batch's loss, of which each part of a sequence has only its share."""
        loss, *others = super().prediction_step(*arguments, **options)
        if self._sequences is not None:
            dist.all_reduce(loss)
            loss /= self.args.world_size
        return (loss, *others)

    def _once_a_sample(self, losses: torch.Tensor) -> torch.Tensor:
        """Return the step's loss, the same on all ranks, as often as the step has samples."""
        count, state = losses.numel() * self._share[1], self.accelerator.gradient_state
        if state.end_of_dataloader and state.remainder > 0:
            count = state.remainder
        return losses[:1].repeat(count)

    def whole_sequences(self) -> AbstractContextManager[None]:
        """Let this rank run whole sequences by itself, as generation does."""
        return nullcontext() if self._sequences is None else self._sequences.paused()

    def _batch_of_step(self) -> list[list[int]]:
        """Return the row numbers of this rank's examples in this step, one list a micro-step."""
        assert self._batches is not None
        return list(self._batches.of_this_step)

    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        """Train on a micro-batch; at the end of a step, DeepSpeed takes it in here."""
        try:
            loss: torch.Tensor = super().training_step(*arguments, **options)
        except Exception as error:
            collapse = self._numbers.collapse_of(error, step=self.state.global_step + 1)
            if collapse is None:
                raise
            raise collapse from error
        return self._numbers.add_loss(loss)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self._numbers.end_step(norm, step=self.state.global_step + 1, batch=self._batch_of_step())
        return norm

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the learning rate's schedule.

        Raises:
            RecipeError: a polynomial schedule has no step after its warm-up.
        """
        is_polynomial = self.args.lr_scheduler_type == "polynomial"
        if is_polynomial and self.args.get_warmup_steps(num_training_steps) >= num_training_steps:
            # transformers 5.23 optimization.py divides by the steps after the warm-up.
            raise RecipeError(
                f"a polynomial schedule cannot warm up in all of its {num_training_steps} steps",
                where="optim.lr_scheduler_type",
                fix="set optim.warmup_ratio=0, train for more steps, or use linear",
            )
        chosen = base = optimizer or self.optimizer
        while not hasattr(base, "defaults"):
            base = base.optimizer
        # What transformers' polynomial schedule asks for, DeepSpeed's wrappers lack.
        chosen.defaults = base.defaults
        return super().create_scheduler(num_training_steps, chosen)

    def _run_epoch(self, **options: Any) -> None:
        """Train for an epoch; transformers 5.23 makes a step too many after the last one."""
        if self.state.global_step >= self.state.max_steps:
            # A run that was stopped between its last step and its end goes on here.
            self.control.should_training_stop = True
            return
        super()._run_epoch(**options)

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Evaluate on the held-out set, as a phase of its own; nothing if it was cut short."""
        metrics: dict[str, float] = {}
        if self._sequences is not None:
            # transformers takes its own again after each evaluation.
            self.gather_function = self._once_a_sample
        with self._recorder.during("eval"), suppress(EvaluationCutShortError):
            metrics = super().evaluate(*arguments, **options)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:  # noqa: FBT001, FBT002
        """Save the trained weights; adapters alone where only they are trained."""
        folder = Path(output_dir or self.args.output_dir)
        with self._recorder.during("save"):
            if not hasattr(self.model, "peft_config"):
                # Everything but the weights, in whose place it leaves an empty file.
                self._save(str(folder), state_dict={})
                save_model(self.model_wrapped, folder, is_writer=self.args.should_save)
            elif self._layout.zero_stage < 3:
                self._save(str(folder))  # every rank holds the whole adapter
            else:
                adapter = trained_tensors(self.model_wrapped, is_writer=self.args.should_save)
                self._save(str(folder), state_dict=adapter)

    def save_progress(self) -> None:
        """Save a checkpoint of the step that was reached, unless there is one.

        Raises:
            SaveFailedError: the disk did not take it.
        """
        if not (Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}").exists():
            self._save_checkpoint(self.model, None)

    def save_final(self) -> None:
        """Save the trained weights below the name ``final``, whole or not at all.

        Raises:
            SaveFailedError: the disk did not take them.
        """
        with self._saving() as staging:
            self.save_model(str(staging / FINAL))
            self._publish(staging / FINAL)

    def _save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        with self._recorder.during("save"), self._saving() as staging:
            super()._save_checkpoint(*arguments, **options)
            name = f"checkpoint-{self.state.global_step}"
            self._publish(staging / name)
            self._last_saved = staging.parent / name
            if self.args.should_save:
                checkpoints.prune(staging.parent, keep=self._save_total_limit)

    @contextmanager
    def _saving(self) -> Iterator[Path]:
        """Yield the folder to write below; what a full disk raises becomes one error."""
        folder = Path(self.args.output_dir)
        self._is_staging = True
        try:
            checkpoints.check_is_same_folder(folder, self._folder_inode)
            yield checkpoints.staging_folder(folder)
        except Exception as error:
            if not checkpoints.is_write_failure(error):
                raise
            failure = checkpoints.save_failure(error, folder, last=self._last_saved)
            # Room for the files that say why the run ended.
            checkpoints.clear_unfinished(folder)
            raise failure from error
        finally:
            self._is_staging = False

    def _get_output_dir(self, trial: Any) -> str:
        plain: str = super()._get_output_dir(trial)
        return str(checkpoints.staging_folder(Path(plain))) if self._is_staging else plain

    def _publish(self, staged: Path) -> None:
        """Give a staged folder its name, when every host's writes are on the disk."""
        dist.barrier()
        if self.args.local_process_index == 0:
            checkpoints.sync_files(staged)
        dist.barrier()
        if self.args.should_save:
            checkpoints.complete(
                staged,
                staged.parent.parent / staged.name,
                step=self.state.global_step,
                layout=self._layout,
                parameter_groups=self._parameter_groups(),
            )
        dist.barrier()

    def _parameter_groups(self) -> tuple[tuple[str, ...], ...]:
        """Return the names of the trained parameters as stage 0's optimizer numbers them.

        The other stages write names beside their states themselves.
        """
        engine = self.model_wrapped
        if self._layout.zero_stage != 0:
            return ()
        groups = getattr(engine.optimizer, "fp16_groups", None)
        if groups is None:
            groups = [group["params"] for group in engine.optimizer.param_groups]
        return tuple(tuple(engine.param_names[item] for item in group) for group in groups)

    def _init_training_state(self, max_steps: int, *arguments: Any) -> tuple[int, int]:
        position: tuple[int, int] = super()._init_training_state(max_steps, *arguments)
        # A checkpoint's state brings its own intervals; those of the recipe hold.
        self.state.compute_steps(self.args, max_steps)
        return position


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
