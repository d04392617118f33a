"""Slurm's own programs: submit, ask, cancel; what they print, as values."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import JobFailedError, LauncherError, SetupError
from launcher.sbatch_directives import minutes_of

# squeue tries for some 4 s when the controller is down, sbatch for 8 s (Slurm 22.05, measured).
ASK_TIMEOUT_SECONDS = 12.0
SUBMIT_TIMEOUT_SECONDS = 60.0

PENDING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"})
ACTIVE = frozenset(
    {"RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT",
     "RESIZING"}
)  # fmt: skip
"""States of a job that has begun and not ended; any other one is an end.

Source: squeue(1), JOB STATE CODES, Slurm 22.05.
"""


class ControllerError(LauncherError):
    """Slurm does not answer; nothing is known about the job, which may well go on."""


class RejectedError(JobFailedError):
    """Slurm did not take a job; nothing has started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmJobState:
    """What Slurm says of a job."""

    job_id: str
    state: str
    """Slurm's word: PENDING, RUNNING, COMPLETED, NODE_FAIL …"""
    reason: str
    nodes: str
    """Slurm's short form, as node[1-4]; empty before the job starts."""
    expected_start: str | None = None

    @property
    def is_pending(self) -> bool:
        """It waits for its turn, the first time or again."""
        return self.state in PENDING

    @property
    def has_ended(self) -> bool:
        """It will not go on."""
        return self.state not in PENDING | ACTIVE


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What Slurm says of jobs by number; those that it no longer knows are left out."""

    jobs: dict[str, SlurmJobState]
    accounting_problem: str | None = None
    """Why accounting says nothing of jobs that the controller has forgotten."""


def check_programs() -> None:
    """Raise SetupError unless Slurm's programs are installed here."""
    import shutil

    programs = ("sbatch", "squeue", "scontrol", "scancel")
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        raise SetupError(
            f"{', '.join(missing)} not found: this is no login node of a Slurm cluster",
            where="this machine",
            fix="start it on a login node, or set cluster.backend to local or deepspeed",
        )


def check_cluster() -> None:
    """Raise SetupError where the environment sends jobs to another cluster than this one.

    Its controller would have to be asked for the job later, from wherever that is done.
    """
    elsewhere = os.environ.get("SLURM_CLUSTERS")
    if elsewhere:
        raise SetupError(
            f"SLURM_CLUSTERS names {elsewhere}, and zerofit asks this machine's own cluster",
            where="environment",
            fix="unset it, and submit on a login node of that cluster",
        )


def submit(argv: Sequence[str], *, env: Mapping[str, str], cwd: Path) -> str:
    """Run ``sbatch`` and return the job's number.

    Raises:
        RejectedError: Slurm refuses the job or does not answer; its message is shown.
        SetupError: there is no sbatch.
    """
    return _run_sbatch(argv, env=env, cwd=cwd).strip().partition(";")[0]


def check_accepted(script: str, *, cwd: Path) -> None:
    """Ask Slurm whether it would take a job, without submitting it.

    Raises:
        RejectedError: it would not.
    """
    _run_sbatch(("sbatch", "--test-only", script), env={}, cwd=cwd)


def ask(job_ids: Iterable[str]) -> dict[str, SlurmJobState]:
    """Return what Slurm says of jobs by number; those that it no longer knows are left out.

    Raises:
        ControllerError: the controller does not answer.
    """
    return ask_all(job_ids).jobs


def ask_all(job_ids: Iterable[str]) -> Answer:
    """Ask the controller, and for jobs that it has forgotten the accounting, if there is one.

    Raises:
        ControllerError: the controller does not answer.
    """
    wanted = list(dict.fromkeys(job_ids))
    if not wanted:
        return Answer(jobs={})
    found = _ask_controller(wanted)
    forgotten = [job_id for job_id in wanted if job_id not in found]
    if not forgotten:
        return Answer(jobs=found)
    try:
        return Answer(jobs={**_ask_accounting(forgotten), **found})
    except ControllerError as error:
        return Answer(jobs=found, accounting_problem=f"sacct: {error.problem}")


def cancel(job_id: str, *, step_name: str | None = None) -> None:
    """Cancel a job, or only those of its steps that have a name.

    Raises:
        ControllerError: Slurm does not answer, or does not permit it.
    """
    if step_name is None:
        _run(["scancel", job_id])
        return
    shown = _run(["squeue", "--noheader", "--steps", "--jobs", job_id, "--format", "%i|%j"])
    for line in shown.splitlines():
        step, _, name = line.strip().partition("|")
        if name == step_name:
            _run(["scancel", step])


def failed_nodes(nodes: str) -> str:
    """Return which of some nodes are down or do not answer and why; empty when none is.

    Raises:
        ControllerError: Slurm does not answer.
    """
    shown = _run(["sinfo", "--noheader", "--Node", "--nodes", nodes, "--format", "%N|%T|%E"])
    return parse_failed_nodes(shown)


def parse_failed_nodes(shown: str) -> str:
    """Return what :func:`failed_nodes` does, from what sinfo printed."""
    lines = dict.fromkeys(line.strip() for line in shown.splitlines())  # one per partition
    bad = []
    for line in lines:
        name, state, reason = [*line.split("|", 2), "", ""][:3]
        if state.endswith("*") or re.match(r"down|fail|drain", state):
            why = f", {reason}" if reason not in ("", "none") else ""
            bad.append(f"{name} ({state.rstrip('*')}{why})")
    return ", ".join(bad)


def partition_minutes(partition: str | None) -> float | None:
    """Return how long a job may take in a partition, or in the default one.

    Returns:
        Minutes; of several partitions, of the strictest. ``None`` when there is no limit.

    Raises:
        ControllerError: Slurm does not answer.
    """
    which = ["--partition", partition] if partition else []
    shown = _run(["sinfo", "--noheader", "--format", "%P|%l", *which])
    lines = [line.strip().rpartition("|") for line in shown.splitlines()]
    limits = [
        minutes_of(limit) for name, _, limit in lines if partition is not None or name[-1:] == "*"
    ]
    return min((limit for limit in limits if limit is not None), default=None)


def minutes_left(job_id: str) -> float | None:
    """Return how much of its time a running job has left; ``None`` without a limit.

    Raises:
        ControllerError: Slurm does not answer, or does not know the job.
    """
    # Also NOT_SET and INVALID (squeue(1)), which are no times.
    return minutes_of(_run(["squeue", "--noheader", "--jobs", job_id, "--format", "%L"]).strip())


def _ask_controller(job_ids: Sequence[str]) -> dict[str, SlurmJobState]:
    # Names and comments, which may hold anything, are not asked for; reasons have no '|'.
    form = "%i|%T|%r|%N|%S"
    flags = ["--noheader", "--array", "--states=all", "--format", form]
    try:
        shown = _run(["squeue", *flags, "--jobs", ",".join(job_ids)])
    except ControllerError as error:
        if "Invalid job id" in error.problem:
            return {}
        raise
    return parse_jobs(shown)


def parse_jobs(shown: str) -> dict[str, SlurmJobState]:
    """Return the jobs that squeue printed, by number."""
    found = {}
    for line in shown.splitlines():
        job_id, state, reason, nodes, start = (line.strip().split("|") + [""] * 4)[:5]
        found[job_id] = SlurmJobState(
            job_id=job_id,
            state=state,
            reason="" if reason == "None" else reason,
            nodes=nodes,
            expected_start=start if start not in ("", "N/A") else None,
        )
    return found


def _ask_accounting(job_ids: Sequence[str]) -> dict[str, SlurmJobState]:
    columns = "--format=JobID,State,NodeList,Reason"
    argv = ["sacct", "--allocations", "--noheader", "--parsable2", columns]
    # Of an array that never started there is one line; it is not found by the number of a task.
    asked = dict.fromkeys(job_id.partition("_")[0] for job_id in job_ids)
    try:
        shown = _run([*argv, "--jobs", ",".join(asked)])
    except ControllerError as error:
        # What most clusters without slurmdbd say, and those without sacct.
        if re.search("storage is disabled|cannot be started", error.problem):
            return {}
        raise
    return parse_accounting(shown, job_ids)


def parse_accounting(shown: str, job_ids: Sequence[str]) -> dict[str, SlurmJobState]:
    """Return those of some jobs that sacct printed, by number."""
    found = {}
    for line in shown.splitlines():
        printed, state, nodes, reason = (line.strip().split("|") + [""] * 3)[:4]
        # 'CANCELLED by 1000'
        word, _, who = state.partition(" ")
        for job_id in job_ids:
            if job_id != printed and not _is_task(job_id, printed):
                continue
            found[job_id] = SlurmJobState(
                job_id=job_id,
                state=word,
                reason=_with_name(who) or ("" if reason == "None" else reason),
                nodes="" if nodes == "None assigned" else nodes,
            )
    return found


def _is_task(job_id: str, tasks: str) -> bool:
    """Return whether '7_1' is one of '7_[0-1,4%2]'."""
    own = re.fullmatch(r"(\d+)_(\d{1,9})", job_id, re.ASCII)
    match = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", tasks, re.ASCII)
    if own is None or match is None or match[1] != own[1]:
        return False
    ranges = re.findall(r"\b(\d{1,9})(?:-(\d{1,9}))?\b", match[2])
    return any(int(first) <= int(own[2]) <= int(last or first) for first, last in ranges)


def _with_name(who: str) -> str:
    """Return 'by ada' for 'by 1000', where the system knows the user."""
    number = who.removeprefix("by ")
    try:
        return f"by {pwd.getpwuid(int(number)).pw_name}"
    except (KeyError, ValueError, OverflowError):
        return who


def _run(argv: Sequence[str]) -> str:
    """Run one of Slurm's programs and return what it printed.

    Raises:
        ControllerError: it failed; its message is in the error.
    """
    try:
        done = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=ASK_TIMEOUT_SECONDS,
            stdin=subprocess.DEVNULL,
            env=own_environment(),
        )
    except subprocess.TimeoutExpired:
        raise ControllerError(
            f"no answer within {ASK_TIMEOUT_SECONDS:.0f} s", where=argv[0], fix=_ASK_AGAIN
        ) from None
    except OSError as error:
        raise ControllerError(
            f"cannot be started: {error.strerror}", where=argv[0], fix="run it on a login node"
        ) from None
    if done.returncode != 0:
        said = _one_line(done.stderr) or f"exit status {done.returncode}"
        raise ControllerError(said, where=argv[0], fix=_ASK_AGAIN)
    return done.stdout


_ASK_AGAIN = "try again; `sinfo` shows whether the controller is up"


def _run_sbatch(argv: Sequence[str], *, env: Mapping[str, str], cwd: Path) -> str:
    try:
        done = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=SUBMIT_TIMEOUT_SECONDS,
            stdin=subprocess.DEVNULL,
            env={**own_environment(), **env},
            cwd=cwd,
        )
    except subprocess.TimeoutExpired:
        raise RejectedError(
            f"no answer within {SUBMIT_TIMEOUT_SECONDS:.0f} s; the job may have been submitted",
            where="sbatch",
            fix="look for it with `squeue --me` before trying again",
        ) from None
    except OSError as error:
        raise SetupError(
            f"sbatch cannot be started: {error.strerror}",
            where="this machine",
            fix="run it on a login node of the cluster",
        ) from None
    if done.returncode == 0:
        return done.stdout
    said = _one_line(done.stderr) or f"exit status {done.returncode}"
    fix = "change the slurm settings of the recipe or the site file"
    if re.search(
        "contact slurm controller|configuration source|Connection (refused|timed out)", said
    ):
        fix = "try again when `sinfo` answers"
    raise RejectedError(f"Slurm did not take the job: {said}", where="sbatch", fix=fix)


def own_environment() -> dict[str, str]:
    """Return this process's variables without those of a job that it may be part of.

    sbatch, and the job's own srun, would take them for options.
    """
    kept = {"SLURM_CONF", "SLURM_TIME_FORMAT"}
    return {
        name: value
        for name, value in os.environ.items()
        if name in kept or not name.startswith(("SLURM_", "SLURMD_", "SRUN_"))
    }


def _one_line(text: str) -> str:
    """Join lines of an error message, without the program's name before each."""
    lines = (re.sub(r"^\w+: (error: )?", "", line.strip()) for line in text.splitlines())
    return "; ".join(line for line in lines if line)
