"""A Slurm job that loses nodes and goes on with fewer, and again with all of them.

Keeps rows of the fault table in docs/reliability.md (``make test-faults``).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from slurm_daemons import Slurm
from slurm_runs import SlurmRuns
from virtual_hosts import ROOT, VirtualCluster

sys.path.insert(0, str(ROOT / "tests" / "integration"))
from fault_rows import add_row, failed_attempts, rows_of_steps, skip_if_kept, steps_lost
from worker_runs import make_model, write_chats

from launcher import run_dir as rd
from launcher.failure_kind import FailureKind
from launcher.recovery.record import read_failed_attempts
from launcher.run_checkpoints import newest_checkpoint

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.slow]

NUM_EXAMPLES = 24
STEPS_PER_EPOCH = 4
LOST = "a node's slurmd is killed (recovery.min_nodes)"
TOO_FEW = "a node crashes, and too few are left (recovery.min_nodes)"
LOST_FIRST = "the node of the job's script crashes (recovery.min_nodes)"
HANGS = "a node hangs (recovery.min_nodes, SlurmdTimeout 300 s)"
AGAIN = "has been put back into the queue"
SECONDS = 400.0
RECIPE = """\
model: {{name_or_path: {folder}/model, precision: fp32}}
method: lora
max_seq_len: 64
data: {{path: {folder}/chats.jsonl}}
optim: {{global_batch_size: 6, max_steps: {steps}, warmup_ratio: 0.0, save_steps: 20}}
strategy: {{zero_stage: 2}}
cluster: {{backend: slurm, num_nodes: {num_nodes}, gpus_per_node: 1}}
recovery: {{min_nodes: {min_nodes}}}
"""


class Job:
    """``zerofit train`` on the login node, which watches a job that may go on with fewer nodes."""

    def __init__(
        self, runs: SlurmRuns, *, num_nodes: int, min_nodes: int, steps: int, slow_saves: list[int]
    ) -> None:
        folder = runs.folder
        make_model(folder / "model")
        write_chats(folder / "chats.jsonl", NUM_EXAMPLES)
        (folder / "recipe.yaml").write_text(
            RECIPE.format(folder=folder, steps=steps, num_nodes=num_nodes, min_nodes=min_nodes)
        )
        # Saves that last as long as a fault needs to be done, however fast the steps are.
        slow = ",".join(f"slow:save:step={step}" for step in slow_saves)
        env = runs.environment(ZEROFIT_FAULT=slow, ZEROFIT_RECORD_BATCHES="1")
        argv = [sys.executable, "-m", "launcher.cli", "train", "recipe.yaml"]
        self.runs, self.run = runs, folder / "run"
        self.process = runs.cluster.start(
            "head", [*argv, "--output-dir", "run"], cwd=folder, env=env
        )

    def until(self, what: str, *, times: int = 1) -> float:
        """Wait until the command says something; return the time."""

        def is_so() -> bool:
            assert self.process.entering.poll() is None, self.process.output
            return self.process.output.count(what) >= times

        self.runs.until(is_so, seconds=SECONDS)
        return time.time()

    def until_slow_save(self, number: int) -> None:
        """Wait for a slow save, counted from 0."""
        marks = self.run / ".faults"
        self.runs.until(lambda: list(marks.glob(f"{number}-*")), seconds=SECONDS)

    def start_now(self) -> None:
        """Spare the job the two minutes that Slurm lets a job wait that was put back."""
        time.sleep(2)  # sooner, the nodes still refuse it
        release = ["scontrol", "update", f"JobId={self.id}", "StartTime=now"]
        self.runs.cluster.run("head", release, check=True)

    @property
    def id(self) -> str:
        return self.runs.job_id(self.run)

    @property
    def steps_since_a_save(self) -> int:
        last = json.loads((self.run / rd.TRAINER_LOG).read_text().splitlines()[-1])["step"]
        newest = newest_checkpoint(self.run)
        assert newest is not None
        return int(last) - int(newest.name.rpartition("-")[2])

    @property
    def hosts(self) -> list[str]:
        return [rank.host for rank in rd.read_ranks(self.run)]

    def assert_each_example_was_seen_once_an_epoch(self, steps: int) -> None:
        taken = rows_of_steps(self.run)
        assert sorted(taken) == list(range(1, steps + 1))
        for first in range(1, steps, STEPS_PER_EPOCH):
            rows = [row for step in range(first, first + STEPS_PER_EPOCH) for row in taken[step]]
            assert sorted(rows) == list(range(NUM_EXAMPLES))


def test_a_job_that_loses_a_node_goes_on_with_the_rest_and_with_too_few_waits_for_all(
    slurm: Slurm, cluster: VirtualCluster, shared_folder: Path
) -> None:
    skip_if_kept("slurm", 2, LOST, TOO_FEW, LOST_FIRST)
    runs = SlurmRuns(cluster=cluster, folder=shared_folder)
    slow = [40] * 3 + [80] * 3 + [120] * 3
    job = Job(runs, num_nodes=3, min_nodes=2, steps=140, slow_saves=slow)

    job.until_slow_save(0)
    cluster.will_need_reboot("node2")
    killed = time.time()
    cluster.run("node2", ["sh", "-c", 'kill -9 "$(cat /run/slurm/slurmd.pid)"'], check=True)
    job.until("slurmd on node2 does not answer")
    job.until("num_nodes 3 → 2")
    ((lost, noticed_seconds),) = failed_attempts(job.run, [killed])
    assert (lost.kind, lost.supervisor) == (FailureKind.lost_host, f"slurm:{job.id}")
    assert lost.problem == "node2 was lost: Slurm cannot start anything there"
    assert lost.changes["num_nodes"] == (3, 2)
    add_row(
        fault=LOST, backend="slurm", zero_stage=2, noticed_seconds=noticed_seconds,
        steps_lost=steps_lost(lost),
        result="resumed in the same job on the two nodes that were left, same global batch",
    )  # fmt: skip

    job.until_slow_save(3)
    assert job.hosts == ["node1", "node3"]
    assert "answers again" not in job.process.output
    # Slurm could not end those of node2; they have found that the run is no longer theirs.
    assert "launcher.worker" not in str(cluster.leftovers(within=0).get("node2"))
    crashed = time.time()
    cluster.crash("node3")
    noticed = job.until(AGAIN)
    job.until("going back into the queue: 1 of 2 hosts are left; recovery.min_nodes: 2")
    lost = read_failed_attempts(job.run)[-1]
    assert lost.action == "requeue"
    add_row(
        fault=TOO_FEW, backend="slurm", zero_stage=2, noticed_seconds=noticed - crashed,
        steps_lost=steps_lost(lost), result="requeued for all nodes, and resumed on all",
    )  # fmt: skip
    cluster.run("node2", ["slurmd"], check=True)
    job.start_now()

    job.until_slow_save(6)
    assert job.hosts == ["node1", "node2", "node4"]
    assert read_failed_attempts(job.run)[-1].changes["num_nodes"] == (2, 3)
    crashed = time.time()
    cluster.crash("node1")
    noticed = job.until(AGAIN, times=2)
    add_row(
        fault=LOST_FIRST, backend="slurm", zero_stage=2, noticed_seconds=noticed - crashed,
        steps_lost=job.steps_since_a_save, result="requeued for all nodes, and resumed",
    )  # fmt: skip
    cluster.boot("node3")
    job.start_now()

    assert job.process.wait(timeout=SECONDS) == 0, job.process.output
    assert rd.read_status(job.run).state == "finished"
    assert job.hosts == ["node2", "node3", "node4"]
    assert rd.read_json(job.run / rd.PLAN)["num_nodes"] == 3
    job.assert_each_example_was_seen_once_an_epoch(140)
    report = json.loads(runs.zerofit("report", job.run, "--json").stdout)
    assert "num_nodes: 3 → 2" in json.dumps(report, ensure_ascii=False)


@contextmanager
def slow_to_miss_a_node(slurm: Slurm, cluster: VirtualCluster) -> Iterator[None]:
    """Give Slurm its usual 300 s until it takes a silent node for lost."""
    path = cluster.folder / "etc" / "slurm" / "slurm.conf"
    usual = path.read_text()
    path.write_text(usual.replace("SlurmdTimeout=15", "SlurmdTimeout=300"))
    cluster.run("head", ["scontrol", "reconfigure"], check=True)
    try:
        shown = cluster.run("head", ["scontrol", "show", "config"], check=True).stdout
        assert "SlurmdTimeout           = 300 sec" in shown
        yield
    finally:
        slurm.cancel_all()
        path.write_text(usual)
        cluster.run("head", ["scontrol", "reconfigure"], check=True)


def test_a_node_that_hangs_is_given_up_long_before_slurm_says_so(
    slurm: Slurm, cluster: VirtualCluster, shared_folder: Path
) -> None:
    skip_if_kept("slurm", 2, HANGS)
    runs = SlurmRuns(cluster=cluster, folder=shared_folder)
    with slow_to_miss_a_node(slurm, cluster):
        job = Job(runs, num_nodes=2, min_nodes=1, steps=60, slow_saves=[40, 40])
        job.until_slow_save(0)
        frozen = time.time()
        cluster.freeze("node2")
        job.until("neither ranks nor slurmd are heard of on node2: ending the ranks")
        job.until("num_nodes 2 → 1")
        ((lost, noticed_seconds),) = failed_attempts(job.run, [frozen])
        job.until("starting the ranks again")
        # Nothing that wakes up harms the run, and Slurm need not wait for the node at the end.
        cluster.thaw("node2")
        assert job.process.wait(timeout=SECONDS) == 0, job.process.output
    assert lost.problem == "node2 was lost: Slurm cannot start anything there"
    assert job.hosts == ["node1"]
    job.assert_each_example_was_seen_once_an_epoch(60)
    add_row(
        fault=HANGS, backend="slurm", zero_stage=2, noticed_seconds=noticed_seconds,
        steps_lost=steps_lost(lost),
        result="resumed in the same job on the one node that was left, same global batch",
    )  # fmt: skip
