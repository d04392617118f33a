"""A run's report as JSON values; docs/report-json.md describes the keys."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from launcher.peaks import StepPeaks
from launcher.report.run_report import (
    BalanceReport,
    Comparison,
    LossReport,
    PhaseReport,
    RankReport,
    RunReport,
    TimeReport,
    select_ranks,
)

SCHEMA_VERSION = 1
MAX_RANKS_WITH_PHASES = 256


def report_to_json(report: RunReport) -> dict[str, Any]:
    """Return the report as JSON values: every rank, and its phases where ranks are few.

    Of more than ``MAX_RANKS_WITH_PHASES`` ranks only the telling ones have their phases: each
    rank's own file has them, and 30 MB of JSON would take longer than all else.

    Bytes are whole numbers, times are seconds, fractions are 0-1 and may be negative; what was
    not measured or not predicted is ``null``, and there is never a NaN.
    """
    shown = report.ranks
    if len(shown) > MAX_RANKS_WITH_PHASES:
        shown = select_ranks(report)
    telling = {rank.rank for rank in shown}
    return {
        "schema_version": SCHEMA_VERSION,
        "name": report.name,
        "state": report.state,
        "state_reason": report.state_reason,
        "problems": list(report.problems),
        "failures": [
            {
                "rank": item.rank,
                "host": item.host,
                "state": item.state,
                **asdict(item.failure),
                "same_on_ranks": list(item.same_on_ranks),
            }
            for item in report.failures
        ],
        "world_size": report.world_size,
        "num_ranks_reported": len(report.ranks),
        "missing_ranks": list(report.missing_ranks),
        "prediction": {
            **asdict(report.prediction),
            "phases": [asdict(phase) for phase in report.prediction.phases],
        },
        "balance": _balance(report.balance),
        "ranks": [_rank(rank, has_phases=rank.rank in telling) for rank in report.ranks],
        "nodes": [
            {
                "host": node.host,
                "num_ranks": node.num_ranks,
                "host_bytes": _compare_bytes(node.host_bytes),
            }
            for node in report.nodes
        ],
        "time": _time(report.time),
        "loss": _loss(report.loss),
        "tokens_seen": report.tokens_seen,
        "train_seconds": report.train_seconds,
        "sample": asdict(report.sample) if report.sample else None,
        "throughput": [list(point) for point in report.throughput],
        "lengths": asdict(report.lengths) if report.lengths else None,
        "attempts": [asdict(attempt) for attempt in report.attempts],
        "memory_at_failure": (
            asdict(report.memory_at_failure) if report.memory_at_failure else None
        ),
        "advice": list(report.advice),
        "clock_skews_seconds": dict(report.clock_skews_seconds),
    }


def _compare(comparison: Comparison) -> dict[str, Any]:
    return {
        "predicted": comparison.predicted,
        "measured": comparison.measured,
        "error_fraction": comparison.error_fraction,
    }


def _compare_bytes(comparison: Comparison) -> dict[str, Any]:
    predicted, measured = comparison.predicted, comparison.measured
    return {
        "predicted": None if predicted is None else round(predicted),
        "measured": None if measured is None else round(measured),
        "error_fraction": comparison.error_fraction,
    }


def _balance(balance: BalanceReport | None) -> dict[str, Any] | None:
    return asdict(balance) if balance else None


def _rank(rank: RankReport, *, has_phases: bool) -> dict[str, Any]:
    return {
        "rank": rank.rank,
        "host": rank.host,
        "device": rank.device,
        "device_name": rank.device_name,
        "state": rank.state,
        "steps_done": rank.steps_done,
        "allocated_bytes": _compare_bytes(rank.allocated_bytes),
        "reserved_bytes": _compare_bytes(rank.reserved_bytes),
        "device_used_bytes": _compare_bytes(rank.device_used_bytes),
        "host_rss_bytes": rank.host_rss_bytes,
        "host_pinned_bytes": rank.host_pinned_bytes,
        "first_step_bytes": rank.first_step_bytes,
        "steady_bytes": rank.steady_bytes,
        "gpu_utilisation_fraction": rank.gpu_utilisation_fraction,
        "power_watts": rank.power_watts,
        "peak_phase": rank.peak_phase,
        "allocator_retries": rank.allocator_retries,
        "allocator_ooms": rank.allocator_ooms,
        "phases": {phase.phase: _phase(phase) for phase in rank.phases} if has_phases else None,
    }


def _phase(phase: PhaseReport) -> dict[str, Any]:
    measured = phase.measured
    return {
        "allocated_bytes": _compare_bytes(phase.allocated_bytes),
        "peak_reserved_bytes": measured.peak_reserved_bytes,
        "peak_active_bytes": measured.peak_active_bytes,
        "device_used_bytes": measured.device_used_bytes,
        "host_rss_bytes": measured.host_rss_bytes,
        "host_pinned_bytes": measured.host_pinned_bytes,
        "gpu_utilisation_fraction": measured.gpu_utilisation_fraction,
        "power_watts": measured.power_watts,
        "first_step": _step(measured.first_step),
        "steady_state": _step(measured.steady_state),
        "seconds": measured.seconds,
        "count": measured.count,
    }


def _step(step: StepPeaks | None) -> dict[str, int | None] | None:
    if step is None:
        return None
    return {
        "allocated_bytes": step.allocated_bytes,
        "reserved_bytes": step.reserved_bytes,
        "active_bytes": step.active_bytes,
    }


def _time(time: TimeReport) -> dict[str, Any]:
    return {
        "num_steps": time.num_steps,
        "first_step_seconds": time.first_step_seconds,
        "step_seconds": _compare(time.step_seconds),
        "max_step_seconds": time.max_step_seconds,
        "tokens_per_step_per_gpu": _compare(time.tokens_per_step_per_gpu),
        "tokens_per_second_per_gpu": _compare(time.tokens_per_second_per_gpu),
        "tokens_per_second": time.tokens_per_second,
        "phase_fractions": dict(time.phase_fractions),
    }


def _loss(loss: LossReport) -> dict[str, Any]:
    return {
        "train": [list(point) for point in loss.train],
        "held_out": [list(point) for point in loss.held_out],
        "held_out_before": loss.held_out_before,
        "held_out_after": loss.held_out_after,
        "held_out_change": loss.held_out_change,
        "is_after_final": loss.is_after_final,
        "not_finite_steps": list(loss.not_finite_steps),
    }
