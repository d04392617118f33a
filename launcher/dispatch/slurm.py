"""Backend ``slurm``: a batch job of one task per GPU, submitted by sbatch."""

from __future__ import annotations

import logging
import math
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from launcher import run_dir as rd
from launcher.dispatch import slurm_commands as slurm
from launcher.dispatch.base import JobHandle, new_run_id, write_files, write_handle
from launcher.dispatch.interruptions import Interruptions
from launcher.dispatch.slurm_watch import watch_job
from launcher.errors import RunDirError, SetupError
from launcher.job_script import WORKER_MODULE, DeepSpeedJob, JobRequest
from launcher.planning.plan import Plan
from launcher.recipe_sections import SlurmSection
from launcher.sbatch_directives import (
    minutes_of,
    suggest_signal_seconds,
    suggest_time_limit_minutes,
)
from launcher.sbatch_parts import JOB_SBATCH
from launcher.sbatch_script import SlurmJob, render_slurm_job

_log = logging.getLogger(__name__)

NAME = "slurm"
USUAL_START_SECONDS = 60.0
"""Before the first step, where nothing is known: ranks on the tests' processors start in 20 s."""


@dataclass(frozen=True, kw_only=True)
class SlurmBackend:
    """Submits a job to Slurm; whoever waits for it may leave, and the job goes on."""

    settings: SlurmSection
    """Of the recipe and the site file together."""
    num_steps: int | None = None
    """Optimizer steps of the run, from which its time limit follows; ``None`` if unknown."""
    partition_minutes: float | None = None
    """Longest time of a job in the partition; a run that needs more is a chain of jobs."""
    min_nodes: int | None = None
    """With how many nodes the run goes on when it loses others (recovery.min_nodes)."""
    has_data: bool = False
    python: str = sys.executable
    run_id: str = field(default_factory=new_run_id)
    worker_module: str = WORKER_MODULE
    name: str = NAME

    def check_place(self, plan: Plan) -> None:  # noqa: ARG002  the nodes are not seen from here
        """Raise SetupError unless jobs can be submitted from here."""
        slurm.check_programs()
        slurm.check_cluster()

    def job(self, plan: Plan, run_dir: Path) -> SlurmJob:
        """Return what the script says."""
        gpu, step_seconds = plan.cluster.gpu, plan.time.step_seconds
        ranks = DeepSpeedJob(
            run_dir=PurePosixPath(run_dir),
            run_id=self.run_id,
            python=PurePosixPath(self.python),
            ranks_per_node=plan.cluster.gpus_per_node,
            device_type=gpu.device_type,
            master_port=0,
            omp_num_threads=1,
            compute_capability=gpu.compute_capability,
            expandable_segments=plan.strategy.expandable_segments,
            worker_module=self.worker_module,
            has_data=self.has_data,
        )
        limit = self._limit_minutes(step_seconds)
        signal_seconds = suggest_signal_seconds(plan.checkpoint_seconds, step_seconds)
        if limit is not None:
            # Else there is no time to train in.
            signal_seconds = min(signal_seconds, int(limit * 60 / 2))
        return SlurmJob(
            ranks=ranks,
            num_nodes=plan.cluster.num_nodes,
            settings=self.settings,
            signal_seconds=signal_seconds,
            time_limit_minutes=None if limit is None else max(1, int(limit)),
            min_nodes=self.min_nodes,
        )

    def num_jobs(self, plan: Plan) -> int:
        """Return how many jobs in a row the run needs; 1 where that is not known."""
        limit = self._limit_minutes(plan.time.step_seconds)
        if self.num_steps is None or limit is None:
            return 1
        job = self.job(plan, Path("/"))
        lead = self.settings.signal_seconds or job.signal_seconds
        usable_seconds = max(60.0, limit * 60 - lead - USUAL_START_SECONDS)
        return math.ceil(self.num_steps * plan.time.step_seconds / usable_seconds)

    def _limit_minutes(self, step_seconds: float) -> float | None:
        """Return the time limit of one job; ``None`` leaves it to the partition, unseen."""
        if self.settings.time is not None:
            return minutes_of(self.settings.time)
        if self.num_steps is None:
            return None
        suggested = suggest_time_limit_minutes(self.num_steps, step_seconds)
        return min(suggested, self.partition_minutes or suggested)

    def in_partition(self) -> SlurmBackend:
        """Return the same backend, knowing how long its partition lets a job run."""
        try:
            minutes = slurm.partition_minutes(self.settings.partition)
        except slurm.ControllerError as error:
            _log.warning("the partition's time limit is not known: %s", error.problem)
            return self
        return replace(self, partition_minutes=minutes)

    def with_steps(self, num_steps: int) -> SlurmBackend:
        """Return the same backend for a run whose number of steps is known by now."""
        return replace(self, num_steps=num_steps)

    def render(self, plan: Plan, *, run_dir: Path, files: Mapping[str, str]) -> JobRequest:
        """Return what :meth:`submit` would run. Pure; ``--dry-run`` stops here.

        Raises:
            SetupError: the Slurm settings cannot be used.
            RunDirError: the path cannot stand in a script.
        """
        return render_slurm_job(self.job(plan, run_dir), files=files)

    def submit(self, request: JobRequest, *, run_dir: Path) -> JobHandle:
        """Write the files and submit the job.

        Raises:
            RejectedError: Slurm did not take it.
            RunDirError: the files cannot be written.
        """
        write_files(request, run_dir)
        # Slurm makes it only when the job starts, and whoever watches looks at once.
        (run_dir / rd.LAUNCHER_LOG).touch()
        job_id = slurm.submit(request.argv, env=request.env, cwd=run_dir)
        handle = handle_of(job_id, run_id=self.run_id, run_dir=run_dir)
        keep_handles([handle], job_id=job_id, folder=run_dir)
        return handle

    def wait(
        self, handle: JobHandle, *, interruptions: Interruptions, console: BinaryIO | None
    ) -> None:
        """Return when the run has finished.

        Raises:
            JobFailedError: it did not finish.
            InterruptionError: a signal ended the waiting; the job goes on.
            JobInterruptedError: Ctrl-C came twice; the job is cancelled.
        """
        watch_job(handle, interruptions=interruptions, console=console)


def handle_of(job_id: str, *, run_id: str, run_dir: Path) -> JobHandle:
    """Return the handle of a Slurm job; Slurm knows everything else."""
    return JobHandle(
        backend=NAME, run_dir=run_dir, run_id=run_id, job_id=job_id, host=socket.gethostname()
    )


def keep_handles(handles: Sequence[JobHandle], *, job_id: str, folder: Path) -> None:
    """Write the handles of a submitted job, or cancel it: nobody would find it again.

    Args:
        handles: of the job, or of each task of an array.
        job_id: of the whole job.
        folder: what the error names.

    Raises:
        RunDirError: they cannot be written.
    """
    try:
        for handle in handles:
            write_handle(handle)
    except OSError as error:
        slurm.cancel(job_id)
        raise RunDirError(
            f"cannot write: {error.strerror}; job {job_id} is cancelled again",
            where=str(folder),
            fix="free some disk space, or choose another folder",
        ) from None


def check_accepted(run_dir: Path) -> None:
    """Ask Slurm whether it would take the job of a run directory, before more is prepared.

    Raises:
        RejectedError: it would not; its message is in the error.
    """
    slurm.check_accepted(JOB_SBATCH, cwd=run_dir)
    if not (run_dir / rd.LOGS).is_dir():
        raise SetupError("there is no logs folder", where=str(run_dir), fix="make the run anew")
