"""Backend ``local``: this machine, through the ``deepspeed`` launcher."""

from __future__ import annotations

import errno
import os
import random
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import BinaryIO

from launcher import run_dir as rd
from launcher.dispatch import process_group
from launcher.dispatch.base import JobHandle, new_run_id, write_files, write_handle
from launcher.dispatch.interruptions import Interruptions
from launcher.dispatch.probe import parse_visible_gpus, probe_machine
from launcher.dispatch.rank_watch import RankWatch
from launcher.dispatch.watch import watch
from launcher.errors import RunDirError, SetupError
from launcher.job_script import WORKER_MODULE, DeepSpeedJob, JobRequest, render_job
from launcher.planning.plan import Plan
from launcher.stop_file import clear_stop

# Below Linux's range for outgoing connections (ip_local_port_range starts at 32768), so that
# none of those takes the port between our look and the ranks' start.
_PORTS = range(20_000, 32_000)


@dataclass(kw_only=True)
class LocalBackend:
    """Runs a job on this machine; all that ``render`` needs is fixed when it is made."""

    master_port: int
    num_cores: int
    visible_gpus: tuple[int, ...] | None = None
    """Indices that ``CUDA_VISIBLE_DEVICES`` allows; ``None`` when it does not limit them."""
    python: str = sys.executable
    run_id: str = field(default_factory=new_run_id)
    worker_module: str = WORKER_MODULE
    has_data: bool = False
    """Whether the recipe names data, which is tokenised before the ranks start."""
    extra_env: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    name: str = "local"
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @classmethod
    def here(
        cls, *, has_data: bool = False, environ: Mapping[str, str] = os.environ
    ) -> LocalBackend:
        """Return a backend with a free port and what this machine allows.

        Raises:
            SetupError: ``CUDA_VISIBLE_DEVICES`` cannot be passed on.
        """
        return cls(
            master_port=choose_port(),
            num_cores=probe_machine(environ=environ).num_cores,
            visible_gpus=parse_visible_gpus(environ.get("CUDA_VISIBLE_DEVICES")),
            has_data=has_data,
        )

    def check_place(self, plan: Plan) -> None:
        """Raise SetupError unless this machine has the GPUs of the plan."""
        gpu, ranks = plan.cluster.gpu, plan.cluster.gpus_per_node
        found = probe_machine().gpus
        if gpu.device_type != "cuda" or len(found) >= ranks:
            return
        here = f"{len(found)} GPU{'s' * (len(found) > 1)}" if found else "no GPU"
        raise SetupError(
            f"the plan is for {ranks} x {gpu.name} and this machine has {here}",
            where="this machine",
            fix="leave cluster.gpu and cluster.gpus_per_node out to plan for this machine, or "
            "write the files with `zerofit render` and start job.sh there",
        )

    def render(self, plan: Plan, *, run_dir: Path, files: Mapping[str, str]) -> JobRequest:
        """Return what :meth:`submit` would run. Pure; ``--dry-run`` stops here.

        Args:
            plan: for one node.
            run_dir: absolute; need not exist.
            files: the run's other files by name.

        Raises:
            SetupError: the plan is for several nodes, or for more GPUs than
                ``CUDA_VISIBLE_DEVICES`` allows.
        """
        if plan.cluster.num_nodes != 1:
            raise SetupError(
                f"the plan is for {plan.cluster.num_nodes} nodes and this is one machine",
                where="cluster.num_nodes",
                fix="name the nodes in a hostfile (cluster.hostfile), or plan for one node",
            )
        return render_job(self.job(plan, run_dir), files=files)

    def submit(self, request: JobRequest, *, run_dir: Path) -> JobHandle:
        """Write the files and start the job. The only step with effects.

        Raises:
            RunDirError: the files cannot be written; nothing is left running.
            SetupError: the shell cannot be started.
        """
        write_files(request, run_dir)
        try:
            (run_dir / rd.CANCEL).unlink(missing_ok=True)
            clear_stop(run_dir)
            rd.write_status(run_dir, "running")
            self._process = process_group.start_job(
                request.argv, env=request.env, cwd=run_dir, log_file=run_dir / rd.LAUNCHER_LOG
            )
            handle = JobHandle(
                backend=self.name,
                run_dir=run_dir,
                run_id=self.run_id,
                job_id=str(self._process.pid),
                host=socket.gethostname(),
                session_id=self._process.pid,
                master_port=self.master_port,
                watcher_pid=os.getpid(),
            )
            write_handle(handle)
        except OSError as error:
            if self._process is not None:
                process_group.end_processes(self.run_id, session_id=self._process.pid)
                self._process.wait()
            if error.filename == request.argv[0]:
                raise SetupError(
                    f"cannot start {request.argv[0]}: {error.strerror}",
                    where="this machine",
                    fix=f"install {request.argv[0]}, or put it on PATH",
                ) from None
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise RunDirError(
                f"cannot write: {error.strerror}",
                where=str(error.filename or run_dir),
                fix="free some disk space" if full else "choose another folder",
            ) from None
        return handle

    def wait(
        self, handle: JobHandle, *, interruptions: Interruptions, console: BinaryIO | None
    ) -> None:
        """Return when the run has finished, with none of its processes left.

        Raises:
            JobFailedError: it did not finish.
            JobInterruptedError: a signal ended it.
        """
        assert self._process is not None, "wait() follows submit()"
        ranks = RankWatch(run_id=handle.run_id, session_id=handle.session_id)
        watch(self._process, handle, ranks, interruptions=interruptions, console=console)

    def job(self, plan: Plan, run_dir: Path) -> DeepSpeedJob:
        """Return what :meth:`render` writes down.

        Raises:
            SetupError: ``CUDA_VISIBLE_DEVICES`` allows fewer GPUs than the plan needs.
        """
        ranks = plan.cluster.gpus_per_node
        gpu = plan.cluster.gpu
        gpu_ids: tuple[int, ...] = ()
        if gpu.device_type == "cuda" and self.visible_gpus is not None:
            gpu_ids = self.visible_gpus[:ranks]
            if len(gpu_ids) < ranks:
                raise SetupError(
                    f"CUDA_VISIBLE_DEVICES allows {len(gpu_ids)} GPUs and the plan needs {ranks}",
                    where="environment",
                    fix="allow more GPUs, or plan for fewer: cluster.gpus_per_node",
                )
        return DeepSpeedJob(
            run_dir=PurePosixPath(run_dir),
            run_id=self.run_id,
            python=PurePosixPath(self.python),
            ranks_per_node=ranks,
            device_type=gpu.device_type,
            master_port=self.master_port,
            # Each rank gets its share, for CPU Adam and data loading; torch would take all
            # cores for every rank.
            omp_num_threads=max(1, self.num_cores // ranks),
            compute_capability=gpu.compute_capability,
            expandable_segments=plan.strategy.expandable_segments,
            gpu_ids=gpu_ids,
            worker_module=self.worker_module,
            has_data=self.has_data,
            extra_env=self.extra_env,
        )


def choose_port() -> int:
    """Return a TCP port that nobody listens on and that left no shared memory behind.

    Raises:
        SetupError: a hundred attempts found none.
    """
    for port in random.sample(_PORTS, 100):
        if any(process_group.shared_memory_leftovers(master_port=port)):
            continue
        with socket.socket(socket.AF_INET) as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise SetupError(
        f"no free TCP port between {_PORTS.start} and {_PORTS.stop}",
        where="this machine",
        fix="end programs that listen there (`ss -ltnp`)",
    )
