"""A report's charts as PNG bytes. Pure; matplotlib is imported when the first one is drawn."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.report.run_report import Chart, RankReport, RunReport
from launcher.report.text import compare_bytes, format_percent, held_out_sentence
from launcher.units import GIB, MIB, format_bytes

# Okabe and Ito, "Color Universal Design" (2008): told apart with every kind of colour blindness.
_PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_OTHER_COLOR = "#BBBBBB"
_MEASURED_COLOR = "#333333"
_TRAIN_COLOR, _HELD_OUT_COLOR = "#0072B2", "#D55E00"
_OTHER = "other"
_MEASURED_LABEL = "measured, fullest rank"
_MAX_RANK_BARS = 16
_SMOOTH_FROM_POINTS = 40
_PIXELS_PER_INCH = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """Size of a drawing; 1 inch is 100 CSS pixels, drawn at twice that for sharp screens."""

    width_inches: float
    font_points: float
    title_characters: int
    legend_columns: int
    row_inches: float
    """Height of a phase: two bars."""
    label_room_fraction: float
    """Free room right of the longest bar, of its length."""
    loss_margin_fraction: float
    """Free room on both sides of the loss curve for the held-out values."""


_WIDE = _Shape(
    width_inches=11.2,
    font_points=11.5,
    title_characters=100,
    legend_columns=4,
    row_inches=0.62,
    label_room_fraction=0.2,
    loss_margin_fraction=0.07,
)
_NARROW = _Shape(
    width_inches=3.6,
    font_points=8.5,
    title_characters=44,
    legend_columns=2,
    row_inches=0.5,
    label_room_fraction=0.66,
    loss_margin_fraction=0.22,
)


def draw_charts(report: RunReport) -> tuple[Chart, ...]:
    """Draw memory by phase, ranks and loss; a chart without data is left out."""
    draw = {"memory": _draw_memory, "ranks": _draw_ranks, "loss": _draw_loss}
    return tuple(
        Chart(
            name=name,
            finding=finding,
            wide_png=draw[name](report, _WIDE, finding),
            narrow_png=draw[name](report, _NARROW, finding),
        )
        for name, finding in chart_findings(report).items()
    )


def chart_findings(report: RunReport) -> dict[str, str]:
    """Return the title of each chart that there is data for, by the chart's name."""
    found = {
        "memory": _memory_finding(report),
        "ranks": _ranks_finding(report),
        "loss": _loss_finding(report),
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


def _loss_finding(report: RunReport) -> str | None:
    loss = report.loss
    if not loss.train and not loss.held_out:
        return None
    if (sentence := held_out_sentence(report)) is not None:
        return f"Held-out loss {sentence}"
    points = loss.train or loss.held_out
    (_, first), (last_step, last) = points[0], points[-1]
    what = "Training" if loss.train else "Held-out"
    return f"{what} loss went from {first:.3f} to {last:.3f} in {last_step} steps"


def _draw_memory(report: RunReport, shape: _Shape, title: str) -> bytes:
    sizes = [phase.allocated_bytes for phase in report.prediction.phases]
    largest = max([*sizes, *(rank.measured_bytes for rank in report.ranks)], default=0)
    scale, unit = _unit(largest)
    names = report.phase_names
    colors = _component_colors(report)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for row, name in enumerate(names):
            _draw_predicted(axes, report, name, colors, row=row - 0.2, scale=scale)
            _draw_measured(axes, report, name, row=row + 0.2, scale=scale)
        axes.set_yticks(range(len(names)), [_label(name) for name in names])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(names) - 0.45, -0.55)
        axes.set_xlim(0, largest / scale * (1 + shape.label_room_fraction) or 1)
        axes.set_xlabel(f"Allocated memory ({unit})")
        _quiet(axes, "x")
        _legend(figure, axes, shape.legend_columns)

    return _render(draw, shape, 2.0 + shape.row_inches * len(names), title)


def _draw_predicted(
    axes: Any, report: RunReport, phase: str, colors: dict[str, str], *, row: float, scale: int
) -> None:
    predicted = report.prediction.phase(phase)
    if predicted is None:
        return
    left = 0.0
    for name, size in _main_components(predicted.components, colors):
        axes.barh(
            row, size / scale, 0.38, left=left, label=_label(name),
            color=colors[name], edgecolor="white", linewidth=0.4,
        )  # fmt: skip
        left += size / scale
    _end_label(axes, predicted.allocated_bytes / scale, row, "predicted", scale)


def _draw_measured(axes: Any, report: RunReport, phase: str, *, row: float, scale: int) -> None:
    rank = report.fullest_in(phase)
    measured = rank.phase(phase) if rank else None
    if measured is None or (size := measured.allocated_bytes.measured) is None:
        return
    axes.barh(row, size / scale, 0.38, color=_MEASURED_COLOR, label=_MEASURED_LABEL)
    error = measured.allocated_bytes.error_fraction
    suffix = "measured" if error is None else f"({format_percent(error)})"
    _end_label(axes, size / scale, row, suffix, scale)


def _component_colors(report: RunReport) -> dict[str, str]:
    """Give the components that are largest anywhere a colour each, the rest one grey.

    The order is the plan's own, so that what stays all the time stands at the foot of each bar.
    """
    largest: dict[str, int] = {}
    for phase in report.prediction.phases:
        for name, size in phase.components.items():
            largest[name] = max(size, largest.get(name, 0))
    main = sorted(largest, key=lambda name: -largest[name])[: len(_PALETTE)]
    names = [name for name in largest if name in main and largest[name] > 0]
    return {**dict(zip(names, _PALETTE, strict=False)), _OTHER: _OTHER_COLOR}


def _main_components(components: Any, colors: dict[str, str]) -> list[tuple[str, int]]:
    """Return components in the order of their colours, the uncoloured ones summed last."""
    known = [(name, components[name]) for name in colors if components.get(name, 0) > 0]
    rest = sum(size for name, size in components.items() if name not in colors and size > 0)
    return [*known, (_OTHER, rest)] if rest else known


def _draw_ranks(report: RunReport, shape: _Shape, title: str) -> bytes:
    ranks = [rank for rank in report.ranks if rank.measured_bytes]
    if len(ranks) > _MAX_RANK_BARS:
        return _draw_many_ranks(ranks, shape, title)
    predicted = report.prediction.peak_allocated_bytes
    furthest = [max(rank.measured_bytes, rank.reserved_bytes.measured or 0) for rank in ranks]
    top = max(*furthest, predicted or 0)
    scale, unit = _unit(top)
    is_on_gpu = not report.is_on_cpu

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        rows = range(len(ranks))
        if is_on_gpu:
            reserved = [(rank.reserved_bytes.measured or 0) / scale for rank in ranks]
            axes.barh(rows, reserved, 0.7, color="#BBDDEE", label="reserved by the allocator")
        sizes = [rank.measured_bytes / scale for rank in ranks]
        axes.barh(rows, sizes, 0.42, color=_PALETTE[0], label="allocated, measured")
        for row, rank in enumerate(ranks):
            shown = [rank.measured_bytes, rank.reserved_bytes.measured or 0]
            text = " / ".join(_number(size / scale, scale) for size in shown[: 1 + is_on_gpu])
            state = "" if rank.state in ("finished", "running") else f", {rank.state}"
            _beside(axes, furthest[row] / scale, row, text + state.replace("_", " "))
        if predicted:
            axes.axvline(
                predicted / scale, color=_HELD_OUT_COLOR, linestyle="--", linewidth=1.8,
                label="allocated, predicted for the fullest",
            )  # fmt: skip
        axes.set_yticks(rows, [f"rank {rank.rank}" for rank in ranks])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(ranks) - 0.4, -0.6)
        axes.set_xlim(0, top / scale * (1 + shape.label_room_fraction))
        axes.set_xlabel(f"Peak memory ({unit})" + (": allocated / reserved" if is_on_gpu else ""))
        _quiet(axes, "x")
        _legend(figure, axes, shape.legend_columns - 1)

    return _render(draw, shape, 1.9 + 0.36 * len(ranks), title)


def _draw_many_ranks(ranks: Sequence[RankReport], shape: _Shape, title: str) -> bytes:
    sizes = sorted((rank.measured_bytes for rank in ranks), reverse=True)
    predicted = ranks[0].allocated_bytes.predicted
    scale, unit = _unit(max(sizes[0], predicted or 0))

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        heights = [size / scale for size in sizes]
        axes.fill_between(
            range(1, len(sizes) + 1), heights, step="mid", color=_PALETTE[4], alpha=0.6,
            linewidth=0, label="allocated, measured",
        )  # fmt: skip
        if predicted:
            axes.axhline(
                predicted / scale, color=_HELD_OUT_COLOR, linestyle="--", linewidth=1.6,
                label="allocated, predicted for the fullest",
            )  # fmt: skip
        axes.set_xlim(1, len(sizes))
        axes.set_ylim(0, max(heights[0], (predicted or 0) / scale) * 1.1)
        axes.set_xlabel(f"{len(sizes)} ranks, fullest first")
        axes.set_ylabel(f"Peak memory ({unit})")
        _quiet(axes, "y")
        _legend(figure, axes, shape.legend_columns - 1)

    return _render(draw, shape, 4.2 if shape is _WIDE else 3.0, title)


def _draw_loss(report: RunReport, shape: _Shape, title: str) -> bytes:
    loss = report.loss

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        steps, values = [step for step, _ in loss.train], [value for _, value in loss.train]
        if len(values) >= _SMOOTH_FROM_POINTS:
            window = len(values) // 20
            axes.plot(steps, values, color=_TRAIN_COLOR, linewidth=0.8, alpha=0.35)
            axes.plot(
                steps, _running_mean(values, window), color=_TRAIN_COLOR, linewidth=2,
                label=f"training, mean of {2 * window + 1} logged steps",
            )  # fmt: skip
        elif values:
            axes.plot(
                steps, values, color=_TRAIN_COLOR, linewidth=1.8,
                marker="o", markersize=3, label="training",
            )  # fmt: skip
        held_out = _held_out_points(report)
        if held_out:
            axes.plot(
                *zip(*held_out, strict=True), color=_HELD_OUT_COLOR, linewidth=1.5,
                linestyle="--", marker="D", markersize=6, label="held-out text",
            )  # fmt: skip
            # Outside the curves, where nothing else is drawn.
            ends = ((held_out[0], -1), (held_out[-1], 1))
            for (step, value), side in ends[: len(held_out)]:
                axes.annotate(
                    f"{value:.3f}", (step, value), color=_HELD_OUT_COLOR, fontweight="bold",
                    xytext=(8 * side, 0), textcoords="offset points",
                    ha="left" if side > 0 else "right", va="center",
                )  # fmt: skip
        axes.margins(x=shape.loss_margin_fraction if held_out else 0.03, y=0.1)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("Optimizer step")
        axes.set_ylabel("Loss (nats per token)")
        _quiet(axes, "y")
        _legend(figure, axes, shape.legend_columns - 1)

    return _render(draw, shape, 4.6 if shape is _WIDE else 3.2, title)


def _held_out_points(report: RunReport) -> list[tuple[int, float]]:
    """Return the evaluations of the log, with those before the first and after the last step."""
    loss = report.loss
    points = dict(loss.held_out)
    if loss.held_out_before is not None:
        points.setdefault(0, loss.held_out_before)
    if loss.held_out_after is not None and loss.train:
        points.setdefault(max(loss.train[-1][0], *points, 1), loss.held_out_after)
    return sorted(points.items())


def _running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Return the mean of each value and up to ``reach`` neighbours on either side."""
    windows = (values[max(i - reach, 0) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _unit(largest_bytes: float) -> tuple[int, str]:
    return (GIB, "GiB") if largest_bytes >= GIB else (MIB, "MiB")


def _end_label(axes: Any, size: float, row: float, suffix: str, scale: int) -> None:
    """Write a bar's size beside its end."""
    _beside(axes, size, row, f"{_number(size, scale)} {suffix}")


def _beside(axes: Any, x: float, y: float, text: str) -> None:
    axes.annotate(
        text, (x, y), xytext=(4, 0), textcoords="offset points", va="center", ha="left",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
    )  # fmt: skip


def _number(size: float, scale: int) -> str:
    """Return a size in the chart's unit: hundredths of a GiB matter, those of a MiB do not."""
    return f"{size:.2f}" if scale == GIB or size < 10 else f"{size:.0f}"


def _quiet(axes: Any, grid_axis: str) -> None:
    """Leave only what helps reading values: light grid lines behind, no frame."""
    axes.spines[["top", "right", "left" if grid_axis == "x" else "bottom"]].set_visible(False)
    axes.grid(axis=grid_axis, color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)


def _legend(figure: Any, axes: Any, num_columns: int) -> None:
    """Name every label once, below the drawing; the sum of small parts and measured come last."""
    handles: dict[str, Any] = {}
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
        handles.setdefault(label, handle)
    for label in (_OTHER, _MEASURED_LABEL):
        if label in handles:
            handles[label] = handles.pop(label)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower left",
        ncols=num_columns, frameon=False, handlelength=1.2,
    )  # fmt: skip


def _label(text: str) -> str:
    """Return a label that the built-in font can draw and that fits beside a bar."""
    return text.replace("_", " ").encode("ascii", "replace").decode()[:28]


def _render(draw: Callable[[Any], None], shape: _Shape, height_inches: float, title: str) -> bytes:
    """Draw on a new figure, outside pyplot's global state, and return its PNG."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = {
        "font.family": "DejaVu Sans",
        "font.size": shape.font_points,
        "text.parse_math": False,
        "axes.edgecolor": "#888888",
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(shape.width_inches, height_inches), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(
            textwrap.fill(_ascii_title(title), shape.title_characters),
            x=0.01, ha="left", fontsize=shape.font_points * 1.2, fontweight="bold",
        )  # fmt: skip
        draw(figure)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=_PIXELS_PER_INCH, metadata={"Software": None})
    return png.getvalue()


def _ascii_title(title: str) -> str:
    return title.encode("ascii", "replace").decode()
