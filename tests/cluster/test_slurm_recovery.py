"""A Slurm job that is preempted, told to stop, then loses a node, and still ends.

Keeps rows of the fault table in docs/reliability.md (``make test-faults``).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from host_processes import HostProcess
from slurm_daemons import Slurm
from slurm_runs import SlurmRuns
from virtual_hosts import ROOT, VirtualCluster

sys.path.insert(0, str(ROOT / "tests" / "integration"))
from fault_rows import add_row
from worker_runs import make_model, write_chats

from launcher import run_dir as rd
from launcher.run_checkpoints import newest_checkpoint

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.slow]

# Seconds, even on a fast machine, so that each fault strikes before the slow save, or in it.
NUM_STEPS = 500
SLOW_STEP = 400
AGAIN = "has been put back into the queue"
RECIPE = """\
model: {{name_or_path: {folder}/model, precision: fp32}}
method: lora
max_seq_len: 64
data: {{path: {folder}/chats.jsonl}}
optim: {{global_batch_size: 4, max_steps: {steps}, save_steps: 20}}
strategy: {{zero_stage: 2}}
cluster: {{backend: slurm, num_nodes: 2, gpus_per_node: 1}}
slurm: {slurm}
"""


class Job:
    """``zerofit train`` on the login node, which watches a job of two nodes."""

    def __init__(
        self, runs: SlurmRuns, *, steps: int = NUM_STEPS, slurm: str, **variables: str
    ) -> None:
        folder = runs.folder
        make_model(folder / "model")
        write_chats(folder / "chats.jsonl", 16)
        (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder, steps=steps, slurm=slurm))
        argv = [sys.executable, "-m", "launcher.cli", "train", "recipe.yaml"]
        self.runs = runs
        self.run = folder / "run"
        self.process: HostProcess = runs.cluster.start(
            "head", [*argv, "--output-dir", "run"], cwd=folder, env=runs.environment(**variables)
        )

    def until(self, text: str, *, path: Path | None = None, times: int = 1) -> float:
        """Wait until the log, or what the command says, has a text; return the time."""
        deadline = time.monotonic() + 300
        while (path.read_text() if path and path.exists() else self.process.output).count(
            text
        ) < times:
            assert self.process.entering.poll() is None, self.process.output
            assert time.monotonic() < deadline, self.process.output
            time.sleep(0.1)
        return time.time()

    def until_step(self, step: int) -> None:
        self.until(f'"step": {step},', path=self.run / rd.TRAINER_LOG)

    def start_now(self, slurm: Slurm) -> None:
        """Spare the job the two minutes that Slurm lets a job wait that was put back."""
        slurm.start_again(self.runs.job_id(self.run))

    @property
    def last_step(self) -> int:
        return int(json.loads((self.run / rd.TRAINER_LOG).read_text().splitlines()[-1])["step"])

    @property
    def saved_step(self) -> int:
        newest = newest_checkpoint(self.run)
        assert newest is not None
        return int(newest.name.rpartition("-")[2])


def test_a_job_that_is_preempted_told_to_stop_and_then_loses_a_node_ends(
    slurm: Slurm,
    cluster: VirtualCluster,
    shared_folder: Path,
) -> None:
    # A save in which Slurm has the time to miss the node's daemon, however fast the steps are.
    slow = ",".join([f"slow:save:step={SLOW_STEP}"] * 4)
    runs = SlurmRuns(cluster=cluster, folder=shared_folder)
    job = Job(runs, slurm="{partition: low}", ZEROFIT_FAULT=slow)

    job.until_step(25)
    preempted = time.time()
    more = ["sbatch", "--partition=main", "--nodes=4", "--exclusive", "--wrap=true"]
    cluster.run("head", more, cwd=shared_folder, check=True)
    noticed = job.until(AGAIN)
    assert job.saved_step == job.last_step >= 25
    assert "preemption by Slurm: saved after step" in (job.run / rd.LAUNCHER_LOG).read_text()
    add_row(
        fault="a job of higher priority preempts (GraceTime, SIGTERM)", backend="slurm",
        zero_stage=2, noticed_seconds=noticed - preempted, steps_lost=0,
        result="saved, requeued and resumed",
    )  # fmt: skip
    job.start_now(slurm)

    job.until_step(job.last_step + 10)
    signalled = time.time()
    signal = ["scancel", "--signal=USR1", "--batch", job.runs.job_id(job.run)]
    cluster.run("head", signal, check=True)
    noticed = job.until(AGAIN, times=2)
    assert job.saved_step == job.last_step > 35
    add_row(
        fault="USR1 from Slurm, as before a time limit", backend="slurm", zero_stage=2,
        noticed_seconds=noticed - signalled, steps_lost=0, result="saved, requeued and resumed",
    )  # fmt: skip
    job.start_now(slurm)

    marks = job.run / ".faults"
    job.runs.until(lambda: list(marks.glob("0-*")), seconds=300)
    cluster.will_need_reboot("node2")
    killed = time.time()
    cluster.run("node2", ["sh", "-c", 'kill -9 "$(cat /run/slurm/slurmd.pid)"'], check=True)
    noticed = job.until(AGAIN, times=3)
    lost = job.last_step - job.saved_step
    add_row(
        fault="a node's slurmd is killed (SlurmdTimeout 15 s)", backend="slurm", zero_stage=2,
        noticed_seconds=noticed - killed, steps_lost=lost, result="requeued by Slurm, and resumed",
    )  # fmt: skip
    job.start_now(slurm)

    assert job.process.wait(timeout=400) == 0, job.process.output
    assert rd.read_status(job.run).state == "finished"
    entries = [json.loads(line) for line in (job.run / rd.TRAINER_LOG).read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(1, NUM_STEPS + 1))
    assert "node2" not in {peaks.host for peaks in rd.read_ranks(job.run)}


def test_a_job_goes_on_after_signals_at_its_start_and_a_real_time_limit(
    slurm: Slurm,
    cluster: VirtualCluster,
    shared_folder: Path,
) -> None:
    runs = SlurmRuns(cluster=cluster, folder=shared_folder)
    job = Job(runs, steps=100_000, slurm="{time: '4', signal_seconds: 60}")
    log = job.run / rd.LAUNCHER_LOG

    job.until("rendezvous", path=log)
    signalled = time.time()
    for number in (1, 2):
        signal = ["scancel", "--signal=USR1", "--batch", runs.job_id(job.run)]
        cluster.run("head", signal, check=True)
        job.until("Slurm says stop", path=log, times=number)
    noticed = job.until(AGAIN)
    assert newest_checkpoint(job.run) is None
    add_row(
        fault="USR1 from Slurm, twice, seconds after the start", backend="slurm", zero_stage=2,
        noticed_seconds=noticed - signalled, steps_lost=0, result="requeued; nothing was to save",
    )  # fmt: skip
    job.start_now(slurm)

    # Slurm's clock, and not ours.
    signalled = job.until("Slurm says stop", path=log, times=3)
    noticed = job.until(AGAIN, times=2)
    assert "DUE TO TIME LIMIT" not in log.read_text()
    assert job.saved_step == job.last_step
    add_row(
        fault="the time limit of a job (4 minutes) is near", backend="slurm", zero_stage=2,
        noticed_seconds=noticed - signalled, steps_lost=0, result="saved, requeued and resumed",
    )  # fmt: skip
    job.start_now(slurm)
    job.until_step(job.last_step + 1)
