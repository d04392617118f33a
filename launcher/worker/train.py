"""The process that every rank runs: ``python -m launcher.worker.train --run-dir DIR``.

Its only input is the run directory: recipe.yaml, plan.json, ds_config.json and, where the
recipe names data, the folder that ``launcher.worker.data`` wrote. It leaves there one file per
rank with what was measured, the trainer's log, checkpoints, results.json and, last of all,
status.json.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import run_dir
from launcher.errors import RunDirError
from launcher.failure_kind import EXIT_STATUS
from launcher.planning.plan import strategy_from_json
from launcher.recipe import parse_recipe
from launcher.recipe_sections import Recipe
from launcher.strategy import Attention, Method, Precision, Strategy, needs_bitsandbytes
from launcher.watchdog import Patience, patience
from launcher.worker.faults import faults_from_environment
from launcher.worker.heartbeat import Heartbeat
from launcher.worker.interruption import exit_on_signal, listen_for_stop
from launcher.worker.last_words import report_failure
from launcher.worker.observation import add_step_snapshot, open_to_view
from launcher.worker.prerequisites import leave_out_bitsandbytes
from launcher.worker.program import (
    collect_garbage_from_now_on,
    hide_secrets,
    quiet_libraries,
    run_program,
)
from launcher.worker.ranks import (
    Ranks,
    choose_device,
    prepare_environment,
    ranks_from_environment,
    start_process_group,
)
from launcher.worker.tracking import tracker_environment

if TYPE_CHECKING:
    import torch

    from launcher.data_cache import DataSummary
    from launcher.worker.peak_memory import PeakRecorder
    from launcher.worker.resume import Resumption
    from launcher.worker.sequence import SequenceGroup
    from launcher.worker.stop_request import StopRequest

# Not __name__, which is "__main__" in a rank.
logger = logging.getLogger("launcher.worker.train")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What the run directory says."""

    folder: Path
    recipe: Recipe
    strategy: Strategy
    precision: Precision
    ds_config: Mapping[str, Any]
    patience: Patience


def read_inputs(folder: Path) -> Inputs:
    """Read what the launcher left in the run directory.

    Raises:
        RunDirError: a file is missing or not what it should be.
    """
    recipe_path = folder / run_dir.RECIPE
    plan = run_dir.read_json(folder / run_dir.PLAN)
    try:
        strategy, precision = plan["strategy"], Precision(plan["precision"])
    except (KeyError, ValueError) as error:
        raise RunDirError(
            f"no usable {error}",
            where=str(folder / run_dir.PLAN),
            fix="write the plan anew with the same version of zerofit",
        ) from None
    recipe = parse_recipe(run_dir.read_text(recipe_path), source=str(recipe_path))
    return Inputs(
        folder=folder,
        recipe=recipe,
        strategy=strategy_from_json(strategy),
        precision=precision,
        ds_config=run_dir.read_json(folder / run_dir.DS_CONFIG),
        patience=patience(
            watchdog_seconds=recipe.recovery.watchdog_seconds,
            phase_seconds=recipe.recovery.phase_seconds,
            step_seconds=plan.get("time", {}).get("step_seconds"),
            write_seconds=plan.get("checkpoint", {}).get("write_seconds"),
        ),
    )


def run(inputs: Inputs, ranks: Ranks, device: torch.device, recorder: PeakRecorder) -> None:
    """Train from start to end on this rank, or until it is asked to stop.

    Raises:
        LauncherError: something that the user can mend.
    """
    from launcher.worker.host_speed import host_autograd_op_seconds
    from launcher.worker.stop_request import NothingToSaveError, StopRequest, leave_for_restart

    with recorder.during("load"):
        start_process_group(device)
    recorder.host_autograd_op_seconds = host_autograd_op_seconds(device)
    stop_request = StopRequest(inputs.folder, device, rank=ranks.rank)
    try:
        _load_and_train(inputs, ranks, device, recorder, stop_request)
    except NothingToSaveError:
        recorder.interrupt()
        leave_for_restart(inputs.folder, step=None, rank=ranks.rank)


def _load_and_train(
    inputs: Inputs,
    ranks: Ranks,
    device: torch.device,
    recorder: PeakRecorder,
    stop_request: StopRequest,
) -> None:
    from transformers import set_seed

    from launcher.worker.checkpoints import layout_of
    from launcher.worker.finite import NumberCheck
    from launcher.worker.model import load_model
    from launcher.worker.resume import agree_on_checkpoint, evaluates_first, resuming_config
    from launcher.worker.sequence import share_sequences
    from launcher.worker.trainer import MeasuredTrainer, training_arguments

    collect_garbage_from_now_on()
    recipe, strategy = inputs.recipe, inputs.strategy
    layout = layout_of(strategy, inputs.precision, inputs.ds_config, world_size=ranks.world_size)
    with recorder.during("load"):
        checkpoints = inputs.folder / run_dir.CHECKPOINTS
        resumption = agree_on_checkpoint(checkpoints, layout, rank=ranks.rank)
        recorder.earlier_steps = resumption.step if resumption else 0
        arguments = training_arguments(
            recipe,
            strategy,
            resuming_config(inputs.ds_config, resumption),
            folder=inputs.folder,
            precision=inputs.precision,
            device=device,
            evaluates_first=evaluates_first(recipe, resumption),
        )
        set_seed(recipe.optim.seed)
        model = load_model(
            recipe, strategy, precision=inputs.precision, device=device, run_dir=inputs.folder
        )
        recorder.count_model(model)
    stop_request.check_before_training()
    sequences = share_sequences(model, strategy)
    options, summary, tokenizer = _data_options(inputs, ranks, model, sequences)
    numbers = NumberCheck(
        inputs.folder,
        rank=ranks.rank,
        on_nan=recipe.recovery.on_nan,
        is_scaled=inputs.precision is Precision.fp16,
    )
    trainer = MeasuredTrainer(
        recorder=recorder,
        layout=layout,
        save_total_limit=recipe.optim.save_total_limit,
        numbers=numbers,
        sequences=sequences,
        resumption=resumption,
        model=model,
        args=arguments,
        optimizer_cls_and_kwargs=_optimizer(inputs),
        processing_class=tokenizer,
        **options,
    )
    _train(trainer, inputs, ranks, recorder, summary, resumption, stop_request)


def _train(  # noqa: PLR0917
    trainer: Any,
    inputs: Inputs,
    ranks: Ranks,
    recorder: PeakRecorder,
    summary: DataSummary | None,
    resumption: Resumption | None,
    stop_request: StopRequest,
) -> None:
    import torch.distributed as dist

    from launcher.worker.gather_peaks import log_fullest_rank, sum_over_ranks
    from launcher.worker.progress import LastEvaluation, Progress
    from launcher.worker.resume import RemoveConverted
    from launcher.worker.sample import Sample, wants_sample
    from launcher.worker.stop_request import StopOnRequest, leave_for_restart
    from launcher.worker.trainer import StepClock, without_built_in_progress

    progress = Progress(recorder, folder=inputs.folder, world_size=ranks.world_size)
    asked = wants_sample(inputs.recipe.tracking, summary, inputs.strategy)
    sample = Sample(trainer, recorder, summary if asked else None, folder=inputs.folder)
    without_built_in_progress(trainer)
    for callback in (sample, StepClock(recorder), stop := StopOnRequest(stop_request)):
        trainer.add_callback(callback)
    add_step_snapshot(trainer, inputs.recipe.tracking, inputs.folder, ranks)
    # First, because they add to the numbers that trackers write down.
    trainer.callback_handler.callbacks[:0] = [progress, LastEvaluation(trainer, stop)]
    if resumption is not None and resumption.is_converted:
        trainer.add_callback(RemoveConverted(resumption))
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(resumption.path) if resumption else None)
    train_seconds = time.perf_counter() - started
    if stop.stopped_at is not None:
        trainer.save_progress()
        recorder.interrupt()
        leave_for_restart(inputs.folder, step=stop.stopped_at, rank=ranks.rank)
        return
    answer_after = sample.answer()
    if inputs.recipe.model.random_weights and inputs.recipe.method is Method.full:
        logger.info("random weights are not saved")
    else:
        trainer.save_final()
    tokens_seen = sum_over_ranks(recorder.num_tokens, trainer.args.device)
    recorder.finish()
    if ranks.rank == 0:
        results = {
            **progress.first_and_last_losses(),
            "sample": sample.result(answer_after),
            "tokens_seen": tokens_seen,
            "train_seconds": round(train_seconds, 3),
        }
        run_dir.write_json(inputs.folder / run_dir.RESULTS, results)
    log_fullest_rank(recorder.snapshot(), ranks)
    dist.barrier()
    if ranks.rank == 0:
        # Last of all: DeepSpeed's launcher can exit with 0 although a rank was killed.
        run_dir.write_status(inputs.folder, "finished")
    dist.destroy_process_group()


def _data_options(
    inputs: Inputs, ranks: Ranks, model: Any, sequences: SequenceGroup | None
) -> tuple[dict[str, Any], DataSummary | None, Any]:
    """Return the trainer's data arguments, the data's summary and the tokenizer."""
    from launcher.data_cache import DATA, EVAL, TRAIN, load_summary
    from launcher.worker.batches import RandomTokens
    from launcher.worker.chat_templates import load_tokenizer
    from launcher.worker.data_writer import read_rows
    from launcher.worker.trainer import SYNTHETIC_STEPS
    from launcher.worker.vocabulary import check_vocabulary

    recipe, strategy = inputs.recipe, inputs.strategy
    if not recipe.data.has_training_data:
        batch = strategy.micro_batch_size_per_gpu * strategy.gradient_accumulation_steps
        batch *= ranks.world_size // strategy.sequence_parallel_size
        tokens = RandomTokens(
            num_examples=batch * (recipe.optim.max_steps or SYNTHETIC_STEPS),
            max_seq_len=recipe.max_seq_len,
            vocab_size=model.config.get_text_config().vocab_size,
            seed=recipe.optim.seed,
        )
        options = {
            "train_dataset": tokens,
            "data_collator": _collator(strategy, sequences, pad_token_id=0),
            "lengths": None,
        }
        return options, None, None
    folder = inputs.folder / DATA
    summary = load_summary(folder)
    train = read_rows(folder / TRAIN).with_format("numpy")
    held_out = None
    if summary.eval is not None:
        held_out = read_rows(folder / EVAL).with_format("numpy")
    rows = model.get_input_embeddings().num_embeddings
    check_vocabulary(summary.max_token_id, rows, source=recipe.model.name_or_path)
    options = {
        "train_dataset": train,
        "eval_dataset": held_out,
        "data_collator": _collator(
            strategy, sequences, pad_token_id=summary.pad_token_id, packing=summary.packing
        ),
        "lengths": [int(length) for length in train["length"]],
    }
    return options, summary, load_tokenizer(recipe)


def _collator(
    strategy: Strategy,
    sequences: SequenceGroup | None,
    *,
    pad_token_id: int,
    packing: bool = False,
) -> Any:
    from launcher.worker.batches import PackedRows, RightPadding
    from launcher.worker.sequence import CutSequences

    if packing:
        is_flash = strategy.attention is Attention.flash_attention_2
        return PackedRows(pad_token_id=pad_token_id, is_one_row=is_flash)
    if sequences is None:
        return RightPadding(pad_token_id=pad_token_id)
    padding = RightPadding(pad_token_id=pad_token_id, multiple_of=sequences.size)
    return CutSequences(padding, sequences)


def _optimizer(inputs: Inputs) -> tuple[Any, dict[str, Any]]:
    from launcher.worker.model import optimizer_class

    optim = inputs.recipe.optim
    chosen, variant = optimizer_class(inputs.strategy)
    return chosen, {
        "lr": optim.learning_rate,
        "betas": (optim.adam_beta1, optim.adam_beta2),
        "eps": 1e-8,  # Kingma & Ba, arXiv:1412.6980, and torch's default
        **variant,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run this rank and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m launcher.worker.train", allow_abbrev=False)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")
    options = parser.parse_args(arguments)
    listen_for_stop()
    ranks = ranks_from_environment(os.environ)
    prepare_environment(ranks)
    # Rank 0 speaks, other ranks only on error.
    hide_secrets()
    quiet_libraries(logging.INFO if ranks.rank == 0 else logging.ERROR)
    recorder = None
    try:
        inputs = read_inputs(options.run_dir)
        if not needs_bitsandbytes(inputs.recipe.method, inputs.strategy):
            leave_out_bitsandbytes()
        for name, value in tracker_environment(inputs.recipe.tracking, options.run_dir).items():
            os.environ.setdefault(name, value)
        if inputs.recipe.model.random_weights or Path(inputs.recipe.model.name_or_path).is_dir():
            # Read when the training stack is imported, below: nothing there asks the hub then.
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
        heartbeat = _start_heartbeat(inputs, ranks)
        device = choose_device(ranks, inputs.precision)
        from launcher.worker.peak_memory import PeakRecorder
        from launcher.worker.stop_request import is_stopping

        recorder = PeakRecorder(heartbeat, device=device)
        stopping = is_stopping(options.run_dir, rank=ranks.rank)
        exit_on_signal(recorder.interrupt, is_stopping=stopping)
        recorder.start()
        if ranks.rank == 0:
            # Also when job.sh was started by hand, perhaps after an interruption.
            run_dir.write_status(options.run_dir, "running")
        faults = faults_from_environment(os.environ, folder=options.run_dir, rank=ranks.rank)
        if faults is not None:
            recorder.on_phase = faults.strike
        open_to_view(inputs.recipe.tracking, options.run_dir, ranks, device)
        run(inputs, ranks, device, recorder)
    except BaseException as error:  # noqa: BLE001 - whatever ends a rank belongs into its file
        kind = report_failure(error, ranks, recorder, folder=options.run_dir)
        return EXIT_STATUS[kind]
    return 0


def _start_heartbeat(inputs: Inputs, ranks: Ranks) -> Heartbeat:
    heartbeat = Heartbeat(
        inputs.folder,
        inputs.patience,
        rank=ranks.rank,
        local_rank=ranks.local_rank,
        world_size=ranks.world_size,
    )
    heartbeat.start()
    return heartbeat


def _rank() -> int:
    status = main()
    if status:
        # Not sys.exit: threads of NCCL and of loaders can keep a failed process from ending.
        os._exit(status)
    return 0


if __name__ == "__main__":
    run_program(_rank)
