"""``zerofit report``: what a run measured beside what was predicted."""

from __future__ import annotations

import json
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher import console
from launcher.commands.options import existing_or_new, json_option
from launcher.errors import LauncherError

if TYPE_CHECKING:
    from launcher.report.run_report import Observation


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN [RUN]…", type=existing_or_new)
@click.option("--open", "opens", is_flag=True, help="Show the page in a web browser.")
@click.option("--out", type=existing_or_new, help="Folder for the files of a comparison.")
@json_option
def report(*, runs: tuple[Path, ...], opens: bool, out: Path | None, as_json: bool) -> None:
    """Compare predicted with measured memory and time; several runs beside each other.

    Of one run also report.md, report.json, report.html and loss.png are written into its
    directory. Of several, comparison.md, comparison.json and comparison.html go to --out.
    """
    if len(runs) == 1 and out is None:
        show_report(runs[0], as_json=as_json, opens=opens)
    elif len(runs) == 1:
        raise click.UsageError("--out is for several runs; the files of one go into its directory")
    else:
        _show_comparison(runs, out=out, as_json=as_json, opens=opens)


def show_report(run: Path, *, as_json: bool, opens: bool = False) -> None:
    """Write a run's report and print it."""
    from launcher.report.files import write_report
    from launcher.run_advice import advise
    from launcher.run_dir import REPORT_HTML

    made = write_report(run, observation=_observe(run), advise=advise)
    if as_json:
        print(json.dumps(made.json_value, indent=1))
    else:
        console.out.print(made.terminal)
        if made.paths:
            console.say(f"wrote {', '.join(str(path) for path in made.paths)}")
    if opens:
        _open(next((path for path in made.paths if path.name == REPORT_HTML), None))


def _show_comparison(
    runs: tuple[Path, ...], *, out: Path | None, as_json: bool, opens: bool
) -> None:
    from launcher.report.as_terminal import render_comparison_terminal
    from launcher.report.files import compare_reports, write_comparison

    if opens and out is None:
        raise click.UsageError("a comparison is opened from its files: name a folder with --out")
    compared = compare_reports(runs, [_observe(run) for run in runs])
    paths = write_comparison(compared, out) if out is not None else ()
    if as_json:
        print(json.dumps(compared.json_value, indent=1))
    else:
        console.out.print(render_comparison_terminal(compared))
        if paths:
            console.say(f"wrote {', '.join(str(path) for path in paths)}")
    if opens:
        _open(next((path for path in paths if path.suffix == ".html"), None))


def _open(page: Path | None) -> None:
    if page is None:
        console.say_aside("there is no page to open: it could not be written")
    elif not webbrowser.open(page.absolute().as_uri()):
        console.say_aside(f"no web browser could be started here; open {page.absolute()}")


def _observe(run: Path) -> Observation | None:
    """Return what Slurm or the process table say of a run; its files are all there is without."""
    from launcher.dispatch.run_state import observe
    from launcher.report.run_report import Observation

    try:
        seen = observe([run])[0]
    except LauncherError:
        return None  # half a file: the report itself names it
    return Observation(state=seen.state, reason=seen.reason)
