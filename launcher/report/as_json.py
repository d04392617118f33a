"""A run's report as JSON values; docs/report-json.md describes the keys."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from launcher.report.run_report import (
    BalanceReport,
    Comparison,
    LossReport,
    PhaseReport,
    RankReport,
    RunReport,
    TimeReport,
)

SCHEMA_VERSION = 1


def report_to_json(report: RunReport) -> dict[str, Any]:
    """Return the report as JSON values: every rank and phase, whatever their number.

    Bytes are whole numbers, times are seconds, fractions are 0-1 and may be negative; what was
    not measured or not predicted is ``null``, and there is never a NaN.
    """
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
        "ranks": [_rank(rank) for rank in report.ranks],
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
    }


def _compare(comparison: Comparison) -> dict[str, Any]:
    return {
        "predicted": comparison.predicted,
        "measured": comparison.measured,
        "error_fraction": comparison.error_fraction,
    }


def _compare_bytes(comparison: Comparison) -> dict[str, Any]:
    sizes = (comparison.predicted, comparison.measured)
    predicted, measured = (None if size is None else round(size) for size in sizes)
    return {**_compare(comparison), "predicted": predicted, "measured": measured}


def _balance(balance: BalanceReport | None) -> dict[str, Any] | None:
    return asdict(balance) if balance else None


def _rank(rank: RankReport) -> dict[str, Any]:
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
        "peak_phase": rank.peak_phase,
        "allocator_retries": rank.allocator_retries,
        "allocator_ooms": rank.allocator_ooms,
        "phases": {phase.phase: _phase(phase) for phase in rank.phases},
    }


def _phase(phase: PhaseReport) -> dict[str, Any]:
    return {
        "allocated_bytes": _compare_bytes(phase.allocated_bytes),
        "peak_reserved_bytes": phase.peak_reserved_bytes,
        "device_used_bytes": phase.device_used_bytes,
        "host_rss_bytes": phase.host_rss_bytes,
        "seconds": phase.seconds,
        "count": phase.count,
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
