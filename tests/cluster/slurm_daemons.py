"""Slurm on virtual hosts: slurmctld on the head, slurmd on the nodes, munge on all."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from host_processes import WAIT_SECONDS
from virtual_hosts import VirtualCluster

SLURM_PROGRAMS = ("munged", "sbatch", "scontrol", "sinfo", "slurmctld", "slurmd", "squeue", "srun")
GPUS_PER_NODE = 2
CPUS_PER_NODE = 4

# No cgroups and no systemd: neither is needed, and test machines often have neither.
_SLURM_CONF = """\
ClusterName=test
SlurmctldHost=head
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=15
SlurmctldTimeout=30
MessageTimeout=5
TCPTimeout=2
KillWait=5
MinJobAge={min_job_age_seconds}
CompleteWait=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,bf_interval=2,sched_min_interval=0
SchedulerType=sched/backfill
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurm/slurmd.pid
SlurmdSpoolDir=/run/slurm/d
StateSaveLocation={folder}/slurmctld
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobcomp.log
{accounting}
NodeName=node[1-{num_nodes}] CPUs={cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={cpus} \
ThreadsPerCore=1 RealMemory=8000 Gres=gpu:h100:{gpus} State=UNKNOWN
PartitionName=main Nodes=node[1-{num_nodes}] Default=YES MaxTime=1-0 DefMemPerCPU=500 State=UP \
PriorityTier=10 PreemptMode=OFF
PartitionName=short Nodes=node[1-{num_nodes}] MaxTime=2 DefMemPerCPU=500 State=UP \
PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=node[1-{num_nodes}] MaxTime=1-0 DefMemPerCPU=500 State=UP \
PriorityTier=1 GraceTime=120
"""
# The null device as each GPU: slurmd refuses plain files.
_GRES_CONF = """\
NodeName=node[1-{num_nodes}] Name=gpu Type=h100 File=/run/gpu[0-{last_gpu}] Flags=nvidia_gpu_env
"""
# Not used, but without it slurmd looks for systemd.
_CGROUP_CONF = """\
CgroupAutomount=no
ConstrainCores=no
ConstrainRAMSpace=no
ConstrainDevices=no
"""
# Run by every host when it boots, and once on those that are up already.
_BOOT = """\
mkdir -p /run/munge /run/slurm/d
chmod 755 /run/munge
for gpu in $(seq 0 {last_gpu}); do mknod "/run/gpu$gpu" c 1 3; done
munged --key-file=/etc/munge/munge.key --pid-file=/run/munge/munged.pid \
  --log-file=/run/munge/munged.log --seed-file=/run/munge/munged.seed --num-threads=2
case $(hostname) in
  head)
    {head_boot}
    daemon=slurmctld
    ;;
  *) daemon=slurmd ;;
esac
"$daemon"
# It forks twice: the process that stays is the one that writes this file.
until [ -s "/run/slurm/$daemon.pid" ]; do sleep 0.02; done
"""


@dataclass(kw_only=True)
class Slurm:
    """A Slurm cluster; made by the fixture ``slurm``.

    Two fake GPUs a node (``gres/gpu:h100:2``; jobs get CUDA_VISIBLE_DEVICES), four fake cores,
    partitions ``main``, ``short`` (two minutes at most) and ``low``, whose jobs those of the others
    preempt with two minutes of grace, SlurmdTimeout 15 s, KillWait 5 s.
    Run commands with ``cluster.run("head", ["sbatch", …])``; every process is root's.
    """

    cluster: VirtualCluster
    accounting: str = "AccountingStorageType=accounting_storage/none"
    """Lines of slurm.conf."""
    head_boot: str = ":"
    """Shell that the head runs before slurmctld."""
    min_job_age_seconds: int = 600
    """For how long, at least, the controller knows a job that has ended."""

    @property
    def folder(self) -> Path:
        """Where the daemons' logs and state are."""
        return self.cluster.folder / "slurm"

    def up(self) -> None:
        """Start the daemons on all hosts; takes about 1.5 s."""
        self.folder.mkdir()
        names = {
            "folder": self.folder,
            "num_nodes": self.cluster.num_nodes,
            "cpus": CPUS_PER_NODE,
            "gpus": GPUS_PER_NODE,
            "last_gpu": GPUS_PER_NODE - 1,
            "accounting": self.accounting,
            "head_boot": self.head_boot,
            "min_job_age_seconds": self.min_job_age_seconds,
        }
        etc = self.cluster.folder / "etc"
        (etc / "slurm" / "slurm.conf").write_text(_SLURM_CONF.format(**names))
        (etc / "slurm" / "gres.conf").write_text(_GRES_CONF.format(**names))
        (etc / "slurm" / "cgroup.conf").write_text(_CGROUP_CONF)
        key = etc / "munge" / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        key.parent.chmod(0o700)
        boot = self.cluster.folder / "boot.sh"
        boot.write_text(_BOOT.format(**names))
        for host in self.cluster.names:
            self.cluster.run(host, ["bash", boot], check=True)
        self.wait_idle()
        self.cluster.note_daemons()

    def wait_idle(self) -> None:
        """Return when all nodes wait for work."""
        deadline = time.monotonic() + WAIT_SECONDS
        states = ""
        while time.monotonic() < deadline:
            shown = self.cluster.run("head", ["sinfo", "-h", "-N", "-p", "main", "-o", "%N %T"])
            states = shown.stdout + shown.stderr
            if states.split() == [word for name in self.cluster.nodes for word in (name, "idle")]:
                return
            time.sleep(0.1)
        raise TimeoutError(f"not all nodes are idle:\n{states}\nlogs are in {self.folder}")

    def start_again(self, job_id: str) -> None:
        """Start a job that was put back; by itself, Slurm lets it wait for two minutes.

        The nodes refuse what was asked for in the second in which they ended the job's last start
        ("Job credential revoked"; times are whole seconds there).
        """
        working = ["sinfo", "-h", "-p", "main", "-t", "alloc,mix,comp", "-o", "%N"]
        deadline = time.monotonic() + WAIT_SECONDS
        while self.cluster.run("head", working, check=True).stdout.strip():
            assert time.monotonic() < deadline, "nodes do not get rid of the job"
            time.sleep(0.1)
        time.sleep(2)
        release = ["scontrol", "update", f"JobId={job_id}", "StartTime=now"]
        self.cluster.run("head", release, check=True)

    def set_partition(self, state: str) -> None:
        """Set the partition ``main`` DOWN, in which jobs only wait, or UP."""
        update = ["scontrol", "update", "PartitionName=main", f"State={state}"]
        self.cluster.run("head", update, check=True)

    @contextmanager
    def patient_with_nodes(self) -> Iterator[None]:
        """Have Slurm itself call no node down within ten minutes while the block runs."""
        path = self.cluster.folder / "etc" / "slurm" / "slurm.conf"
        text = path.read_text()
        reconfigure = ["scontrol", "reconfigure"]
        path.write_text(text.replace("SlurmdTimeout=15\n", "SlurmdTimeout=600\n"))
        self.cluster.run("head", reconfigure, check=True)
        try:
            yield
        finally:
            path.write_text(text)
            self.cluster.run("head", reconfigure, check=True)

    def cancel_all(self) -> None:
        """End every job."""
        self.cluster.run("head", ["scancel", "--user", "root"])
