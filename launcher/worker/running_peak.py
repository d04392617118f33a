"""The running maxima of one phase on one rank."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median_low

from launcher.peaks import PhasePeaks, StepPeaks

STEADY_STEPS = 100
"""Optimizer steps whose median is the steady state; more would only cost memory."""
KEPT_STEPS = 1000
"""Step times that a rank's file holds, so that it stays small however long the run is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorPeaks:
    """What torch's allocator counted since it was reset; ``active_bytes`` is ``None`` on CPU."""

    allocated_bytes: int = 0
    reserved_bytes: int = 0
    active_bytes: int | None = None


@dataclass(slots=True)
class _Mean:
    """A mean of samples that need not be kept."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float | None) -> None:
        if value is not None:
            self.total += value
            self.count += 1

    def rounded(self, digits: int) -> float | None:
        return round(self.total / self.count, digits) if self.count else None


@dataclass(slots=True)
class RunningPeak:
    """One phase so far; :meth:`frozen` says it for the rank's file."""

    highest: AllocatorPeaks = AllocatorPeaks()
    device_used_bytes: int | None = None
    host_rss_bytes: int = 0
    host_pinned_bytes: int | None = None
    seconds: float = 0.0
    count: int = 0
    _in_step: AllocatorPeaks | None = None
    _first_step: AllocatorPeaks | None = None
    _recent_steps: deque[AllocatorPeaks] = field(default_factory=lambda: deque(maxlen=STEADY_STEPS))
    _utilisation_fractions: _Mean = field(default_factory=_Mean)
    _power_watts: _Mean = field(default_factory=_Mean)

    def keep(self, peaks: AllocatorPeaks) -> None:
        """Count what the allocator says now."""
        self.highest = _higher(self.highest, peaks)
        self._in_step = peaks if self._in_step is None else _higher(self._in_step, peaks)

    def keep_load(self, *, utilisation_fraction: float | None, power_watts: float | None) -> None:
        """Count a sample of how busy the GPU is and what it draws."""
        self._utilisation_fractions.add(utilisation_fraction)
        self._power_watts.add(power_watts)

    def end_step(self) -> None:
        """End an optimizer step: what was kept since the last one is that step's."""
        if self._in_step is None:
            return
        if self._first_step is None:
            self._first_step = self._in_step
        else:
            self._recent_steps.append(self._in_step)
        self._in_step = None

    def frozen(self) -> PhasePeaks:
        """Return what is known now."""
        steady = list(self._recent_steps)
        return PhasePeaks(
            peak_allocated_bytes=self.highest.allocated_bytes,
            peak_reserved_bytes=self.highest.reserved_bytes,
            peak_active_bytes=self.highest.active_bytes,
            device_used_bytes=self.device_used_bytes,
            host_rss_bytes=self.host_rss_bytes,
            host_pinned_bytes=self.host_pinned_bytes,
            seconds=round(self.seconds, 6),
            count=self.count,
            gpu_utilisation_fraction=self._utilisation_fractions.rounded(3),
            power_watts=self._power_watts.rounded(1),
            first_step=_as_step([self._first_step]) if self._first_step else None,
            steady_state=_as_step(steady) if steady else None,
        )


class StepTimes:
    """Seconds of optimizer steps: the first, and the most recent ``KEPT_STEPS``."""

    def __init__(self) -> None:
        self.count = 0
        self.first_ended_at: float | None = None
        """Unix time."""
        self._first_seconds = 0.0
        self._recent_seconds: deque[float] = deque(maxlen=KEPT_STEPS)

    def add(self, seconds: float) -> None:
        """Count a step that ends now."""
        if self.count == 0:
            self.first_ended_at = round(time.time(), 3)
            self._first_seconds = round(seconds, 6)
        else:
            self._recent_seconds.append(round(seconds, 6))
        self.count += 1

    def seconds(self) -> tuple[float, ...]:
        """Return the steps in order."""
        return (self._first_seconds, *self._recent_seconds) if self.count else ()


def _higher(one: AllocatorPeaks, other: AllocatorPeaks) -> AllocatorPeaks:
    return AllocatorPeaks(
        allocated_bytes=max(one.allocated_bytes, other.allocated_bytes),
        reserved_bytes=max(one.reserved_bytes, other.reserved_bytes),
        active_bytes=higher_known(one.active_bytes, other.active_bytes),
    )


def higher_known(one: int | None, other: int | None) -> int | None:
    """Return the larger of two numbers, of which some may be unknown."""
    if one is None or other is None:
        return other if one is None else one
    return max(one, other)


def _as_step(steps: Sequence[AllocatorPeaks]) -> StepPeaks:
    active = [step.active_bytes for step in steps if step.active_bytes is not None]
    return StepPeaks(
        allocated_bytes=median_low(step.allocated_bytes for step in steps),
        reserved_bytes=median_low(step.reserved_bytes for step in steps),
        active_bytes=median_low(active) if active else None,
    )
