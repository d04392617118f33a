"""The sentence that each of a report's charts shows, which is also its title. Pure."""

from __future__ import annotations

from statistics import median

from launcher.report.curves import predicted_throughput
from launcher.report.run_report import RunReport
from launcher.report.text import compare_bytes, format_rate, held_out_sentence
from launcher.units import format_bytes, format_seconds


def chart_findings(report: RunReport) -> dict[str, str]:
    """Return the title of each chart that there is data for, by the chart's name."""
    found = {
        "memory": _memory_finding(report),
        "ranks": _ranks_finding(report),
        "timeline": _timeline_finding(report),
        "host": _host_finding(report),
        "loss": loss_finding(report),
        "throughput": _throughput_finding(report),
        "lengths": _lengths_finding(report),
    }
    return {name: finding for name, finding in found.items() if finding is not None}


def _memory_finding(report: RunReport) -> str | None:
    if report.balance is not None:
        rank = report.rank(report.balance.fullest_rank)
        return f"Fullest rank: {compare_bytes(rank.allocated_bytes)}"
    peak = report.prediction.peak_allocated_bytes
    if not report.prediction.phases or not peak:
        return None
    return f"Predicted peak: {format_bytes(peak)}; nothing measured yet"


def _ranks_finding(report: RunReport) -> str | None:
    if report.balance is None:
        return None
    fullest = report.rank(report.balance.fullest_rank)
    peak = format_bytes(fullest.measured_bytes)
    measured = sum(1 for rank in report.ranks if rank.measured_bytes)
    if measured == 1:
        return f"Rank {fullest.rank} peaked at {peak}"
    if report.balance.imbalance_fraction < 0.0005:
        return f"All {measured} ranks peaked at {peak}"
    above = 100 * report.balance.imbalance_fraction
    return f"Rank {fullest.rank} is the fullest: {peak}, {above:.1f} % above the mean"


def _timeline_finding(report: RunReport) -> str | None:
    if not report.timelines:
        return None
    timeline = report.timelines[0]
    samples = [sample for sample in timeline.samples if sample.allocated_bytes is not None]
    if not samples:
        return None
    highest = max(samples, key=lambda sample: sample.allocated_bytes or 0)
    where = f" in {highest.phase}" if highest.phase else ""
    size = format_bytes(highest.allocated_bytes or 0)
    return (
        f"Rank {timeline.rank} over time: highest sample {size} after "
        f"{format_seconds(highest.seconds)}{where}"
    )


def _host_finding(report: RunReport) -> str | None:
    sizes = [sample.host_rss_bytes for timeline in report.timelines for sample in timeline.samples]
    if not sizes:
        return None
    ranks = len(report.timelines)
    whose = f"rank {report.timelines[0].rank}" if ranks == 1 else f"{ranks} ranks"
    return f"Host memory of {whose} over time: at most {format_bytes(max(sizes))} each"


def loss_finding(report: RunReport) -> str | None:
    """Return what the loss did; ``None`` when none was logged."""
    loss = report.loss
    if not loss.train and not loss.held_out:
        return None
    if (sentence := held_out_sentence(report)) is not None:
        return f"Held-out loss {sentence}"
    points = loss.train or loss.held_out
    (_, first), (last_step, last) = points[0], points[-1]
    what = "Training" if loss.train else "Held-out"
    return f"{what} loss went from {first:.3f} to {last:.3f} in {last_step} steps"


def _throughput_finding(report: RunReport) -> str | None:
    if not report.throughput:
        return None
    usual = format_rate(median(value for _, value in report.throughput))
    predicted = predicted_throughput(report)
    beside = f", {format_rate(predicted)} predicted" if predicted else ""
    return f"Throughput of all ranks: {usual} (median){beside}"


def _lengths_finding(report: RunReport) -> str | None:
    lengths = report.lengths
    if lengths is None:
        return None
    total = sum(count for _, _, count in lengths.bins)
    if lengths.num_truncated:
        return (
            f"{lengths.num_truncated:,} of {total:,} records are longer than "
            f"{lengths.max_seq_len:,} tokens and were cut"
        )
    longest = max(last for _, last, count in lengths.bins if count)
    return f"No record was cut: the longest of {total:,} has at most {longest:,} tokens"
