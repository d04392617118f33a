"""The test cluster itself: what the other tests rely on."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from slurm_daemons import Slurm
from virtual_hosts import VirtualCluster

pytestmark = pytest.mark.cluster


def test_every_host_reaches_every_other_by_ssh_and_name(cluster: VirtualCluster) -> None:
    done = cluster.run("head", ["pdsh", "-R", "ssh", "-w", "node[1-4]", "hostname"])
    assert sorted(done.stdout.split()) == sorted(
        word for name in cluster.nodes for word in (f"{name}:", name)
    )


def test_hosts_share_the_test_s_folder_and_not_tmp(
    cluster: VirtualCluster, shared_folder: Path
) -> None:
    cluster.run("node1", ["touch", shared_folder / "seen", "/tmp/own"], check=True)
    done = cluster.run("node2", ["ls", shared_folder / "seen", "/tmp/own"])
    assert done.stdout.strip() == str(shared_folder / "seen")


def test_nothing_of_the_hosts_is_seen_outside(cluster: VirtualCluster) -> None:
    shown = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True)
    assert "p-node" not in shown.stdout
    assert "node1" not in Path("/etc/hosts").read_text()


def test_a_crashed_host_is_booted_anew_and_a_process_left_on_a_host_is_found(
    cluster: VirtualCluster,
) -> None:
    cluster.start("node2", ["sleep", "1000"])
    left = {"node2": ["sleep 1000"]}
    assert cluster.leftovers(but=left) == left
    cluster.crash("node2")
    refused = cluster.run("head", ["ssh", "-o", "ConnectTimeout=1", "node2", "true"])
    assert refused.returncode == 255
    cluster.heal()
    assert cluster.leftovers() == {}
    assert cluster.run("head", ["ssh", "node2", "hostname"]).stdout == "node2\n"


def test_a_cut_cable_is_silence_until_it_is_mended(cluster: VirtualCluster) -> None:
    cluster.cut("node3")
    ssh = ["ssh", "node3", "hostname"]
    assert cluster.run("head", [*ssh[:1], "-o", "ConnectTimeout=1", *ssh[1:]]).returncode == 255
    cluster.mend("node3")
    assert cluster.run("head", ssh).stdout == "node3\n"


def test_a_frozen_host_accepts_connections_and_says_nothing(cluster: VirtualCluster) -> None:
    cluster.freeze("node4")
    done = cluster.run("head", ["ssh", "-o", "ConnectTimeout=3", "node4", "true"])
    assert "banner exchange" in done.stderr


def test_slurm_runs_a_job_on_all_nodes_with_gpus(slurm: Slurm, cluster: VirtualCluster) -> None:
    srun = ["srun", "-N4", "--gres=gpu:2", "sh", "-c", 'echo "$(hostname) $CUDA_VISIBLE_DEVICES"']
    done = cluster.run("head", srun)
    assert sorted(done.stdout.splitlines()) == [f"{name} 0,1" for name in cluster.nodes]
    slurm.wait_idle()
