"""The loss curve as PNG bytes, for report.md. Pure.

Pillow, because importing matplotlib takes longer than reading the files of thousands of ranks.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from launcher.report.curves import held_out_points
from launcher.report.run_report import RunReport
from launcher.report.svg import GRID, INK, QUIET, Axis, fewer_points

_TRAIN_COLOR, _HELD_OUT_COLOR = "#0072B2", "#D55E00"
_WIDTH, _HEIGHT = 1120, 460
_FONT = 15
_PIXELS = 2
"""Of the picture, for each one of a plain screen."""
_OVER = 2
"""Drawn larger and made smaller again: Pillow draws lines without smooth edges."""


def draw_loss_png(report: RunReport, title: str) -> bytes:
    """Return the training and held-out loss by step as a picture, 2240 pixels wide."""
    from PIL import Image

    image = Image.new("RGB", (_WIDTH * _PIXELS * _OVER, _HEIGHT * _PIXELS * _OVER), "white")
    _draw(image, report, title)
    small = image.resize((_WIDTH * _PIXELS, _HEIGHT * _PIXELS), Image.Resampling.BOX)
    png = io.BytesIO()
    # Few colours and areas of one: slow compression gains nothing.
    small.save(png, format="png", compress_level=3)
    return png.getvalue()


def _draw(image: Any, report: RunReport, title: str) -> None:
    from PIL import ImageDraw, ImageFont

    scale = _PIXELS * _OVER
    pen = ImageDraw.Draw(image)
    font, large = (ImageFont.load_default(size=size * scale) for size in (_FONT, _FONT * 1.2))

    def write(x: float, y: float, text: str, anchor: str, color: str = QUIET) -> None:
        pen.text((x * scale, y * scale), _plain(text), fill=color, font=font, anchor=anchor)

    def line(points: Sequence[tuple[float, float]], color: str, width: float) -> None:
        places = [(x * scale, y * scale) for x, y in points]
        pen.line(places, fill=color, width=round(width * scale), joint="curve")

    train = fewer_points([(float(step), loss) for step, loss in report.loss.train])
    held_out = [(float(step), loss) for step, loss in held_out_points(report)]
    x, y = _axes([*train, *held_out])
    pen.text((12 * scale, 22 * scale), _plain(title), fill=INK, font=large, anchor="lm")
    write(12, 52, "Loss (nats per token)", "lm")
    for value in y.ticks(most=6):
        line([(x.start, y.place(value)), (x.end, y.place(value))], GRID, 1)
        write(x.start - 8, y.place(value), f"{value:,.5g}", "rm")
    for value in x.ticks(most=8, whole=True):
        write(x.place(value), y.start + 16, f"{value:,.0f}", "mm")
    line([(x.start, y.start), (x.end, y.start)], QUIET, 1)
    write((x.start + x.end) / 2, y.start + 40, "Optimizer step", "mm")
    for points, color, label, left in (
        (train, _TRAIN_COLOR, "training", 400),
        (held_out, _HELD_OUT_COLOR, "held-out text", 520),
    ):
        if not points:
            continue
        places = [(x.place(step), y.place(loss)) for step, loss in points]
        line(places, color, 2)
        for px, py in places if len(places) < 60 else ():
            box = [(px - 3) * scale, (py - 3) * scale, (px + 3) * scale, (py + 3) * scale]
            pen.ellipse(box, fill=color)
        line([(left, 52), (left + 24, 52)], color, 3)
        write(left + 32, 52, label, "lm")


def _axes(points: Sequence[tuple[float, float]]) -> tuple[Axis, Axis]:
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    low, high = min(losses), max(losses)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    first, last = min(steps), max(*steps, min(steps) + 1)
    x = Axis(low=first, high=last, start=90, end=_WIDTH - 24)
    y = Axis(low=low - margin, high=high + margin, start=_HEIGHT - 64, end=76)
    return x, y


def _plain(text: str) -> str:
    """Return a text that the built-in font can draw."""
    return text.encode("ascii", "replace").decode()
