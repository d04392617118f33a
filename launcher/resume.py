"""``zerofit resume``: go on with a run in its own directory, perhaps on other GPUs."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from launcher import run_dir as rd
from launcher.dispatch.base import read_handle, run_to_end
from launcher.dispatch.process_group import find_processes
from launcher.dispatch.run_state import observe
from launcher.dispatch.warm import ForkServers
from launcher.errors import RecipeError, RunDirError, list_problems
from launcher.launch import check_can_start, disk_bytes, render_again
from launcher.post_mortem import POST_MORTEM
from launcher.prepare import Prepared, prepare
from launcher.recipe import parse_recipe
from launcher.run_checkpoints import (
    MANIFEST,
    UNFINISHED,
    newest_checkpoint,
    why_bound_to_layout,
)
from launcher.sbatch_parts import JOB_SBATCH
from launcher.sbatch_script import NEEDS, NODES, PREFLIGHT
from launcher.strategy import Optimizer, Precision

ATTEMPTS = "attempts"
"""Folder with what earlier attempts wrote: ``attempts/1``, ``attempts/2`` …"""
SIGN_OF_LIFE_SECONDS = 60.0
"""Ranks rewrite their files every 5 s (launcher/worker/peak_memory.py) while they train."""

CHANGEABLE = (
    "cluster.",
    "strategy.",
    "slurm.",
    "recovery.",
    "tracking.",
    "deepspeed.zero_optimization.",
    "optim.save_steps",
    "optim.save_total_limit",
    "optim.logging_steps",
    "optim.eval_steps",
)
"""What may change without making it another training."""
# Without these a run cannot be started; a new attempt replaces them without taking them away.
_NEEDED = (rd.STATUS, rd.RECIPE, rd.PLAN)
# Written anew by each attempt; the log of steps, the data and the checkpoints stay.
_OF_ONE_ATTEMPT = (
    rd.RECIPE, rd.PLAN, rd.DS_CONFIG, rd.ENVIRONMENT, rd.JOB_SCRIPT, JOB_SBATCH,
    rd.HOSTFILE, rd.JOB, rd.STATUS, rd.RANKS, POST_MORTEM, rd.TIMELINES, rd.LOGS,
    rd.REPORT_JSON, rd.REPORT_MARKDOWN, rd.REPORT_HTML,
    NEEDS, PREFLIGHT, NODES,
)  # fmt: skip


def prepare_resume(run_dir: Path, overrides: Sequence[str]) -> Prepared:
    """Read the recipe of a run that stopped, and plan it for what there is now.

    Raises:
        RunDirError: this is no run, it has finished, is still in progress, or its checkpoint can
            be used by the ranks alone that saved it.
        RecipeError: an override would make it another training.
    """
    rd.check_is_run(run_dir)
    check_has_stopped(run_dir)
    wrong = [
        f"{item.partition('=')[0]} cannot change in mid-training"
        for item in overrides
        if not item.startswith(CHANGEABLE)
    ]
    if wrong:
        raise RecipeError(
            list_problems(wrong),
            where="command line",
            fix="a resumed run goes on with the same model, data and schedule; change only "
            "cluster.*, strategy.*, slurm.* and how often it saves, logs and evaluates",
        )
    path = run_dir / rd.RECIPE
    recipe = parse_recipe(rd.read_text(path), source=str(path), overrides=overrides)
    if recipe.model.precision is None:
        # Another GPU must not change the numbers' format in mid-training.
        precision = _planned_precision(run_dir / rd.PLAN)
        recipe = replace(recipe, model=replace(recipe.model, precision=precision))
    if "optimizer" in recipe.strategy.allowed and recipe.strategy.optimizer is None:
        # Nor another choice of the planner's the states of Adam.
        optimizer = _planned_optimizer(run_dir / rd.PLAN)
        recipe = replace(recipe, strategy=replace(recipe.strategy, optimizer=optimizer))
    prepared = prepare(recipe, source=str(path))
    _check_layout(run_dir, prepared)
    return prepared


def _check_layout(run_dir: Path, prepared: Prepared) -> None:
    """Raise RunDirError when the newest checkpoint cannot be used by the ranks now planned."""
    newest = newest_checkpoint(run_dir)
    if newest is None:
        return
    strategy = prepared.plan.strategy
    now = {
        "world_size": prepared.plan.cluster.world_size,
        "zero_stage": strategy.zero_stage,
        "optimizer": strategy.optimizer.value,
        "offload_optimizer": strategy.offload_optimizer.value,
    }
    saved = rd.read_json(newest / MANIFEST).get("layout", {})
    before = {key: saved.get(key) for key in now}
    if before == now:
        return
    for layout in (before, now):
        reason = why_bound_to_layout(offload_optimizer=str(layout["offload_optimizer"]))
        if reason is not None:
            raise RunDirError(
                f"this checkpoint cannot be used by other ranks or another ZeRO stage: {reason}",
                where=str(newest),
                fix=f"go on with {before['world_size']} ranks and strategy.zero_stage="
                f"{before['zero_stage']} strategy.optimizer={before['optimizer']} "
                f"strategy.offload_optimizer={before['offload_optimizer']}",
            )


def _planned_precision(plan: Path) -> Precision:
    try:
        return Precision(rd.read_json(plan)["precision"])
    except (KeyError, ValueError):
        raise _not_said(plan, "in which precision") from None


def _planned_optimizer(plan: Path) -> Optimizer:
    try:
        return Optimizer(rd.read_json(plan)["strategy"]["optimizer"])
    except (KeyError, ValueError, TypeError):
        raise _not_said(plan, "with which optimizer") from None


def _not_said(plan: Path, what: str) -> RunDirError:
    return RunDirError(
        f"it does not say {what} the run trained",
        where=str(plan),
        fix="the file was changed, or another zerofit wrote it: start a new run",
    )


def check_has_stopped(run_dir: Path) -> None:
    """Raise RunDirError when a run has finished or is still in progress."""
    status = rd.read_status(run_dir)
    if status.state == "finished":
        raise RunDirError(
            "this run has finished: there is nothing to resume",
            where=str(run_dir),
            fix=f"`zerofit report {shlex.quote(str(run_dir))}` shows it; for more steps start a "
            "new run",
        )
    who = None
    if (run_dir / rd.JOB).is_file():
        seen = observe([run_dir])[0]
        if seen.state in ("pending", "running"):
            who = f"{seen.state}, job {seen.job_id} on {seen.host}"
        elif alive := find_processes(read_handle(run_dir).run_id):
            who = f"process {alive[0].pid}"
    ranks = (run_dir / rd.RANKS).glob("[0-9]*.json")
    silence_seconds = time.time() - max((path.stat().st_mtime for path in ranks), default=0.0)
    if who is None and status.state == "running" and silence_seconds < SIGN_OF_LIFE_SECONDS:
        who = "a rank wrote less than a minute ago"
    if who is not None:
        raise RunDirError(
            f"this run is in progress ({who})",
            where=str(run_dir),
            fix="wait for it, or end it first; two jobs must not write into one run directory",
        )


def resume_run(
    run_dir: Path,
    prepared: Prepared,
    *,
    say: Callable[[str], None],
    console: BinaryIO,
    servers: ForkServers | None = None,
) -> Path:
    """Go on with a run to its end; return its absolute directory.

    What the earlier attempt wrote about itself moves to ``attempts``.

    Args:
        run_dir: accepted by :func:`prepare_resume`.
        prepared: a plan that fits.
        say: shows a line of text.
        console: where the job's output is copied.
        servers: fork the ranks, where they run on this machine.

    Raises:
        LauncherError: it cannot be started (exit status 2), failed (4) or was interrupted.
    """
    run_dir = run_dir.absolute()
    check_can_start(prepared)
    # Half a checkpoint would count as used space; the ranks remove it too.
    shutil.rmtree(run_dir / rd.CHECKPOINTS / UNFINISHED, ignore_errors=True)
    backend, request = render_again(prepared, run_dir)
    if servers is not None:
        backend = servers.warmed(backend, prepared.plan)
    kept_bytes = sum(
        path.stat().st_size for path in (run_dir / rd.CHECKPOINTS).rglob("*") if path.is_file()
    )
    rd.prove_writable(run_dir, max(0, disk_bytes(prepared) - kept_bytes))
    attempt = set_aside(run_dir)
    say(f"run directory: {run_dir}; the earlier attempt's files are in {attempt.name}")
    run_to_end(backend, request, run_dir=run_dir, console=console)
    return run_dir


def set_aside(run_dir: Path, *, kept: Sequence[str] = _NEEDED) -> Path:
    """Move what the last attempt wrote about itself into a new folder; return it.

    Files that are ``kept`` are copied: a command that is killed right now can be given again.
    Folders that are stay where they are.
    """
    parent = run_dir / ATTEMPTS
    parent.mkdir(exist_ok=True)
    number = 1 + max((int(p.name) for p in parent.iterdir() if p.name.isdigit()), default=0)
    target = parent / str(number)
    target.mkdir()
    for name in _OF_ONE_ATTEMPT:
        if not (run_dir / name).exists() or (name in kept and (run_dir / name).is_dir()):
            continue
        if name in kept:
            shutil.copy2(run_dir / name, target / name)
        else:
            (run_dir / name).rename(target / name)
    for name in (rd.RANKS, rd.LOGS):
        (run_dir / name).mkdir(exist_ok=True)
    rd.write_status(run_dir, "created")
    return target
