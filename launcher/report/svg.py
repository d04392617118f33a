"""Drawings as SVG text: bars, curves, axes and a legend. Pure.

matplotlib draws a report's twelve pictures in 2.5 s of the processor's time, which is more than
everything else of a report of 8,192 ranks; these need milliseconds and stay sharp on a projector.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

INK, QUIET, GRID = "#1b1f24", "#57606a", "#dde2e7"
MAX_POINTS = 600
"""Of one curve; a screen shows no more."""

Anchor = Literal["start", "middle", "end"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Size of a drawing in CSS pixels."""

    width: float
    font: float
    """Height of the letters."""
    row: float
    """Height of a horizontal bar with its gap."""
    plot_height: float
    """Height of the area inside the axes of a curve."""


WIDE = Shape(width=1120, font=15, row=28, plot_height=330)
NARROW = Shape(width=366, font=12.5, row=24, plot_height=210)


@dataclass(frozen=True, slots=True, kw_only=True)
class LegendItem:
    """What a colour or a line stands for."""

    label: str
    color: str
    kind: Literal["area", "line", "dashes"] = "area"


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Values from ``low`` to ``high`` on pixels from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        """Return the pixel of a value."""
        span = self.high - self.low
        share = (value - self.low) / span if span else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self, *, most: int, whole: bool = False) -> list[float]:
        """Return round values inside, at most about ``most`` of them."""
        step = _round_step((self.high - self.low) / max(most, 1))
        if whole:
            step = max(step, 1.0)
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor(self.high / step + 1e-9) - first + 1
        return [(first + index) * step for index in range(max(count, 0))]


class Drawing:
    """Collects shapes; :meth:`svg` returns them as one element."""

    def __init__(self, shape: Shape, height: float, *, title: str) -> None:
        self.shape = shape
        self.height = height
        self._title = title
        self._parts: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        anchor: Anchor = "start",
        color: str = INK,
        bold: bool = False,
        halo: bool = False,
    ) -> None:
        """Write a line of text whose middle is at the height ``y``; a halo covers lines below."""
        weight = ' font-weight="600"' if bold else ""
        rim = ' stroke="#fff" stroke-width="4" paint-order="stroke"' if halo else ""
        self._parts.append(
            f'<text x="{_n(x)}" y="{_n(y)}" dy=".35em" text-anchor="{anchor}" fill="{color}"'
            f"{weight}{rim}>{escape(text)}</text>"
        )

    def rect(
        self, x: float, y: float, *, width: float, height: float, color: str, note: str = ""
    ) -> None:
        """Fill a rectangle; ``note`` is shown when a pointer rests on it."""
        inside = f"<title>{escape(note)}</title>" if note else ""
        self._parts.append(
            f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(max(width, 0))}" height="{_n(height)}" '
            f'fill="{color}">{inside}</rect>'
        )

    def line(
        self, ends: tuple[float, float, float, float], *, color: str = GRID, dashes: bool = False
    ) -> None:
        """Draw a straight line between ``x1, y1, x2, y2``."""
        x1, y1, x2, y2 = map(_n, ends)
        more = ' stroke-width="2" stroke-dasharray="7 5"' if dashes else ""
        self._parts.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{color}"{more}/>'
        )

    def curve(
        self,
        points: Iterable[tuple[float, float]],
        *,
        color: str,
        width: float = 2.0,
        opacity: float = 1.0,
        dots: bool = False,
    ) -> None:
        """Draw lines through points; ``dots`` marks each of them."""
        places = [(_n(x), _n(y)) for x, y in points]
        path = " ".join(f"{x},{y}" for x, y in places)
        self._parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width:g}" '
            f'stroke-linejoin="round" opacity="{opacity:g}"/>'
        )
        if dots:
            self._parts += [
                f'<circle cx="{x}" cy="{y}" r="3.5" fill="{color}"/>' for x, y in places
            ]

    def area(self, points: Sequence[tuple[float, float]], *, foot: float, color: str) -> None:
        """Fill what is between points and a horizontal line."""
        if not points:
            return
        places = [(points[0][0], foot), *points, (points[-1][0], foot)]
        path = " ".join(f"{_n(x)},{_n(y)}" for x, y in places)
        self._parts.append(f'<polygon points="{path}" fill="{color}" fill-opacity="0.55"/>')

    def legend(self, items: Sequence[LegendItem], *, top: float) -> None:
        """Name the colours in rows that begin at the height ``top``."""
        font, x, y = self.shape.font, 0.0, top + self.shape.font * 0.8
        for item, (x, row) in zip(items, _legend_places(items, self.shape), strict=True):
            middle = y + row * font * 1.6
            self._mark(item, x, middle)
            self.text(x + font * 1.7, middle, item.label, color=QUIET)

    def _mark(self, item: LegendItem, x: float, y: float) -> None:
        font = self.shape.font
        if item.kind == "area":
            self.rect(x, y - font * 0.4, width=font * 1.3, height=font * 0.8, color=item.color)
        elif item.kind == "dashes":
            self.line((x, y, x + font * 1.4, y), color=item.color, dashes=True)
        else:
            self.curve([(x, y), (x + font * 1.4, y)], color=item.color, width=2.5)

    def svg(self) -> str:
        """Return the element; its name for those who cannot see it is the title."""
        width, height = _n(self.shape.width), _n(self.height)
        return (
            f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(self._title)}" '
            f'font-size="{self.shape.font:g}">{"".join(self._parts)}</svg>'
        )


def legend_height(items: Sequence[LegendItem], shape: Shape) -> float:
    """Return the height that a legend needs."""
    rows = 1 + max((row for _, row in _legend_places(items, shape)), default=-1)
    return rows * shape.font * 1.6


def _legend_places(items: Sequence[LegendItem], shape: Shape) -> list[tuple[float, int]]:
    """Return where each item stands: pixels from the left, and the row."""
    places, x, row = [], 0.0, 0
    for item in items:
        width = shape.font * 3.2 + text_width(item.label, shape.font)
        if x and x + width - shape.font > shape.width:
            x, row = 0.0, row + 1
        places.append((x, row))
        x += width
    return places


def text_width(text: str, font: float) -> float:
    """Return about how wide a text is; the widths are those of DejaVu Sans, a wide font."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    narrow = sum(letter in " .,:;|!'()[]/ijlftrI-" for letter in text)
    return font * (wide + 0.38 * narrow + 0.64 * (len(text) - wide - narrow))


def fewer_points(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most ``MAX_POINTS``: means of neighbours, the first and last as they are."""
    size = -(-len(points) // MAX_POINTS)
    if size <= 1:
        return list(points)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    means = [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]
    return [points[0], *means[1:-1], points[-1]]


def _round_step(step: float) -> float:
    """Return the next larger of 1, 2 and 5 times a power of ten."""
    if not step > 0:
        return 1.0
    power = 10 ** math.floor(math.log10(step))
    return float(next(factor for factor in (1, 2, 5, 10, 20) if factor * power >= step) * power)


def _n(value: float) -> str:
    """Return a pixel position, short."""
    return f"{value:.1f}".removesuffix(".0")
