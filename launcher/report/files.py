"""Read a run, write its report's files beside it, and return what is to be shown."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from launcher import run_dir
from launcher.report.as_html import render_html
from launcher.report.as_json import report_to_json
from launcher.report.as_markdown import render_markdown
from launcher.report.as_terminal import render_terminal
from launcher.report.build import build_report
from launcher.report.plots import draw_charts
from launcher.report.run_reader import load_run
from launcher.report.run_report import RunReport

_INDENTED_RANKS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeReport:
    """A report, ready to be shown, and the files that were written."""

    report: RunReport
    json_value: dict[str, Any]
    terminal: RenderableType
    paths: tuple[Path, ...]
    """Empty when the run directory cannot be written; ``terminal`` says so then."""


def write_report(directory: Path) -> MadeReport:
    """Report a run in any state; write report.json, report.md, report.html and loss.png.

    An older report is replaced; loss.png is written only when a loss was logged. A run directory
    that cannot be written, such as a colleague's, is still reported.

    Raises:
        RunDirError: there is no such directory, or no run was ever written to it.
    """
    report = build_report(load_run(directory))
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
    charts = draw_charts(report)
    loss_png = next((chart.wide_png for chart in charts if chart.name == "loss"), None)
    image = run_dir.LOSS_PNG if loss_png else None
    # Python indents slowly: 5 s for 8,192 ranks, which nobody reads by eye.
    indent = 1 if len(report.ranks) <= _INDENTED_RANKS else None
    texts = {
        run_dir.REPORT_JSON: json.dumps(json_value, indent=indent, allow_nan=False) + "\n",
        run_dir.REPORT_MARKDOWN: render_markdown(report, loss_image=image),
        run_dir.REPORT_HTML: render_html(report, charts),
    }
    for name, text in texts.items():
        run_dir.write_text(directory / name, text)
    written = tuple(directory / name for name in texts)
    if loss_png is None:
        return written
    (directory / run_dir.LOSS_PNG).write_bytes(loss_png)
    return (*written, directory / run_dir.LOSS_PNG)
