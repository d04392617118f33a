"""The ladder: strategies to fall back to, each with less memory than the last."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.planning.plan import Candidate
from launcher.planning.search import TIE_FRACTION, kind
from launcher.strategy import Checkpointing, Offload, ZeroStage

# Preferred order among equals: the study's default first (arXiv 2406.02290, section 5).
STAGE_ORDER: Mapping[ZeroStage, int] = {2: 0, 1: 1, 3: 2, 0: 3}
# A rung of the ladder that saves less would not cure an out-of-memory error.
_RUNG_FRACTION = 0.95


def num_offloads(candidate: Candidate) -> int:
    """Return how many kinds of bytes a strategy keeps away from the GPU."""
    strategy = candidate.strategy
    moved = (strategy.offload_optimizer, strategy.offload_param)
    return sum(offload is not Offload.none for offload in moved) + (
        strategy.gradient_checkpointing is Checkpointing.cpu_offload
    )


def simplicity(candidate: Candidate) -> tuple[int, int, int, float]:
    """Sort equals: fewer offloads, then the usual stage, then nothing computed twice."""
    strategy = candidate.strategy
    return (
        num_offloads(candidate),
        STAGE_ORDER[strategy.zero_stage],
        int(strategy.gradient_checkpointing is not Checkpointing.none),
        candidate.time.step_seconds,
    )


def ladder(best: Candidate, weighed: list[Candidate]) -> tuple[Candidate, ...]:
    """Return strategies that use ever less memory, each the fastest of its kind."""
    frugal = [
        candidate
        for candidate in weighed
        if candidate.fits and candidate.memory.device_used_bytes < best.memory.device_used_bytes
    ]
    frugal = [item for item in frugal if not _changes_stage_for_nothing(item, best, frugal)]
    frugal.sort(key=lambda candidate: (candidate.time.step_seconds, simplicity(candidate)))
    rungs: list[Candidate] = []
    lowest_bytes = best.memory.device_used_bytes
    for candidate in frugal:
        if candidate.memory.device_used_bytes <= _RUNG_FRACTION * lowest_bytes:
            rungs.append(candidate)
            lowest_bytes = candidate.memory.device_used_bytes
    return tuple(rungs)


def _changes_stage_for_nothing(item: Candidate, best: Candidate, others: list[Candidate]) -> bool:
    """Return whether another saves as much, as fast, at the stage that was chosen."""
    stage, most = best.strategy.zero_stage, 1 + TIE_FRACTION
    return item.strategy.zero_stage != stage and any(
        other.strategy.zero_stage == stage
        and kind(other.strategy)[1:] == kind(item.strategy)[1:]
        and other.time.step_seconds <= most * item.time.step_seconds
        and other.memory.device_used_bytes <= most * item.memory.device_used_bytes
        for other in others
    )
