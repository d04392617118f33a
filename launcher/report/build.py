"""Put what a run's ranks measured beside what its plan predicted. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median, median_low

from launcher.peaks import RankPeaks
from launcher.predict.memory import PHASES
from launcher.report.prediction import (
    Prediction,
    prediction_from_plan,
    read_float,
    read_int,
    read_text,
)
from launcher.report.run_report import (
    STEP_PHASES,
    BalanceReport,
    Comparison,
    FailureReport,
    LossReport,
    NodeReport,
    Observation,
    PhaseReport,
    RankReport,
    RunFiles,
    RunReport,
    RunState,
    SampleReport,
    TimeReport,
)

CLOCK_SKEW_SECONDS = 5.0
"""NTP keeps clocks within milliseconds; ranks leave a step's last collective within one step."""
# What a rank raises when another one has died: shown after the failure that caused it.
_SECONDARY_FAILURES = ("DistBackendError", "DistNetworkError", "DistStoreError", "Connection")


def build_report(files: RunFiles) -> RunReport:
    """Put what was measured beside what was predicted; never fails on partial data.

    Args:
        files: what could be read of the run directory, at any moment of the run.

    Returns:
        Bytes as they were measured; the prediction is for the fullest rank and is compared
        with every rank.
    """
    prediction = prediction_from_plan(files.plan)
    peaks = sorted(files.ranks, key=lambda rank: rank.rank)
    world_size = prediction.world_size or max((rank.world_size for rank in peaks), default=None)
    present = {rank.rank for rank in peaks}
    missing = tuple(rank for rank in range(world_size or 0) if rank not in present)
    predicted = {phase.phase: phase.allocated_bytes for phase in prediction.phases}
    ranks = tuple(_rank_report(rank, prediction, predicted) for rank in peaks)
    results = files.results or {}
    return RunReport(
        name=files.name,
        state=_run_state(
            files.status, peaks, files.observation, is_complete=bool(peaks) and not missing
        ),
        state_reason=_reason(files),
        observation=files.observation,
        prediction=prediction,
        world_size=world_size,
        missing_ranks=missing,
        ranks=ranks,
        nodes=_node_reports(ranks, prediction),
        balance=_balance(ranks, prediction),
        time=_time_report(peaks, prediction),
        loss=_loss_report(files.log, results),
        tokens_seen=read_int(results, "tokens_seen"),
        train_seconds=read_float(results, "train_seconds"),
        sample=_sample(results),
        throughput=_curve(files.log, "tokens_per_s"),
        timelines=files.timelines,
        lengths=files.lengths,
        attempts=files.attempts,
        memory_at_failure=files.memory_at_failure,
        recipe=files.recipe,
        clock_skews_seconds=_clock_skews(peaks),
        failures=_failures(peaks),
        problems=files.problems,
        phase_names=_phase_names(ranks, prediction),
    )


def _run_state(
    status: Mapping[str, object] | None,
    peaks: Sequence[RankPeaks],
    observation: Observation | None,
    *,
    is_complete: bool,
) -> RunState:
    """Combine status.json with the ranks' own states; the ranks know better what went wrong.

    What was observed decides where the files cannot: a process that was killed says nothing.
    """
    seen = observation.state if observation else None
    rank_states = {rank.state for rank in peaks}
    said = read_text(status or {}, "state")
    rules: tuple[tuple[RunState, bool], ...] = (
        ("out_of_memory", "out_of_memory" in rank_states),
        # Before "failed": ranks that a Ctrl-C killed often report a failure of their own.
        ("interrupted", said == "interrupted"),
        ("failed", said == "failed" or "failed" in rank_states),
        ("interrupted", "interrupted" in rank_states),
        ("finished", said == "finished" or (is_complete and rank_states == {"finished"})),
        ("killed", seen == "killed"),
        ("failed", seen == "failed"),
        ("pending", seen == "pending"),
        ("running", said == "running" or bool(rank_states) or seen == "running"),
        ("created", said == "created"),
    )
    return next((state for state, applies in rules if applies), "unknown")


def _reason(files: RunFiles) -> str | None:
    if said := read_text(files.status or {}, "reason"):
        return said
    return files.observation.reason if files.observation else None


def _clock_skews(peaks: Sequence[RankPeaks]) -> dict[str, float]:
    """Return the hosts whose clock is far from most others': all ranks end a step together."""
    ends: dict[str, list[float]] = defaultdict(list)
    for rank in peaks:
        if rank.first_step_at is not None:
            ends[rank.host].append(rank.first_step_at)
    at = {host: median(seconds) for host, seconds in ends.items()}
    usual = median_low(at.values()) if at else 0.0
    return {
        host: seconds - usual
        for host, seconds in at.items()
        if abs(seconds - usual) > CLOCK_SKEW_SECONDS
    }


def _rank_report(
    rank: RankPeaks, prediction: Prediction, predicted: Mapping[str, int]
) -> RankReport:
    measured = {name: peaks for name, peaks in rank.phases.items() if peaks.count > 0}
    fullest = max(measured, key=lambda name: measured[name].peak_allocated_bytes, default=None)
    is_cuda = rank.device != "cpu"
    return RankReport(
        rank=rank.rank,
        host=rank.host,
        device=rank.device,
        device_name=rank.device_name,
        state=rank.state,
        steps_done=rank.steps_done,
        allocated_bytes=Comparison(
            predicted=prediction.peak_allocated_bytes,
            measured=measured[fullest].peak_allocated_bytes if fullest else None,
        ),
        # On CPU nothing is reserved and no device is used: there is nothing to compare.
        reserved_bytes=Comparison(
            predicted=prediction.peak_reserved_bytes if is_cuda else None,
            measured=_highest(p.peak_reserved_bytes for p in measured.values()),
        ),
        device_used_bytes=Comparison(
            predicted=prediction.device_used_bytes if is_cuda else None,
            measured=_highest(p.device_used_bytes for p in measured.values()),
        ),
        host_rss_bytes=_highest(p.host_rss_bytes for p in measured.values()),
        peak_phase=fullest,
        phases=tuple(
            PhaseReport(phase=name, predicted_bytes=predicted.get(name), measured=measured[name])
            for name in sorted(measured, key=_phase_order)
        ),
        allocator_retries=rank.allocator_retries,
        allocator_ooms=rank.allocator_ooms,
    )


def _node_reports(ranks: Sequence[RankReport], prediction: Prediction) -> tuple[NodeReport, ...]:
    by_host: dict[str, list[RankReport]] = defaultdict(list)
    for rank in ranks:
        by_host[rank.host].append(rank)
    nodes = []
    for host, members in by_host.items():
        resident = [rank.host_rss_bytes for rank in members if rank.host_rss_bytes is not None]
        # The prediction is for a node with all of its ranks.
        is_whole = len(resident) >= (prediction.gpus_per_node or 0)
        host_bytes = Comparison(
            predicted=prediction.host_bytes_per_node if is_whole else None,
            measured=sum(resident) if resident else None,
        )
        nodes.append(NodeReport(host=host, num_ranks=len(members), host_bytes=host_bytes))
    return tuple(nodes)


def _balance(ranks: Sequence[RankReport], prediction: Prediction) -> BalanceReport | None:
    measured = sorted(
        (rank for rank in ranks if rank.measured_bytes), key=lambda r: (-r.measured_bytes, r.rank)
    )
    if not measured:
        return None
    fullest = measured[0]
    used = fullest.device_used_bytes.measured or fullest.reserved_bytes.measured
    headroom = None
    if fullest.device != "cpu" and prediction.gpu_memory_bytes and used:
        headroom = round(prediction.gpu_memory_bytes - used)
    return BalanceReport(
        fullest_rank=fullest.rank,
        median_rank=measured[len(measured) // 2].rank,
        emptiest_rank=measured[-1].rank,
        imbalance_fraction=fullest.measured_bytes / fmean(r.measured_bytes for r in measured) - 1,
        headroom_bytes=headroom,
    )


def _time_report(peaks: Sequence[RankPeaks], prediction: Prediction) -> TimeReport:
    steps = [max(row) for row in _by_step([rank.step_seconds for rank in peaks])]
    # The first step allocates, compiles and opens connections: no later step is like it.
    steady = steps[1:] or steps
    usual = median(steady) if steady else None
    stepping = [rank for rank in peaks if rank.step_seconds and rank.tokens_per_step]
    tokens_per_step = sum(rank.tokens_per_step for rank in stepping)
    total = tokens_per_step / usual if usual and tokens_per_step else None
    planned_tokens = None
    if prediction.tokens_per_second_per_gpu and prediction.step_seconds:
        planned_tokens = prediction.tokens_per_second_per_gpu * prediction.step_seconds
    return TimeReport(
        num_steps=max((rank.steps_done for rank in peaks), default=0),
        first_step_seconds=steps[0] if steps else None,
        max_step_seconds=max(steady, default=None),
        step_seconds=Comparison(predicted=prediction.step_seconds, measured=usual),
        tokens_per_step_per_gpu=Comparison(
            predicted=planned_tokens,
            measured=tokens_per_step / len(stepping) if stepping else None,
        ),
        tokens_per_second_per_gpu=Comparison(
            predicted=prediction.tokens_per_second_per_gpu,
            measured=total / len(stepping) if total else None,
        ),
        tokens_per_second=total,
        phase_fractions=_phase_fractions(peaks),
    )


def _phase_fractions(peaks: Sequence[RankPeaks]) -> dict[str, float]:
    in_steps = sum(
        fmean(rank.step_seconds) * rank.steps_done for rank in peaks if rank.step_seconds
    )
    totals: dict[str, float] = defaultdict(float)
    for rank in peaks:
        for name in STEP_PHASES & rank.phases.keys():
            totals[name] += rank.phases[name].seconds if rank.step_seconds else 0.0
    if not in_steps or sum(totals.values()) > 1.1 * in_steps:
        return {}  # a step that was not ended has phases and no time of its own
    return {name: totals[name] / in_steps for name in sorted(totals, key=_phase_order)}


def _by_step(times: Sequence[tuple[float, ...]]) -> list[list[float]]:
    """Return each step's times on the ranks that have done it."""
    longest = max(map(len, times), default=0)
    if all(len(row) == longest for row in times):
        return [list(column) for column in zip(*times, strict=True)]
    return [[row[index] for row in times if index < len(row)] for index in range(longest)]


def _loss_report(log: Sequence[Mapping[str, object]], results: Mapping[str, object]) -> LossReport:
    train, held_out = _curve(log, "loss"), _curve(log, "eval_loss")
    before, after = (read_float(results, f"eval_loss_{when}") for when in ("before", "after"))
    is_after_final = after is not None
    if before is None and held_out and held_out[0][0] == 0:
        before = held_out[0][1]
    if after is None and held_out and held_out[-1][0] > 0:
        after = held_out[-1][1]
    not_finite = (
        step
        for line in log
        if (step := read_int(line, "step")) is not None
        and isinstance(loss := line.get("loss"), float)
        and not math.isfinite(loss)
    )
    return LossReport(
        train=train,
        held_out=held_out,
        held_out_before=before,
        held_out_after=after,
        is_after_final=is_after_final,
        not_finite_steps=tuple(not_finite),
    )


def _curve(log: Sequence[Mapping[str, object]], key: str) -> tuple[tuple[int, float], ...]:
    """Return (step, value) in order of steps; a step that was logged again counts once."""
    points = {
        step: value
        for line in log
        if (step := read_int(line, "step")) is not None
        and (value := read_float(line, key)) is not None
    }
    return tuple(sorted(points.items()))


def _sample(results: Mapping[str, object]) -> SampleReport | None:
    sample = results.get("sample")
    if not isinstance(sample, Mapping) or (prompt := read_text(sample, "prompt")) is None:
        return None
    return SampleReport(
        prompt=prompt, before=read_text(sample, "before"), after=read_text(sample, "after")
    )


def _failures(peaks: Sequence[RankPeaks]) -> tuple[FailureReport, ...]:
    """Group equal failures; the likely cause first, what followed from it last."""
    groups: dict[tuple[str, str], list[RankPeaks]] = defaultdict(list)
    for rank in peaks:
        if rank.failure is not None:
            groups[rank.failure.type, rank.failure.message].append(rank)

    def order(group: Sequence[RankPeaks]) -> tuple[bool, bool, int]:
        first = group[0]
        assert first.failure is not None
        is_secondary = any(word in first.failure.type for word in _SECONDARY_FAILURES)
        return (is_secondary, first.state != "out_of_memory", first.rank)

    found = []
    for group in sorted(groups.values(), key=order):
        first = group[0]
        assert first.failure is not None
        found.append(
            FailureReport(
                rank=first.rank,
                host=first.host,
                state=first.state,
                failure=first.failure,
                same_on_ranks=tuple(rank.rank for rank in group[1:]),
            )
        )
    return tuple(found)


def _phase_names(ranks: Iterable[RankReport], prediction: Prediction) -> tuple[str, ...]:
    names = {phase.phase for phase in prediction.phases}
    names |= {phase.phase for rank in ranks for phase in rank.phases}
    return tuple(sorted(names, key=_phase_order))


_ORDER: Mapping[str, int] = {phase: index for index, phase in enumerate(PHASES)}


def _phase_order(name: str) -> tuple[int, str]:
    return _ORDER.get(name, len(_ORDER)), name


def _highest(sizes: Iterable[int | None]) -> int | None:
    return max((size for size in sizes if size is not None), default=None)
