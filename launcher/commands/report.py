"""``zerofit report``: what a run measured beside what was predicted."""

from __future__ import annotations

import json
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.commands.options import json_option, run_arg
from launcher.console import out, say
from launcher.errors import LauncherError

if TYPE_CHECKING:
    from launcher.report.run_report import Observation


@click.command()
@run_arg
@click.option("--open", "opens", is_flag=True, help="Show report.html in a web browser.")
@json_option
def report(*, run: Path, opens: bool, as_json: bool) -> None:
    """Compare predicted with measured memory and time, for every rank and phase.

    Also writes report.md, report.json, report.html and loss.png into the run directory.
    """
    show_report(run, as_json=as_json, opens=opens)


def show_report(run: Path, *, as_json: bool, opens: bool = False) -> None:
    """Write a run's report and print it."""
    from launcher.report.files import write_report
    from launcher.run_dir import REPORT_HTML

    made = write_report(run, observation=_observe(run))
    if as_json:
        print(json.dumps(made.json_value, indent=1))
    else:
        out.print(made.terminal)
        if made.paths:
            say(f"wrote {', '.join(str(path) for path in made.paths)}")
    page = next((path for path in made.paths if path.name == REPORT_HTML), None)
    if opens and page is not None and not webbrowser.open(page.absolute().as_uri()):
        say(f"no web browser could be started here; open {page.absolute()}")


def _observe(run: Path) -> Observation | None:
    """Return what Slurm or the process table say of a run; its files are all there is without."""
    from launcher.dispatch.run_state import observe
    from launcher.report.run_report import Observation

    try:
        seen = observe([run])[0]
    except LauncherError:
        return None  # half a file: the report itself names it
    return Observation(state=seen.state, reason=seen.reason)
