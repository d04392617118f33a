"""Run probe ranks on hosts through the real backend, as ``zerofit train`` does: a program.

Arguments: run directory, what the ranks do, hosts separated by commas, port.
"""

from __future__ import annotations

import sys
from pathlib import Path, PurePosixPath

from launcher import run_dir as rd
from launcher.console import show_error
from launcher.dispatch.base import run_to_end
from launcher.dispatch.deepspeed import HostfileBackend
from launcher.errors import LauncherError
from launcher.hostfile import Host
from launcher.job_script import DeepSpeedJob, render_job


def main() -> int:
    folder, what, names, port = sys.argv[1:]
    hosts = tuple(Host(name=name, slots=1) for name in names.split(","))
    backend = HostfileBackend(
        master_port=int(port), num_cores=1, hosts=hosts, lost_after_seconds=10.0
    )
    job = DeepSpeedJob(
        run_dir=PurePosixPath(folder),
        run_id=backend.run_id,
        python=PurePosixPath(sys.executable),
        ranks_per_node=1,
        device_type="cpu",
        master_port=backend.master_port,
        omp_num_threads=1,
        worker_module="probe_rank",
        hosts=hosts,
        extra_env={"PROBE": what},
    )
    run_dir = rd.create(Path(folder))
    try:
        run_to_end(backend, render_job(job, files={}), run_dir=run_dir, console=sys.stdout.buffer)
    except LauncherError as error:
        show_error(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
