"""Memory and step time of a sweep's cases as bars, predicted beside measured. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launcher.bench.drawing import render, where_of
from launcher.bench.result import Result

# Okabe and Ito, "Color Universal Design" (2008): told apart with every kind of colour blindness.
_PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_PREDICTED_ALPHA = 0.4
_QUANTITIES = (
    ("peak_allocated_bytes", 1e9, "peak allocated, GB per GPU"),
    ("step_seconds", 1.0, "seconds per optimizer step"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One case in a chart."""

    group: str
    series: str
    result: Result


@dataclass(frozen=True, slots=True, kw_only=True)
class BarChart:
    """Cases that belong side by side."""

    title: str
    bars: tuple[Bar, ...]

    @property
    def groups(self) -> tuple[str, ...]:
        """In the order of the cases."""
        return tuple(dict.fromkeys(bar.group for bar in self.bars))

    @property
    def series(self) -> tuple[str, ...]:
        """In the order of the cases; empty names mean that there is only one."""
        return tuple(dict.fromkeys(bar.series for bar in self.bars))


def make_bar_charts(results: Sequence[Result]) -> tuple[BarChart, ...]:
    """Return a chart for each model and place of a matrix, and one for cases written out.

    One length: groups are strategies and bars are ZeRO stages (arXiv:2406.02290, figure 2).
    Several: groups are lengths and bars are strategies (its figure 3).
    """
    matrices: dict[tuple[str, str], list[Result]] = {}
    listed: dict[str, list[Result]] = {}
    for result in results:
        if not result.content.get("predicted"):
            continue
        where = where_of(result)
        if result.content.get("strategy_label") is None:
            listed.setdefault(where, []).append(result)
        else:
            model = result.recipe.model.name_or_path.rstrip("/").rpartition("/")[2]
            matrices.setdefault((model, where), []).append(result)
    charts = [
        BarChart(title=f"{model} on {where}", bars=_bars(found))
        for (model, where), found in matrices.items()
    ]
    for where, found in listed.items():
        bars = tuple(Bar(group=result.case, series="", result=result) for result in found)
        charts.append(BarChart(title=f"{len(found)} cases on {where}", bars=bars))
    return tuple(charts)


def _bars(results: Sequence[Result]) -> tuple[Bar, ...]:
    has_lengths = len({result.recipe.max_seq_len for result in results}) > 1
    bars = []
    for result in results:
        stage = f"ZeRO-{result.content['predicted']['strategy']['zero_stage']}"
        label = str(result.content["strategy_label"])
        group, series = label, stage
        if has_lengths:
            group, series = f"{result.recipe.max_seq_len:,} tokens", f"{stage} {label}"
        bars.append(Bar(group=group, series=series, result=result))
    return tuple(bars)


def draw_bar_chart(chart: BarChart) -> bytes:
    """Return a PNG: memory left, time right; light bars are predicted, full ones measured."""
    num_rows = len(chart.groups) * (len(chart.series) + 0.5)

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (quantity, scale, label) in zip(panels, _QUANTITIES, strict=True):
            _draw_panel(axes, chart, quantity, scale)
            axes.set_xlabel(label)
        rows = [position * (len(chart.series) + 0.5) for position in range(len(chart.groups))]
        middle = (len(chart.series) - 1) / 2
        panels[0].set_yticks([row + middle for row in rows], chart.groups)
        panels[0].set_ylim(num_rows - 0.5, -0.75)
        _legend(figure, chart)

    return render(draw, width=11.0, height=1.7 + 0.3 * num_rows, title=chart.title)


def _draw_panel(axes: Any, chart: BarChart, quantity: str, scale: float) -> None:
    for bar in chart.bars:
        row = chart.groups.index(bar.group) * (len(chart.series) + 0.5)
        row += chart.series.index(bar.series)
        color = _PALETTE[chart.series.index(bar.series) % len(_PALETTE)]
        predicted, measured = bar.result.predicted(quantity), bar.result.measured(quantity)
        if predicted:
            axes.barh(row - 0.2, predicted / scale, 0.38, color=color, alpha=_PREDICTED_ALPHA)
        if measured:
            axes.barh(row + 0.2, measured / scale, 0.38, color=color)
        note = _note(bar.result, quantity, scale)
        furthest = max(predicted or 0.0, measured or 0.0) / scale
        axes.annotate(
            note, (furthest, row), xytext=(4, 0), textcoords="offset points", va="center",
            fontsize=7.5,
        )  # fmt: skip
    axes.margins(x=0.25)
    axes.set_xlim(left=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)


def _note(result: Result, quantity: str, scale: float) -> str:
    measured, error = result.measured(quantity), result.error_fraction(quantity)
    if measured is not None and error is not None:
        return f"{measured / scale:.3g} ({error:+.0%})"
    predicted = result.predicted(quantity)
    value = f"{predicted / scale:.3g} predicted" if predicted else ""
    if "measured" not in result.content:
        return value if result.content["predicted"]["fits"] else f"{value}: does not fit"
    return f"{value}; {result.state.replace('_', ' ')}"


def _legend(figure: Any, chart: BarChart) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(color=_PALETTE[position % len(_PALETTE)], label=name)
        for position, name in enumerate(chart.series)
        if name
    ]
    handles += [
        Patch(color="#555555", alpha=_PREDICTED_ALPHA, label="predicted before the run"),
        Patch(color="#555555", label="measured, fullest rank (error of the prediction)"),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=4, frameon=False)
