"""What was not chosen and why: the alternatives that teach most come first."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.planning.explain import Setting
from launcher.planning.plan import Candidate, Rejected
from launcher.planning.search import kind
from launcher.planning.wording import (
    SAME_MEMORY_BYTES,
    SAME_TIME_FRACTION,
    compare,
    why_too_large,
)
from launcher.strategy import Strategy


def explain_rejections(
    setting: Setting, impossible: Mapping[Strategy, str], pointless: Mapping[Strategy, str]
) -> tuple[Rejected, ...]:
    """Return the best of every other kind of strategy and why it lost.

    First what differs from the choice in one thing, and of that first what would be faster but
    does not fit; what hardly differs from an entry above it comes last.

    Args:
        setting: the choice and everything that was weighed.
        impossible: strategies that cannot work, with the reason.
        pointless: strategies that fit but must not be chosen, with the reason.
    """
    best = setting.best
    groups: dict[tuple[object, ...], Candidate] = {}
    for candidate in setting.weighed:
        group = kind(candidate.strategy)
        if group not in groups or _rank(candidate) < _rank(groups[group]):
            groups[group] = candidate
    groups.pop(kind(best.strategy), None)
    nearest = sorted(groups.values(), key=lambda item: _distance(item, best))
    told: list[Candidate] = []
    repeated: list[Candidate] = []
    for candidate in nearest:
        is_repeated = any(_are_alike(candidate, earlier) for earlier in told)
        (repeated if is_repeated else told).append(candidate)
    weighed = [_rejected(item, setting, pointless) for item in [*told, *repeated]]
    return (*weighed, *_cannot_work(impossible, groups))


def _rank(candidate: Candidate) -> tuple[bool, float]:
    """Sort what fits by time, then what does not by how much memory it needs."""
    if candidate.fits:
        return (False, candidate.time.step_seconds)
    return (True, float(candidate.memory.device_used_bytes))


def _distance(candidate: Candidate, best: Candidate) -> tuple[int, int, bool, float]:
    """Sort by how many things differ, by how far the stage is, then what does not fit first."""
    mine, theirs = kind(candidate.strategy), kind(best.strategy)
    differences = sum(a != b for a, b in zip(mine, theirs, strict=True))
    steps = abs(candidate.strategy.zero_stage - best.strategy.zero_stage)
    return (differences, steps, candidate.fits, candidate.time.step_seconds)


def _are_alike(candidate: Candidate, other: Candidate) -> bool:
    """Return whether a reader learns nothing new: same verdict, same time, same memory."""
    ratio = candidate.time.step_seconds / other.time.step_seconds
    change_bytes = candidate.memory.device_used_bytes - other.memory.device_used_bytes
    return (
        candidate.fits == other.fits
        and abs(ratio - 1) <= SAME_TIME_FRACTION
        and abs(change_bytes) <= SAME_MEMORY_BYTES
    )


def _rejected(
    candidate: Candidate, setting: Setting, pointless: Mapping[Strategy, str]
) -> Rejected:
    space = setting.space
    if not candidate.fits:
        reason = why_too_large(
            candidate,
            limit_bytes=space.limit_bytes,
            host_memory_bytes=space.cluster.host_memory_bytes,
        )
    elif candidate.strategy in pointless and not _is_slower(candidate, setting.best):
        reason = f"{compare(candidate, setting.best)}; {pointless[candidate.strategy]}"
    else:
        reason = compare(candidate, setting.best)
    return Rejected(
        strategy=candidate.strategy,
        reason=reason,
        fits=candidate.fits,
        device_used_bytes=candidate.memory.device_used_bytes,
        step_seconds=candidate.time.step_seconds,
    )


def _is_slower(candidate: Candidate, best: Candidate) -> bool:
    return candidate.time.step_seconds > best.time.step_seconds * (1 + SAME_TIME_FRACTION)


def _cannot_work(
    impossible: Mapping[Strategy, str], weighed: Mapping[tuple[object, ...], Candidate]
) -> list[Rejected]:
    """Return one strategy for each reason that rules whole kinds out."""
    first: dict[str, Strategy] = {}
    for strategy, reason in impossible.items():
        if kind(strategy) not in weighed:
            first.setdefault(reason, strategy)
    return [
        Rejected(
            strategy=strategy,
            reason=f"cannot work: {reason}",
            fits=False,
            device_used_bytes=None,
            step_seconds=None,
        )
        for reason, strategy in first.items()
    ]
