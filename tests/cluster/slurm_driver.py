"""Run the probe as ``zerofit train`` runs the worker with backend slurm.

Arguments: run directory, Slurm settings as JSON (and ``nodes``, and ``needs`` of each node), then
``submit``, ``wait``, or ``inside`` for the allocation that it is started in.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path, PurePosixPath

from launcher import run_dir as rd
from launcher.allocation import current_allocation
from launcher.console import show_error
from launcher.dispatch import slurm_watch
from launcher.dispatch.allocation import AllocationBackend
from launcher.dispatch.base import run_to_end
from launcher.dispatch.slurm import SlurmBackend
from launcher.errors import LauncherError
from launcher.job_script import DeepSpeedJob
from launcher.recipe_sections import SlurmSection
from launcher.sbatch_script import JOB_SBATCH, NEEDS, SlurmJob, render_slurm_job


def main() -> int:
    run_dir = Path(sys.argv[1])
    # Most tests are of something else, and a look at the nodes takes seconds.
    given = {"preflight": False, **json.loads(sys.argv[2])}
    nodes, needs = given.pop("nodes", 2), given.pop("needs", None)
    settings = SlurmSection(**given)
    backend = SlurmBackend(settings=settings)
    if seconds := os.environ.get("SECOND_CTRL_C_SECONDS"):
        slurm_watch.SECOND_CTRL_C_SECONDS = float(seconds)
    ranks = DeepSpeedJob(
        run_dir=PurePosixPath(run_dir),
        run_id=backend.run_id,
        python=PurePosixPath(sys.executable),
        ranks_per_node=1,
        device_type="cpu",
        master_port=0,
        omp_num_threads=1,
        worker_module="slurm_probe",
        has_data="HAS_DATA" in os.environ,
        extra_env={"PROBE": os.environ.get("PROBE", "finish")},
    )
    job = SlurmJob(ranks=ranks, num_nodes=nodes, settings=settings, signal_seconds=120)
    try:
        rd.create(run_dir)
        (run_dir / rd.RECIPE).write_text("model: {name_or_path: probe}\n")
        request = render_slurm_job(job, files={NEEDS: json.dumps(needs)} if needs else {})
        if sys.argv[3] == "inside":
            allocation = current_allocation()
            assert allocation is not None
            inside = AllocationBackend.inside(allocation, settings, has_data=False)
            inside.run_id = backend.run_id
            request = replace(request, argv=("bash", JOB_SBATCH))
            run_to_end(inside, request, run_dir=run_dir, console=sys.stdout.buffer)
        elif sys.argv[3] == "submit":
            backend.submit(request, run_dir=run_dir)
        else:
            run_to_end(backend, request, run_dir=run_dir, console=sys.stdout.buffer)
    except LauncherError as error:
        show_error(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
