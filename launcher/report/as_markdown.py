"""A run's report as Markdown text."""

from __future__ import annotations

import re

from launcher.report.compare import RunsCompared
from launcher.report.failure_tables import attempts_table
from launcher.report.run_report import FAILED_STATES, RunReport
from launcher.report.table import Table
from launcher.report.tables import detail_table, summary_tables
from launcher.report.text import (
    describe_run,
    failure_lines,
    findings,
    printable,
    shorten,
    state_sentence,
    warnings,
)
from launcher.report.text_plot import draw_curve

# What Markdown, or HTML or mathematics inside it, takes for markup in the middle of a line; text
# from outside never stands at the start of one.
_SPECIAL = re.compile(r"([\\`*_\[\]<>|~&$])")


def render_markdown(report: RunReport, *, loss_image: str | None = None) -> str:
    """Return the report as Markdown.

    Args:
        report: of a run in any state.
        loss_image: relative path of the loss curve's picture, if there is one.
    """
    parts = [f"# Run {_escape(_one_line(report.name))}", _state(report), _job(report)]
    for failure in report.failures:
        head, traceback = failure_lines(failure)
        parts += [f"**{_escape(_one_line(head))}**", _fenced(traceback)]
    if notes := warnings(report):
        parts.append("\n".join(f"- ⚠ {_escape(_one_line(note))}" for note in notes))
    if results := findings(report):
        parts.append("\n".join(f"- **{item.label}**: {_escape(item.text)}" for item in results))
    if report.advice:
        lines = "\n".join(f"- {_escape(_one_line(line))}" for line in report.advice)
        parts.append(f"## What to change\n\n{lines}")
    parts += [_table(table) for table in summary_tables(report)]
    if (attempts := attempts_table(report)).rows:
        parts.append(_table(attempts))
    parts += _loss(report, loss_image)
    if report.sample is not None:
        sample = report.sample
        parts.append("## One answer, before and after")
        for label, text in (
            ("Prompt", sample.prompt),
            ("Before", sample.before),
            ("After", sample.after),
        ):
            parts.append(f"{label}:\n\n{_fenced(shorten(printable(text or '(none)')))}")
    if (detail := detail_table(report)).rows:
        parts.append(_table(detail))
    return "\n\n".join(part for part in parts if part) + "\n"


def render_comparison_markdown(runs: RunsCompared) -> str:
    """Return several runs beside each other as Markdown."""
    names = ", ".join(_escape(_one_line(name)) for name in runs.names)
    findings = [chart.finding for chart in runs.charts if ":" in chart.finding]
    parts = [f"# {len(runs.names)} runs", names]
    parts.append("\n".join(f"- {_escape(_one_line(finding))}" for finding in findings))
    parts += [_table(table) for table in (runs.results, runs.differences)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _job(report: RunReport) -> str:
    text = describe_run(report)
    return f"Job: {_escape(_one_line(text))}" if text else ""


def _state(report: RunReport) -> str:
    sentence = state_sentence(report)
    return (
        f"**{_escape(_one_line(sentence))}**"
        if report.state in FAILED_STATES
        else _escape(_one_line(sentence))
    )


def _loss(report: RunReport, loss_image: str | None) -> list[str]:
    if not report.loss.train:
        return []
    parts = ["## Training loss"]
    if loss_image:
        parts.append(f"![Training and held-out loss by step]({loss_image})")
    return [*parts, _fenced(draw_curve(report.loss.train))]


def _table(table: Table) -> str:
    aligns = [
        ":--" if index < table.num_text_columns else "--:" for index in range(len(table.header))
    ]
    lines = [table.header, tuple(aligns), *table.rows]
    cells = [[_escape(_one_line(cell)) for cell in line] for line in lines]
    cells[1] = aligns
    text = "\n".join(f"| {' | '.join(line)} |" for line in cells)
    return f"## {table.title}\n\n{text}" + (f"\n\n{_escape(table.note)}" if table.note else "")


def _escape(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", printable(text))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _fenced(text: str) -> str:
    """Return a code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
