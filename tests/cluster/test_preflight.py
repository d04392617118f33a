"""``zerofit doctor`` and ``zerofit hostfile`` on real hosts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from slurm_daemons import Slurm
from virtual_hosts import VirtualCluster

pytestmark = pytest.mark.cluster

ZEROFIT = (sys.executable, "-m", "launcher.cli")


def zerofit(
    cluster: VirtualCluster, folder: Path, *args: str, within: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    return cluster.run("head", [*within, *ZEROFIT, *args], cwd=folder, timeout=600)


def test_good_hosts_are_compared_and_the_network_between_them_is_measured(
    cluster: VirtualCluster, shared_folder: Path
) -> None:
    (shared_folder / "hosts").write_text("node[1-2] slots=2\n")
    done = zerofit(
        cluster, shared_folder, "doctor", "--hostfile", "hosts", "--json", "-o", "measured.json"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((shared_folder / "measured.json").read_text())
    assert found == json.loads(done.stdout)
    assert found["schema"] == 1
    assert [host["name"] for host in found["hosts"]] == ["node1", "node2"]
    assert all(abs(host["clock_skew_seconds"]) < 5 for host in found["hosts"])
    for rate in ("intra_node_all_reduce_gbit_per_s", "inter_node_all_reduce_gbit_per_s"):
        assert 0.01 < found[rate] < 1000
    assert 0.0001 < found["gemm_tflop_per_s"] < 10
    assert cluster.leftovers() == {}


def test_bad_hosts_are_named_with_the_reason_and_can_be_left_out(
    cluster: VirtualCluster, shared_folder: Path
) -> None:
    # /tmp is each host's own: what is there differs, as on a cluster where it is not copied.
    for host, text in (("node1", "a"), ("node3", "a"), ("node4", "b"), ("head", "a")):
        cluster.run(host, ["sh", "-c", f"echo {text} > /tmp/train.jsonl"], check=True)
        cluster.will_need_reboot(host)
    cluster.will_need_reboot("node2")
    cluster.stop_sshd("node3")
    (shared_folder / "hosts").write_text("node[1-4] slots=1\n")
    done = zerofit(
        cluster,
        shared_folder,
        *("doctor", "model.name_or_path=smollm2-135m", "data.path=/tmp/train.jsonl"),
        *("--hostfile", "hosts", "--no-measure", "--exclude-bad", "good"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "node2: /tmp/train.jsonl is not there" in done.stdout
    assert "node3: it refuses ssh connections" in done.stdout
    assert "node4: /tmp/train.jsonl has other content than on most nodes" in done.stdout
    assert (shared_folder / "good").read_text() == "node1 slots=1\n"


def test_a_slurm_job_checks_its_own_nodes_and_writes_its_hostfile(
    cluster: VirtualCluster, slurm: Slurm, shared_folder: Path
) -> None:
    salloc = ["salloc", "--quiet", "-N2", "--ntasks-per-node=1", "--gpus-per-node=2", "--mem=1G"]
    done = zerofit(cluster, shared_folder, "hostfile", within=salloc)
    assert done.stdout == "node1 slots=2\nnode2 slots=2\n", done.stderr
    # A job that zerofit submits measures rates itself, which is tested there.
    done = zerofit(cluster, shared_folder, "doctor", "--no-measure", "--json", within=salloc)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert [host["name"] for host in found["hosts"]] == ["node1", "node2"]


def test_a_hostfile_is_written_from_a_list_by_asking_each_host(
    cluster: VirtualCluster, shared_folder: Path
) -> None:
    done = zerofit(cluster, shared_folder, "hostfile", "node[1-2],node4", "-o", "hosts")
    assert done.returncode == 0, done.stderr
    assert "node1 has no GPU: one slot" in done.stderr
    text = (shared_folder / "hosts").read_text()
    assert text == "node1 slots=1\nnode2 slots=1\nnode4 slots=1\n"
    done = zerofit(cluster, shared_folder, "hostfile", "node[1-2]", "nosuch")
    assert done.returncode == 2
    assert "nosuch: its name is not known here" in done.stderr
