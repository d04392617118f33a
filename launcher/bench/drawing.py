"""What a sweep's pictures have in common. Pure; matplotlib is imported when one is drawn."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from launcher.bench.result import Result

_PIXELS_PER_INCH = 160
_WIDEST_INCHES, _HIGHEST_INCHES = 40.0, 60.0
"""At most 6,400 x 9,600 pixels, however many cases there are."""


def where_of(result: Result) -> str:
    """Return where a case ran or was planned for: ``8 x V100-32GB``."""
    cluster = result.recipe.cluster
    gpu = result.content.get("device_name") or cluster.gpu or "this machine's device"
    # Results of zerofit 0.1.0's first runs do not say the number of ranks, but have all of them.
    known = len(result.content.get("measured") or []) or cluster.gpus_per_node
    ranks = (result.content.get("predicted") or {}).get("world_size", known)
    return f"{ranks} x {gpu}"


def label_of(result: Result) -> str:
    """Return what a case's settings are called: ``ZeRO-2 lora-gc``."""
    stage = result.content["predicted"]["strategy"]["zero_stage"]
    label = result.content.get("strategy_label")
    return f"ZeRO-{stage} {label}" if label else result.case


def render(draw: Callable[[Any], None], *, width: float, height: float, title: str) -> bytes:
    """Draw on a new figure, outside pyplot's global state, and return its PNG; in inches."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (min(max(width, 5.0), _WIDEST_INCHES), min(height, _HIGHEST_INCHES))
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        plain = title.encode("ascii", "replace").decode()
        figure.suptitle(plain, x=0.01, ha="left", fontsize=12, fontweight="bold")
        draw(figure)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=_PIXELS_PER_INCH, metadata={"Software": None})
    return png.getvalue()
