"""A curve drawn with characters, for terminals and Markdown."""

from __future__ import annotations

from collections.abc import Sequence

# Braille cells are 2 dots wide and 4 high; Unicode block U+2800, bit of each dot by (row, column).
_BRAILLE_START = 0x2800
_DOT_BITS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def draw_curve(points: Sequence[tuple[int, float]], *, width: int = 60, height: int = 8) -> str:
    """Return lines of text that draw finite values by step, axes labelled.

    Args:
        points: (step, value), sorted by step; at least one.
        width: characters of the drawing, axis labels not counted.
        height: lines of the drawing.
    """
    steps = [step for step, _ in points]
    values = [value for _, value in points]
    low, high = min(values), max(values)
    columns, rows = 2 * width, 4 * height
    bits = [[0] * width for _ in range(height)]
    previous: tuple[int, int] | None = None
    for step, value in points:
        x = _place(step, steps[0], steps[-1], columns)
        y = rows - 1 - _place(value, low, high, rows)
        for dot_x, dot_y in _between(previous or (x, y), (x, y)):
            bits[dot_y // 4][dot_x // 2] |= _DOT_BITS[dot_y % 4][dot_x % 2]
        previous = (x, y)
    labels = [""] * height
    labels[-1], labels[0] = f"{low:.3g}", f"{high:.3g}"
    margin = max(map(len, labels))
    lines = [
        f"{label:>{margin}} ┤{''.join(chr(_BRAILLE_START + cell) for cell in row)}".rstrip("⠀")
        for label, row in zip(labels, bits, strict=True)
    ]
    last = str(steps[-1])
    axis = f"{steps[0]}{'step':^{max(width - len(str(steps[0])) - len(last), 4)}}{last}"
    return "\n".join([*lines, f"{'':>{margin}} └{'─' * width}", f"{'':>{margin}}  {axis}"])


def _place(value: float, low: float, high: float, count: int) -> int:
    """Return the nearest of ``count`` places for a value between two ends."""
    if high == low:
        return (count - 1) // 2
    return round((value - low) / (high - low) * (count - 1))


def _between(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the dots of a straight line, both ends included."""
    (x0, y0), (x1, y1) = start, end
    length = max(abs(x1 - x0), abs(y1 - y0))
    if length == 0:
        return [start]
    return [
        (round(x0 + (x1 - x0) * i / length), round(y0 + (y1 - y0) * i / length))
        for i in range(length + 1)
    ]
