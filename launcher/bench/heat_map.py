"""Model size against context length from a sweep: the fastest case of each cell. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launcher.bench.drawing import label_of, render, where_of
from launcher.bench.result import FINISHED, OUT_OF_MEMORY, Result

# One hue from light to dark is told apart with every kind of colour blindness (ColorBrewer's
# Blues); it ends where black text would lose contrast.
_COLOR_MAP, _DARKEST = "Blues", 0.6
_EMPTY_COLOR = "#EDEDED"
# Of the cells' font, in 1.25 inches.
_CELL_CHARACTERS = 19


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The fastest case of a model at a length, or why there is none."""

    text: str
    used_fraction: float | None
    """Device memory in use, of what a rank may use; ``None`` where nothing is shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """Cells by (model, tokens), as predicted before the runs and as measured."""

    where: str
    models: tuple[str, ...]
    contexts: tuple[int, ...]
    predicted: dict[tuple[str, int], Cell]
    measured: dict[tuple[str, int], Cell]
    """Empty when nothing ran."""


def make_heat_maps(results: Sequence[Result]) -> tuple[HeatMap, ...]:
    """Return one map for each kind of cluster that a matrix ran on."""
    by_place: dict[str, list[Result]] = {}
    for result in results:
        if result.content.get("strategy_label") is not None and result.content.get("predicted"):
            by_place.setdefault(where_of(result), []).append(result)
    return tuple(_make(where, found) for where, found in by_place.items())


def _make(where: str, results: Sequence[Result]) -> HeatMap:
    cells: dict[tuple[str, int], list[Result]] = {}
    for result in results:
        recipe = result.recipe
        cells.setdefault((recipe.model.name_or_path, recipe.max_seq_len), []).append(result)
    has_run = any("measured" in result.content for result in results)
    return HeatMap(
        where=where,
        models=tuple(dict.fromkeys(model for model, _ in cells)),
        contexts=tuple(sorted({tokens for _, tokens in cells})),
        predicted={key: _predicted_cell(found) for key, found in cells.items()},
        measured={key: _measured_cell(found) for key, found in cells.items()} if has_run else {},
    )


def _predicted_cell(results: Sequence[Result]) -> Cell:
    fitting = [result for result in results if result.content["predicted"]["fits"]]
    if not fitting:
        return Cell(text="does not fit", used_fraction=None)
    best = min(fitting, key=lambda result: result.predicted("step_seconds") or 0.0)
    return _filled(best, best.predicted("device_used_bytes"), best.predicted("step_seconds"))


def _measured_cell(results: Sequence[Result]) -> Cell:
    finished = [r for r in results if r.state == FINISHED and r.measured("step_seconds")]
    if not finished:
        states = {result.state for result in results}
        text = "out of memory" if states == {OUT_OF_MEMORY} else "nothing finished"
        return Cell(text=text, used_fraction=None)
    best = min(finished, key=lambda result: result.measured("step_seconds") or 0.0)
    used = best.measured("device_used_bytes") or best.measured("peak_allocated_bytes")
    return _filled(best, used, best.measured("step_seconds"))


def _filled(result: Result, used_bytes: float | None, seconds: float | None) -> Cell:
    limit = float(result.content["predicted"]["limit_bytes"])
    name = textwrap.fill(label_of(result), _CELL_CHARACTERS)
    return Cell(
        text=f"{name}\n{(used_bytes or 0) / 1e9:.1f} GB\n{seconds or 0:.3g} s",
        used_fraction=min(1.0, (used_bytes or 0) / limit),
    )


def draw_heat_map(heat_map: HeatMap) -> bytes:
    """Return a PNG: predicted, and measured beside it where something ran."""
    panels = [("predicted", heat_map.predicted)]
    if heat_map.measured:
        panels.append(("measured", heat_map.measured))
    width = len(panels) * (1.2 + 1.3 * len(heat_map.contexts))

    def draw(figure: Any) -> None:
        for axes, (name, cells) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            _draw_panel(axes, heat_map, cells)
            axes.set_title(f"{name} (darker: fuller)", fontsize=10, loc="left")

    title = f"Fastest strategy on {heat_map.where}"
    return render(draw, width=width, height=1.4 + 0.85 * len(heat_map.models), title=title)


def _draw_panel(axes: Any, heat_map: HeatMap, cells: dict[tuple[str, int], Cell]) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    for y, model in enumerate(heat_map.models):
        for x, tokens in enumerate(heat_map.contexts):
            cell = cells.get((model, tokens))
            if cell is None:
                continue
            is_empty = cell.used_fraction is None
            color = (
                _EMPTY_COLOR
                if cell.used_fraction is None
                else colormaps[_COLOR_MAP](_DARKEST * cell.used_fraction)
            )
            axes.add_patch(Rectangle((x - 0.48, y - 0.47), 0.96, 0.94, facecolor=color))
            axes.text(
                x, y, cell.text, ha="center", va="center", fontsize=7.5,
                color="#666666" if is_empty else "black",
            )  # fmt: skip
    axes.set_xlim(-0.5, len(heat_map.contexts) - 0.5)
    axes.set_ylim(len(heat_map.models) - 0.5, -0.5)
    axes.set_xticks(range(len(heat_map.contexts)), [f"{n:,}" for n in heat_map.contexts])
    axes.set_yticks(range(len(heat_map.models)), [_short(name) for name in heat_map.models])
    axes.set_xlabel("tokens per sample")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def _short(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2]
