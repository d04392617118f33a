"""The matrix for people: a table in the terminal, and a heat map as PNG."""

from __future__ import annotations

import io
import textwrap
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from launcher.planning.matrix import Matrix, MatrixCell
from launcher.planning.wording import METHOD_NAME
from launcher.strategy import Checkpointing, Offload, Optimizer
from launcher.units import GIB, format_count, format_gib, format_seconds

_OFFLOAD_WORDS = {Offload.cpu: "host", Offload.nvme: "NVMe"}
_OPTIMIZER_WORDS = {
    Optimizer.adamw_foreach: "foreach Adam", Optimizer.adamw_single: "single Adam",
    Optimizer.adamw_8bit: "8-bit Adam", Optimizer.paged_adamw_8bit: "paged 8-bit",
}  # fmt: skip
# What 80 columns hold beside the models' names.
_LENGTHS_PER_TABLE = 5
_LEGEND = (
    "Each cell: the fastest strategy that fits, else the nearest; GiB used per GPU of {limit}; "
    "seconds per optimizer step. ckpt: checkpointing (layers are computed twice to save memory)"
)
_SHARED_LEGEND = "; shared by N: N GPUs share each sequence"
# One hue from light to dark is told apart with every kind of colour blindness (ColorBrewer's
# Blues); it ends where black text would lose contrast.
_COLOR_MAP, _DARKEST = "Blues", 0.6
_EMPTY_COLOR = "#EDEDED"
_PIXELS_PER_INCH = 200
# The title of three nodes of the longest names.
_LEAST_WIDTH_INCHES = 6.5
_LEGEND_INCHES_PER_LETTER = 0.058
# A line of 8 points in a row of 0.78 inches.
_LINE_HEIGHT = 0.18


def render_matrix(matrix: Matrix) -> RenderableType:
    """Return tables of a few lengths each: a row for each model, a column for each length."""
    columns = range(len(matrix.contexts))
    tables = [
        _table(matrix, columns[start : start + _LENGTHS_PER_TABLE])
        for start in columns[::_LENGTHS_PER_TABLE]
    ]
    legend = Text(f"{_legend(matrix)}.", style="dim")
    return Group(Text(_title(matrix), style="bold"), *tables, legend)


def _table(matrix: Matrix, columns: range) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_lines=True, pad_edge=False, padding=(0, 1))
    table.add_column("model", style="bold", no_wrap=True)
    for column in columns:
        table.add_column(f"{matrix.contexts[column]:,}", no_wrap=False)
    for row in matrix.rows:
        model = row[0].model
        cells = [_cell_text(row[column], limit_bytes=matrix.limit_bytes) for column in columns]
        table.add_row(f"{model.name}\n{format_count(model.num_params)}", *cells)
    return table


def draw_matrix(matrix: Matrix) -> bytes:
    """Return the matrix as a PNG heat map; colour is the share of usable memory in use."""
    # Imported here: matplotlib takes half a second, and only --png needs it.
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.figure import Figure

    num_columns, num_rows = len(matrix.contexts), len(matrix.rows)
    width_inches = max(2.1 + 1.45 * num_columns, _LEAST_WIDTH_INCHES)
    figure = Figure(figsize=(width_inches, 1.45 + 0.78 * num_rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colors = ListedColormap(colormaps[_COLOR_MAP]([_DARKEST * i / 255 for i in range(256)]))
    for y, row in enumerate(matrix.rows):
        for x, cell in enumerate(row):
            _draw_cell(axes, cell, x=x, y=y, colors=colors, limit_bytes=matrix.limit_bytes)
    axes.set_xlim(-0.5, num_columns - 0.5)
    axes.set_ylim(num_rows - 0.5, -0.5)
    axes.set_xticks(range(num_columns), [f"{tokens:,}" for tokens in matrix.contexts])
    axes.set_yticks(
        range(num_rows),
        [f"{row[0].model.name}\n{format_count(row[0].model.num_params)}" for row in matrix.rows],
    )
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("tokens per sample")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    figure.suptitle(_title(matrix), fontsize=11, fontweight="bold", x=0.01, ha="left")
    scale = figure.colorbar(
        ScalarMappable(Normalize(0, 100), colors), ax=axes, fraction=0.03, pad=0.02
    )
    scale.set_label(f"% of the {format_gib(matrix.limit_bytes)}\nthat a GPU may use", fontsize=8)
    scale.ax.tick_params(labelsize=8)
    legend = textwrap.fill(_legend(matrix), width=int(width_inches / _LEGEND_INCHES_PER_LETTER))
    figure.supxlabel(legend, fontsize=7, x=0.01, ha="left", color="#444444")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=_PIXELS_PER_INCH, metadata={"Software": None})
    return image.getvalue()


def _draw_cell(
    axes: Any, cell: MatrixCell, *, x: int, y: int, colors: Any, limit_bytes: int
) -> None:
    from matplotlib.patches import Rectangle

    place: dict[str, Any] = {"xy": (x - 0.48, y - 0.46), "width": 0.96, "height": 0.92}
    if not cell.fits:
        axes.add_patch(Rectangle(**place, facecolor=_EMPTY_COLOR, edgecolor="#BBBBBB", hatch="//"))
        text = _why_empty(cell, limit_bytes=limit_bytes).replace(" the ", "\nthe ")
        box_style = {"facecolor": _EMPTY_COLOR, "edgecolor": "none", "pad": 1.5}
        axes.text(x, y, text, ha="center", va="center", fontsize=7, color="#444444", bbox=box_style)
        return
    assert cell.best is not None
    used_fraction = cell.best.memory.device_used_bytes / limit_bytes
    axes.add_patch(Rectangle(**place, facecolor=colors(used_fraction)))
    lines = _cell_lines(cell)
    top = y - _LINE_HEIGHT * (len(lines) - 1) / 2
    axes.text(x, top, lines[0], ha="center", va="center", fontsize=9.5, fontweight="bold")
    middle = y + _LINE_HEIGHT / 2
    axes.text(x, middle, "\n".join(lines[1:]), ha="center", va="center", fontsize=8)


def _title(matrix: Matrix) -> str:
    cluster = matrix.cluster
    where = f"{cluster.gpus_per_node} x {cluster.gpu.name}"
    if cluster.num_nodes > 1:
        where = f"{cluster.num_nodes:,} nodes of {where}"
    return f"{METHOD_NAME[matrix.method]} on {where}: fastest strategy that fits"


def _legend(matrix: Matrix) -> str:
    shares = any(
        cell.best is not None and cell.fits and cell.best.strategy.sequence_parallel_size > 1
        for row in matrix.rows
        for cell in row
    )
    return _LEGEND.format(limit=format_gib(matrix.limit_bytes)) + _SHARED_LEGEND * shares


def _cell_text(cell: MatrixCell, *, limit_bytes: int) -> Text:
    if not cell.fits:
        return Text(_why_empty(cell, limit_bytes=limit_bytes), style="dim")
    lines = _cell_lines(cell)
    return Text.assemble((lines[0], "bold"), "\n", "\n".join(lines[1:]))


def _why_empty(cell: MatrixCell, *, limit_bytes: int) -> str:
    """Return why nothing was sought, or what the nearest strategy would need."""
    if cell.best is None:
        return cell.note
    memory = cell.best.memory
    if memory.device_used_bytes > limit_bytes:
        return f"does not fit\n{memory.device_used_bytes / GIB:,.1f} GiB"
    return f"does not fit\nhost {memory.host_bytes_per_node / GIB:,.0f} GiB"


def _cell_lines(cell: MatrixCell) -> list[str]:
    """Return stage and savings, then the numbers."""
    assert cell.best is not None
    strategy, memory, time = cell.best.strategy, cell.best.memory, cell.best.time
    words = f"ZeRO-{strategy.zero_stage}"
    if strategy.gradient_checkpointing is not Checkpointing.none:
        words += " ckpt"
    moved = {
        name: place
        for name, place in (
            ("optimizer", strategy.offload_optimizer),
            ("weights", strategy.offload_param),
        )
        if place is not Offload.none
    }
    lines = [words]
    if moved:
        place = _OFFLOAD_WORDS[next(iter(moved.values()))]
        lines.append(f"{'all' if len(moved) == 2 else next(iter(moved))} in {place}")
    elif strategy.gradient_checkpointing is Checkpointing.cpu_offload:
        lines.append("inputs in host")
    if strategy.sequence_parallel_size > 1:
        lines.append(f"shared by {strategy.sequence_parallel_size}")
    if strategy.optimizer in _OPTIMIZER_WORDS:
        lines.append(_OPTIMIZER_WORDS[strategy.optimizer])
    lines.append(f"{memory.device_used_bytes / GIB:.1f} GiB")
    lines.append(format_seconds(time.step_seconds))
    return lines
