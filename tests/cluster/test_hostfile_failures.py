"""What can go wrong on the hosts of a hostfile: the user learns which host and why, soon.

Ranks are probes without torch; hosts, ssh, pdsh and DeepSpeed's launcher are real.
"""

from __future__ import annotations

import itertools
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from host_processes import WAIT_SECONDS, HostProcess
from virtual_hosts import HERE, ROOT, VirtualCluster

from launcher import run_dir as rd

pytestmark = pytest.mark.cluster

KNOWN_WITHIN_SECONDS = 90.0
"""15 s from the event on a quiet machine, and much less than anything else would take to notice:
ssh, TCP and gloo wait for minutes."""
_ports = itertools.count(21_000)


class ProbeJob:
    """A job of two probe ranks on two hosts, started from the head."""

    def __init__(self, cluster: VirtualCluster, folder: Path, what: str, hosts: str) -> None:
        self.cluster = cluster
        self.folder = folder
        self.port = next(_ports)
        job = [sys.executable, HERE / "probe_job.py", folder, what, hosts, str(self.port)]
        self.process: HostProcess = cluster.start(
            "head", job, env={"PYTHONPATH": f"{ROOT}:{HERE}", "MLFLOW_TRACKING_TOKEN": "hush-hush"}
        )

    def wait_for_ranks(self) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while len(list((self.folder / rd.RANKS).glob("0*.json"))) < 2:
            assert self.process.entering.poll() is None, self.process.output
            assert time.monotonic() < deadline, self.process.output
            time.sleep(0.1)

    def fails(self, *expected: str, state: str = "failed") -> None:
        """Check that it ends in time, says so, says what is expected, and leaves nothing."""
        status = self.process.wait(timeout=KNOWN_WITHIN_SECONDS)
        output = self.process.output
        assert status == 4, output
        for text in expected:
            assert text in output
        assert rd.read_status(self.folder).state == state
        assert not (self.folder / "environment.sh").exists()


Job = Callable[..., ProbeJob]
FIRST, SECOND = "node1,node2", "node3,node4"


@pytest.fixture
def job(cluster: VirtualCluster, tmp_path: Path) -> Job:
    numbers = itertools.count()

    def start(what: str, hosts: str = FIRST) -> ProbeJob:
        return ProbeJob(cluster, tmp_path / f"run{next(numbers)}", what, hosts)

    return start


def test_a_host_without_sshd_is_named_before_anything_starts(
    cluster: VirtualCluster, job: Job
) -> None:
    cluster.stop_sshd("node2")
    job("wait").fails("node2: it refuses ssh connections", "start sshd on node2")
    assert cluster.leftovers() == {}


def test_a_host_with_another_key_is_named_before_anything_starts(
    cluster: VirtualCluster, job: Job
) -> None:
    ssh = cluster.folder / "etc" / "ssh"
    known = (ssh / "known_hosts").read_text()
    right, wrong = (
        (ssh / name).read_text().split()[1] for name in ("host_key.pub", "id_ed25519.pub")
    )
    lines = known.splitlines()
    assert lines[2].startswith("node2,")
    lines[2] = lines[2].replace(right, wrong)
    (ssh / "known_hosts").write_text("\n".join(lines) + "\n")
    try:
        job("wait").fails("node2: its host key is unknown, or not the one that it had before")
    finally:
        (ssh / "known_hosts").write_text(known)
    assert cluster.leftovers() == {}


def test_a_host_that_accepts_the_connection_and_hangs_is_named(
    cluster: VirtualCluster, job: Job
) -> None:
    cluster.freeze("node2")
    job("wait").fails("node2: it accepts connections and then says nothing")


def test_a_port_that_is_taken_is_named_with_its_owner(cluster: VirtualCluster, job: Job) -> None:
    port = next(_ports) + 1
    listen = (
        "import socket, time; s = socket.socket(); "
        f"s.bind(('', {port})); s.listen(); print('listens', flush=True); time.sleep(1000)"
    )
    listener = cluster.start("node1", [sys.executable, "-c", listen])
    deadline = time.monotonic() + WAIT_SECONDS
    while "listens" not in listener.output:
        assert time.monotonic() < deadline, listener.output
        time.sleep(0.05)
    running = job("wait")
    assert running.port == port
    running.fails(f"node1: port {port} is taken by process", "(python")


def test_a_host_that_crashes_in_mid_run_is_named_and_all_others_are_cleared(
    cluster: VirtualCluster, job: Job
) -> None:
    running = job("wait")
    running.wait_for_ranks()
    cluster.crash("node2")
    running.fails("node2 was lost: the connection broke")
    assert cluster.leftovers() == {}


def test_a_host_that_is_cut_off_or_frozen_in_mid_run_is_named_and_all_others_are_cleared(
    cluster: VirtualCluster, job: Job
) -> None:
    on_cut, on_frozen = job("wait", FIRST), job("wait", SECOND)
    on_cut.wait_for_ranks()
    on_frozen.wait_for_ranks()
    cluster.cut("node2")
    cluster.freeze("node4")
    on_cut.fails("node2 was lost: it has not answered for")
    on_frozen.fails("node4 was lost: it has not answered for")
    # It cannot be told; it notices that nobody is there, and ends the run by itself. What stays is
    # sshd's session of a connection that is cut, and all of a frozen host.
    deadline = time.monotonic() + WAIT_SECONDS
    left = cluster.leftovers(within=0)
    while set(left) - {"node2", "node4"} or "probe_rank" in str(left.get("node2")):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
        left = cluster.leftovers(within=0)


def test_ranks_that_raise_or_are_killed_are_named_with_their_host(
    cluster: VirtualCluster, job: Job
) -> None:
    raising, killed = job("raise", FIRST), job("kill", SECOND)
    raising.wait_for_ranks()
    killed.wait_for_ranks()
    raising.fails("rank 1 on node2 failed in phase forward: ValueError: deliberate")
    killed.fails("rank 1 on node4 was killed by signal 9 (SIGKILL)")
    assert cluster.leftovers() == {}


def test_a_signal_ends_this_run_everywhere_and_no_other_and_no_secret_is_seen(
    cluster: VirtualCluster, job: Job
) -> None:
    # DeepSpeed's own launcher would run `pkill -f "python -u -m deepspeed.launcher.launch"`.
    other = "sleep 1000; echo python -u -m deepspeed.launcher.launch"
    cluster.start("node1", ["sh", "-c", other])
    first, second, third = job("wait"), job("wait"), job("wait", SECOND)
    for running in (first, second, third):
        running.wait_for_ranks()
    seen = [line for lines in cluster.leftovers(within=0).values() for line in lines]
    assert [line for line in seen if "probe_rank" in line]
    assert not [line for line in seen if "hush-hush" in line]
    secrets = first.folder / "environment.sh"
    assert secrets.stat().st_mode & 0o777 == 0o600
    assert "MLFLOW_TRACKING_TOKEN=hush-hush" in secrets.read_text()
    first.process.signal(signal.SIGTERM)
    first.fails("stopped by SIGTERM", state="interrupted")
    # The other run on the same hosts has not noticed.
    assert second.process.entering.poll() is None
    assert "probe_rank" in str(cluster.leftovers(within=0).get("node1"))
    second.process.signal(signal.SIGINT)
    second.fails("stopped by SIGINT", state="interrupted")
    # pdsh and DeepSpeed's runner on this machine end when their ranks have.
    third.process.signal(signal.SIGKILL)
    third.process.wait()
    still = {"node1": [f"sh -c {other}", "sleep 1000"]}
    assert cluster.leftovers(but=still) == still


def test_200_mb_of_output_end_in_the_log_and_on_the_terminal(
    cluster: VirtualCluster, job: Job
) -> None:
    running = job("flood")
    assert running.process.wait() == 0
    log = running.folder / rd.LAUNCHER_LOG
    assert log.stat().st_size > 200_000_000
    assert running.process.log.stat().st_size >= log.stat().st_size
    log.unlink()
    running.process.log.unlink()
    assert cluster.leftovers() == {}
