"""What to do when an attempt has failed; pure, so that every case can be read and tested."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from launcher.failure_kind import FailureKind
from launcher.recipe_sections import RecoverySection
from launcher.recovery.record import FailedAttempt


class Action(StrEnum):
    """What the supervisor does next."""

    stop = "stop"
    same_plan = "same_plan"
    """Start again from the newest complete checkpoint."""
    next_rung = "next_rung"
    """The same, with a plan that needs less of the memory that ran out."""
    other_hosts = "other_hosts"
    """The same, on the hosts that are left."""
    requeue = "requeue"
    """Back into the queue, for as many nodes as at first: too few are left of a Slurm job's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """An action and why."""

    action: Action
    reason: str


_ACTIONS: Mapping[FailureKind, Decision] = {
    FailureKind.gpu_oom: Decision(
        action=Action.next_rung, reason="a plan that needs less of the GPU's memory may fit"
    ),
    FailureKind.host_oom: Decision(
        action=Action.next_rung, reason="a plan that needs less of the host's memory may fit"
    ),
    FailureKind.killed: Decision(
        action=Action.same_plan, reason="the signal came from outside, so the plan may be sound"
    ),
    FailureKind.interrupted: Decision(action=Action.stop, reason="somebody asked for it"),
    FailureKind.lost_host: Decision(
        action=Action.other_hosts, reason="the other hosts may take over"
    ),
    FailureKind.hang: Decision(
        action=Action.same_plan, reason="what it waited for may answer the next time"
    ),
    FailureKind.nan: Decision(action=Action.stop, reason="the same numbers would come again"),
    FailureKind.storage: Decision(
        action=Action.stop, reason="what is saved next would be lost as well"
    ),
    FailureKind.other: Decision(action=Action.stop, reason="the same error would come again"),
}


def decide(
    kind: FailureKind, earlier: Sequence[FailedAttempt], settings: RecoverySection
) -> Decision:
    """Return what follows from a failure.

    Args:
        kind: of the attempt that has just failed.
        earlier: the attempts before it that failed under the same supervisor, oldest first.
        settings: of the recipe.
    """
    decision = _ACTIONS[kind]
    if decision.action is Action.stop:
        return decision
    num_attempts = len(earlier) + 1
    if num_attempts >= settings.max_attempts:
        return Decision(
            action=Action.stop,
            reason=f"it was attempt {num_attempts} of {settings.max_attempts} "
            "(recovery.max_attempts)",
        )
    if decision.action is Action.next_rung and settings.oom == "stop":
        return Decision(action=Action.stop, reason="the recipe says so: recovery.oom is stop")
    return decision
