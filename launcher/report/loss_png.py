"""The loss curve as PNG bytes, for report.md. Pure; matplotlib is imported when it is drawn."""

from __future__ import annotations

import io
import textwrap

from launcher.report.curves import held_out_points
from launcher.report.run_report import RunReport

_TRAIN_COLOR, _HELD_OUT_COLOR = "#0072B2", "#D55E00"


def draw_loss_png(report: RunReport, title: str) -> bytes:
    """Return the curve, 2240 pixels wide; outside pyplot's global state."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    held_out = held_out_points(report)
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 11.5}):
        figure = Figure(figsize=(11.2, 4.6))
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0.08, 0.13, 0.89, 0.72))
        if report.loss.train:
            axes.plot(
                *zip(*report.loss.train, strict=True), color=_TRAIN_COLOR, linewidth=1.8,
                marker="o", markersize=3 if len(report.loss.train) < 100 else 0, label="training",
            )  # fmt: skip
        if held_out:
            axes.plot(
                *zip(*held_out, strict=True), color=_HELD_OUT_COLOR, linewidth=1.5,
                linestyle="--", marker="D", markersize=6, label="held-out text",
            )  # fmt: skip
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("Optimizer step")
        axes.set_ylabel("Loss (nats per token)")
        axes.legend(frameon=False, loc="upper right", ncols=2)
        plain = title.encode("ascii", "replace").decode()
        figure.suptitle(textwrap.fill(plain, 100), x=0.01, ha="left", fontweight="bold")
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=200, metadata={"Software": None})
    return png.getvalue()
