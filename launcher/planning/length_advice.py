"""What the lengths of the data say about ``max_seq_len`` and packing, asked of the planner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from launcher.planning.plan import Candidate
from launcher.recipe_sections import StrategySection
from launcher.strategy import Strategy
from launcher.units import format_bytes
from launcher.workload import Workload

Plans = Callable[[Workload, StrategySection], Candidate | None]
"""Plans another workload under fixed fields; ``None`` when nothing fits."""

_TOKEN_STEP = 128
_SHORTER_FRACTION = 0.75
"""A length that saves less than a quarter is not worth cutting records for."""
_LEAST_SAVED_FRACTION = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How long the training records are, in tokens, and what is done with them."""

    max_seq_len: int
    """Of the recipe: what packed sequences are filled up to."""
    percentile_99: int
    """Of all records before truncation."""
    mean: float
    """Of a sequence of the batches."""
    can_pack: bool
    """Whether the model is known to keep packed examples apart."""


def shorter(
    lengths: Lengths,
    workload: Workload,
    plans: Plans,
    *,
    fixed: StrategySection,
    now: StrategySection,
    least_gain: float,
) -> Iterator[str]:
    """Yield what a ``max_seq_len`` that cuts one record in a hundred would bring.

    Speeds are those at the mean length, as batches are padded to their own longest sequence.

    Args:
        lengths: of the data.
        workload: at the length that was planned for, the longest of the data.
        plans: asks the planner.
        fixed: what the recipe fixes.
        now: the whole strategy that ran.
        least_gain: a speed-up below it is not named.
    """
    tokens = -(-lengths.percentile_99 // _TOKEN_STEP) * _TOKEN_STEP
    if tokens > _SHORTER_FRACTION * workload.max_seq_len:
        return
    short = replace(workload, max_seq_len=tokens)
    said = (
        f"99 % of the records have at most {lengths.percentile_99:,} tokens, and memory is kept "
        f"for {workload.max_seq_len:,}: max_seq_len={tokens} cuts the rest"
    )
    faster = plans(short, replace(fixed, micro_batch_size_per_gpu=None))
    mean = replace(workload, max_seq_len=max(1, round(lengths.mean)))
    before, after = plans(mean, now), faster and plans(mean, whole_section(faster.strategy))
    if faster and before and after:
        gain = before.time.step_seconds / after.time.step_seconds
        if gain >= least_gain:
            micro = faster.strategy.micro_batch_size_per_gpu
            yield (
                f"{said}; then micro-batch {micro} fits "
                f"({format_bytes(faster.memory.device_used_bytes)}) and is {gain:.1f}x faster, "
                "both predicted."
            )
            return
    long, same = plans(workload, now), plans(short, now)
    if long and same:
        used = long.memory.device_used_bytes
        saved = used - same.memory.device_used_bytes
        if saved >= _LEAST_SAVED_FRACTION * used:
            yield (
                f"{said}; the same strategy is then predicted to need {format_bytes(saved)} less."
            )


def packed(
    lengths: Lengths,
    workload: Workload,
    plans: Plans,
    *,
    fixed: StrategySection,
    now: StrategySection,
    least_gain: float,
) -> Iterator[str]:
    """Yield what packing would bring: more of the data's tokens in a second.

    Packed sequences are taken to be full; the arguments are those of :func:`shorter`.
    """
    if not lengths.can_pack or lengths.mean > _SHORTER_FRACTION * lengths.max_seq_len:
        return
    mean = replace(workload, max_seq_len=max(1, round(lengths.mean)))
    full = replace(workload, max_seq_len=lengths.max_seq_len, has_padding=True)
    before = plans(mean, now)
    after = plans(full, replace(fixed, micro_batch_size_per_gpu=None))
    if before is None or after is None:
        return
    more = lengths.max_seq_len / lengths.mean
    gain = more * before.time.step_seconds / after.time.step_seconds
    if gain >= least_gain:
        yield (
            f"Sequences have {lengths.mean:,.0f} tokens on average: packed into "
            f"{lengths.max_seq_len:,} (data.packing=true) the data goes through {gain:.1f}x "
            f"faster, as predicted. That is another training: a step then has {more:.1f}x as many "
            "tokens, unless optim.global_batch_size is lowered."
        )


def whole_section(strategy: Strategy) -> StrategySection:
    """Return the section that leaves the planner nothing to choose."""
    names = [name for name in StrategySection.__dataclass_fields__ if hasattr(strategy, name)]
    return StrategySection(**{name: getattr(strategy, name) for name in names})
