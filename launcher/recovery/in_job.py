"""What a Slurm job's script runs when its ranks have failed: decide, and write the next plan.

``python -m launcher.recovery.in_job --run-dir DIR``, on one of the job's hosts. It ends with 0 when
the ranks shall be started again, in the same allocation and so without waiting in the queue; else
with the status that the job ends with. What follows from which failure is the same as elsewhere.

A job that may go on with fewer nodes (recovery.min_nodes) also says ``--left node1,node3``: where
Slurm can start something. The names of the nodes to use then stand in the file ``nodes``. With
``--start N`` no rank has run yet: the plan is made anew if it is not for as many nodes as there
are, N at most.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from launcher import run_dir as rd
from launcher.dispatch.failure import (
    HostLostError,
    LostHost,
    describe_failure,
    describe_lost_hosts,
    is_consequence,
    read_failures,
)
from launcher.dispatch.rank_lines import tail
from launcher.dispatch.run_state import last_logged
from launcher.errors import JobFailedError, LauncherError
from launcher.failure_kind import EXIT_STATUS, FailureKind
from launcher.launch import run_files
from launcher.planning.plan import strategy_from_json
from launcher.predict.memory import estimate_memory
from launcher.prepare import Prepared, prepare
from launcher.recipe import parse_recipe
from launcher.recovery.decide import Action
from launcher.recovery.judge import judge
from launcher.recovery.other_hosts import NoOtherHostsError, on_nodes_left
from launcher.recovery.record import (
    FailedAttempt,
    append_failed_attempt,
    read_failed_attempts,
)
from launcher.resume import set_aside
from launcher.run_checkpoints import newest_checkpoint
from launcher.sbatch_parts import JOB_SBATCH, REQUEUE_MARKER
from launcher.sbatch_script import NODES, PREFLIGHT
from launcher.starter_lock import give_up_ranks
from launcher.strategy import Precision

# slurmstepd's words (Slurm 22.05 and later, with or without the "_" and the "-").
_OOM_KILL = re.compile(r"slurmstepd: error: .*(oom[-_ ]kill|Out[ -]Of[ -]Memory)", re.IGNORECASE)
_TASK_KILLED = re.compile(r"srun: error: (\S+): tasks? ([\d,-]+): (Killed|Out Of Memory)")
_AGAIN = "starting the ranks again"
# Lines that begin an attempt in a log that several of them share; job.sbatch prints the second.
_BORDER = re.compile(rf"{_AGAIN}|job \d+ on .*, rendezvous ")
# Slurm writes into the log and reads nothing of these again; job.json says which job it is.
_KEPT = (rd.LOGS, rd.JOB, JOB_SBATCH)


def decide_in_job(run_dir: Path, *, job_id: str, left: Sequence[str] | None = None) -> int:
    """Decide what follows from the failure of a job's ranks; return the exit status.

    Args:
        run_dir: of the run.
        job_id: Slurm's.
        left: names of the nodes on which Slurm can start something; ``None`` where the run does
            not go on with fewer.

    Raises:
        LauncherError: no further plan can be made.
    """
    used = rd.read_text(run_dir / NODES).strip().split(",") if left is not None else []
    usable = good_nodes(run_dir, used, left or ())
    lost = tuple(name for name in used if name not in usable)
    error = why_nodes_are_lost(run_dir, lost, usable) if lost else why_the_ranks_failed(run_dir)
    if lost:
        # Before the record is written, which belongs to the attempt that ended last.
        rd.write_status(run_dir, "interrupted", reason=error.problem.replace("\n", " "))
    supervisor = f"slurm:{job_id}"
    earlier = [item for item in read_failed_attempts(run_dir) if item.supervisor == supervisor]
    verdict = judge(run_dir, read_prepared(run_dir), error, earlier, supervisor=supervisor)
    for line in verdict.describe():
        print(line, flush=True)  # noqa: T201 - into the job's log
    if verdict.record.action == Action.requeue:
        return _ask_for_requeue(run_dir, f"{error.problem}; {verdict.record.reason}")
    if verdict.following is None:
        rd.write_status(run_dir, "failed", reason=error.problem.partition("\n")[0])
        print(f"error: {verdict.error}", file=sys.stderr)  # noqa: T201
        return EXIT_STATUS[error.kind]
    write_files(run_dir, verdict.following.prepared, usable)
    if lost:
        # Ranks on a node that Slurm cannot reach may live; they must be gone before others begin.
        give_up_ranks(run_dir, now=verdict.record.failed_at)
        time.sleep(verdict.following.wait_seconds)
    print(_AGAIN, flush=True)  # noqa: T201
    return 0


def fit_to_nodes(run_dir: Path, *, left: Sequence[str], num_wanted: int) -> int:
    """Make the plan for as many nodes as a job that starts has; return the exit status.

    Another one than before, if the job comes back with fewer nodes, or with all of them after it
    had gone on with fewer.

    Args:
        run_dir: of the run.
        left: names of the job's nodes.
        num_wanted: that the run has at best.

    Raises:
        LauncherError: no plan can be made.
    """
    prepared = read_prepared(run_dir)
    before = prepared.plan.cluster.num_nodes
    if before != min(len(left), num_wanted):
        try:
            found = on_nodes_left(run_dir, prepared, len(left), num_wanted=num_wanted)
        except NoOtherHostsError as why:
            reason = f"the job has {len(left)} nodes; {why}"
            rd.write_status(run_dir, "interrupted", reason=reason)
            return _ask_for_requeue(run_dir, reason)
        after = found.plan.cluster.num_nodes
        # Not every number of nodes divides the global batch: the plan may be the best there is.
        if after != before:
            append_failed_attempt(run_dir, _resized(run_dir, before, after, left=left))
            print(f"another plan for the nodes that there are: num_nodes {before} → {after}")  # noqa: T201
            write_files(run_dir, found, left)
            return 0
    rd.write_text(run_dir / NODES, ",".join(left[:before]) + "\n")
    return 0


def _resized(run_dir: Path, before: int, after: int, *, left: Sequence[str]) -> FailedAttempt:
    checkpoint = newest_checkpoint(run_dir)
    problem = f"the job came back with another number of nodes than the plan's {before}"
    if after < before and (run_dir / NODES).is_file():
        used = rd.read_text(run_dir / NODES).strip().split(",")
        if gone := [name for name in used if name not in left]:
            problem = f"the job came back without {', '.join(gone)}"
    return FailedAttempt(
        attempt=1,
        supervisor=f"queue:{os.environ.get('SLURM_JOB_ID', 'by hand')}",
        failed_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        kind=FailureKind.lost_host if after < before else FailureKind.interrupted,
        problem=problem,
        step=last_logged(run_dir)[0] or 0,
        action=Action.other_hosts,
        reason="it goes on with those that there are",
        changes={"num_nodes": (before, after)},
        resumes_from_step=int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0,
    )


def write_files(run_dir: Path, prepared: Prepared, usable: Sequence[str]) -> None:
    """Write the files of the next plan, and the names of the nodes that it takes."""
    # What the look at the nodes found holds for as long as the job has them.
    set_aside(run_dir, kept=(*_KEPT, PREFLIGHT) if usable else _KEPT)
    for name, text in run_files(prepared).items():
        rd.write_text(run_dir / name, text)
    if usable:
        rd.write_text(run_dir / NODES, ",".join(usable[: prepared.plan.cluster.num_nodes]) + "\n")


def good_nodes(run_dir: Path, used: Sequence[str], left: Sequence[str]) -> list[str]:
    """Return the nodes that are left: those that were used, then those that looked good."""
    checked = run_dir / PREFLIGHT
    hosts = rd.read_json(checked)["hosts"] if checked.exists() else []
    bad = {host["name"] for host in hosts if not host["ok"]}
    return sorted((name for name in left if name not in bad), key=lambda name: name not in used)


def why_nodes_are_lost(run_dir: Path, lost: Sequence[str], usable: Sequence[str]) -> HostLostError:
    """Return the error that names nodes on which Slurm can start nothing any more."""
    problem, fix = "Slurm cannot start anything there", "`sinfo --long --nodes` shows why"
    hosts = [LostHost(host=name, problem=problem, fix=fix) for name in lost]
    return describe_lost_hosts(hosts, where=str(run_dir), num_left=len(usable))


def _ask_for_requeue(run_dir: Path, reason: str) -> int:
    (run_dir / REQUEUE_MARKER).touch()
    print(f"error: {reason}", file=sys.stderr)  # noqa: T201
    return EXIT_STATUS[FailureKind.lost_host]


def why_the_ranks_failed(run_dir: Path) -> JobFailedError:
    """Return why a step of ranks ended: from what they wrote, else from what Slurm printed."""
    failures = read_failures(run_dir)
    if failures and not is_consequence(failures[0]):
        return describe_failure(run_dir, exit_code=None)
    log = _lines_of_last_attempt(tail(run_dir))
    killed = next((match for line in log if (match := _TASK_KILLED.search(line))), None)
    where = str(run_dir / rd.LAUNCHER_LOG)
    who = f"rank {killed[2]} on {killed[1]}" if killed else "a rank"
    if any(_OOM_KILL.search(line) for line in log) or (killed and killed[3] != "Killed"):
        return JobFailedError(
            f"{who} was killed: the memory that Slurm gave the job on that host ran out",
            where=where,
            fix="ask for more with slurm.mem, use fewer ranks, or less offload to the CPU",
            kind=FailureKind.host_oom,
        )
    if killed:
        return JobFailedError(
            f"{who} was killed", where=where, fix="see the log", kind=FailureKind.killed
        )
    return describe_failure(run_dir, exit_code=None)


def _lines_of_last_attempt(log: list[str]) -> list[str]:
    borders = [number for number, line in enumerate(log) if _BORDER.match(line)]
    return log[borders[-1] :] if borders else log


def read_prepared(run_dir: Path) -> Prepared:
    """Return what a run directory was planned for, as this host sees it.

    Raises:
        LauncherError: a file is missing or broken.
    """
    path, plan = run_dir / rd.RECIPE, rd.read_json(run_dir / rd.PLAN)
    recipe = parse_recipe(rd.read_text(path), source=str(path))
    # The nodes that the job has, and not what one of them sees of itself.
    cluster = replace(
        recipe.cluster, num_nodes=plan["num_nodes"], gpus_per_node=plan["gpus_per_node"]
    )
    model = replace(recipe.model, precision=Precision(plan["precision"]))
    found = prepare(replace(recipe, cluster=cluster, model=model), source=str(path))
    strategy = strategy_from_json(plan["strategy"])
    memory = estimate_memory(found.plan.workload, strategy, found.plan.cluster)
    return replace(found, plan=replace(found.plan, strategy=strategy, memory=memory))


def main(arguments: Sequence[str] | None = None) -> int:
    """Decide, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m launcher.recovery.in_job", allow_abbrev=False)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--left", type=lambda names: [name for name in names.split(",") if name])
    parser.add_argument("--start", type=int, metavar="N")
    options = parser.parse_args(arguments)
    run_dir, left = options.run_dir, options.left
    try:
        if options.start is not None:
            return fit_to_nodes(run_dir, left=left or (), num_wanted=options.start)
        job_id = os.environ.get("SLURM_JOB_ID", "by hand")
        return decide_in_job(run_dir, job_id=job_id, left=left)
    except LauncherError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return EXIT_STATUS[FailureKind.other]


if __name__ == "__main__":
    sys.exit(main())
