"""What follows from a failed attempt: the decision, the plan to go on with, and its record."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launcher import starter_lock
from launcher.dispatch.failure import HostLostError, is_consequence, read_failures
from launcher.dispatch.run_state import last_logged
from launcher.errors import JobFailedError, RunDirError
from launcher.failure_kind import FailureKind
from launcher.peaks import RankPeaks
from launcher.planning.plan import rung_to_json
from launcher.post_mortem import post_mortem_file, read_post_mortems
from launcher.prepare import Prepared
from launcher.recovery.decide import Action, Decision, decide
from launcher.recovery.next_rung import changed_fields, next_rung, set_by_hand, with_leave
from launcher.recovery.other_hosts import (
    FENCE_SECONDS,
    NoOtherHostsError,
    on_nodes_left,
    on_other_hosts,
)
from launcher.recovery.record import FailedAttempt, append_failed_attempt
from launcher.run_checkpoints import newest_checkpoint
from launcher.run_dir import read_ranks, write_json
from launcher.units import format_bytes

_log = logging.getLogger(__name__)
_MEMORY = (FailureKind.gpu_oom, FailureKind.host_oom)


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """A run whose attempt has just failed."""

    run_dir: Path
    prepared: Prepared
    """What failed."""
    error: JobFailedError
    first: RankPeaks | None
    """The rank that failed first, where it could say so."""
    earlier: Sequence[FailedAttempt]
    """Attempts that failed before under the same supervisor."""

    @property
    def phase(self) -> str | None:
        """The phase in which it failed."""
        failure = self.first.failure if self.first else None
        return failure.phase if failure else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Following:
    """What the next attempt goes on with."""

    prepared: Prepared
    changes: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    """Fields of the strategy or the cluster that differ: before, after."""
    given_up: tuple[str, ...] = ()
    """Those of them that the recipe had set."""
    wait_seconds: float = 0.0
    """Before it starts: until ranks that cannot be reached have ended by themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is done about a failure."""

    record: FailedAttempt
    following: Following | None
    """``None``: it was the last attempt."""
    error: JobFailedError
    """For the user, when it was the last."""

    def describe(self) -> Iterator[str]:
        """Yield lines that say what happened and what comes next."""
        record = self.record
        if self.following is None:
            # The error itself is shown by whoever ends with it.
            if record.action == Action.requeue:
                yield f"attempt {record.attempt} failed ({record.kind}): {record.problem}"
                yield f"going back into the queue: {record.reason}"
            elif record.kind is not FailureKind.interrupted:
                yield f"not starting again: {record.reason}"
            return
        yield f"attempt {record.attempt} failed ({record.kind}): {record.problem}"
        if record.changes:
            changes = ", ".join(f"{k} {old} → {new}" for k, (old, new) in record.changes.items())
            yield f"going on with another plan: {changes}"
            yield "  global batch, order of the data and learning-rate schedule stay the same"
        else:
            yield f"starting again: {record.reason}"
        if wait_seconds := self.following.wait_seconds:
            yield f"  in {wait_seconds:.0f} s, when ranks on lost hosts have ended by themselves"
        if record.given_up:
            yield f"  this gives up what the recipe sets: {', '.join(record.given_up)}"
        step = record.resumes_from_step
        yield f"  from the checkpoint of step {step}" if step else "  from the beginning"


def judge(
    run_dir: Path,
    prepared: Prepared,
    error: JobFailedError,
    earlier: Sequence[FailedAttempt],
    *,
    supervisor: str,
) -> Verdict:
    """Decide what follows from a failure, and write it into the run's record.

    Args:
        run_dir: of the run; what the failed attempt wrote is still in it.
        prepared: what failed.
        error: how the attempt ended.
        earlier: the attempts that failed before under the same supervisor, oldest first.
        supervisor: who asks; see :class:`FailedAttempt`.

    Raises:
        LauncherError: no further plan can be made; nothing has been recorded.
    """
    situation = Situation(
        run_dir=run_dir,
        prepared=prepared,
        error=error,
        first=next((rank for rank in read_failures(run_dir) if not is_consequence(rank)), None),
        earlier=earlier,
    )
    decision = decide(error.kind, earlier, prepared.recipe.recovery)
    following = None
    try:
        following = _FOLLOWING[decision.action](situation)
    except NoOtherHostsError as why:
        in_queue = _num_left(error) is not None
        action = Action.requeue if in_queue else Action.stop
        decision = Decision(action=action, reason=str(why))
    if error.kind in _MEMORY:
        found = following or _next_rung(situation)
        _complete_post_mortems(situation, found)
        if following is not None and not found.prepared.plan.fits:
            decision = Decision(
                action=Action.stop, reason="no plan that is left would need less of what ran out"
            )
            following = None
        if following is None:
            # Not to be started; but the last word says what would fit.
            error = _with_what_would_fit(situation, found)
    record = _record(situation, decision, following, supervisor=supervisor)
    try:
        append_failed_attempt(run_dir, record)
    except OSError as problem:
        # A full disk is often the very reason; the error to show is the job's.
        _log.error("the failure cannot be recorded: %s", problem)
    return Verdict(record=record, following=following, error=error)


def _record(
    situation: Situation, decision: Decision, following: Following | None, *, supervisor: str
) -> FailedAttempt:
    first, run_dir = situation.first, situation.run_dir
    checkpoint = newest_checkpoint(run_dir)
    return FailedAttempt(
        attempt=len(situation.earlier) + 1,
        supervisor=supervisor,
        failed_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        kind=situation.error.kind,
        problem=situation.error.problem.partition("\n")[0],
        rank=first.rank if first else None,
        host=first.host if first else None,
        phase=situation.phase,
        step=last_logged(run_dir)[0] or 0,
        action=decision.action,
        reason=decision.reason,
        changes=following.changes if following else {},
        given_up=following.given_up if following else (),
        resumes_from_step=int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0,
    )


def _stop(_situation: Situation) -> None:
    return None


def _same_plan(situation: Situation) -> Following:
    return Following(prepared=situation.prepared)


def _next_rung(situation: Situation) -> Following:
    rung = next_rung(
        situation.run_dir,
        situation.prepared,
        kind=situation.error.kind,
        phase=situation.phase,
        num_earlier=sum(attempt.kind in _MEMORY for attempt in situation.earlier),
    )
    return Following(prepared=rung.prepared, changes=rung.changes, given_up=rung.given_up)


def _other_hosts(situation: Situation) -> Following:
    before, error = situation.prepared, situation.error
    lost = error.hosts if isinstance(error, HostLostError) else ()
    if (num_left := _num_left(error)) is not None:
        found = on_nodes_left(situation.run_dir, before, num_left)
    else:
        found = on_other_hosts(situation.run_dir, before, lost)
    changes = changed_fields(before.plan.strategy, found.plan.strategy)
    nodes = (before.plan.cluster.num_nodes, found.plan.cluster.num_nodes)
    if nodes[0] != nodes[1]:
        changes["num_nodes"] = nodes
    return Following(
        prepared=found,
        changes=changes,
        given_up=tuple(sorted(changes.keys() & set_by_hand(before.recipe))),
        wait_seconds=FENCE_SECONDS if num_left is None else starter_lock.FENCE_SECONDS,
    )


def _num_left(error: JobFailedError) -> int | None:
    return error.num_left if isinstance(error, HostLostError) else None


_FOLLOWING: Mapping[Action, Callable[[Situation], Following | None]] = {
    Action.stop: _stop,
    Action.same_plan: _same_plan,
    Action.next_rung: _next_rung,
    Action.other_hosts: _other_hosts,
}


def _complete_post_mortems(situation: Situation, found: Following) -> None:
    """Write what comes next into those that know nothing: their recipe left the plan no ladder."""
    run_dir, before = situation.run_dir, situation.prepared
    unsaid = [one for one in read_post_mortems(run_dir) if one.next_rung is None]
    if unsaid and not found.prepared.plan.fits and before.recipe.recovery.oom == "within_recipe":
        # What this recipe forbids is still worth knowing.
        free = replace(before, recipe=with_leave(before.recipe))
        found = _next_rung(replace(situation, prepared=free))
    if not found.prepared.plan.fits:
        return
    rung = {**rung_to_json(found.prepared.plan), "given_up": list(found.given_up)}
    try:
        for one in unsaid:
            path = post_mortem_file(run_dir, one.rank)
            written = path.stat()
            write_json(path, replace(one, next_rung=rung).to_json())
            # Its time stays that of the rank's last word.
            os.utime(path, ns=(written.st_atime_ns, written.st_mtime_ns))
    except (OSError, RunDirError) as problem:
        _log.error("the post-mortems cannot be completed: %s", problem)


def _with_what_would_fit(situation: Situation, found: Following) -> JobFailedError:
    """Return the error with a way out: a plan that fits, or else what else would have to change."""
    plan, error, run_dir = found.prepared.plan, situation.error, situation.run_dir
    short_of = "host" if error.kind is FailureKind.host_oom else "GPU"
    if plan.fits:
        keys = " ".join(
            f"strategy.{key}={new}"
            for key, (_, new) in found.changes.items()
            if key != "gradient_accumulation_steps"
        )
        fix = f"`zerofit resume {shlex.quote(str(run_dir))} {keys}` goes on with a plan that fits"
    elif plan.suggestions:
        fix = f"no plan is left for this {short_of}; what would fit: {'; '.join(plan.suggestions)}"
    else:
        fix = f"no plan is left for this {short_of}: use a smaller model, or shorter samples"
    if error.kind is FailureKind.host_oom:
        fix += f"\n  {_host_numbers(situation)}"
    return JobFailedError(error.problem, where=error.where, fix=fix, kind=error.kind)


def _host_numbers(situation: Situation) -> str:
    """Return what the fullest host had and needed, as far as its ranks could say."""
    plan = situation.prepared.plan
    resident: dict[str, int] = {}
    for rank in read_ranks(situation.run_dir):
        peak = max((phase.host_rss_bytes for phase in rank.phases.values()), default=0)
        resident[rank.host] = resident.get(rank.host, 0) + peak
    fullest = max(resident, key=lambda host: resident[host], default=None)
    measured = ""
    if fullest is not None:
        measured = f", ranks on {fullest} had {format_bytes(resident[fullest])} resident"
    return (
        f"host memory: {format_bytes(plan.memory.host_bytes_per_node)} predicted{measured}, a node "
        f"has {format_bytes(plan.cluster.host_memory_bytes)}"
    )
