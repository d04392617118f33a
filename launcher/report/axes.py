"""What the report's charts with two axes share: frame, grid, labels and legend. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launcher.report.svg import (
    GRID,
    QUIET,
    Axis,
    Drawing,
    LegendItem,
    Shape,
    legend_height,
    text_width,
)

Show = Callable[[float], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """An empty chart with its axes, ready to be drawn into."""

    drawing: Drawing
    x: Axis
    y: Axis

    def at(self, points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        """Return the pixels of values."""
        return [(self.x.place(x), self.y.place(y)) for x, y in points]

    def level(self, value: float, color: str) -> None:
        """Draw a dashed line at one value of the y axis."""
        y = self.y.place(value)
        self.drawing.line((self.x.start, y, self.x.end, y), color=color, dashes=True)


def plot(  # noqa: PLR0913 - one parameter per thing that a chart has
    shape: Shape,
    *,
    title: str,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    x_label: str,
    y_label: str,
    legend: Sequence[LegendItem] = (),
    show_x: Show = "{:g}".format,
    show_y: Show = "{:g}".format,
    whole_x: bool = False,
) -> Plot:
    """Return a chart with a grid behind, both axes named, and the legend below.

    Args:
        shape: wide or narrow.
        title: said to those who cannot see it.
        x_range: first and last value.
        y_range: lowest and highest value.
        x_label: what is on the axis, with its unit.
        y_label: likewise.
        legend: what the colours mean.
        show_x: writes a value of the x axis.
        show_y: writes one of the y axis.
        whole_x: the x axis counts something.
    """
    font = shape.font
    top, bottom = font * 2.2, font * 2.2 + shape.plot_height
    y_axis = Axis(low=y_range[0], high=y_range[1], start=bottom, end=top)
    y_ticks = y_axis.ticks(most=6)
    left = max(text_width(show_y(value), font) for value in (*y_ticks, 0.0)) + font * 0.8
    x_axis = Axis(low=x_range[0], high=x_range[1], start=left, end=shape.width - font)
    height = bottom + font * 3.6 + legend_height(legend, shape)
    drawing = Drawing(shape, height, title=title)
    # Above the axis, where there is room for words; turned text is hard to read on a phone.
    drawing.text(0, font * 0.9, y_label, color=QUIET)
    for value in y_ticks:
        y = y_axis.place(value)
        drawing.line((left, y, x_axis.end, y))
        drawing.text(left - font * 0.5, y, show_y(value), anchor="end", color=QUIET)
    widest = max(text_width(show_x(value), font) for value in x_range)
    room = int((x_axis.end - left) / (widest + 2 * font))
    for value in x_axis.ticks(most=max(min(room, 8), 1), whole=whole_x):
        x = x_axis.place(value)
        drawing.line((x, bottom, x, bottom + font * 0.4), color=QUIET)
        drawing.text(x, bottom + font, show_x(value), anchor="middle", color=QUIET)
    drawing.line((left, bottom, x_axis.end, bottom), color=QUIET)
    middle = (left + x_axis.end) / 2
    drawing.text(middle, bottom + font * 2.4, x_label, anchor="middle", color=QUIET)
    drawing.legend(legend, top=bottom + font * 3.4)
    return Plot(drawing=drawing, x=x_axis, y=y_axis)


@dataclass(frozen=True, slots=True, kw_only=True)
class BarChart:
    """An empty chart of horizontal bars: rows named on the left, sizes to the right."""

    drawing: Drawing
    x: Axis
    top: float

    def bar(
        self, row: float, size: float, *, color: str, height: float, start: float = 0.0,
        note: str = "",
    ) -> None:  # fmt: skip
        """Draw a bar of ``size`` in a row; ``height`` is a share of the row."""
        thick = self.drawing.shape.row * height
        x = self.x.place(start)
        self.drawing.rect(
            x, self.middle(row) - thick / 2, width=self.x.place(start + size) - x, height=thick,
            color=color, note=note,
        )  # fmt: skip

    def middle(self, row: float) -> float:
        """Return the height of a row's middle."""
        return self.top + (row + 0.5) * self.drawing.shape.row

    def beside(self, row: float, size: float, text: str, *, bold: bool = False) -> None:
        """Write beside a bar's end."""
        x = self.x.place(size) + self.drawing.shape.font * 0.4
        self.drawing.text(x, self.middle(row), text, bold=bold, halo=True)


def bar_chart(
    shape: Shape,
    *,
    title: str,
    names: Sequence[tuple[float, str]],
    num_rows: float,
    largest: float,
    longest_label: str,
    x_label: str,
    legend: Sequence[LegendItem],
) -> BarChart:
    """Return a chart of horizontal bars without its bars.

    Args:
        shape: wide or narrow.
        title: said to those who cannot see it.
        names: row (its middle) and name.
        num_rows: rows in all.
        largest: size of the longest bar.
        longest_label: a text as long as the longest beside a bar.
        x_label: what is on the axis, with its unit.
        legend: what the colours mean.
    """
    font = shape.font
    left = max((text_width(name, font) for _, name in names), default=0) + font * 0.8
    bottom = num_rows * shape.row + font * 0.4
    room = text_width(longest_label, font) + font
    end = max(shape.width - room, left + shape.width * 0.25)
    axis = Axis(low=0, high=largest or 1, start=left, end=end)
    height = bottom + font * 3.6 + legend_height(legend, shape)
    drawing = Drawing(shape, height, title=title)
    widest = text_width(f"{largest:g}", font) + 2 * font
    for value in axis.ticks(most=max(min(int((end - left) / widest), 8), 2)):
        x = axis.place(value)
        drawing.line((x, 0, x, bottom), color=GRID)
        drawing.text(x, bottom + font, f"{value:g}", anchor="middle", color=QUIET)
    drawing.text(left, bottom + font * 2.4, x_label, color=QUIET)
    chart = BarChart(drawing=drawing, x=axis, top=0)
    for row, name in names:
        drawing.text(left - font * 0.5, chart.middle(row), name, anchor="end")
    drawing.legend(legend, top=bottom + font * 3.4)
    return chart
