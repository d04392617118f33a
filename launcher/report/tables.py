"""A report's tables as rows of text, shared by the terminal, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from launcher.report.failure_tables import failure_memory_table
from launcher.report.run_report import (
    MAX_RANK_ROWS,
    Comparison,
    RankReport,
    RunReport,
    select_ranks,
)
from launcher.report.table import Table, Unit, unit_for, without_empty_columns
from launcher.report.text import (
    NOTHING,
    error_note,
    format_percent,
    format_rate,
    printable,
    shorten,
)
from launcher.units import format_count, format_seconds

MAX_NODE_ROWS = 16
RANKS_PER_PAGE = 256


def summary_tables(report: RunReport) -> tuple[Table, ...]:
    """Return memory by phase, ranks, nodes and time; what has no rows is left out."""
    makers = (
        failure_memory_table, _phase_table, _rank_table, _device_table, _load_table, _node_table,
        _time_table,
    )  # fmt: skip
    return tuple(table for make in makers if (table := make(report)).rows)


def detail_table(report: RunReport) -> Table:
    """Return every phase of every rank, of a few telling ranks when there are many."""
    shown = select_ranks(report)
    unit = unit_for([*_peaks(report), *(rank.host_rss_bytes for rank in shown)])
    rows = [
        (
            str(rank.rank),
            printable(phase.phase),
            *_comparison_cells(phase.allocated_bytes, unit.show),
            unit.show(phase.measured.peak_active_bytes),
            NOTHING if report.is_on_cpu else unit.show(phase.measured.peak_reserved_bytes),
            unit.show(phase.measured.device_used_bytes),
            unit.show(phase.measured.host_rss_bytes),
            unit.show(phase.measured.host_pinned_bytes),
            _percent(phase.measured.gpu_utilisation_fraction),
            format_seconds(phase.measured.seconds),
        )
        for rank in shown
        for phase in rank.phases
    ]
    return without_empty_columns(
        Table(
            title=f"Every rank and phase, in {unit.name}",
            header=(
                "rank", "phase", "predicted", "measured", "error",
                "active", "reserved", "device", "host RSS", "pinned", "GPU busy", "time",
            ),
            rows=tuple(rows),
            note=_selection_note(report, shown),
            num_text_columns=2,
        )
    )  # fmt: skip


def _phase_table(report: RunReport) -> Table:
    unit = unit_for(_peaks(report))
    rows = []
    for name in report.phase_names:
        rank, predicted = report.fullest_in(name), report.prediction.phase(name)
        measured = rank.phase(name) if rank else None
        comparison = measured.allocated_bytes if measured else None
        each = NOTHING
        first = steady = None
        if measured is not None:
            peaks = measured.measured
            each = format_seconds(peaks.seconds / peaks.count) if peaks.count else NOTHING
            first = peaks.first_step.allocated_bytes if peaks.first_step else None
            steady = peaks.steady_state.allocated_bytes if peaks.steady_state else None
        rows.append(
            (
                printable(name),
                *_comparison_cells(
                    comparison
                    or Comparison(
                        predicted=predicted.allocated_bytes if predicted else None, measured=None
                    ),
                    unit.show,
                ),
                unit.show(first),
                unit.show(steady),
                str(rank.rank) if rank else NOTHING,
                each,
            )
        )
    table = Table(
        title=f"Memory by phase, fullest rank of each, in {unit.name}",
        header=(
            "phase", "predicted", "measured", "error", "1st step", "steady", "rank", "time each",
        ),
        rows=tuple(rows),
        note=error_note(report) if rows else "",
    )  # fmt: skip
    return without_empty_columns(table, names=("1st step", "steady"))


def _rank_table(report: RunReport) -> Table:
    shown = select_ranks(report)
    unit = unit_for([*_peaks(report), *(rank.host_rss_bytes for rank in shown)])
    rows = [
        (
            _rank_cell(report, rank),
            rank.state.replace("_", " "),
            printable(rank.peak_phase or NOTHING),
            *_comparison_cells(rank.allocated_bytes, unit.show),
            unit.show(rank.host_rss_bytes),
        )
        for rank in shown
    ]
    return Table(
        title=f"Peak of each rank, in {unit.name}",
        header=("rank", "state", "in phase", "predicted", "measured", "error", "host RSS"),
        rows=tuple(rows),
        note=_selection_note(report, shown),
        num_text_columns=3,
    )


def _device_table(report: RunReport) -> Table:
    shown = () if report.is_on_cpu else select_ranks(report)
    unit = unit_for(rank.device_used_bytes.measured for rank in shown)
    rows = [
        (
            _rank_cell(report, rank),
            *_comparison_cells(rank.reserved_bytes, unit.show),
            *_comparison_cells(rank.device_used_bytes, unit.show),
        )
        for rank in shown
    ]
    return Table(
        title=f"Reserved by the allocator, and device memory in use, in {unit.name}",
        header=(
            "rank",
            "res. predicted",
            "measured",
            "error",
            "dev. predicted",
            "measured",
            "error",
        ),
        rows=tuple(rows),
        note=_selection_note(report, shown) if rows else "",
    )


def _load_table(report: RunReport) -> Table:
    shown = [rank for rank in select_ranks(report) if rank.power_watts or rank.host_pinned_bytes]
    unit = unit_for(rank.host_pinned_bytes for rank in shown)
    rows = [
        (
            _rank_cell(report, rank),
            _percent(rank.gpu_utilisation_fraction),
            NOTHING if rank.power_watts is None else f"{rank.power_watts:.0f} W",
            unit.show(rank.host_pinned_bytes),
            str(rank.allocator_retries),
            str(rank.allocator_ooms),
        )
        for rank in shown
    ]
    return Table(
        title="GPU load during steps, pinned host memory, and the allocator's troubles",
        header=("rank", "busy", "power", f"pinned ({unit.name})", "retries", "out of memory"),
        rows=tuple(rows),
        note=_selection_note(report, shown) if rows else "",
    )


def rank_pages(report: RunReport) -> tuple[Table, ...]:
    """Return every rank in pages of ``RANKS_PER_PAGE``; none where one table holds them all."""
    if len(report.ranks) <= MAX_RANK_ROWS:
        return ()
    unit = unit_for(_peaks(report))
    return tuple(
        _rank_page(report.ranks[start : start + RANKS_PER_PAGE], unit)
        for start in range(0, len(report.ranks), RANKS_PER_PAGE)
    )


def _rank_page(ranks: Sequence[RankReport], unit: Unit) -> Table:
    return Table(
        title=f"Ranks {ranks[0].rank} to {ranks[-1].rank}, in {unit.name}",
        header=("rank", "host", "state", "peak", "error", "reserved", "host RSS"),
        rows=tuple(
            (
                str(rank.rank),
                shorten(rank.host, 40),
                rank.state,
                unit.show(rank.allocated_bytes.measured),
                format_percent(rank.allocated_bytes.error_fraction),
                unit.show(rank.reserved_bytes.measured),
                unit.show(rank.host_rss_bytes),
            )
            for rank in ranks
        ),
        num_text_columns=3,
    )


def _percent(fraction: float | None) -> str:
    return NOTHING if fraction is None else f"{100 * fraction:.0f} %"


def _rank_cell(report: RunReport, rank: RankReport) -> str:
    return f"{rank.rank}{_role(report, rank)}"


def _role(report: RunReport, rank: RankReport) -> str:
    if report.balance is None or len(report.ranks) <= MAX_RANK_ROWS:
        return ""
    roles = {
        report.balance.emptiest_rank: " (emptiest)",
        report.balance.median_rank: " (median)",
        report.balance.fullest_rank: " (fullest)",
    }
    return roles.get(rank.rank, "")


def _selection_note(report: RunReport, shown: Sequence[RankReport]) -> str:
    total = len(report.ranks)
    if len(shown) == total:
        return ""
    return f"{len(shown)} of {total} ranks shown; report.json has all of them."


def _node_table(report: RunReport) -> Table:
    nodes = sorted(report.nodes, key=lambda node: -(node.host_bytes.measured or 0))
    unit = unit_for(node.host_bytes.measured for node in nodes)
    rows = [
        (
            shorten(printable(node.host), 40),
            str(node.num_ranks),
            *_comparison_cells(node.host_bytes, unit.show),
        )
        for node in nodes[:MAX_NODE_ROWS]
    ]
    note = "Measured is the sum of the ranks' peak resident memory; shared pages count once a rank."
    if len(nodes) > MAX_NODE_ROWS:
        note += f" The {MAX_NODE_ROWS} fullest of {len(nodes)} nodes are shown."
    return Table(
        title=f"Host memory of each node, in {unit.name}",
        header=("node", "ranks", "predicted", "measured", "error"),
        rows=tuple(rows),
        note=note,
    )


def _time_table(report: RunReport) -> Table:
    time = report.time
    if time.first_step_seconds is None:
        return Table(title="Time", header=("", "predicted", "measured", "error"), rows=())
    slowest = Comparison(predicted=None, measured=time.max_step_seconds)
    first = Comparison(predicted=None, measured=time.first_step_seconds)
    per = "rank" if report.is_on_cpu else "GPU"
    together = Comparison(predicted=None, measured=time.tokens_per_second)
    rows: list[tuple[str, ...]] = [
        ("first step", *_comparison_cells(first, format_seconds)),
        ("median step", *_comparison_cells(time.step_seconds, format_seconds)),
        ("slowest later step", *_comparison_cells(slowest, format_seconds)),
        (
            f"tokens a step, each {per}",
            *_comparison_cells(time.tokens_per_step_per_gpu, format_count),
        ),
        (f"each {per}", *_comparison_cells(time.tokens_per_second_per_gpu, format_rate)),
    ]
    if len(report.ranks) > 1:
        name = f"all {len(report.ranks)} ranks"
        rows.append((name, *_comparison_cells(together, format_rate)))
    return Table(
        title="Time and throughput",
        header=("", "predicted", "measured", "error"),
        rows=tuple(rows),
        note="A step takes as long as its slowest rank; tokens include padding. The prediction is "
        "for sequences of full length: with fewer tokens a step takes less time.",
    )


def _comparison_cells(comparison: Comparison, show: Callable[[float], str]) -> tuple[str, str, str]:
    sizes = (comparison.predicted, comparison.measured)
    predicted, measured = (NOTHING if size is None else show(size) for size in sizes)
    return predicted, measured, format_percent(comparison.error_fraction)


def _peaks(report: RunReport) -> list[float | None]:
    return [report.prediction.peak_allocated_bytes, report.largest_measured_bytes]
