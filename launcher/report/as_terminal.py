"""A run's report for the terminal, as one rich renderable; printing it is the caller's."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table as RichTable
from rich.text import Text

from launcher.report.compare import RunsCompared
from launcher.report.failure_tables import attempts_table
from launcher.report.run_report import FAILED_STATES, RunReport, SampleReport
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

_MAX_SAMPLE_CHARACTERS = 600


def render_terminal(report: RunReport) -> RenderableType:
    """Return the report: what went wrong first, then results, tables, loss and one answer.

    Text from outside (model names, messages, samples) is never read as markup, and its control
    characters are replaced.
    """
    is_failed = report.state in FAILED_STATES
    parts: list[RenderableType] = [
        Text.assemble(("Run ", "bold"), (printable(report.name), "bold")),
        Text(state_sentence(report), style="bold red" if is_failed else "bold green"),
        Text(printable(describe_run(report)), style="dim"),
    ]
    for failure in report.failures:
        head, traceback = failure_lines(failure)
        body = Group(Text(head, style="bold"), *([Text(traceback)] if traceback else []))
        parts.append(Panel(body, border_style="red"))
    parts += [Text(f"! {printable(note)}", style="yellow") for note in warnings(report)]
    parts.append(_findings(report))
    parts += [Text(f"→ {printable(line)}", style="green") for line in report.advice]
    tables = (*summary_tables(report), attempts_table(report), detail_table(report))
    parts += [_table(table) for table in tables]
    if report.loss.train:
        parts += [_heading("Training loss"), Text(draw_curve(report.loss.train))]
    if report.sample is not None:
        parts += [_heading("One answer, before and after"), _sample(report.sample)]
    return Group(*parts)


def render_comparison_terminal(runs: RunsCompared) -> RenderableType:
    """Return several runs beside each other."""
    findings = [chart.finding for chart in runs.charts if ":" in chart.finding]
    return Group(
        *(Text(printable(finding)) for finding in findings),
        _table(runs.results),
        _table(runs.differences),
        *([] if runs.differences.rows else [Text(runs.differences.note, style="dim")]),
    )


def _sample(sample: SampleReport) -> RenderableType:
    grid = RichTable.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for label, text in (
        ("Prompt", sample.prompt),
        ("Before", sample.before),
        ("After", sample.after),
    ):
        grid.add_row(label, Text(shorten(printable(text or "(none)"), _MAX_SAMPLE_CHARACTERS)))
    return grid


def _heading(title: str) -> RenderableType:
    return Padding(Rule(Text(title), align="left", style="dim"), (1, 0, 0, 0))


def _findings(report: RunReport) -> RenderableType:
    grid = RichTable.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for item in findings(report):
        grid.add_row(item.label, Text(printable(item.text)))
    return Padding(grid, (1, 0, 0, 0))


def _table(table: Table) -> RenderableType:
    if not table.rows:
        return Text("")
    rich_table = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    for index, name in enumerate(table.header):
        is_word = index < table.num_text_columns
        # On a narrow terminal columns of numbers may shrink; names must stay readable.
        rich_table.add_column(name, justify="left" if is_word else "right", no_wrap=is_word)
    previous = ""
    for row in table.rows:
        # In a table of ranks and phases a rank is named once.
        is_repeat = table.num_text_columns == 2 and row[0] == previous
        previous = row[0]
        cells = ("" if is_repeat else row[0], *row[1:])
        rich_table.add_row(*(Text(cell) for cell in cells))
    parts: list[RenderableType] = [_heading(table.title), rich_table]
    if table.note:
        parts.append(Text(table.note, style="dim"))
    return Group(*parts)
