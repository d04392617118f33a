"""What a Slurm job's script runs when its ranks have failed: decide, and write the next plan.

``python -m launcher.recovery.in_job --run-dir DIR``, on one of the job's hosts. It ends with 0 when
the ranks shall be started again, in the same allocation and so without waiting in the queue; else
with the status that the job ends with. What follows from which failure is the same as elsewhere.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher import run_dir as rd
from launcher.dispatch.failure import describe_failure, is_consequence, read_failures
from launcher.dispatch.rank_lines import tail
from launcher.errors import JobFailedError, LauncherError
from launcher.failure_kind import EXIT_STATUS, FailureKind
from launcher.launch import run_files
from launcher.planning.plan import strategy_from_json
from launcher.predict.memory import estimate_memory
from launcher.prepare import Prepared, prepare
from launcher.recipe import parse_recipe
from launcher.recovery.judge import judge
from launcher.recovery.record import read_failed_attempts
from launcher.resume import set_aside
from launcher.sbatch_parts import JOB_SBATCH
from launcher.strategy import Precision

# slurmstepd's words (Slurm 22.05 and later, with or without the "_" and the "-").
_OOM_KILL = re.compile(r"slurmstepd: error: .*(oom[-_ ]kill|Out[ -]Of[ -]Memory)", re.IGNORECASE)
_TASK_KILLED = re.compile(r"srun: error: (\S+): tasks? ([\d,-]+): (Killed|Out Of Memory)")
_AGAIN = "starting the ranks again"
# Lines that begin an attempt in a log that several of them share; job.sbatch prints the second.
_BORDER = re.compile(rf"{_AGAIN}|job \d+ on .*, rendezvous ")
# Slurm writes into the log and reads nothing of these again; job.json says which job it is.
_KEPT = (rd.LOGS, rd.JOB, JOB_SBATCH)


def decide_in_job(run_dir: Path, *, job_id: str) -> int:
    """Decide what follows from the failure of a job's ranks; return the exit status.

    Raises:
        LauncherError: no further plan can be made.
    """
    error = why_the_ranks_failed(run_dir)
    supervisor = f"slurm:{job_id}"
    earlier = [item for item in read_failed_attempts(run_dir) if item.supervisor == supervisor]
    verdict = judge(run_dir, read_prepared(run_dir), error, earlier, supervisor=supervisor)
    for line in verdict.describe():
        print(line, flush=True)  # noqa: T201 - into the job's log
    if verdict.following is None:
        rd.write_status(run_dir, "failed", reason=error.problem.partition("\n")[0])
        print(f"error: {verdict.error}", file=sys.stderr)  # noqa: T201
        return EXIT_STATUS[error.kind]
    set_aside(run_dir, kept=_KEPT)
    for name, text in run_files(verdict.following.prepared).items():
        rd.write_text(run_dir / name, text)
    print(_AGAIN, flush=True)  # noqa: T201
    return 0


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
    options = parser.parse_args(arguments)
    try:
        return decide_in_job(options.run_dir, job_id=os.environ.get("SLURM_JOB_ID", "by hand"))
    except LauncherError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return EXIT_STATUS[FailureKind.other]


if __name__ == "__main__":
    sys.exit(main())
