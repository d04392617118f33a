"""``zerofit bench``: many runs from one file, predicted beside measured."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.commands.options import existing_or_new, json_option
from launcher.console import say, say_aside
from launcher.errors import JobFailedError, RecipeError

if TYPE_CHECKING:
    from launcher.bench.result import Result
    from launcher.bench.runner import Limits, Outputs
    from launcher.bench.sweep import Case


@click.command()
@click.argument("sweep", type=existing_or_new)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]…")
@click.option(
    "--out", type=existing_or_new, help="Folder for results; default: bench-<name of the sweep>."
)
@click.option(
    "--runs", type=existing_or_new, help="Folder for run directories; default: runs below --out."
)
@click.option("--only", metavar="TEXT", default="", help="Cases whose name contains this.")
@click.option("--dry-run", is_flag=True, help="Plan every case; start and write nothing.")
@click.option(
    "--max-failures-in-a-row",
    type=click.IntRange(min=1),
    help="Stop after so many; running out of memory is a result, no failure.",
)
@click.option("--case-seconds", type=click.FloatRange(min=1), help="End a case after this.")
@click.option("--total-seconds", type=click.FloatRange(min=1), help="Begin no case after this.")
@click.option("--retry-failed", is_flag=True, help="Run cases again that failed earlier.")
@click.option(
    "--warm", is_flag=True, help="Import the training stack once and fork ranks: for short cases."
)
@click.option(
    "--array", is_flag=True, help="Submit to Slurm as a job array; again: gather what has ended."
)
@click.option(
    "--max-parallel", type=click.IntRange(min=1), help="Cases of an array at the same time."
)
@json_option
def bench(
    *, sweep: Path, overrides: tuple[str, ...], only: str, dry_run: bool, as_json: bool, **how: Any
) -> None:
    """Run the cases of SWEEP and compare what was predicted with what was measured.

    A case that has a result already is not run again, so that the same command goes on where
    it stopped. Failures and cases that run out of memory are recorded. Writes JSON Lines, CSV
    and pictures. Exit status 4 when a case failed.
    """
    from launcher.bench.runner import read_sweep

    cases = tuple(case for case in read_sweep(sweep, overrides) if only in case.name)
    if not cases:
        raise click.UsageError(f"no case's name contains {only!r}")
    if dry_run:
        _dry_run(cases, as_json=as_json)
        return
    _run(cases, sweep, as_json=as_json, **how)


def _dry_run(cases: tuple[Case, ...], *, as_json: bool) -> None:
    from launcher.bench.runner import plan_case

    planned = [plan_case(case) for case in cases]
    if as_json:
        print(json.dumps(planned, indent=1))
    else:
        for item in planned:
            say(_planned_line(item))
        num_fitting = sum(1 for item in planned if item.get("predicted", {}).get("fits"))
        say(f"{len(planned)} cases, {num_fitting} are predicted to fit; nothing was started")
    refused = [item["case"] for item in planned if "predicted" not in item]
    if refused:
        raise RecipeError(
            f"{len(refused)} of {len(planned)} cases are refused: {', '.join(refused[:8])}",
            where="dry run",
            fix="mend their recipes as said above, or leave them out",
        )


def _planned_line(item: dict[str, Any]) -> str:
    if "predicted" not in item:
        return f"{item['case']:44} refused: {' '.join(str(item['failure']).split())}"
    predicted = item["predicted"]
    return (
        f"{item['case']:44} {'fits' if predicted['fits'] else 'DOES NOT FIT':12} "
        f"allocated {predicted['peak_allocated_bytes'] / 1e9:7.2f} GB, "
        f"in use {predicted['device_used_bytes'] / 1e9:7.2f} of "
        f"{predicted['limit_bytes'] / 1e9:.2f} GB, "
        f"host {predicted['host_bytes_per_node'] / 1e9:6.1f} GB, "
        f"{predicted['step_seconds']:7.3f} s a step"
    )


def _run(
    cases: tuple[Case, ...],
    sweep: Path,
    *,
    out: Path | None,
    runs: Path | None,
    as_json: bool,
    warm: bool,
    retry_failed: bool,
    array: bool,
    max_parallel: int | None,
    **limits: Any,
) -> None:
    from launcher.bench.result import remaining
    from launcher.bench.runner import Limits, Outputs, read_outputs

    if array and (warm or any(limits.values())):
        raise click.UsageError(
            "--array leaves starting and stopping to Slurm: no --warm, no limits"
        )
    if max_parallel is not None and not array:
        raise click.UsageError("--max-parallel belongs to --array")

    folder = (out or Path(f"bench-{sweep.stem}")).absolute()
    outputs = Outputs(folder=folder, stem=sweep.stem, runs=(runs or folder / "runs").absolute())
    show = say_aside if as_json else say
    before = read_outputs(outputs)
    made, waiting = _gathered(outputs, before, show) if array else ((), frozenset())
    before = (*before, *made)
    left = remaining(cases, before, source=str(outputs.results), retry_failed=retry_failed)
    if len(left) < len(cases):
        show(f"{len(cases) - len(left)} of {len(cases)} cases have results already")
    if array:
        _submit(tuple(c for c in left if c.name not in waiting), outputs, show, max_parallel)
    else:
        made = _run_here(left, outputs, show, limits=Limits(**limits), is_warm=warm)
    results = read_outputs(outputs)
    paths = _write_summaries(outputs, results)
    states = [result.state for result in results]
    counts = {state: states.count(state) for state in sorted(set(states))}
    if as_json:
        print(json.dumps({"files": [str(path) for path in paths], "states": counts}))
    else:
        counted = [f"{count} {state.replace('_', ' ')}" for state, count in counts.items()]
        say(", ".join(counted) or "no results yet")
        say(f"wrote {', '.join(str(path) for path in paths)}")
    failed = [result.case for result in made if result.is_failure]
    if failed:
        raise JobFailedError(
            f"{len(failed)} of {len(made)} cases failed: {', '.join(failed[:8])}",
            where=str(outputs.results),
            fix="see their failure and their run directories; --retry-failed runs them again",
        )


def _run_here(
    cases: tuple[Case, ...],
    outputs: Outputs,
    show: Callable[[str], None],
    *,
    limits: Limits,
    is_warm: bool,
) -> tuple[Result, ...]:
    from launcher.bench.runner import read_outputs, run_sweep, start_with
    from launcher.dispatch.base import InterruptionError

    with contextlib.ExitStack() as stack:
        start = start_with(outputs, stack, is_warm=is_warm)
        try:
            return run_sweep(cases, outputs, limits=limits, say=show, start=start)
        except (InterruptionError, KeyboardInterrupt):
            paths = _write_summaries(outputs, read_outputs(outputs))
            show(f"wrote what there is: {', '.join(str(path) for path in paths)}")
            raise


def _gathered(
    outputs: Outputs, results: tuple[Result, ...], show: Callable[[str], None]
) -> tuple[tuple[Result, ...], frozenset[str]]:
    from launcher.bench.array import gather

    return gather(outputs, results, say=show)


def _submit(
    cases: tuple[Case, ...],
    outputs: Outputs,
    show: Callable[[str], None],
    max_parallel: int | None,
) -> None:
    from launcher.bench.array import submit_cases

    if cases:
        submit_cases(cases, outputs, say=show, max_parallel=max_parallel)
        show("the same command gathers their results as they end")


def _write_summaries(outputs: Outputs, results: tuple[Result, ...]) -> list[Path]:
    from launcher.bench.bars import draw_bar_chart, make_bar_charts
    from launcher.bench.heat_map import draw_heat_map, make_heat_maps
    from launcher.bench.result import results_to_csv
    from launcher.bench.runner import write_summary

    contents = {outputs.csv: results_to_csv(results).encode()}
    for number, heat_map in enumerate(make_heat_maps(results), start=1):
        contents[outputs.picture("heat-map", number)] = draw_heat_map(heat_map)
    for number, chart in enumerate(make_bar_charts(results), start=1):
        contents[outputs.picture("bars", number)] = draw_bar_chart(chart)
    for path, content in contents.items():
        write_summary(path, content)
    return [outputs.results, *contents]
