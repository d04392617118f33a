"""Whether the numbers in a rank's file are possible. Pure."""

from __future__ import annotations

from operator import attrgetter

from launcher.peaks import RankPeaks
from launcher.report.prediction import MAX_WORLD_SIZE

_NUMBERS = ("rank", "world_size", "steps_done", "tokens_per_step", "allocator_retries",
            "allocator_ooms")  # fmt: skip
_MAYBE_NUMBERS = ("first_step_at",)
_PHASE = ("peak_allocated_bytes", "peak_reserved_bytes", "host_rss_bytes", "count", "seconds")
_MAYBE_PHASE = ("device_used_bytes", "peak_active_bytes", "host_pinned_bytes",
                "gpu_utilisation_fraction", "power_watts")  # fmt: skip
_STEP, _MAYBE_STEP = ("allocated_bytes", "reserved_bytes"), ("active_bytes",)


_numbers_of = attrgetter(*_NUMBERS)
_phase_of, _maybe_phase_of = attrgetter(*_PHASE), attrgetter(*_MAYBE_PHASE)
_step_of, _maybe_step_of = attrgetter(*_STEP), attrgetter("active_bytes")
_LARGEST = 1e18
"""An exabyte in bytes; no time and no count comes near it."""


def check_rank(peaks: RankPeaks) -> None:
    """Raise ValueError when a number of a rank's file is impossible; all of them are numbers."""
    if not _has_possible_numbers(peaks):
        _name_the_culprit(peaks)
    if peaks.world_size > MAX_WORLD_SIZE:
        raise ValueError(f"world_size is {peaks.world_size}")


def _has_possible_numbers(peaks: RankPeaks) -> bool:
    """Look at all numbers at once: for thousands of ranks one by one takes a second."""
    numbers: list[float] = [*_numbers_of(peaks), *peaks.step_seconds]
    maybe: list[float | None] = [peaks.first_step_at]
    for phase in peaks.phases.values():
        numbers += _phase_of(phase)
        maybe += _maybe_phase_of(phase)
        for step in (phase.first_step, phase.steady_state):
            if step is not None:
                numbers += _step_of(step)
                maybe.append(_maybe_step_of(step))
    numbers += [number for number in maybe if number is not None]
    # The sum is not a number, and so not small, when one of them is not.
    return min(numbers) >= 0 and sum(numbers) < _LARGEST


def _name_the_culprit(peaks: RankPeaks) -> None:
    _check_fields(peaks, _NUMBERS, _MAYBE_NUMBERS)
    for name, phase in peaks.phases.items():
        _check_fields(phase, _PHASE, _MAYBE_PHASE, prefix=f"{name}.")
        for step in (phase.first_step, phase.steady_state):
            if step is not None:
                _check_fields(step, _STEP, _MAYBE_STEP, prefix=f"{name}.")
    for index, seconds in enumerate(peaks.step_seconds):
        if not _is_possible(seconds):
            raise ValueError(f"step_seconds[{index}] is {seconds!r}, which is no time")


def _check_fields(
    item: object, names: tuple[str, ...], maybe_names: tuple[str, ...], *, prefix: str = ""
) -> None:
    for name in names:
        if not _is_possible(value := getattr(item, name)):
            raise ValueError(f"{prefix}{name} is {value!r}, which is no size, count or time")
    for name in maybe_names:
        value = getattr(item, name)
        if value is not None and not _is_possible(value):
            raise ValueError(f"{prefix}{name} is {value!r}, which is no size, count or time")


def _is_possible(value: float) -> bool:
    return 0 <= value < _LARGEST
