"""Several runs beside each other: what differs in them, and what each needed. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.report.axes import bar_chart, plot
from launcher.report.curves import running_mean
from launcher.report.run_report import Chart, Comparison, RunReport
from launcher.report.svg import NARROW, WIDE, LegendItem, Shape, fewer_points
from launcher.report.table import Table
from launcher.report.text import NOTHING, format_percent, format_rate, printable
from launcher.units import GIB, MIB, format_bytes, format_seconds

SCHEMA_VERSION = 1
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
_PREDICTED_COLOR, _MEASURED_COLOR = "#BBBBBB", "#0072B2"
_MAX_NAME_CHARACTERS = 26
_SAME_FRACTION = 0.01
"""Peaks that are this close are called the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunsCompared:
    """Runs side by side; each table has a column a run."""

    names: tuple[str, ...]
    differences: Table
    results: Table
    charts: tuple[Chart, ...]
    json_value: Mapping[str, Any]


def compare_runs(reports: Sequence[RunReport]) -> RunsCompared:
    """Put runs beside each other.

    Args:
        reports: of two or more runs, in any state and of any kind.

    Returns:
        Tables and charts in the order of ``reports``; runs of one name are numbered.
    """
    names = _unlike([report.name for report in reports])
    differences = _differences(reports)
    return RunsCompared(
        names=names,
        differences=Table(
            title="What differs",
            header=("", *(_short(name) for name in names)),
            rows=tuple((key, *(_short(value) for value in row)) for key, row in differences),
            note="" if differences else "Nothing in recipe or plan differs.",
        ),
        results=_results_table(reports, names),
        charts=_charts(reports, names),
        json_value={
            "schema_version": SCHEMA_VERSION,
            "runs": [
                {"name": name, **_figures(report)}
                for name, report in zip(names, reports, strict=True)
            ],
            "differences": {key: dict(zip(names, row, strict=True)) for key, row in differences},
        },
    )


def _unlike(names: Sequence[str]) -> tuple[str, ...]:
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return tuple(found)


def _differences(reports: Sequence[RunReport]) -> list[tuple[str, tuple[str, ...]]]:
    """Return the recipe's keys and the plan's choices that are not the same everywhere."""
    columns = [_settings(report) for report in reports]
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = [(key, tuple(column.get(key, NOTHING) for column in columns)) for key in keys]
    return [(key, row) for key, row in rows if len(set(row)) > 1]


def _settings(report: RunReport) -> dict[str, str]:
    prediction = report.prediction
    planned = {
        "model": prediction.model_name,
        "method": prediction.method,
        "precision": prediction.precision,
        "max_seq_len": prediction.max_seq_len,
        "GPU": prediction.gpu_name,
        "ranks": report.world_size,
    }
    known = {key: str(value) for key, value in planned.items() if value is not None}
    known |= {f"plan: {key}": value for key, value in prediction.strategy.items()}
    same = ("model.name_or_path", "method", "max_seq_len")
    recipe = {key: str(value) for key, value in report.recipe.items() if key not in same}
    return known | {f"recipe: {key}": value for key, value in recipe.items()}


def _figures(report: RunReport) -> dict[str, Any]:
    fullest = report.rank(report.balance.fullest_rank) if report.balance else None
    predicted = report.prediction
    allocated = (
        fullest.allocated_bytes
        if fullest
        else Comparison(predicted=predicted.peak_allocated_bytes, measured=None)
    )
    device = (
        fullest.device_used_bytes
        if fullest
        else Comparison(predicted=predicted.device_used_bytes, measured=None)
    )
    fullest_node = max(report.nodes, key=lambda node: node.host_bytes.measured or 0, default=None)
    host = (
        fullest_node.host_bytes
        if fullest_node
        else Comparison(predicted=predicted.host_bytes_per_node, measured=None)
    )
    time, loss = report.time, report.loss
    return {
        "state": report.state,
        "num_steps": time.num_steps,
        "num_ranks": len(report.ranks),
        "peak_allocated_bytes": _both(allocated),
        "device_used_bytes": _both(device),
        "host_bytes_per_node": _both(host),
        "step_seconds": _both(time.step_seconds),
        "tokens_per_second": time.tokens_per_second,
        "tokens_per_second_per_gpu": _both(time.tokens_per_second_per_gpu),
        "train_loss_last": loss.train[-1][1] if loss.train else None,
        "held_out_before": loss.held_out_before,
        "held_out_after": loss.held_out_after,
        "bound_by": predicted.bound_by,
        "num_attempts": 1 + len(report.attempts),
    }


def _both(comparison: Comparison) -> dict[str, float | None]:
    return {
        "predicted": comparison.predicted,
        "measured": comparison.measured,
        "error_fraction": comparison.error_fraction,
    }


def _results_table(reports: Sequence[RunReport], names: Sequence[str]) -> Table:
    figures = [_figures(report) for report in reports]
    rows = [
        _row("state", figures, lambda run: str(run["state"]).replace("_", " ")),
        _row("optimizer steps", figures, lambda run: str(run["num_steps"])),
        _row("ranks that reported", figures, lambda run: str(run["num_ranks"])),
    ]
    for label, key, show in (
        ("peak allocated", "peak_allocated_bytes", format_bytes),
        ("device in use", "device_used_bytes", format_bytes),
        ("host memory of a node", "host_bytes_per_node", format_bytes),
        ("step", "step_seconds", format_seconds),
        ("tokens/s of a rank", "tokens_per_second_per_gpu", format_rate),
    ):
        shown = (("predicted", show), ("measured", show), ("error_fraction", format_percent))
        rows += [
            _row(f"{label}, {part.partition('_')[0]}", figures, _shower(key, part, show_part))
            for part, show_part in shown
        ]
    rows += [
        _row("tokens/s, all ranks", figures, _plain("tokens_per_second", format_rate)),
        _row("training loss, last", figures, _plain("train_loss_last", "{:.4f}".format)),
        _row("held-out loss, before", figures, _plain("held_out_before", "{:.4f}".format)),
        _row("held-out loss, after", figures, _plain("held_out_after", "{:.4f}".format)),
        _row("bound by, predicted", figures, _plain("bound_by", _first_words)),
        _row("attempts", figures, lambda run: str(run["num_attempts"])),
    ]
    return Table(
        title="What was measured",
        header=("", *(_short(name) for name in names)),
        rows=tuple(row for row in rows if any(cell != NOTHING for cell in row[1:])),
        note="Error = (predicted - measured) / measured. Tokens include padding.",
    )


_Show = Callable[[Mapping[str, Any]], str]


def _row(label: str, figures: Sequence[Mapping[str, Any]], show: _Show) -> tuple[str, ...]:
    return (label, *(_short(show(run), 60) for run in figures))


def _plain(key: str, show: Callable[[Any], str]) -> _Show:
    return lambda run: NOTHING if run[key] is None else show(run[key])


def _shower(key: str, part: str, show: Callable[[Any], str]) -> _Show:
    return lambda run: NOTHING if run[key][part] is None else show(run[key][part])


def _first_words(text: str) -> str:
    """Return what bounds a step without the advice behind it, which no narrow column holds."""
    return text.partition(":")[0]


def _short(text: str, most: int = _MAX_NAME_CHARACTERS) -> str:
    plain = printable(text)
    return plain if len(plain) <= most else f"{plain[: most - 1]}…"


def _charts(reports: Sequence[RunReport], names: Sequence[str]) -> tuple[Chart, ...]:
    figures = [_figures(report) for report in reports]
    charts = []
    for name, draw in (("memory", _draw_memory), ("throughput", _draw_throughput)):
        drawn = draw(figures, names)
        charts += [] if drawn is None else [_chart(name, *drawn)]
    if any(report.loss.train for report in reports):
        charts.append(
            _chart("loss", "Training loss", lambda shape: _draw_losses(reports, names, shape))
        )
    return tuple(charts)


_Draw = Callable[[Shape], str]


def _chart(name: str, finding: str, draw: _Draw) -> Chart:
    return Chart(name=name, finding=finding, wide_svg=draw(WIDE), narrow_svg=draw(NARROW))


def _draw_memory(
    figures: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> tuple[str, _Draw] | None:
    pairs = [run["peak_allocated_bytes"] for run in figures]
    largest = max((value or 0 for pair in pairs for value in _values(pair)), default=0)
    measured = [(pair["measured"], name) for pair, name in zip(pairs, names, strict=True)]
    least = min(((size, name) for size, name in measured if size), default=None)
    if not largest:
        return None
    scale, unit = (GIB, "GiB") if largest >= GIB else (MIB, "MiB")
    title = "Peak memory of the fullest rank"
    sizes = [size for size, _ in measured if size]
    if least is not None and len(sizes) > 1:
        is_same = max(sizes) < (1 + _SAME_FRACTION) * least[0]
        title += (
            f": about {format_bytes(least[0])} in each"
            if is_same
            else (f": {least[1]} needs least, {format_bytes(least[0])}")
        )
    legend = [
        LegendItem(label="predicted", color=_PREDICTED_COLOR),
        LegendItem(label="measured", color=_MEASURED_COLOR),
    ]

    def draw(shape: Shape) -> str:
        chart = bar_chart(
            shape, title=title, names=_name_rows(names), num_rows=2.5 * len(names),
            largest=largest / scale, longest_label="0000.00", legend=legend,
            x_label=f"Allocated memory ({unit})",
        )  # fmt: skip
        for index, pair in enumerate(pairs):
            for line, (size, color) in enumerate(
                zip(_values(pair), (_PREDICTED_COLOR, _MEASURED_COLOR), strict=True)
            ):
                if size:
                    row = 2.5 * index + line
                    chart.bar(row, size / scale, color=color, height=0.84)
                    chart.beside(row, size / scale, f"{size / scale:.2f}")
        return chart.drawing.svg()

    return title, draw


def _values(pair: Mapping[str, Any]) -> tuple[float | None, float | None]:
    return pair["predicted"], pair["measured"]


def _name_rows(names: Sequence[str]) -> list[tuple[float, str]]:
    return [(2.5 * index + 0.5, _short(name, 18)) for index, name in enumerate(names)]


def _draw_throughput(
    figures: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> tuple[str, _Draw] | None:
    rates = [run["tokens_per_second"] or 0.0 for run in figures]
    largest = max(rates)
    if not largest:
        return None
    fastest = names[rates.index(largest)]
    title = f"Tokens per second of all ranks: {fastest} is the fastest, {format_rate(largest)}"

    def draw(shape: Shape) -> str:
        chart = bar_chart(
            shape, title=title, names=[(i, _short(name, 18)) for i, name in enumerate(names)],
            num_rows=len(names), largest=largest, longest_label="000,000,000", legend=[],
            x_label="Tokens per second",
        )  # fmt: skip
        for row, rate in enumerate(rates):
            if rate:
                chart.bar(row, rate, color=_MEASURED_COLOR, height=0.7)
                chart.beside(row, rate, f"{rate:,.0f}")
        return chart.drawing.svg()

    return title, draw


def _draw_losses(reports: Sequence[RunReport], names: Sequence[str], shape: Shape) -> str:
    curves = [
        (name, report.loss.train)
        for name, report in zip(names, reports, strict=True)
        if report.loss.train
    ]
    values = [value for _, points in curves for _, value in points]
    steps = [step for _, points in curves for step, _ in points]
    margin = 0.06 * (max(values) - min(values)) or 0.05 * abs(max(values)) or 1.0
    legend = [
        LegendItem(label=_short(name), color=_COLORS[index % len(_COLORS)], kind="line")
        for index, (name, _) in enumerate(curves)
    ]
    chart = plot(
        shape, title="Training loss", x_range=(min(steps), max(*steps, min(steps) + 1)),
        y_range=(min(values) - margin, max(values) + margin), x_label="Optimizer step",
        y_label="Loss (nats per token)", legend=legend, show_x="{:,.0f}".format,
        show_y="{:,.5g}".format, whole_x=True,
    )  # fmt: skip
    for item, (_, points) in zip(legend, curves, strict=True):
        means = running_mean([value for _, value in points], len(points) // 40)
        smooth = [(float(step), mean) for (step, _), mean in zip(points, means, strict=True)]
        chart.drawing.curve(chart.at(fewer_points(smooth)), color=item.color, dots=len(smooth) == 1)
    return chart.drawing.svg()
