"""``zerofit status``, ``logs``, ``cancel`` and ``list``: runs that were started."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.commands.options import existing_or_new, json_option, run_arg
from launcher.console import out, say, say_aside
from launcher.errors import RunDirError

if TYPE_CHECKING:
    from launcher.dispatch.run_state import RunState

_FOLLOW_SECONDS = 0.5
# Slurm is asked less often than the file is read.
_STATE_SECONDS = 5.0
_COLOURS = {
    "running": "green", "finished": "green", "pending": "yellow", "unknown": "yellow",
    "failed": "red", "killed": "red", "not started": "dim",
}  # fmt: skip


@click.command()
@click.argument("run", metavar="[RUN]", type=existing_or_new, default=Path("runs"))
@json_option
def status(*, run: Path, as_json: bool) -> None:
    """Say how a run is doing, or every run in a folder (by default ./runs).

    The run directory and the scheduler are asked, nothing else. Exit status 0 whatever the run
    does; its state is in the output.
    """
    from launcher.dispatch.run_state import observe, observe_all
    from launcher.run_dir import STATUS

    if not (run / STATUS).exists() and run.is_dir():
        _show_list(observe_all(run), folder=run, as_json=as_json)
        return
    (seen,) = observe([run])
    if as_json:
        print(json.dumps(seen.to_json(), indent=1))
        return
    say(f"{seen.state}" + (f": {seen.reason}" if seen.reason else ""))
    if seen.job_id is not None:
        where = f", on {seen.host}" if seen.host else ""
        say(f"  started by the {seen.backend} backend as {seen.job_id}{where}")
    if seen.step is not None:
        say(f"  step {seen.step}" + ("" if seen.loss is None else f", loss {seen.loss:.4f}"))
    say(f"  since {seen.changed_at}")


@click.command(name="list")
@click.argument("folder", type=existing_or_new, default=Path("runs"))
@json_option
def list_(*, folder: Path, as_json: bool) -> None:
    """List the runs in a folder and in its sweeps (by default ./runs)."""
    from launcher.dispatch.run_state import observe_all

    _show_list(observe_all(folder), folder=folder, as_json=as_json)


@click.command()
@run_arg
@json_option
def cancel(*, run: Path, as_json: bool) -> None:
    """End a run: all of its processes, on all of its hosts.

    A run that has ended already stays as it is.
    """
    from launcher.dispatch.cancel import cancel_run

    seen = cancel_run(run)
    if as_json:
        print(json.dumps(seen.to_json(), indent=1))
    else:
        say(f"{seen.state}" + (f": {seen.reason}" if seen.reason else ""))


@click.command()
@run_arg
@click.option("--follow", "-f", is_flag=True, help="Go on until the run ends.")
@click.option("--rank", type=click.IntRange(min=0), help="Only what this rank printed.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line: {line: …}.")
def logs(*, run: Path, follow: bool, rank: int | None, as_json: bool) -> None:
    """Print what a run has printed.

    Under Slurm every line begins with its rank's number. Elsewhere rank 0 speaks for all, and
    lines of other ranks begin with [rank N].
    """
    from launcher.dispatch.rank_lines import lines_of_rank
    from launcher.run_dir import LAUNCHER_LOG, check_is_run

    check_is_run(run)
    path = run / LAUNCHER_LOG
    offset, num_shown = 0, 0
    rest = ""
    for is_last in _until_it_ends(run, follow=follow):
        text, offset = _read_from(path, offset)
        lines = (rest + text).splitlines(keepends=True)
        rest = lines.pop() if lines and not is_last and not lines[-1].endswith("\n") else ""
        if rank is not None:
            lines = list(lines_of_rank(lines, rank, is_labelled=_is_labelled(run)))
        for line in lines:
            text = line.rstrip("\n")
            print(json.dumps({"line": text}) if as_json else text)
        num_shown += len(lines)
        sys.stdout.flush()
    if not num_shown:
        say_aside("nothing was printed" if rank is None else _silent_words(run, rank))


def _silent_words(run: Path, rank: int) -> str:
    from launcher.report.prediction import prediction_from_plan
    from launcher.report.run_extras import read_object
    from launcher.run_dir import PLAN

    size = prediction_from_plan(read_object(run / PLAN)).world_size or rank + 1
    why = "" if rank < size else f": the run's ranks are 0 to {size - 1}"
    return f"nothing was printed by rank {rank}{why}"


def _until_it_ends(run: Path, *, follow: bool) -> Iterator[bool]:
    """Yield whether this look at the log is the last one; sleeps between looks."""
    from launcher.dispatch.run_state import observe

    said, asked = None, float("-inf")
    while follow:
        if time.monotonic() - asked > _STATE_SECONDS:
            asked = time.monotonic()
            (seen,) = observe([run])
            told = f"{seen.state}" + (f": {seen.reason}" if seen.reason else "")
            if told != said and seen.state in ("pending", "unknown"):
                say_aside(told)
            said = told
            if seen.state not in ("pending", "running", "unknown"):
                break
        yield False
        time.sleep(_FOLLOW_SECONDS)
    yield True
    if follow and said is not None:
        say_aside(said)


def _read_from(path: Path, offset: int) -> tuple[str, int]:
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            content = stream.read()
    except FileNotFoundError:
        return "", offset
    except OSError as error:
        raise RunDirError(
            f"cannot be read: {error.strerror}", where=str(path), fix="ask its owner"
        ) from None
    return content.decode("utf-8", errors="replace"), offset + len(content)


def _is_labelled(run: Path) -> bool:
    from launcher.sbatch_parts import JOB_SBATCH

    return (run / JOB_SBATCH).exists()


def _show_list(runs: Sequence[RunState], *, folder: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps([seen.to_json() for seen in runs], indent=1))
        return
    if not runs:
        say_aside(f"no run in {folder}")
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("run", "state", "step", "loss", "job", "on", "why"):
        table.add_column(title, overflow="fold")
    for seen in runs:
        colour = _COLOURS[seen.state]
        table.add_row(
            escape(str(seen.run_dir)),
            f"[{colour}]{seen.state}[/]",
            "" if seen.step is None else str(seen.step),
            "" if seen.loss is None else f"{seen.loss:.4f}",
            escape(seen.job_id or ""),
            escape(seen.host or ""),
            escape(seen.reason or ""),
        )
    out.print(table)
