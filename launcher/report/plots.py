"""A report's charts, each in two widths with the sentence that it shows. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from launcher.report.axes import bar_chart, plot
from launcher.report.chart_findings import chart_findings
from launcher.report.curves import draw_host, draw_loss, draw_throughput, draw_timeline
from launcher.report.run_report import Chart, RankReport, RunReport
from launcher.report.svg import NARROW, WIDE, LegendItem, Shape
from launcher.report.text import format_percent, printable
from launcher.units import GIB, MIB, format_bytes

# Okabe and Ito, "Color Universal Design" (2008): told apart with every kind of colour blindness.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_OTHER_COLOR, _MEASURED_COLOR, _RESERVED_COLOR = "#BBBBBB", "#333333", "#BBDDEE"
_PREDICTED_COLOR = "#D55E00"
_OTHER = "other"
MAX_RANK_BARS = 16
_MAX_NAME_CHARACTERS, _MAX_LEGEND_CHARACTERS = 28, 42
"""Beside a bar, and of a line of the legend on a phone."""


def draw_charts(report: RunReport) -> tuple[Chart, ...]:
    """Draw memory, ranks, memory over time, loss, throughput and lengths; those with data."""
    draw: Mapping[str, Callable[[RunReport, Shape, str], str]] = {
        "memory": _draw_memory,
        "ranks": _draw_ranks,
        "timeline": draw_timeline,
        "host": draw_host,
        "loss": draw_loss,
        "throughput": draw_throughput,
        "lengths": _draw_lengths,
    }
    return tuple(
        Chart(
            name=name,
            finding=finding,
            wide_svg=draw[name](report, WIDE, finding),
            narrow_svg=draw[name](report, NARROW, finding),
        )
        for name, finding in chart_findings(report).items()
    )


def _draw_memory(report: RunReport, shape: Shape, title: str) -> str:
    sizes = [phase.allocated_bytes for phase in report.prediction.phases]
    largest = max([*sizes, *(rank.measured_bytes for rank in report.ranks)], default=0)
    scale, unit = unit_of(largest)
    colors = _component_colors(report)
    names = report.phase_names
    legend = [
        LegendItem(label=_label(name, _MAX_LEGEND_CHARACTERS), color=color)
        for name, color in colors.items()
    ]
    if report.balance is not None:
        legend.append(LegendItem(label="measured, fullest rank", color=_MEASURED_COLOR))
    # Two bars a phase, and a gap between phases.
    rows = {name: 2.5 * index for index, name in enumerate(names)}
    chart = bar_chart(
        shape,
        title=title,
        names=[(row + 0.5, _label(name)) for name, row in rows.items()],
        num_rows=2.5 * len(names),
        largest=largest / scale,
        longest_label=f"{_number(largest, scale)} predicted ",
        x_label=f"Allocated memory ({unit})",
        legend=legend,
    )
    for name, row in rows.items():
        predicted = report.prediction.phase(name)
        if predicted is not None:
            start = 0.0
            for part, size in _main_components(predicted.components, colors):
                note = f"{part}: {format_bytes(size)}"
                chart.bar(
                    row, size / scale, color=colors[part], height=0.84, start=start, note=note
                )
                start += size / scale
            total = predicted.allocated_bytes
            chart.beside(row, total / scale, f"{_number(total, scale)} predicted")
        rank = report.fullest_in(name)
        measured = rank.phase(name) if rank else None
        if measured is not None:
            size = measured.measured.peak_allocated_bytes
            chart.bar(row + 1, size / scale, color=_MEASURED_COLOR, height=0.84)
            error = measured.allocated_bytes.error_fraction
            suffix = "measured" if error is None else f"({format_percent(error)})"
            chart.beside(row + 1, size / scale, f"{_number(size, scale)} {suffix}")
    return chart.drawing.svg()


def _component_colors(report: RunReport) -> dict[str, str]:
    """Give the components that are largest anywhere a colour each, the rest one grey.

    The order is the plan's own, so that what stays all the time stands at the foot of each bar.
    """
    largest: dict[str, int] = {}
    for phase in report.prediction.phases:
        for name, size in phase.components.items():
            largest[name] = max(size, largest.get(name, 0))
    main = sorted(largest, key=lambda name: -largest[name])[: len(PALETTE)]
    names = [name for name in largest if name in main and largest[name] > 0]
    colors = dict(zip(names, PALETTE, strict=False))
    if any(size > 0 for name, size in largest.items() if name not in colors):
        colors[_OTHER] = _OTHER_COLOR
    return colors


def _main_components(
    components: Mapping[str, int], colors: Mapping[str, str]
) -> list[tuple[str, int]]:
    """Return components in the order of their colours, the uncoloured ones summed last."""
    known = [(name, components[name]) for name in colors if components.get(name, 0) > 0]
    rest = sum(size for name, size in components.items() if name not in colors and size > 0)
    return [*known, (_OTHER, rest)] if rest else known


def _draw_ranks(report: RunReport, shape: Shape, title: str) -> str:
    ranks = [rank for rank in report.ranks if rank.measured_bytes]
    if len(ranks) > MAX_RANK_BARS:
        return _draw_many_ranks(ranks, shape, title)
    predicted = report.prediction.peak_allocated_bytes
    furthest = [
        max(rank.measured_bytes, round(rank.reserved_bytes.measured or 0)) for rank in ranks
    ]
    largest = max(*furthest, predicted or 0)
    scale, unit = unit_of(largest)
    is_on_gpu = not report.is_on_cpu
    legend = [LegendItem(label="allocated, measured", color=PALETTE[0])]
    if is_on_gpu:
        legend.append(LegendItem(label="reserved by the allocator", color=_RESERVED_COLOR))
    if predicted:
        legend.append(_predicted_item())
    labels = [_rank_label(rank, scale, is_on_gpu=is_on_gpu) for rank in ranks]
    chart = bar_chart(
        shape,
        title=title,
        names=[(row, f"rank {rank.rank}") for row, rank in enumerate(ranks)],
        num_rows=len(ranks),
        largest=largest / scale,
        longest_label=max(labels, key=len),
        x_label=f"Peak memory ({unit})" + (": allocated / reserved" if is_on_gpu else ""),
        legend=legend,
    )
    for row, rank in enumerate(ranks):
        if is_on_gpu:
            reserved = (rank.reserved_bytes.measured or 0) / scale
            chart.bar(row, reserved, color=_RESERVED_COLOR, height=0.86)
        chart.bar(row, rank.measured_bytes / scale, color=PALETTE[0], height=0.5)
    if predicted:
        x = chart.x.place(predicted / scale)
        bottom = chart.middle(len(ranks) - 0.5)
        chart.drawing.line((x, 0, x, bottom), color=_PREDICTED_COLOR, dashes=True)
    for row, label in enumerate(labels):
        chart.beside(row, furthest[row] / scale, label)
    return chart.drawing.svg()


def _rank_label(rank: RankReport, scale: int, *, is_on_gpu: bool) -> str:
    shown = [rank.measured_bytes, rank.reserved_bytes.measured or 0][: 1 + is_on_gpu]
    text = " / ".join(_number(size, scale) for size in shown)
    return text if rank.state in ("finished", "running") else f"{text}, {_label(rank.state)}"


def _draw_many_ranks(ranks: Sequence[RankReport], shape: Shape, title: str) -> str:
    sizes = sorted((rank.measured_bytes for rank in ranks), reverse=True)
    predicted = ranks[0].allocated_bytes.predicted
    top = max(sizes[0], predicted or 0)
    scale, unit = unit_of(top)
    legend = [LegendItem(label="allocated, measured", color=PALETTE[4])]
    chart = plot(
        shape,
        title=title,
        x_range=(1, len(sizes)),
        y_range=(0, top / scale * 1.08),
        x_label=f"{len(sizes):,} ranks, fullest first",
        y_label=f"Peak memory ({unit})",
        legend=[*legend, _predicted_item()] if predicted else legend,
        show_x="{:,.0f}".format,
        whole_x=True,
    )
    # The shape of thousands of ranks needs no more points than the screen has pixels.
    every = -(-len(sizes) // int(shape.width))
    kept = [*range(0, len(sizes), every), len(sizes) - 1]
    points = chart.at([(index + 1, sizes[index] / scale) for index in kept])
    chart.drawing.area(points, foot=chart.y.start, color=PALETTE[4])
    if predicted:
        chart.level(predicted / scale, _PREDICTED_COLOR)
    return chart.drawing.svg()


def _predicted_item() -> LegendItem:
    label = "allocated, predicted for the fullest"
    return LegendItem(label=label, color=_PREDICTED_COLOR, kind="dashes")


def _draw_lengths(report: RunReport, shape: Shape, title: str) -> str:
    lengths = report.lengths
    assert lengths is not None
    legend = [LegendItem(label="records", color=PALETTE[0])]
    if any(first > lengths.max_seq_len and count for first, _, count in lengths.bins):
        legend.append(LegendItem(label="longer than max_seq_len: cut off", color=_PREDICTED_COLOR))
    last = max(lengths.bins[-1][1], 1)
    most = max(count for _, _, count in lengths.bins)
    chart = plot(
        shape,
        title=title,
        x_range=(0, last),
        y_range=(0, most * 1.05 or 1),
        x_label="Tokens of a record, before it is cut",
        y_label="Records",
        legend=legend,
        show_x="{:,.0f}".format,
        show_y="{:,.0f}".format,
        whole_x=True,
    )
    for first, end, count in lengths.bins:
        left, right = chart.x.place(first - 1), chart.x.place(end)
        top = chart.y.place(count)
        color = _PREDICTED_COLOR if first > lengths.max_seq_len else PALETTE[0]
        chart.drawing.rect(
            left, top, width=right - left - 1, height=chart.y.start - top, color=color,
            note=f"{first:,} to {end:,} tokens: {count:,}",
        )  # fmt: skip
    if lengths.max_seq_len <= last:
        x = chart.x.place(lengths.max_seq_len)
        chart.drawing.line((x, chart.y.end, x, chart.y.start), color=_MEASURED_COLOR, dashes=True)
    return chart.drawing.svg()


def unit_of(largest_bytes: float) -> tuple[int, str]:
    """Return the unit of a chart whose largest value this is."""
    return (GIB, "GiB") if largest_bytes >= GIB else (MIB, "MiB")


def _number(size: float, scale: int) -> str:
    """Return a size in the chart's unit: hundredths of a GiB matter, those of a MiB do not."""
    value = size / scale
    return f"{value:.2f}" if scale == GIB or value < 10 else f"{value:.0f}"


def _label(text: str, most: int = _MAX_NAME_CHARACTERS) -> str:
    """Return a name that fits where it is written."""
    plain = printable(text).replace("_", " ")
    return plain if len(plain) <= most else f"{plain[: most - 1]}…"
