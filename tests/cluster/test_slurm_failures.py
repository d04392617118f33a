"""What a user of `zerofit train` with Slurm sees when something fails, on a real Slurm."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from slurm_daemons import Slurm
from slurm_runs import TINY, SlurmRuns
from virtual_hosts import VirtualCluster

from launcher import run_dir as rd
from launcher.dispatch.preflight import Needs
from launcher.sbatch_script import PREFLIGHT

pytestmark = pytest.mark.cluster


KNOWN_WITHIN_SECONDS = 60.0
"""15 s on a quiet machine."""


def test_a_rank_that_raises_is_named_with_its_host_and_soon(
    runs: SlurmRuns, cluster: VirtualCluster
) -> None:
    done = runs.wait("raise", "raise 1")
    failed_at = rd.rank_file(runs.folder / "raise", 1).stat().st_mtime
    assert time.time() - failed_at < KNOWN_WITHIN_SECONDS
    assert done.returncode == 4
    assert "rank 1 on node2 failed in phase forward: ValueError: deliberate" in done.stderr
    assert runs.status(runs.folder / "raise")["state"] == "failed"
    assert cluster.leftovers() == {}


def test_a_job_looks_at_its_nodes_first_and_goes_on_with_a_spare_one_or_names_the_bad(
    runs: SlurmRuns, cluster: VirtualCluster
) -> None:
    # What the run reads is not the same on node2: /tmp is each host's own.
    for host, text in (("node1", "a"), ("node2", "b"), ("node3", "a")):
        cluster.run(host, ["sh", "-c", f"echo {text} > /tmp/train.jsonl"], check=True)
        cluster.will_need_reboot(host)
    needs = Needs(paths=(Path("/tmp/train.jsonl"),)).to_json()
    looking: dict[str, Any] = {"preflight": True, "extra": ["--nodelist=node[1-3]"]}
    spare = runs.wait("spare", needs=needs, spare_nodes=1, **looking)
    assert spare.returncode == 0, spare.stdout + spare.stderr
    assert "node2: /tmp/train.jsonl has other content than on most nodes" in spare.stdout
    assert [peaks.host for peaks in rd.read_ranks(runs.folder / "spare")] == ["node1", "node3"]
    rates = json.loads((runs.folder / "spare" / PREFLIGHT).read_text())
    assert rates["inter_node_all_reduce_gbit_per_s"] > 0.01
    all_three = runs.wait("all", nodes=3, needs=needs, **looking)
    looked_at = (runs.folder / "all" / PREFLIGHT).stat().st_mtime
    assert time.time() - looked_at < KNOWN_WITHIN_SECONDS
    assert all_three.returncode == 4
    said = "2 of 3 nodes are good; node2: /tmp/train.jsonl has other content than on most nodes"
    assert said in all_three.stderr
    assert rd.read_status(runs.folder / "all").reason == said
    assert cluster.leftovers() == {}


def test_a_rank_that_is_killed_is_named_with_its_host(
    runs: SlurmRuns, cluster: VirtualCluster
) -> None:
    done = runs.wait("kill", "kill 1")
    assert done.returncode == 4
    assert "rank 1 on node2 ended: Killed" in done.stderr
    assert "ran out of memory" in done.stderr
    status = rd.read_status(runs.folder / "kill")
    assert (status.state, status.reason) == ("failed", "rank 1 on node2 ended: Killed")
    assert cluster.leftovers() == {}


def test_a_job_that_slurm_rejects_shows_its_message_and_leaves_nothing(runs: SlurmRuns) -> None:
    (runs.folder / "tiny.yaml").write_text(TINY)
    (runs.folder / "zerofit").mkdir()
    # The site file counts too.
    (runs.folder / "zerofit" / "site.yaml").write_text("slurm: {partition: nosuch}\n")
    done = runs.zerofit("submit", "tiny.yaml", "--output-dir", "out")
    assert done.returncode == 4
    assert "Slurm did not take the job: invalid partition specified: nosuch" in done.stderr
    assert not (runs.folder / "out").exists()


def test_a_job_that_another_cancels_ends_the_watching(
    runs: SlurmRuns, cluster: VirtualCluster
) -> None:
    watching = runs.start("cancelled", "sleep")
    job_id = runs.job_id(runs.folder / "cancelled")
    cluster.run("head", ["scancel", job_id], check=True)
    assert watching.wait() == 4
    assert f"job {job_id}: it was cancelled" in watching.output
    assert runs.status(runs.folder / "cancelled")["state"] == "killed"
    assert cluster.leftovers() == {}


def test_ctrl_c_lets_the_job_go_on_and_twice_cancels_it(
    runs: SlurmRuns, cluster: VirtualCluster
) -> None:
    watching = runs.start("once", "sleep")
    watching.signal(signal.SIGINT)
    assert watching.wait() == 130
    assert re.search(r"job \d+ goes on; Ctrl-C again within 2 s cancels it", watching.output)
    assert runs.status(runs.folder / "once")["state"] == "running"
    runs.zerofit("cancel", runs.folder / "once")
    watching = runs.start("twice", "sleep", SECOND_CTRL_C_SECONDS="600")
    watching.signal(signal.SIGINT)
    runs.until(lambda: "Ctrl-C again within" in watching.output)
    watching.signal(signal.SIGINT)
    assert watching.wait() == 4
    assert re.search(r"job \d+ is cancelled", watching.output)
    assert rd.read_status(runs.folder / "twice").state == "interrupted"
    assert cluster.leftovers() == {}


def test_inside_an_allocation_cancel_ends_the_ranks_on_all_hosts_and_not_the_allocation(
    runs: SlurmRuns, cluster: VirtualCluster
) -> None:
    watching = runs.start_inside("inside", "sleep")
    seen = runs.status(runs.folder / "inside")
    assert (seen["state"], seen["backend"]) == ("running", "allocation")
    cancelled = runs.zerofit("cancel", runs.folder / "inside")
    assert cancelled.stdout.startswith("killed: stopped by zerofit cancel"), cancelled.stderr
    # salloc, for its command has ended.
    assert watching.wait() != 0
    assert "the run was stopped by zerofit cancel" in watching.output
    assert cluster.leftovers() == {}


def test_inside_an_allocation_a_rank_that_raises_is_named_with_its_host(
    runs: SlurmRuns, cluster: VirtualCluster
) -> None:
    watching = runs.start_inside("inside", "raise 1")
    assert watching.wait() == 4
    assert "rank 1 on node2 failed in phase forward: ValueError" in watching.output
    assert rd.read_status(runs.folder / "inside").state == "failed"
    assert cluster.leftovers() == {}


def test_without_the_controller_nothing_is_submitted_and_watching_goes_on(
    runs: SlurmRuns, slurm: Slurm, cluster: VirtualCluster
) -> None:
    watching = runs.start("watched", "sleep")
    run_dir, job_id = runs.folder / "watched", runs.job_id(runs.folder / "watched")
    # Not SIGKILL: a controller that has not yet written down the job starts it a second time.
    pid = cluster.run("head", ["cat", "/run/slurm/slurmctld.pid"], check=True).stdout.strip()
    cluster.run("head", ["kill", pid], check=True)
    runs.until(lambda: cluster.run("head", ["kill", "-0", pid]).returncode != 0)
    (runs.folder / "tiny.yaml").write_text(TINY)
    done = runs.zerofit("submit", "tiny.yaml", "--output-dir", "out")
    assert done.returncode == 4
    assert "Unable to contact slurm controller" in done.stderr
    assert not (runs.folder / "out").exists()
    seen = runs.status(run_dir)
    assert seen["state"] == "unknown"
    assert seen["reason"].startswith("Slurm does not answer: ")
    runs.until(lambda: "the job goes on" in watching.output)
    cluster.run("head", ["slurmctld"], check=True)
    runs.until(lambda: "Slurm answers again" in watching.output)
    cluster.run("head", ["scancel", job_id], check=True)
    assert watching.wait() == 4
    slurm.wait_idle()
    cluster.note_daemons()


def test_lost_nodes_are_named_by_a_job_and_inside_an_allocation_and_all_ranks_end(
    runs: SlurmRuns, cluster: VirtualCluster, slurm: Slurm
) -> None:
    watching = runs.start("slurmd", "sleep", requeue=False)
    inside = runs.start_inside("inside", "sleep")
    cluster.will_need_reboot("node2")
    with slurm.patient_with_nodes():
        cluster.run("node2", ["sh", "-c", 'kill -9 "$(cat /run/slurm/slurmd.pid)"'], check=True)
        (lost,) = [peaks.host for peaks in rd.read_ranks(runs.folder / "inside") if peaks.rank == 1]
        cluster.crash(lost)
        # 11 s, and what a busy machine adds.
        runs.until(lambda: "slurmd on node2 does not answer; its ranks were" in watching.output)
        runs.until(lambda: f"slurmd on {lost} does not answer; its ranks were" in inside.output)
    # Now Slurm itself may know.
    assert inside.wait() == 4
    # Whoever comes first: the watcher, or Slurm after SlurmdTimeout, which is short here.
    assert re.search(rf"{lost} was lost|a node failed: {lost} \(down", inside.output)
    assert watching.wait() == 4
    assert re.search(r"job \d+: a node failed: node2 \(down", watching.output)
    assert runs.status(runs.folder / "slurmd")["state"] == "killed"
    # Slurm cannot reach those of node2: they notice that their job is over, and slurmstepd that
    # they are.
    assert cluster.leftovers() == {}


@pytest.mark.slow
def test_a_job_that_lost_its_node_waits_for_another_unless_told_not_to(
    runs: SlurmRuns, cluster: VirtualCluster
) -> None:
    watching = runs.start("crash", "sleep")
    cluster.crash("node2")
    # Slurm knows after 15 s here, and after 300 s by default.
    runs.until(lambda: "node2 has fallen silent" in watching.output)
    runs.until(lambda: "has been put back into the queue" in watching.output)
    assert runs.status(runs.folder / "crash")["state"] == "pending"
    runs.zerofit("cancel", runs.folder / "crash")
    assert watching.wait() == 4
    assert cluster.leftovers() == {}


@pytest.mark.slow
def test_ranks_that_do_not_save_in_time_end_at_the_limit(
    runs: SlurmRuns, cluster: VirtualCluster
) -> None:
    watching = runs.start("late", "deaf", time="1")
    assert watching.wait(timeout=400) == 4
    assert "the time limit was reached" in watching.output
    assert cluster.leftovers() == {}
