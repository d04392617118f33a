"""Backend ``deepspeed``: the hosts of a hostfile, through DeepSpeed's launcher over pdsh or MPI."""

from __future__ import annotations

import contextlib
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from launcher import run_dir as rd
from launcher.dispatch.base import JobHandle, write_files
from launcher.dispatch.guards import LOST_AFTER_SECONDS, Guards
from launcher.dispatch.interruptions import Interruptions
from launcher.dispatch.local import LocalBackend, choose_port
from launcher.dispatch.probe import probe_machine
from launcher.dispatch.watch import watch
from launcher.errors import HostfileError, LauncherError, SetupError
from launcher.hostfile import Host, equal_slots, filter_hosts, parse_hostfile
from launcher.job_script import (
    HOST_ENVIRONMENT,
    HostLauncher,
    JobRequest,
    render_job,
)
from launcher.planning.plan import Plan
from launcher.recipe_sections import ClusterSection

# Measured with DeepSpeed 0.19.8; see docs/clusters.md.
_UNUSABLE_LAUNCHERS = {
    "mpich": "a rank that fails leaves exit status 0, and the other ranks go on",
    "slurm": "it does not end the other ranks when one fails; cluster.backend=slurm does",
    "impi": "it takes options of Intel MPI's mpirun, which we could not test",
    "mvapich": "it takes options of MVAPICH's mpirun, which we could not test",
}
_PROGRAMS = {
    "pdsh": (("pdsh", "ssh"), "apt-get install pdsh openssh-client"),
    "openmpi": (("mpirun", "ompi_info", "ssh"), "apt-get install openmpi-bin openssh-client"),
}


@dataclass(kw_only=True)
class HostfileBackend(LocalBackend):
    """Runs a job on the hosts of a hostfile; they must see the run directory at one path."""

    hosts: tuple[Host, ...]
    launcher: HostLauncher = "pdsh"
    pass_env: tuple[str, ...] = ()
    lost_after_seconds: float = LOST_AFTER_SECONDS
    name: str = "deepspeed"
    _guards: Guards | None = field(default=None, repr=False)

    @classmethod
    def for_hosts(
        cls, hosts: tuple[Host, ...], section: ClusterSection, *, has_data: bool = False
    ) -> HostfileBackend:
        """Return a backend with a port that is free here; the first host says if it is there.

        Raises:
            SetupError: DeepSpeed's launcher of that name cannot be used.
        """
        launcher = section.launcher
        if launcher != "pdsh" and launcher != "openmpi":  # noqa: PLR1714  mypy narrows by this
            raise SetupError(
                f"DeepSpeed's launcher {launcher} cannot be used: {_UNUSABLE_LAUNCHERS[launcher]}",
                where="cluster.launcher",
                fix="use pdsh or openmpi",
            )
        return cls(
            master_port=choose_port(),
            num_cores=probe_machine().num_cores,
            hosts=hosts,
            launcher=launcher,
            pass_env=section.pass_env,
            has_data=has_data,
        )

    def check_place(self, plan: Plan) -> None:  # noqa: ARG002  the hosts' GPUs are not seen here
        """Raise SetupError unless ranks can be started on other hosts from here."""
        programs, fix = _PROGRAMS[self.launcher]
        missing = [name for name in programs if shutil.which(name) is None]
        if missing:
            raise SetupError(
                f"{' and '.join(missing)} not found, which DeepSpeed starts ranks on hosts with",
                where="this machine",
                fix=f"{fix}, or use the local backend",
            )

    def render(self, plan: Plan, *, run_dir: Path, files: Mapping[str, str]) -> JobRequest:
        """Return what :meth:`submit` would run. Pure; ``--dry-run`` stops here.

        Raises:
            HostfileError: the hosts do not match the plan, or the launcher cannot use them.
            RunDirError: the path cannot pass through DeepSpeed's remote shell.
        """
        slots = equal_slots(self.hosts, source="hostfile")
        wanted = (plan.cluster.num_nodes, plan.cluster.gpus_per_node)
        if (len(self.hosts), slots) != wanted:
            raise HostfileError(
                f"the hostfile has {len(self.hosts)} hosts with {slots} slots each, the plan is "
                f"for {wanted[0]} nodes with {wanted[1]} GPUs each",
                where="hostfile",
                fix="set cluster.num_nodes and cluster.gpus_per_node to match",
            )
        self._check_launcher()
        # GPU indices are of this machine; what the hosts allow is theirs to say.
        job = replace(
            self.job(plan, run_dir),
            hosts=self.hosts,
            host_launcher=self.launcher,
            pass_env=self.pass_env,
            gpu_ids=(),
        )
        return render_job(job, files=files)

    def submit(self, request: JobRequest, *, run_dir: Path) -> JobHandle:
        """Write the files, connect to every host, and start the job.

        Raises:
            JobFailedError: hosts cannot take part; each is named with the reason.
            RunDirError: the files cannot be written; nothing is left running.
            SetupError: the shell cannot be started.
        """
        write_files(request, run_dir)
        guards = Guards(
            hosts=self.hosts,
            run_id=self.run_id,
            run_dir=run_dir,
            master_port=self.master_port,
            lost_after_seconds=self.lost_after_seconds,
        )
        try:
            guards.start()
        except LauncherError as error:
            rd.write_status(run_dir, "failed", reason=error.problem.replace("\n", " "))
            raise
        try:
            handle = super().submit(request, run_dir=run_dir)
        except BaseException:
            guards.end(at_once=True)
            guards.close()
            raise
        self._guards = guards
        return handle

    def wait(
        self, handle: JobHandle, *, interruptions: Interruptions, console: BinaryIO | None
    ) -> None:
        """Return when the run has finished, with none of its processes left on any host.

        Raises:
            JobFailedError: it did not finish.
            JobInterruptedError: a signal ended it.
        """
        assert self._process is not None, "wait() follows submit()"
        assert self._guards is not None
        try:
            watch(self._process, handle, self._guards, interruptions=interruptions, console=console)
        finally:
            # It may hold secrets, and the ranks have read it long ago.
            with contextlib.suppress(OSError):
                (handle.run_dir / HOST_ENVIRONMENT).unlink(missing_ok=True)

    def _check_launcher(self) -> None:
        if self.launcher == "openmpi" and any(host.gpu_ids for host in self.hosts):
            raise HostfileError(
                "DeepSpeed's openmpi launcher cannot choose among the GPUs of a host",
                where="cluster.include",
                fix="use the launcher pdsh, or whole hosts",
            )
        address = next((host for host in self.hosts if ":" in host.name), None)
        if address is not None and (self.launcher == "openmpi" or address.gpu_ids):
            after = "a host" if self.launcher == "openmpi" else "the host in --include"
            raise HostfileError(
                f"{address.name}: {self.launcher} takes what follows a colon after {after} for "
                "its GPUs, so that an IPv6 address cannot stand there",
                where="hostfile",
                fix="give the host a name in /etc/hosts or ~/.ssh/config, and use that",
            )


def read_hosts(section: ClusterSection) -> tuple[Host, ...]:
    """Return the hosts to run on: the first ``num_nodes`` of :func:`all_hosts`, or all.

    Raises:
        HostfileError: the hostfile or a filter cannot be read, or nothing is left.
    """
    return all_hosts(section)[: section.num_nodes]


def all_hosts(section: ClusterSection) -> tuple[Host, ...]:
    """Return the hosts that a recipe's hostfile and filters leave, spare ones at the end.

    Raises:
        HostfileError: the hostfile or a filter cannot be read, or nothing is left.
    """
    assert section.hostfile is not None
    hosts = read_hostfile(Path(section.hostfile))
    return filter_hosts(
        hosts, include=section.include, exclude=section.exclude, source=section.hostfile
    )


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """Read a hostfile; a missing one is an error, never a run on this machine alone.

    Raises:
        HostfileError: it cannot be read or used.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise HostfileError(
            f"cannot read the hostfile: {reason}",
            where=str(path),
            fix="check cluster.hostfile; leave it out to run on this machine",
        ) from None
    return parse_hostfile(text, source=str(path))


def is_only_this_machine(hosts: tuple[Host, ...]) -> bool:
    """Return whether a hostfile names nothing but this machine, so that no ssh is needed."""
    names = {"localhost", "127.0.0.1", "::1", socket.gethostname(), socket.getfqdn()}
    return len(hosts) == 1 and hosts[0].name in names
