"""Backend ``allocation``: inside somebody's Slurm allocation (salloc, sbatch), through srun."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from launcher.allocation import Allocation
from launcher.dispatch import slurm_commands as slurm
from launcher.dispatch.base import JobHandle
from launcher.dispatch.interruptions import Interruptions
from launcher.dispatch.local import LocalBackend
from launcher.dispatch.slurm import SlurmBackend
from launcher.errors import SetupError
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
        """Raise SetupError unless the allocation has the nodes of the plan."""
        slurm.check_programs()
        here, planned = self.allocation, plan.cluster
        if here.num_nodes < planned.num_nodes:
            raise SetupError(
                f"job {here.job_id} has {here.num_nodes} nodes, the plan is for "
                f"{planned.num_nodes}",
                where="this allocation",
                fix="ask for more nodes, or plan for fewer: cluster.num_nodes",
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
        try:
            super().wait(handle, interruptions=interruptions, console=console)
        finally:
            try:
                # Ranks on other hosts outlive an srun that was killed.
                slurm.cancel(self.allocation.job_id, step_name=step_name(self.run_id))
            except slurm.ControllerError as error:
                _log.error("cannot see whether ranks are left on other hosts: %s", error)
