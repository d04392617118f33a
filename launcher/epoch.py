"""What tokenised data means for a plan: the length that counts, steps and time of a training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from launcher.data_cache import DataSummary
from launcher.planning.plan import Plan
from launcher.predict.step_time import estimate_time
from launcher.recipe_sections import OptimSection
from launcher.units import format_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How long a training on known data takes."""

    num_examples: int
    num_tokens: int
    """Of one epoch, padding not included."""
    longest_tokens: int
    mean_tokens: float
    """Of a sequence: an example, or several that are packed."""
    steps_per_epoch: int
    num_steps: int
    seconds: float


def longest_tokens(summary: DataSummary) -> int:
    """Return the longest sequence, in tokens, that any batch of the data holds."""
    held_out = summary.eval.longest_sequence_tokens if summary.eval else 0
    return max(summary.train.longest_sequence_tokens, held_out)


def training_of(summary: DataSummary, plan: Plan, optim: OptimSection) -> Training:
    """Return steps and predicted seconds of a training.

    Batches are of like length and padded to their own longest sequence, so a step is taken to
    be as long as one of sequences of the mean length.
    """
    train = summary.train
    steps_per_epoch = math.ceil(train.num_sequences / optim.global_batch_size)
    num_steps = optim.max_steps or math.ceil(steps_per_epoch * optim.num_train_epochs)
    mean = max(1, round(train.mean_sequence_tokens))
    step = estimate_time(replace(plan.workload, max_seq_len=mean), plan.strategy, plan.cluster)
    return Training(
        num_examples=train.num_examples,
        num_tokens=train.num_tokens,
        longest_tokens=longest_tokens(summary),
        mean_tokens=train.mean_sequence_tokens,
        steps_per_epoch=steps_per_epoch,
        num_steps=num_steps,
        seconds=step.run_seconds(num_steps),
    )


def describe_training(training: Training, *, max_seq_len: int) -> Iterator[str]:
    """Yield the lines that a plan shows when its data is known."""
    longest, mean = training.longest_tokens, training.mean_tokens
    planned = f"the longest sequence has {longest:,} tokens"
    if longest < max_seq_len:
        planned += f", so the plan is for those and not for max_seq_len {max_seq_len:,}"
    size = f"{training.num_examples:,} examples of {training.num_tokens:,} tokens"
    yield f"  data      {size}; {planned}"
    epochs = training.num_steps / training.steps_per_epoch
    yield (
        f"  training  {training.num_steps:,} steps ({epochs:.3g} epochs) at {mean:,.0f} tokens a "
        f"sequence on average: about {format_seconds(training.seconds)}"
        + (f", {format_seconds(training.seconds / epochs)} an epoch" if epochs > 1 else "")
    )
