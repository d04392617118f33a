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
from virtual_hosts import HERE, ROOT, HostProcess, VirtualCluster

from launcher import run_dir as rd

pytestmark = pytest.mark.cluster

KNOWN_WITHIN_SECONDS = 15.0
_ports = itertools.count(21_000)


class ProbeJob:
    """A job of two probe ranks on node1 and node2, started from the head."""

    def __init__(self, cluster: VirtualCluster, folder: Path, what: str) -> None:
        self.cluster = cluster
        self.folder = folder
        self.port = next(_ports)
        job = [sys.executable, HERE / "probe_job.py", folder, what, "node1,node2", str(self.port)]
        self.process: HostProcess = cluster.start(
            "head", job, env={"PYTHONPATH": f"{ROOT}:{HERE}", "MLFLOW_TRACKING_TOKEN": "hush-hush"}
        )

    def wait_for_ranks(self) -> None:
        deadline = time.monotonic() + 60
        while len(list((self.folder / rd.RANKS).glob("0*.json"))) < 2:
            assert self.process.entering.poll() is None, self.process.output
            assert time.monotonic() < deadline, self.process.output
            time.sleep(0.1)

    def fails(self, *expected: str, state: str = "failed") -> None:
        """Check that it ends in time, says so, says what is expected, and leaves nothing."""
        started = time.monotonic()
        status = self.process.wait(timeout=60)
        took = time.monotonic() - started
        output = self.process.output
        assert status == 4, output
        for text in expected:
            assert text in output
        assert rd.read_status(self.folder).state == state
        assert not (self.folder / "environment.sh").exists()
        assert took < KNOWN_WITHIN_SECONDS, f"{took:.0f} s\n{output}"


@pytest.fixture
def job(cluster: VirtualCluster, tmp_path: Path) -> Callable[[str], ProbeJob]:
    def start(what: str) -> ProbeJob:
        return ProbeJob(cluster, tmp_path / "run", what)

    return start


def test_ranks_on_two_hosts_finish(cluster: VirtualCluster, job: Callable[[str], ProbeJob]) -> None:
    running = job("finish")
    assert running.process.wait(timeout=60) == 0, running.process.output
    assert cluster.leftovers(within=3) == {}


def test_a_host_without_sshd_is_named_before_anything_starts(
    cluster: VirtualCluster, job: Callable[[str], ProbeJob]
) -> None:
    cluster.stop_sshd("node2")
    job("wait").fails("node2: it refuses ssh connections", "start sshd on node2")
    assert cluster.leftovers(within=3) == {}


def test_a_host_with_another_key_is_named_before_anything_starts(
    cluster: VirtualCluster, job: Callable[[str], ProbeJob]
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
    assert cluster.leftovers(within=3) == {}


def test_a_host_that_accepts_the_connection_and_hangs_is_named(
    cluster: VirtualCluster, job: Callable[[str], ProbeJob]
) -> None:
    cluster.freeze("node2")
    job("wait").fails("node2: it accepts connections and then says nothing")


def test_a_port_that_is_taken_is_named_with_its_owner(
    cluster: VirtualCluster, job: Callable[[str], ProbeJob]
) -> None:
    port = next(_ports) + 1
    listen = (
        "import socket, time; s = socket.socket(); "
        f"s.bind(('', {port})); s.listen(); time.sleep(100)"
    )
    cluster.start("node1", [sys.executable, "-c", listen])
    time.sleep(1)
    running = job("wait")
    assert running.port == port
    running.fails(f"node1: port {port} is taken by process", "(python")


@pytest.mark.parametrize(
    ("hurt", "reason"),
    [
        ("crash", "node2 was lost: the connection broke"),
        ("cut", "node2 was lost: it has not answered for"),
        ("freeze", "node2 was lost: it has not answered for"),
    ],
)
def test_a_host_that_is_lost_in_mid_run_is_named_and_all_others_are_cleared(
    cluster: VirtualCluster, job: Callable[[str], ProbeJob], hurt: str, reason: str
) -> None:
    running = job("wait")
    running.wait_for_ranks()
    getattr(cluster, hurt)("node2")
    running.fails(reason)
    left = cluster.leftovers(within=3)
    if hurt == "cut":
        # It cannot be told; it notices that nobody is there, and ends the run by itself.
        deadline = time.monotonic() + 25
        while any("probe_rank" in line for line in left.get("node2", [])):
            assert time.monotonic() < deadline, left
            left = cluster.leftovers(within=1)
    left.pop("node2", None)  # sshd's session of a connection that is cut; all of a frozen host
    assert left == {}


def test_a_rank_that_raises_is_named_with_its_host(
    cluster: VirtualCluster, job: Callable[[str], ProbeJob]
) -> None:
    running = job("raise")
    running.wait_for_ranks()
    running.fails("rank 1 on node2 failed in phase forward: ValueError: deliberate")
    assert cluster.leftovers(within=3) == {}


def test_a_rank_that_is_killed_is_named_with_its_host(
    cluster: VirtualCluster, job: Callable[[str], ProbeJob]
) -> None:
    running = job("kill")
    running.wait_for_ranks()
    running.fails("rank 1 on node2 was killed by signal 9 (SIGKILL)")
    assert cluster.leftovers(within=3) == {}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_this_run_everywhere_and_no_other(
    cluster: VirtualCluster, job: Callable[[str], ProbeJob], number: signal.Signals
) -> None:
    # DeepSpeed's own launcher would run `pkill -f "python -u -m deepspeed.launcher.launch"`.
    other = "sleep 1000; echo python -u -m deepspeed.launcher.launch"
    cluster.start("node1", ["sh", "-c", other])
    running = job("wait")
    running.wait_for_ranks()
    running.process.signal(number)
    running.fails(f"stopped by {number.name}", state="interrupted")
    assert cluster.leftovers() == {"node1": [f"sh -c {other}", "sleep 1000"]}


def test_nothing_is_left_when_the_launcher_itself_is_killed(
    cluster: VirtualCluster, job: Callable[[str], ProbeJob]
) -> None:
    running = job("wait")
    running.wait_for_ranks()
    running.process.signal(signal.SIGKILL)
    running.process.wait(timeout=5)
    # pdsh and DeepSpeed's runner on this machine end when their ranks have.
    assert cluster.leftovers(within=15) == {}


def test_no_secret_is_on_a_command_line_of_any_host(
    cluster: VirtualCluster, job: Callable[[str], ProbeJob]
) -> None:
    running = job("wait")
    running.wait_for_ranks()
    seen = cluster.leftovers()
    assert {"head", "node1", "node2"} == set(seen)
    assert not [line for lines in seen.values() for line in lines if "hush-hush" in line]
    mode = (running.folder / "environment.sh").stat().st_mode
    assert mode & 0o777 == 0o600
    assert "MLFLOW_TRACKING_TOKEN=hush-hush" in (running.folder / "environment.sh").read_text()
    running.process.signal(signal.SIGTERM)
    running.process.wait(timeout=30)


def test_200_mb_of_output_end_in_the_log_and_on_the_terminal(
    cluster: VirtualCluster, job: Callable[[str], ProbeJob]
) -> None:
    running = job("flood")
    assert running.process.wait(timeout=120) == 0
    log = running.folder / rd.LAUNCHER_LOG
    assert log.stat().st_size > 200_000_000
    assert running.process.log.stat().st_size >= log.stat().st_size
    log.unlink()
    running.process.log.unlink()
