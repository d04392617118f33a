"""What the lengths of the data say about ``max_seq_len`` and packing, asked of the planner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

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


@dataclass(frozen=True, kw_only=True)
class LengthAdvice:
    """Asks the planner for a run whose data has such lengths."""

    lengths: Lengths
    workload: Workload
    """At the length that was planned for, the longest of the data."""
    plans: Plans
    fixed: StrategySection
    """What the recipe fixes."""
    now: StrategySection
    """The whole strategy that ran."""
    least_gain: float
    """A speed-up below it is not named."""

    @cached_property
    def _mean(self) -> Workload:
        """The workload at the mean length: batches are padded to their own longest sequence."""
        return replace(self.workload, max_seq_len=max(1, round(self.lengths.mean)))

    @cached_property
    def _before(self) -> Candidate | None:
        return self.plans(self._mean, self.now)

    @property
    def _free(self) -> StrategySection:
        return self.fixed.without("micro_batch_size_per_gpu")

    def shorter(self) -> Iterator[str]:
        """Yield what a ``max_seq_len`` that cuts one record in a hundred would bring."""
        planned = self.workload.max_seq_len
        tokens = -(-self.lengths.percentile_99 // _TOKEN_STEP) * _TOKEN_STEP
        if tokens > _SHORTER_FRACTION * planned:
            return
        short = replace(self.workload, max_seq_len=tokens)
        said = (
            f"99 % of the records have at most {self.lengths.percentile_99:,} tokens, and memory "
            f"is kept for {planned:,}: max_seq_len={tokens} cuts the rest"
        )
        faster, before = self.plans(short, self._free), self._before
        after = faster and self.plans(self._mean, whole_section(faster.strategy))
        if faster and before and after:
            gain = before.time.step_seconds / after.time.step_seconds
            if gain >= self.least_gain:
                micro = faster.strategy.micro_batch_size_per_gpu
                yield (
                    f"{said}; then micro-batch {micro} fits "
                    f"({format_bytes(faster.memory.device_used_bytes)}) and is {gain:.1f}x "
                    "faster, both predicted."
                )
                return
        long, same = self.plans(self.workload, self.now), self.plans(short, self.now)
        if long and same:
            used = long.memory.device_used_bytes
            saved = used - same.memory.device_used_bytes
            if saved >= _LEAST_SAVED_FRACTION * used:
                yield (
                    f"{said}; the same strategy is then predicted to need {format_bytes(saved)} "
                    "less."
                )

    def packed(self) -> Iterator[str]:
        """Yield what packing would bring: more of the data's tokens in a second.

        Packed sequences are taken to be full.
        """
        longest, mean = self.lengths.max_seq_len, self.lengths.mean
        if not self.lengths.can_pack or mean > _SHORTER_FRACTION * longest:
            return
        full = replace(self.workload, max_seq_len=longest, has_padding=True)
        before, after = self._before, self.plans(full, self._free)
        if before is None or after is None:
            return
        more = longest / mean
        gain = more * before.time.step_seconds / after.time.step_seconds
        if gain >= self.least_gain:
            yield (
                f"Sequences have {mean:,.0f} tokens on average: packed into {longest:,} "
                f"(data.packing=true) the data goes through {gain:.1f}x faster, as predicted. "
                f"That is another training: a step then has {more:.1f}x as many tokens, unless "
                "optim.global_batch_size is lowered."
            )


def whole_section(strategy: Strategy) -> StrategySection:
    """Return the section that leaves the planner nothing to choose."""
    names = [name for name in StrategySection.__dataclass_fields__ if hasattr(strategy, name)]
    return StrategySection(**{name: getattr(strategy, name) for name in names})
