"""All ranks of a run on one screen: a line each, or the most telling ones and a summary. Pure."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

from rich.console import Group
from rich.table import Table
from rich.text import Text

from launcher.report.live import Progress, SeenRank
from launcher.report.prediction import Prediction
from launcher.report.text import NOTHING, printable, shorten
from launcher.units import GIB, format_bytes, format_seconds

Sorting = Literal["rank", "memory", "step", "time", "age"]
_SORTINGS: dict[Sorting, Callable[[SeenRank], float]] = {
    "rank": lambda seen: seen.peaks.rank,
    "memory": lambda seen: -(seen.device_used_bytes or seen.peak_allocated_bytes),
    "step": lambda seen: seen.peaks.steps_done,
    "time": lambda seen: -(seen.step_seconds or 0.0),
    "age": lambda seen: -seen.age_seconds,
}
"""What comes first: the fullest, the furthest behind, the slowest, the longest silent."""
SILENT_SECONDS = 60.0
"""A rank writes its file every 5 s, or with each step where a step takes longer."""
_COLOURS = {"running": "green", "finished": "green", "out_of_memory": "red", "failed": "red"}
_TITLES = (
    ("rank", 0), ("host name", 80), ("phase", 0), ("step", 0), ("s/step", 0), ("tok/s", 80),
    ("now", 100), ("alloc", 0), ("resv", 100), ("device", 0), ("host", 0), ("of plan", 0),
    ("silent", 0),
)  # fmt: skip
"""Of the ranks' columns, and the columns that a terminal must have to show them."""
_Cell = TypeVar("_Cell", str, str | Text)
_MAX_MISSING_SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """What is known of a run at one moment."""

    name: str
    state: str
    """From ``status.json``; ``unknown`` without it."""
    reason: str | None
    progress: Progress
    prediction: Prediction
    ranks: tuple[SeenRank, ...]
    world_size: int
    """That the plan names, else that the ranks name."""
    unreadable: frozenset[int]
    """Ranks whose file is broken or of another version."""

    @property
    def missing(self) -> list[int]:
        """Ranks without a file of use."""
        known = {seen.peaks.rank for seen in self.ranks}
        return [rank for rank in range(self.world_size) if rank not in known]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Which ranks to show."""

    sorting: Sorting = "rank"
    num_rows: int = 20
    number: int = 0
    """From 0; beyond the last page, the last is shown."""
    num_columns: int = 120
    """Of the terminal; a narrow one shows the fullest moment alone."""


def num_pages(num_ranks: int, num_rows: int) -> int:
    """Return how many pages that many ranks fill; at least one."""
    return max(1, -(-num_ranks // num_rows))


def render_run(view: RunView, page: Page) -> Group:
    """Return the screen: the run, a summary of all ranks, and a page of them."""
    parts: list[Text | Table] = [_headline(view), *_notes(view)]
    if view.ranks:
        parts += [Text(), _summary(view), Text(), _ranks(view, page)]
        last = num_pages(len(view.ranks), page.num_rows)
        if last > 1:
            shown = min(page.number, last - 1) + 1
            parts.append(Text(f"page {shown} of {last}, sorted by {page.sorting}", style="dim"))
    return Group(*parts)


def _headline(view: RunView) -> Text:
    progress, prediction = view.progress, view.prediction
    text = Text(printable(view.name), style="bold", no_wrap=True)
    text.append(f"  {view.state}", style=_COLOURS.get(view.state, "yellow"))
    parts = []
    # The ranks' own count is newer than the log where not every step is logged.
    steps = max((seen.peaks.steps_done for seen in view.ranks), default=0)
    step = max(steps, progress.step or 0)
    total = "" if progress.total_steps is None else f"/{progress.total_steps:,}"
    parts.append(f"step {step:,}{total}")
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4f}")
    if progress.eval_loss is not None:
        parts.append(f"held-out {progress.eval_loss:.4f}")
    if progress.tokens_per_second is not None:
        parts.append(f"{progress.tokens_per_second:,.0f} tokens/s")
    if view.state == "running" and progress.remaining_seconds is not None:
        parts.append(f"{format_seconds(progress.remaining_seconds)} left")
    if prediction.device_used_bytes is not None:
        parts.append(f"{format_bytes(prediction.device_used_bytes)} a rank predicted")
    text.append("  " + "  ".join(parts), style="not bold")
    return text


def _notes(view: RunView) -> list[Text]:
    notes = []
    if view.reason:
        notes.append(shorten(printable(view.reason), 300))
    silent = [seen for seen in view.ranks if _is_silent(seen)]
    if silent:
        oldest = max(silent, key=lambda seen: seen.age_seconds)
        notes.append(
            f"{len(silent)} of {len(view.ranks)} ranks have written nothing for over "
            f"{SILENT_SECONDS:.0f} s, rank {oldest.peaks.rank} for "
            f"{format_seconds(oldest.age_seconds)}: slow, hanging or dead; "
            "`zerofit status` asks who runs them"
        )
    if view.missing:
        first = ", ".join(map(str, view.missing[:_MAX_MISSING_SHOWN]))
        more = "" if len(view.missing) <= _MAX_MISSING_SHOWN else ", …"
        notes.append(f"no file of {len(view.missing)} of {view.world_size} ranks: {first}{more}")
    if view.unreadable:
        count = len(view.unreadable)
        what = "file of a rank is" if count == 1 else "files of ranks are"
        notes.append(f"{count} {what} broken or of another version")
    return [Text(note, style="yellow") for note in notes]


def _is_silent(seen: SeenRank) -> bool:
    return seen.peaks.state == "running" and seen.age_seconds > SILENT_SECONDS


def _summary(view: RunView) -> Table:
    """Return the least, median and most of each quantity over all ranks."""
    table = Table(box=None, pad_edge=False)
    table.add_column(f"{_count(len(view.ranks), 'rank')} on {_count(_num_hosts(view), 'host')}")
    for title in ("least", "median", "most"):
        table.add_column(title, justify="right")
    quantities: list[tuple[str, list[float | None], Callable[[float], str]]] = [
        ("peak allocated", [s.peak_allocated_bytes for s in view.ranks], format_bytes),
        ("peak reserved", [s.peak_reserved_bytes for s in view.ranks], format_bytes),
        ("device in use", [s.device_used_bytes for s in view.ranks], format_bytes),
        ("host", [s.host_rss_bytes for s in view.ranks], format_bytes),
        ("step", [s.step_seconds for s in view.ranks], format_seconds),
        ("steps done", [s.peaks.steps_done for s in view.ranks], lambda n: f"{n:,.0f}"),
    ]
    for name, given, show in quantities:
        values = [value for value in given if value is not None]
        if values and any(values):
            middle = statistics.median(values)
            table.add_row(name, show(min(values)), show(middle), show(max(values)))
    return table


def _count(number: int, name: str) -> str:
    return f"{number} {name}" + "s" * (number != 1)


def _num_hosts(view: RunView) -> int:
    return len({seen.peaks.host for seen in view.ranks})


def _ranks(view: RunView, page: Page) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), caption_justify="left")
    shown = [least_columns <= page.num_columns for _, least_columns in _TITLES]
    for title in _only(shown, [title for title, _ in _TITLES]):
        is_text = title in {"host name", "phase"}
        width = 20 if title == "host name" else None
        justify: Literal["left", "right"] = "left" if is_text else "right"
        table.add_column(title, justify=justify, no_wrap=True, overflow="ellipsis", max_width=width)
    table.caption = "sizes in GiB, peaks but for now"
    ordered = sorted(view.ranks, key=lambda s: (_SORTINGS[page.sorting](s), s.peaks.rank))
    number = min(page.number, num_pages(len(ordered), page.num_rows) - 1)
    for seen in ordered[number * page.num_rows : (number + 1) * page.num_rows]:
        table.add_row(*_only(shown, _cells(seen, view.prediction)))
    return table


def _only(shown: list[bool], items: list[_Cell]) -> Iterator[_Cell]:
    return itertools.compress(items, shown)


def _cells(seen: SeenRank, prediction: Prediction) -> list[str | Text]:
    """Return what stands below each of the titles."""
    peaks, seconds, rate = seen.peaks, seen.step_seconds, seen.tokens_per_second
    is_running = peaks.state == "running"
    return [
        str(peaks.rank),
        Text(printable(peaks.host)),
        Text(_doing(seen), style=_COLOURS.get(peaks.state, "yellow")),
        f"{peaks.steps_done:,}",
        NOTHING if seconds is None else f"{seconds:.3g}",
        NOTHING if rate is None else f"{rate:,.0f}",
        _gib(peaks.now.allocated_bytes if peaks.now else None),
        _gib(seen.peak_allocated_bytes),
        _gib(seen.peak_reserved_bytes),
        _gib(seen.device_used_bytes),
        _gib(seen.host_rss_bytes),
        _of_plan(seen, prediction),
        Text(
            format_seconds(round(seen.age_seconds)) if is_running else NOTHING,
            style="yellow" if _is_silent(seen) else "",
        ),
    ]


def _doing(seen: SeenRank) -> str:
    """Return the phase that a running rank was in when it wrote, else how it ended."""
    peaks = seen.peaks
    return printable(str(peaks.phase or peaks.state if peaks.state == "running" else peaks.state))


def _of_plan(seen: SeenRank, prediction: Prediction) -> str:
    """Return the peak's share of the predicted one: of the device, else of what tensors hold."""
    predicted, measured = prediction.device_used_bytes, seen.device_used_bytes
    if measured is None:
        predicted, measured = prediction.peak_allocated_bytes, seen.peak_allocated_bytes
    return f"{measured / predicted:.0%}" if predicted and measured else NOTHING


def _gib(size: int | None) -> str:
    return NOTHING if size is None else f"{size / GIB:.2f}"
