"""``zerofit calibrate``: the predictor's constants from a site's own runs."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.commands.options import existing_or_new, json_option
from launcher.console import say, say_aside

if TYPE_CHECKING:
    from launcher.calibrate.fit import GpuFit, Verdict
    from launcher.calibrate.runs import MeasuredRun


@click.command()
@click.argument("runs", nargs=-1, required=True, type=existing_or_new, metavar="RUNS…")
@click.option("--dry-run", is_flag=True, help="Show the fit; write nothing.")
@json_option
def calibrate(*, runs: tuple[Path, ...], dry_run: bool, as_json: bool) -> None:
    """Fit the predictor's physical constants to RUNS: run directories, or .jsonl of bench.

    What does not come from formulas is fitted (memory outside torch, allocator slack, host
    memory of a process, launch overhead, rates that kernels reach), for each kind of GPU. Every
    second run judges: a fit that predicts those no better is not taken. The rest goes into the
    site file, and every later plan uses and names it.
    """
    from launcher.calibrate.fit import fit_gpu
    from launcher.calibrate.runs import read_runs
    from launcher.hardware import SiteConstants
    from launcher.site_file import read_constants, site_path, write_constants

    found, problems = read_runs(runs)
    for problem in problems:
        say_aside(f"left out: {problem}")
    by_gpu: dict[str, list[MeasuredRun]] = {}
    for run in found:
        by_gpu.setdefault(run.cluster.gpu.name, []).append(run)
    if not by_gpu:
        raise _no_runs(len(problems))
    path, today = site_path(), datetime.now(UTC).date().isoformat()
    shown: list[dict[str, Any]] = []
    for gpu_name, its_runs in by_gpu.items():
        before = read_constants(path, gpu_name)
        fit = fit_gpu(its_runs, used_now=dict(before.values) if before else {})
        shown.append(_to_json(fit))
        if not as_json:
            _show(fit)
        if fit.is_better and not dry_run:
            values = tuple(sorted(fit.constants.items()))
            new = SiteConstants(values=values, num_runs=fit.num_runs, fitted_at=today)
            write_constants(path, gpu_name, new)
    is_better = any(item["taken"] for item in shown)
    if as_json:
        written = is_better and not dry_run
        print(json.dumps({"site_file": str(path), "written": written, "gpus": shown}, indent=1))
        return
    if not is_better:
        say("nothing predicts better than what is used now; nothing was written")
    else:
        say("nothing was written: --dry-run" if dry_run else f"wrote {path}; plans use it now")


def _no_runs(num_problems: int) -> Exception:
    from launcher.errors import RunDirError

    return RunDirError(
        f"none of {num_problems} runs can be used",
        where="calibrate",
        fix="name runs that finished on GPUs that zerofit knows",
    )


def _show(fit: GpuFit) -> None:
    say(f"{fit.gpu_name}: {fit.num_runs} runs; errors are means over runs that were not fitted")
    for verdict in fit.verdicts:
        outcome = "" if verdict.is_taken else "   not taken: no better"
        say(
            f"  {verdict.family.label:22} {verdict.error_before:6.1%} -> "
            f"{verdict.error_after:.1%}{outcome}"
        )
        for words in _changes(verdict):
            say(f"      {words}")


def _changes(verdict: Verdict) -> list[str]:
    from launcher.predict.site_constants import constant_words

    if not verdict.is_taken:
        return []
    return [
        f"{name:40} {constant_words(name, before)} -> {constant_words(name, after)}"
        for name, (before, after) in verdict.changes.items()
    ]


def _to_json(fit: GpuFit) -> dict[str, Any]:
    return {
        "gpu": fit.gpu_name,
        "num_runs": fit.num_runs,
        "taken": fit.is_better,
        "constants": dict(fit.constants),
        "quantities": [
            {
                "quantity": verdict.family.quantity,
                "num_runs": verdict.num_runs,
                "error_before": verdict.error_before,
                "error_after": verdict.error_after,
                "taken": verdict.is_taken,
                "changes": {name: list(values) for name, values in verdict.changes.items()},
            }
            for verdict in fit.verdicts
        ],
    }
