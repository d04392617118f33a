"""``zerofit top``: all ranks of a run, live."""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from launcher.commands.options import json_option, run_arg
from launcher.console import out
from launcher.report.top_view import Page, RunView, Sorting, num_pages, render_run

if TYPE_CHECKING:
    from launcher.report.live import RankFolder

_LINES_ABOVE = 17
"""Of the screen: the run, its notes, the summary, the titles and the foot."""


@click.command()
@run_arg
@click.option("--once", is_flag=True, help="Print one page and leave.")
@click.option(
    "--sort",
    "sorting",
    type=click.Choice(get_args(Sorting)),
    default="rank",
    show_default=True,
    help="First come: the fullest, those behind, the slowest, the longest silent.",
)
@click.option("--rows", type=click.IntRange(min=1), help="Ranks on a page; default: what fits.")
@click.option("--page", type=click.IntRange(min=1), default=1, help="Page to begin with.")
@click.option(
    "--interval", type=click.FloatRange(min=0.2), default=2.0, show_default=True, help="Seconds."
)
@json_option
def top(
    *,
    run: Path,
    once: bool,
    sorting: Sorting,
    rows: int | None,
    page: int,
    interval: float,
    as_json: bool,
) -> None:
    """Watch the ranks of a run: memory, pace, and who has fallen silent.

    Only files of the run directory are read, so it works beside a run, after it, and from
    another machine. Keys: n and p turn pages, r m s t a sort by rank, memory, step, time of a
    step, age; q leaves.
    """
    from launcher.report.live import RankFolder
    from launcher.run_dir import check_is_run

    check_is_run(run)
    files = RankFolder(run)
    shown = Page(sorting=sorting, num_rows=rows or 20, number=page - 1, num_columns=out.size.width)
    if as_json:
        print(json.dumps(_to_json(_look(run, files)), indent=1))
    elif once or not sys.stdout.isatty():
        out.print(render_run(_look(run, files), shown))
    else:
        _watch(run, files, shown, has_fixed_rows=rows is not None, interval_seconds=interval)


def _look(run: Path, files: RankFolder) -> RunView:
    """Read what is there now; what is broken or missing is left out and counted."""
    from launcher import run_dir
    from launcher.errors import RunDirError
    from launcher.report.live import read_prediction, read_progress

    try:
        status = run_dir.read_status(run)
        state, reason = str(status.state), status.reason
    except RunDirError:
        state, reason = "unknown", None
    prediction = read_prediction(run)
    ranks = tuple(files.read(files.numbers()))
    named = max((seen.peaks.world_size for seen in ranks), default=0)
    return RunView(
        name=run.resolve().name,
        state=state,
        reason=reason if isinstance(reason, str) else None,
        progress=read_progress(run),
        prediction=prediction,
        ranks=ranks,
        world_size=prediction.world_size or named,
        unreadable=files.unreadable,
    )


def _to_json(view: RunView) -> dict[str, Any]:
    return {
        "name": view.name,
        "state": view.state,
        "reason": view.reason,
        "progress": asdict(view.progress),
        "world_size": view.world_size,
        "missing_ranks": view.missing,
        "predicted_device_used_bytes": view.prediction.device_used_bytes,
        "ranks": [
            {
                "rank": seen.peaks.rank,
                "host": seen.peaks.host,
                "state": seen.peaks.state,
                "steps_done": seen.peaks.steps_done,
                "step_seconds": seen.step_seconds,
                "tokens_per_second": seen.tokens_per_second,
                "peak_allocated_bytes": seen.peak_allocated_bytes,
                "peak_reserved_bytes": seen.peak_reserved_bytes,
                "device_used_bytes": seen.device_used_bytes,
                "host_rss_bytes": seen.host_rss_bytes,
                "now": None if seen.peaks.now is None else asdict(seen.peaks.now),
                "age_seconds": round(seen.age_seconds, 3),
            }
            for seen in view.ranks
        ],
    }


def _watch(
    run: Path, files: RankFolder, page: Page, *, has_fixed_rows: bool, interval_seconds: float
) -> None:
    from rich.live import Live

    with _keys() as read_key, Live(console=out, screen=True, auto_refresh=False) as live:
        while True:
            view = _look(run, files)
            width, height = out.size
            page = replace(page, num_columns=width)
            if not has_fixed_rows:
                page = replace(page, num_rows=max(3, height - _LINES_ABOVE))
            live.update(render_run(view, page), refresh=True)
            until = time.monotonic() + interval_seconds
            while (left := until - time.monotonic()) > 0:
                key = read_key(left)
                if key == "q":
                    return
                if key:
                    page = _turn(page, key, num_ranks=len(view.ranks))
                    live.update(render_run(view, page), refresh=True)


def _turn(page: Page, key: str, *, num_ranks: int) -> Page:
    """Return the page that a key leads to; other keys change nothing."""
    by_letter = {name[0]: name for name in get_args(Sorting)}

    if key in by_letter:
        return replace(page, sorting=by_letter[key], number=0)
    step = {"n": 1, " ": 1, "p": -1}.get(key, 0)
    last = num_pages(num_ranks, page.num_rows) - 1
    return replace(page, number=min(max(0, page.number + step), last))


@contextlib.contextmanager
def _keys() -> Iterator[Any]:
    """Yield a function that waits for one key, without Enter; empty where none comes in time."""
    if not sys.stdin.isatty():

        def wait(seconds: float) -> str:
            time.sleep(seconds)
            return ""

        yield wait
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def read(seconds: float) -> str:
        ready, _, _ = select.select([descriptor], [], [], seconds)
        return os.read(descriptor, 1).decode("ascii", "replace") if ready else ""

    try:
        tty.setcbreak(descriptor)
        yield read
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
