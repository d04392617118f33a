"""Read a run, write its report's files beside it, and return what is to be shown."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from launcher import run_dir
from launcher.errors import RunDirError
from launcher.report.as_html import render_comparison_html, render_html
from launcher.report.as_json import MAX_RANKS_WITH_PHASES, report_to_json
from launcher.report.as_markdown import render_comparison_markdown, render_markdown
from launcher.report.as_terminal import render_terminal
from launcher.report.build import build_report
from launcher.report.chart_findings import loss_finding
from launcher.report.compare import RunsCompared, compare_runs
from launcher.report.loss_png import draw_loss_png
from launcher.report.plots import draw_charts
from launcher.report.run_reader import load_run
from launcher.report.run_report import Observation, RunReport


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeReport:
    """A report, ready to be shown, and the files that were written."""

    report: RunReport
    json_value: dict[str, Any]
    terminal: RenderableType
    paths: tuple[Path, ...]
    """Empty when the run directory cannot be written; ``terminal`` says so then."""


Adviser = Callable[[Path, RunReport], tuple[str, ...]]


def write_report(
    directory: Path, *, observation: Observation | None = None, advise: Adviser | None = None
) -> MadeReport:
    """Report a run in any state; write report.json, report.md, report.html and loss.png.

    An older report is replaced; loss.png is written only when a loss was logged. A run directory
    that cannot be written, such as a colleague's, is still reported.

    Args:
        directory: of the run.
        observation: what whoever runs it says of it now; without it, a run that is going on
            looks like one that was killed.
        advise: says what to change in a run.

    Raises:
        RunDirError: there is no such directory, or no run was ever written to it.
    """
    with without_collector():
        return _write_report(directory, observation, advise)


@contextmanager
def without_collector() -> Iterator[None]:
    """Let Python not look for cycles of garbage for a while.

    There are none, and it would look through the millions of objects of thousands of ranks
    again and again, for a fifth of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _write_report(
    directory: Path, observation: Observation | None, advise: Adviser | None
) -> MadeReport:
    report = build_report(load_run(directory, observation=observation))
    if advise is not None:
        report = replace(report, advice=advise(directory, report))
    json_value = report_to_json(report)
    terminal: RenderableType = render_terminal(report)
    try:
        paths = _write(directory, report, json_value)
    except OSError as error:
        paths = ()
        note = f"! No file was written in {directory}: {error.strerror or error}"
        terminal = Group(terminal, Text(note, style="yellow"))
    return MadeReport(report=report, json_value=json_value, terminal=terminal, paths=paths)


def _write(directory: Path, report: RunReport, json_value: dict[str, Any]) -> tuple[Path, ...]:
    loss = loss_finding(report)
    image = run_dir.LOSS_PNG if loss else None
    # Python indents slowly, and nobody reads thousands of ranks by eye.
    indent = 1 if len(report.ranks) <= MAX_RANKS_WITH_PHASES else None
    texts = {
        run_dir.REPORT_JSON: json.dumps(json_value, indent=indent, allow_nan=False) + "\n",
        run_dir.REPORT_MARKDOWN: render_markdown(report, loss_image=image),
        run_dir.REPORT_HTML: render_html(report, draw_charts(report)),
    }
    for name, text in texts.items():
        run_dir.write_text(directory / name, text)
    written = tuple(directory / name for name in texts)
    if loss is None:
        return written
    (directory / run_dir.LOSS_PNG).write_bytes(draw_loss_png(report, loss))
    return (*written, directory / run_dir.LOSS_PNG)


def compare_reports(
    directories: Sequence[Path], observations: Sequence[Observation | None]
) -> RunsCompared:
    """Read runs and put them beside each other; nothing is written.

    Args:
        directories: of the runs.
        observations: what is known of each from elsewhere.

    Raises:
        RunDirError: one of them is no run directory.
    """
    with without_collector():
        return compare_runs(
            [
                build_report(load_run(directory, observation=observation))
                for directory, observation in zip(directories, observations, strict=True)
            ]
        )


def write_comparison(runs: RunsCompared, folder: Path) -> tuple[Path, ...]:
    """Write a comparison as comparison.json, comparison.md and comparison.html.

    Raises:
        RunDirError: the folder cannot be made or written.
    """
    texts: Mapping[str, str] = {
        "comparison.json": json.dumps(runs.json_value, indent=1, allow_nan=False) + "\n",
        "comparison.md": render_comparison_markdown(runs),
        "comparison.html": render_comparison_html(runs),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            run_dir.write_text(folder / name, text)
    except OSError as error:
        raise RunDirError(
            f"cannot write here: {error.strerror or error}",
            where=str(folder),
            fix="name another folder with --out",
        ) from None
    return tuple(folder / name for name in texts)
