"""Why a Slurm job did not finish: from the ranks, from Slurm, and from what srun printed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher import run_dir as rd
from launcher.dispatch import slurm_commands as slurm
from launcher.dispatch.failure import (
    LostHost,
    describe_failure,
    is_consequence,
    read_failures,
)
from launcher.dispatch.rank_lines import tail
from launcher.errors import JobFailedError
from launcher.failure_kind import FailureKind
from launcher.sbatch_script import NODES, PREFLIGHT

BY_SLURM = {
    "NODE_FAIL": (
        "a node failed",
        "start it again; sbatch's --exclude in slurm.extra leaves a bad node out",
    ),
    "TIMEOUT": (
        "the time limit was reached",
        "ask for more time (slurm.time, --time of your own script), or set optim.save_steps",
    ),
    "CANCELLED": ("it was cancelled", "start it again in a new folder"),
    "PREEMPTED": ("a job of higher priority took its nodes", "start it again"),
    "OUT_OF_MEMORY": (
        "a node ran out of the memory that Slurm gave the job",
        "ask for more with slurm.mem, use fewer ranks, or less offload to the CPU",
    ),
    "BOOT_FAIL": ("a node did not boot", "start it again"),
    "DEADLINE": ("its deadline passed", "start it again without --deadline"),
}
"""Ends that Slurm decides, with what to do: what the ranks say then is only how they took it."""
_KINDS = {
    "NODE_FAIL": FailureKind.lost_host,
    "BOOT_FAIL": FailureKind.lost_host,
    "OUT_OF_MEMORY": FailureKind.host_oom,
}
"""The other ends were wished for by somebody."""
_BAD_NODES = (
    f"{PREFLIGHT} has all that was found; sbatch's --exclude in slurm.extra leaves a node out, "
    "slurm.spare_nodes goes on without it"
)
# What srun and slurmstepd print, with the host (Slurm 22.05).
_NODE_FAILURE = re.compile(r"srun: error: Node failure on (\S+)")
_TASK_ENDED = re.compile(r"srun: error: (\S+): tasks? ([\d,-]+): (.+)")
_SRUN_ERROR = re.compile(r"(?:srun|slurmstepd): error: (.+)")
# Slurm 22.05 without cgroups calls it a failure (JobAcctGatherParams=OverMemoryKill).
_OVER_MEMORY = re.compile(r"slurmstepd.*: error: (Exceeded|.* exceeded) (job |step )?memory limit")
_TOLD_TO_STOP = re.compile(r"Terminated|exit code 143")
_KILLED = "Killed"


def describe_slurm_failure(
    run_dir: Path, state: slurm.SlurmJobState, *, lost_hosts: Sequence[LostHost] = ()
) -> JobFailedError:
    """Return the error for ranks that have ended without finishing the run.

    Args:
        run_dir: the run's directory.
        state: the job's; somebody's allocation may go on.
        lost_hosts: nodes that Slurm may not know to be lost.
    """
    log = tail(run_dir)
    early = _bad_nodes(run_dir)
    if state.state == "FAILED" and any(_OVER_MEMORY.search(line) for line in log):
        state = replace(state, state="OUT_OF_MEMORY")
    if state.state in BY_SLURM:
        early = _ended_by_slurm(run_dir, state, log)
    if early is not None:
        return early
    failures = read_failures(run_dir)
    if lost_hosts or (failures and not is_consequence(failures[0])):
        return describe_failure(run_dir, exit_code=None, lost_hosts=lost_hosts)
    where = str(run_dir / rd.LAUNCHER_LOG)
    lost = _lost_nodes(state, log)
    if lost:
        return JobFailedError(
            f"job {state.job_id}: a node failed: {lost}",
            where=where,
            fix=BY_SLURM["NODE_FAIL"][1],
            kind=FailureKind.lost_host,
        )
    ended = [match for line in log if (match := _TASK_ENDED.search(line))]
    # Those that were told to stop because of another one come last.
    ended.sort(key=lambda match: bool(_TOLD_TO_STOP.search(match[3])))
    if ended:
        host, ranks, how = ended[0].groups()
        fix = "the log has what the rank printed last"
        if how.startswith(_KILLED):
            fix = "the host probably ran out of memory (slurm.mem); use fewer ranks or less offload"
        return JobFailedError(f"rank {ranks} on {host} ended: {how}", where=where, fix=fix)
    if failures:
        return describe_failure(run_dir, exit_code=None)
    said = [match[1] for line in log if (match := _SRUN_ERROR.search(line))] or log[-1:]
    problem = f"job {state.job_id} ended as {state.state} ({state.reason or 'no reason given'})"
    if not state.has_ended:
        problem = f"the ranks in job {state.job_id} ended and the run is not marked as finished"
    elif state.state == "COMPLETED":
        problem = f"job {state.job_id} ended and the run is not marked as finished"
    return JobFailedError(
        problem + (f": {said[-1].strip()}" if said else ""),
        where=where,
        fix="the log has all that was printed",
    )


def _bad_nodes(run_dir: Path) -> JobFailedError | None:
    """Return the error of a job whose look at its nodes let no rank start."""
    if not (run_dir / PREFLIGHT).exists() or (run_dir / NODES).exists():
        return None
    reason = rd.read_status(run_dir).reason or "nodes are bad"
    return JobFailedError(reason, where=str(run_dir), fix=_BAD_NODES, kind=FailureKind.lost_host)


def describe_unknown_end(run_dir: Path, job_id: str) -> JobFailedError:
    """Return the error for a job that Slurm cannot be asked about, or has forgotten."""
    if read_failures(run_dir):
        return describe_failure(run_dir, exit_code=None)
    return JobFailedError(
        f"Slurm no longer knows job {job_id}, and the run is not marked as finished",
        where=str(run_dir),
        fix=f"`sacct -j {job_id}` may know more, and {rd.LAUNCHER_LOG} has all that was printed",
    )


def _ended_by_slurm(run_dir: Path, state: slurm.SlurmJobState, log: list[str]) -> JobFailedError:
    what, fix = BY_SLURM[state.state]
    problem = f"job {state.job_id}: {what}"
    if state.state == "NODE_FAIL":
        problem += f": {_lost_nodes(state, log) or state.nodes}"
    elif state.state == "OUT_OF_MEMORY":
        hosts = dict.fromkeys(match[1] for line in log if (match := _TASK_ENDED.search(line)))
        problem += f": {', '.join(hosts) or state.nodes}"
    elif state.state == "CANCELLED" and state.reason:
        problem += f" ({state.reason})"
    kind = _KINDS.get(state.state, FailureKind.interrupted)
    return JobFailedError(problem, where=str(run_dir), fix=fix, kind=kind)


def _lost_nodes(state: slurm.SlurmJobState, log: list[str]) -> str:
    """Return the nodes of the job that Slurm has lost and why; empty when there is none."""
    try:
        bad = slurm.failed_nodes(state.nodes) if state.nodes else ""
    except slurm.ControllerError:
        bad = ""
    named = dict.fromkeys(match[1] for line in log if (match := _NODE_FAILURE.search(line)))
    return bad or ", ".join(named)
