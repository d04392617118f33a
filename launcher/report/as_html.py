"""A run's report as one HTML page that fetches nothing."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from launcher.report.compare import RunsCompared
from launcher.report.failure_tables import attempts_table
from launcher.report.run_report import FAILED_STATES, Chart, RunReport
from launcher.report.table import Table
from launcher.report.tables import detail_table, rank_pages, summary_tables
from launcher.report.text import (
    describe_run,
    failure_lines,
    findings,
    printable,
    shorten,
    state_sentence,
    warnings,
)

# The browser itself refuses whatever a hostile model name or sample might try to load or run.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

_STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --quiet: #57606a; --line: #d8dee4; --panel: #f6f8fa;
  --good: #00684a; --bad: #a4262c; --warn: #7a4d00; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1160px; padding: 1rem clamp(.75rem, 2.5vw, 2rem) 3rem;
  font: clamp(1rem, .94rem + .25vw, 1.15rem)/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "DejaVu Sans", sans-serif; color: var(--ink); background: #fff; overflow-wrap: anywhere; }
h1 { font-size: 1.7em; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.2em; margin: 2.2rem 0 .5rem; }
p { margin: .4rem 0; }
.quiet, .note { color: var(--quiet); }
.note { font-size: .85em; }
.state { display: inline-block; padding: .25rem .8rem; border-radius: .4rem; color: #fff;
  font-weight: 600; background: var(--good); }
.state.bad { background: var(--bad); }
.state.open { background: var(--warn); }
.failure { border-left: .35rem solid var(--bad); background: #fdf0f0; padding: .6rem 1rem;
  margin: 1rem 0; }
.warnings { border-left: .35rem solid #e69f00; background: #fff8e6; padding: .6rem 1rem .6rem 2rem;
  margin: 1rem 0; }
.advice { border-left: .35rem solid var(--good); background: #eef8f3; margin: 1rem 0;
  padding: .6rem 1rem .6rem 2rem; }
dl.findings { display: grid; gap: .7rem; margin: 1.2rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 16.5rem), 1fr)); }
dl.findings div { background: var(--panel); border: 1px solid var(--line); border-radius: .5rem;
  padding: .55rem .8rem; }
dt { color: var(--quiet); font-size: .85em; }
dd { margin: 0; font-weight: 600; }
figure { margin: 1.8rem 0; }
figcaption { font-weight: 600; font-size: 1.1em; margin-bottom: .6rem; }
figure svg { display: block; width: 100%; height: auto; }
.narrow { display: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92em; }
th, td { padding: .28rem .7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { color: var(--quiet); font-weight: 600; border-bottom: 2px solid var(--line); }
th.word, td.word, th.sentence, td.sentence { text-align: left; }
td.sentence { white-space: normal; min-width: 14rem; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: .5rem;
  padding: .7rem .9rem; margin: .3rem 0; white-space: pre-wrap; font-size: .85em; }
.samples { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
summary { cursor: pointer; font-size: 1.2em; font-weight: 600; margin: 2rem 0 .5rem; }
@media (max-width: 640px) { table { font-size: .82em; } th, td { padding: .25rem .4rem; }
  .wide { display: none; } .narrow { display: block; } }
@media (min-width: 1700px) { body { max-width: 1440px; font-size: 1.3rem; } }
@media print { details > * { display: block; } .scroll { overflow: visible; } }
"""


def render_html(report: RunReport, charts: Sequence[Chart] = ()) -> str:
    """Return a complete page: state and failures first, then results, charts and tables.

    Args:
        report: of a run in any state.
        charts: drawings to embed; phones get the narrow one.
    """
    body = [
        f"<h1>Run {_text(report.name)}</h1>",
        _state(report),
        f'<p class="quiet">{_text(describe_run(report))}</p>',
        *_failures(report),
        _warnings(report),
        _findings(report),
        _advice(report),
        *(_figure(chart) for chart in charts),
        *(f"<section>{_table(table)}</section>" for table in summary_tables(report)),
        _sample(report),
        _attempts(report),
        _detail(report),
        *(_folded(page) for page in rank_pages(report)),
    ]
    return _page(report.name, body)


def render_comparison_html(runs: RunsCompared) -> str:
    """Return a complete page of several runs beside each other."""
    title = ", ".join(runs.names)
    body = [
        f"<h1>{len(runs.names)} runs</h1>",
        f'<p class="quiet">{_text(title)}</p>',
        *(_figure(chart) for chart in runs.charts),
        *(f"<section>{_table(table)}</section>" for table in (runs.results, runs.differences)),
    ]
    return _page(title, body)


def _page(title: str, body: Sequence[str]) -> str:
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)}: zerofit report</title>",
            f"<style>{_STYLE}</style>",
            "</head>",
            "<body>",
            *(part for part in body if part),
            "</body>",
            "</html>",
            "",
        ]
    )


def _text(text: str) -> str:
    # A number and its percent sign stay on one line.
    return escape(printable(text).replace(" %", "\N{NO-BREAK SPACE}%"), quote=True)


def _state(report: RunReport) -> str:
    kind = "bad" if report.state in FAILED_STATES else "good"
    if report.state not in (*FAILED_STATES, "finished"):
        kind = "open"
    return f'<p><span class="state {kind}">{_text(state_sentence(report))}</span></p>'


def _failures(report: RunReport) -> list[str]:
    parts = []
    for failure in report.failures:
        head, traceback = failure_lines(failure)
        pre = f"<pre>{_text(traceback)}</pre>" if traceback else ""
        parts.append(f'<div class="failure"><strong>{_text(head)}</strong>{pre}</div>')
    return parts


def _warnings(report: RunReport) -> str:
    items = "".join(f"<li>{_text(note)}</li>" for note in warnings(report))
    return f'<ul class="warnings">{items}</ul>' if items else ""


def _findings(report: RunReport) -> str:
    items = "".join(
        f"<div><dt>{_text(item.label)}</dt><dd>{_text(item.text)}</dd></div>"
        for item in findings(report)
    )
    return f'<dl class="findings">{items}</dl>' if items else ""


def _figure(chart: Chart) -> str:
    return (
        f'<figure id="{_text(chart.name)}"><figcaption>{_text(chart.finding)}</figcaption>'
        f'<div class="wide">{chart.wide_svg}</div><div class="narrow">{chart.narrow_svg}</div>'
        "</figure>"
    )


def _table(table: Table) -> str:
    return f"<h2>{_text(table.title)}</h2>{_grid(table)}"


def _grid(table: Table) -> str:
    kinds = [
        ' class="word"' if i < table.num_text_columns else "" for i in range(len(table.header))
    ]
    if table.has_sentences:
        kinds[-2:] = [' class="sentence"'] * 2

    def row(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{kind}>{_text(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)
        )

    lines = "\n".join(f"<tr>{row(cells, 'td')}</tr>" for cells in table.rows)
    note = f'<p class="note">{_text(table.note)}</p>' if table.note else ""
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{row(table.header, "th")}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>{note}"
    )


def _sample(report: RunReport) -> str:
    if report.sample is None:
        return ""
    sample = report.sample
    answers = "".join(
        f"<div><strong>{label}</strong><pre>{_text(shorten(text or '(none)'))}</pre></div>"
        for label, text in (("Before", sample.before), ("After", sample.after))
    )
    return (
        "<section><h2>One answer, before and after</h2>"
        f"<strong>Prompt</strong><pre>{_text(shorten(sample.prompt))}</pre>"
        f'<div class="samples">{answers}</div></section>'
    )


def _advice(report: RunReport) -> str:
    items = "".join(f"<li>{_text(line)}</li>" for line in report.advice)
    return f'<ul class="advice">{items}</ul>' if items else ""


def _attempts(report: RunReport) -> str:
    table = attempts_table(report)
    return f"<section>{_table(table)}</section>" if table.rows else ""


def _detail(report: RunReport) -> str:
    table = detail_table(report)
    return _folded(table) if table.rows else ""


def _folded(table: Table) -> str:
    return f"<details><summary>{_text(table.title)}</summary>{_grid(table)}</details>"
