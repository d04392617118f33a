"""The real worker on 4 nodes as a job of its own, and on 2 nodes inside somebody's job."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from slurm_daemons import Slurm
from slurm_runs import SlurmRuns
from virtual_hosts import ROOT, VirtualCluster

from launcher import run_dir as rd
from launcher.failure_kind import FailureKind
from launcher.recovery.record import read_failed_attempts

pytestmark = pytest.mark.cluster
sys.path.insert(0, str(ROOT / "tests" / "integration"))

RECIPE = """\
model: {{name_or_path: {folder}/model, precision: fp32}}
max_seq_len: 64
data: {{path: {folder}/chats.jsonl}}
optim: {{global_batch_size: 4, max_steps: 3}}
strategy: {{zero_stage: 2, loss: full}}
"""


@pytest.fixture
def runs(slurm: Slurm, cluster: VirtualCluster, shared_folder: Path) -> SlurmRuns:
    from worker_runs import make_model, write_chats

    make_model(shared_folder / "model")
    write_chats(shared_folder / "chats.jsonl", 16)
    (shared_folder / "recipe.yaml").write_text(RECIPE.format(folder=shared_folder))
    return SlurmRuns(cluster=cluster, folder=shared_folder)


def hosts_of(run_dir: Path) -> list[str]:
    return [peaks.host for peaks in rd.read_ranks(run_dir)]


def test_a_run_trains_on_four_nodes_as_a_job_of_its_own_although_memory_runs_out_once(
    runs: SlurmRuns, cluster: VirtualCluster
) -> None:
    overrides = ["cluster.backend=slurm", "cluster.num_nodes=4", "cluster.gpus_per_node=1"]
    fault = {"ZEROFIT_FAULT": "oom:backward:step=2:rank=2"}
    done = runs.zerofit("train", "recipe.yaml", *overrides, "--output-dir", "four", **fault)
    assert done.returncode == 0, done.stdout + done.stderr
    run_dir = runs.folder / "four"
    (failed,) = read_failed_attempts(run_dir)
    assert (failed.kind, failed.rank, failed.host) == (FailureKind.gpu_oom, 2, "node3")
    # In the same job, with a plan that needs less.
    assert failed.supervisor == f"slurm:{runs.job_id(run_dir)}"
    assert failed.changes
    assert "DUE TO JOB REQUEUE" not in (run_dir / rd.LAUNCHER_LOG).read_text()
    assert hosts_of(run_dir) == ["node1", "node2", "node3", "node4"]
    assert json.loads((run_dir / rd.RESULTS).read_text())["tokens_seen"] > 0
    # The data was tokenised before the job, and the limit follows from the predicted time.
    assert "submitted job" in done.stdout
    assert "time limit 30 minutes, from the predicted run time" in done.stdout
    assert runs.status(run_dir)["step"] == 3
    assert cluster.leftovers() == {}


def test_a_script_of_one_s_own_trains_on_the_nodes_that_it_has(
    runs: SlurmRuns, cluster: VirtualCluster
) -> None:
    shape = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--time=10"]
    script = ROOT / "slurm" / "finetune.sbatch"
    submit = ["sbatch", "--parsable", *shape, script, "recipe.yaml", "output_dir=two"]
    submit += ["slurm.preflight=false"]  # the run above looks at its nodes
    done = cluster.run("head", submit, cwd=runs.folder, env=runs.environment(), check=True)
    job_id = done.stdout.strip()
    log = runs.folder / f"finetune-{job_id}.out"
    ended = ["COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL"]

    def has_ended() -> bool:
        shown = cluster.run("head", ["squeue", "-h", "-t", "all", "-j", job_id, "-o", "%T"])
        return shown.stdout.strip() in ended

    runs.until(has_ended, seconds=600)
    run_dir = runs.folder / "two"
    assert rd.read_status(run_dir).state == "finished", log.read_text()
    assert hosts_of(run_dir) == ["node1", "node2"]
    assert json.loads((run_dir / rd.JOB).read_text())["backend"] == "allocation"
    assert "step 3/3" in log.read_text()
    assert cluster.leftovers() == {}


@pytest.mark.slow
def test_a_run_whose_time_is_nearly_up_saves_and_goes_on_where_it_was(
    runs: SlurmRuns, cluster: VirtualCluster, slurm: Slurm
) -> None:
    """What recovery needs of Slurm: USR1, a checkpoint, another start, the same steps."""
    overrides = ["cluster.num_nodes=2", "cluster.gpus_per_node=1", "optim.max_steps=400"]
    done = runs.zerofit("submit", "recipe.yaml", *overrides, "--output-dir", "late")
    assert done.returncode == 0, done.stderr
    run_dir = runs.folder / "late"
    job_id = runs.job_id(run_dir)
    log = run_dir / rd.LAUNCHER_LOG
    runs.until(lambda: "step 5/400" in log.read_text(), seconds=600)
    cluster.run("head", ["scancel", "--signal=USR1", "--batch", job_id], check=True)
    runs.until(lambda: runs.status(run_dir)["state"] == "pending")
    assert "Slurm's signal: saved after step" in log.read_text()
    slurm.start_again(job_id)
    runs.until(lambda: rd.read_status(run_dir).state == "finished", seconds=600)
    entries = [json.loads(line) for line in (run_dir / rd.TRAINER_LOG).read_text().splitlines()]
    steps = [entry["step"] for entry in entries if "loss" in entry]
    assert steps == list(range(1, 401))
    assert log.read_text().count("step 1/400") == 1
