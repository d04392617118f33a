"""Backend ``deepspeed``: the hosts of a hostfile, through DeepSpeed's own launcher over pdsh."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.dispatch.local import LocalBackend, choose_port
from launcher.dispatch.probe import probe_machine
from launcher.errors import HostfileError, SetupError
from launcher.hostfile import Host, equal_slots, parse_hostfile
from launcher.job_script import JobRequest, render_job
from launcher.planning.plan import Plan


@dataclass(kw_only=True)
class HostfileBackend(LocalBackend):
    """Runs a job on the hosts of a hostfile; they must see the run directory at one path."""

    hosts: tuple[Host, ...]
    name: str = "deepspeed"

    @classmethod
    def for_hosts(cls, hosts: tuple[Host, ...], *, has_data: bool = False) -> HostfileBackend:
        """Return a backend with a port that is free here; the first host's is not known yet."""
        return cls(
            master_port=choose_port(),
            num_cores=probe_machine().num_cores,
            hosts=hosts,
            has_data=has_data,
        )

    def check_place(self, plan: Plan) -> None:  # noqa: ARG002  the hosts' GPUs are not seen here
        """Raise SetupError unless ranks can be started on other hosts from here."""
        missing = [name for name in ("pdsh", "ssh") if shutil.which(name) is None]
        if missing:
            raise SetupError(
                f"{' and '.join(missing)} not found, which DeepSpeed starts ranks on hosts with",
                where="this machine",
                fix="apt-get install pdsh openssh-client, or use the local backend",
            )

    def render(self, plan: Plan, *, run_dir: Path, files: Mapping[str, str]) -> JobRequest:
        """Return what :meth:`submit` would run. Pure; ``--dry-run`` stops here.

        Raises:
            HostfileError: the hosts do not match the plan.
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
        # GPU indices are of this machine; what the hosts allow is theirs to say.
        job = replace(self.job(plan, run_dir), hosts=self.hosts, gpu_ids=())
        return render_job(job, files=files)


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
