"""The report's curves: memory over time, loss and throughput. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from launcher.report.axes import Plot, plot
from launcher.report.run_report import RunReport
from launcher.report.svg import LegendItem, Shape, fewer_points
from launcher.timeline import MemorySample, Timeline
from launcher.units import GIB, MIB

_BLUE, _LIGHT_BLUE, _GREY, _RED, _GREEN = "#0072B2", "#56B4E9", "#777777", "#D55E00", "#009E73"
_RANK_COLORS = (_BLUE, _RED, _GREEN, "#CC79A7")
_SMOOTH_FROM_POINTS = 40
Column = Callable[[MemorySample], int | None]
Stretches = list[list[tuple[float, float]]]


def draw_timeline(report: RunReport, shape: Shape, title: str) -> str:
    """Draw device memory of the fullest rank over time."""
    timeline = report.timelines[0]
    columns: tuple[tuple[str, str, Column], ...] = (
        ("device in use", _GREY, lambda sample: sample.device_used_bytes),
        ("reserved", _LIGHT_BLUE, lambda sample: sample.reserved_bytes),
        ("allocated", _BLUE, lambda sample: sample.allocated_bytes),
    )
    curves = [
        (LegendItem(label=name, color=color, kind="line"), stretches)
        for name, color, column in columns
        if (stretches := _stretches(timeline, column))
    ]
    predicted = report.prediction.peak_allocated_bytes
    return _draw_memory_curves(curves, shape, title, predicted_bytes=predicted)


def draw_host(report: RunReport, shape: Shape, title: str) -> str:
    """Draw the resident memory of a few ranks over time."""
    curves = [
        (
            LegendItem(label=f"rank {timeline.rank}", color=color, kind="line"),
            _stretches(timeline, lambda sample: sample.host_rss_bytes),
        )
        for timeline, color in zip(report.timelines, _RANK_COLORS, strict=False)
    ]
    return _draw_memory_curves(curves, shape, title, predicted_bytes=None)


def _stretches(timeline: Timeline, column: Column) -> Stretches:
    """Return the samples that have a value, a list for each stretch without a gap.

    On a processor tensors are counted in the first steps alone; a line across the rest would
    show memory that nobody measured.
    """
    found: Stretches = [[]]
    for sample in timeline.samples:
        size = column(sample)
        if size is not None:
            found[-1].append((sample.seconds, float(size)))
        elif found[-1]:
            found.append([])
    return [stretch for stretch in found if stretch]


def _draw_memory_curves(
    curves: Sequence[tuple[LegendItem, Stretches]],
    shape: Shape,
    title: str,
    *,
    predicted_bytes: int | None,
) -> str:
    drawn = [point for _, stretches in curves for points in stretches for point in points]
    sizes = [size for _, size in drawn]
    top = max([*sizes, predicted_bytes or 0])
    scale, unit = (GIB, "GiB") if top >= GIB else (MIB, "MiB")
    last = max(seconds for seconds, _ in drawn)
    time_scale, time_unit = _time_unit(last)
    legend = [item for item, _ in curves]
    if predicted_bytes:
        label = "allocated, predicted peak"
        legend.append(LegendItem(label=label, color=_RED, kind="dashes"))
    chart = plot(
        shape,
        title=title,
        x_range=(0, last / time_scale or 1),
        y_range=(0, top / scale * 1.06 or 1),
        x_label=f"Time since the rank started ({time_unit})",
        y_label=f"Memory ({unit})",
        legend=legend,
    )
    for item, stretches in curves:
        for points in stretches:
            scaled = [(seconds / time_scale, size / scale) for seconds, size in points]
            chart.drawing.curve(chart.at(scaled), color=item.color, dots=len(scaled) == 1)
    if predicted_bytes:
        chart.level(predicted_bytes / scale, _RED)
    return chart.drawing.svg()


def _time_unit(seconds: float) -> tuple[float, str]:
    if seconds < 180:
        return 1, "seconds"
    return (60, "minutes") if seconds < 3 * 3600 else (3600, "hours")


def draw_loss(report: RunReport, shape: Shape, title: str) -> str:
    """Draw training and held-out loss by step."""
    held_out = held_out_points(report)
    legend = []
    if report.loss.train:
        legend.append(LegendItem(label=_train_label(len(report.loss.train)), color=_BLUE,
                                 kind="line"))  # fmt: skip
    if held_out:
        legend.append(LegendItem(label="held-out text", color=_RED, kind="line"))
    points = [*report.loss.train, *held_out]
    chart = _step_plot(points, shape, title, y_label="Loss (nats per token)", legend=legend)
    _draw_smoothed(chart, report.loss.train, _BLUE)
    if held_out:
        chart.drawing.curve(chart.at(held_out), color=_RED, dots=True)
        for index in {0, len(held_out) - 1}:
            (x, y), value = chart.at([held_out[index]])[0], held_out[index][1]
            is_first = index == 0 and len(held_out) > 1
            chart.drawing.text(
                x, y - shape.font * 0.9, f"{value:.3f}", color=_RED, bold=True,
                anchor="start" if is_first else "end", halo=True,
            )  # fmt: skip
    return chart.drawing.svg()


def draw_throughput(report: RunReport, shape: Shape, title: str) -> str:
    """Draw the tokens per second of all ranks by step, beside the prediction."""
    predicted = predicted_throughput(report)
    legend = [LegendItem(label="tokens/s, all ranks", color=_BLUE, kind="line")]
    if predicted:
        label = "predicted, for sequences of full length"
        legend.append(LegendItem(label=label, color=_RED, kind="dashes"))
    top = max([value for _, value in report.throughput] + [predicted or 0])
    chart = _step_plot(
        report.throughput, shape, title, y_label="Tokens per second", legend=legend,
        y_range=(0, top * 1.06 or 1),
    )  # fmt: skip
    _draw_smoothed(chart, report.throughput, _BLUE)
    if predicted:
        chart.level(predicted, _RED)
    return chart.drawing.svg()


def predicted_throughput(report: RunReport) -> float | None:
    """Return the predicted tokens per second of all ranks, on GPUs only.

    The rates of a processor are not known well enough to be drawn beside the measured ones.
    """
    each = report.prediction.tokens_per_second_per_gpu
    if not each or not report.world_size or report.is_on_cpu:
        return None
    return each * report.world_size


def held_out_points(report: RunReport) -> list[tuple[int, float]]:
    """Return the evaluations of the log, with those before the first and after the last step."""
    loss = report.loss
    points = dict(loss.held_out)
    if loss.held_out_before is not None:
        points.setdefault(0, loss.held_out_before)
    if loss.held_out_after is not None and loss.train:
        points.setdefault(max(loss.train[-1][0], *points, 1), loss.held_out_after)
    return sorted(points.items())


def running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Return the mean of each value and up to ``reach`` neighbours on either side."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    ends = [(max(i - reach, 0), min(i + reach + 1, len(values))) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in ends]


def _train_label(num_points: int) -> str:
    if num_points < _SMOOTH_FROM_POINTS:
        return "training"
    return f"training, mean of {2 * (num_points // 20) + 1} logged steps"


def _draw_smoothed(chart: Plot, points: Sequence[tuple[int, float]], color: str) -> None:
    if len(points) < _SMOOTH_FROM_POINTS:
        if points:
            chart.drawing.curve(chart.at(points), color=color, dots=len(points) == 1)
        return
    steps, values = [step for step, _ in points], [value for _, value in points]
    few = [(float(step), value) for step, value in points]
    chart.drawing.curve(chart.at(fewer_points(few)), color=color, width=1, opacity=0.4)
    smooth = list(zip(map(float, steps), running_mean(values, len(values) // 20), strict=True))
    chart.drawing.curve(chart.at(fewer_points(smooth)), color=color, width=2.5)


def _step_plot(
    points: Sequence[tuple[int, float]],
    shape: Shape,
    title: str,
    *,
    y_label: str,
    legend: Sequence[LegendItem],
    y_range: tuple[float, float] | None = None,
) -> Plot:
    steps, values = [step for step, _ in points], [value for _, value in points]
    if y_range is None:
        low, high = min(values), max(values)
        margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
        # Room above for the numbers beside the held-out points.
        y_range = low - margin, high + 1.5 * margin
    return plot(
        shape,
        title=title,
        x_range=(min(steps), max(*steps, min(steps) + 1)),
        y_range=y_range,
        x_label="Optimizer step",
        y_label=y_label,
        legend=legend,
        show_x="{:,.0f}".format,
        show_y="{:,.5g}".format,
        whole_x=True,
    )
