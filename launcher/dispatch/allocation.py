"""Backend ``allocation``: inside somebody's Slurm allocation (salloc, sbatch), through srun."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

from launcher.allocation import Allocation
from launcher.dispatch import slurm_commands as slurm
from launcher.dispatch.base import JobHandle
from launcher.dispatch.failure import DeadRank, LostHost
from launcher.dispatch.interruptions import Interruptions
from launcher.dispatch.local import LocalBackend
from launcher.dispatch.rank_watch import RankWatch
from launcher.dispatch.slurm import SlurmBackend
from launcher.dispatch.slurm_failure import describe_slurm_failure
from launcher.dispatch.slurm_nodes import SlurmNodes
from launcher.dispatch.watch import watch
from launcher.errors import JobFailedError, SetupError
from launcher.job_script import JobRequest
from launcher.planning.plan import Plan
from launcher.recipe_sections import SlurmSection
from launcher.sbatch_parts import IN_ALLOCATION_VARIABLE, JOB_SBATCH
from launcher.sbatch_script import port_of, step_name

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class AllocationBackend(LocalBackend):
    """Runs a job inside an allocation: ``bash job.sbatch``, whose ``srun`` starts the ranks."""

    allocation: Allocation
    settings: SlurmSection = field(default_factory=SlurmSection)
    name: str = "allocation"

    @classmethod
    def inside(
        cls, allocation: Allocation, settings: SlurmSection, *, has_data: bool
    ) -> AllocationBackend:
        """Return a backend for an allocation."""
        return cls(
            master_port=port_of(int(allocation.job_id)),
            num_cores=os.cpu_count() or 1,
            allocation=allocation,
            settings=settings,
            has_data=has_data,
        )

    def check_place(self, plan: Plan) -> None:
        """Raise SetupError unless the allocation has the nodes, GPUs and cores of the plan."""
        slurm.check_programs()
        here, planned = self.allocation, plan.cluster
        if here.num_nodes < planned.num_nodes:
            raise SetupError(
                f"job {here.job_id} has {here.num_nodes} nodes, the plan is for "
                f"{planned.num_nodes}",
                where="this allocation",
                fix="ask for more nodes, or plan for fewer: cluster.num_nodes",
            )
        ranks, has_gpus = planned.gpus_per_node, planned.gpu.device_type == "cuda"
        if has_gpus and here.gpus_per_node is not None and here.gpus_per_node < ranks:
            raise SetupError(
                f"job {here.job_id} has {here.gpus_per_node} GPUs on a node, the plan is for "
                f"{ranks}",
                where="this allocation",
                fix="ask for more (--gpus-per-node), or plan for fewer: cluster.gpus_per_node",
            )
        cpus = ranks * here.cpus_per_task
        if here.cpus_of_nodes and sum(own >= cpus for own in here.cpus_of_nodes) < (
            planned.num_nodes
        ):
            raise SetupError(
                f"job {here.job_id} has {min(here.cpus_of_nodes)} CPUs on a node; {ranks} ranks "
                f"with {here.cpus_per_task} each need {cpus}",
                where="this allocation",
                fix=f"ask for more (--ntasks-per-node={ranks}), or plan for fewer ranks: "
                "cluster.gpus_per_node",
            )
        self._warn_of_time(plan)

    def _warn_of_time(self, plan: Plan) -> None:
        """Say when the allocation ends before the run is predicted to."""
        try:
            minutes = slurm.minutes_left(self.allocation.job_id)
        except slurm.ControllerError as error:
            _log.warning("how long this allocation lasts is not known: %s", error.problem)
            return
        if minutes is not None and plan.run is not None and plan.run.seconds > minutes * 60:
            _log.warning(
                "job %s ends in %.0f min, and the run is predicted to take %.0f: what is not saved "
                "by then is lost (optim.save_steps; `zerofit resume` goes on)",
                self.allocation.job_id,
                minutes,
                plan.run.seconds / 60,
            )

    def render(self, plan: Plan, *, run_dir: Path, files: Mapping[str, str]) -> JobRequest:
        """Return what :meth:`submit` would run. Pure; ``--dry-run`` stops here."""
        batch = SlurmBackend(
            settings=self.settings,
            has_data=self.has_data,
            python=self.python,
            run_id=self.run_id,
            worker_module=self.worker_module,
        )
        request = batch.render(plan, run_dir=run_dir, files=files)
        env = {**request.env, IN_ALLOCATION_VARIABLE: "1"}
        return replace(request, argv=("bash", JOB_SBATCH), env=env)

    def wait(
        self, handle: JobHandle, *, interruptions: Interruptions, console: BinaryIO | None
    ) -> None:
        """Return when the run has finished, with nothing of it left in the allocation.

        Raises:
            JobFailedError: it did not finish.
            JobInterruptedError: a signal ended it.
        """
        assert self._process is not None, "wait() follows submit()"
        with closing(SlurmNodes(run_dir=handle.run_dir)) as nodes:
            ranks = _RanksOnNodes(
                run_id=handle.run_id,
                session_id=handle.session_id,
                nodes=nodes,
                slurm_job=self.allocation.job_id,
            )
            try:
                watch(
                    self._process,
                    handle,
                    ranks,
                    interruptions=interruptions,
                    console=console,
                    describe=partial(self._describe, nodes),
                )
            finally:
                try:
                    # Ranks on other hosts outlive an srun that was killed.
                    slurm.cancel(self.allocation.job_id, step_name=step_name(self.run_id))
                except slurm.ControllerError as error:
                    _log.error("cannot see whether ranks are left on other hosts: %s", error)

    def _describe(
        self,
        nodes: SlurmNodes,
        run_dir: Path,
        *,
        exit_code: int | None,  # noqa: ARG002  srun's, whose message says more
        dead_ranks: Iterable[DeadRank],  # noqa: ARG002  seen on this host alone; srun names all
        lost_hosts: Sequence[LostHost],
    ) -> JobFailedError:
        """Return why the ranks ended."""
        job_id = self.allocation.job_id
        state = slurm.SlurmJobState(job_id=job_id, state="RUNNING", reason="", nodes="")
        try:
            state = slurm.ask([job_id]).get(job_id, state)
        except slurm.ControllerError as error:
            _log.error("Slurm does not answer: %s", error.problem)
        return describe_slurm_failure(run_dir, state, lost_hosts=lost_hosts or nodes.settle())


@dataclass(kw_only=True)
class _RanksOnNodes(RankWatch):
    """The ranks that run on this host, and which of the allocation's nodes are lost."""

    nodes: SlurmNodes
    slurm_job: str

    def look(self) -> None:
        """Note what has changed since the last look."""
        super().look()
        self.nodes.look(time.monotonic(), self.slurm_job)
        self.lost.extend(self.nodes.lost)
