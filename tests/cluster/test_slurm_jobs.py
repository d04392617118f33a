"""Jobs on a real Slurm that go well: submitted, seen, requeued, cancelled, as arrays."""

from __future__ import annotations

import json
import shlex
import sys

import pytest
from slurm_daemons import Slurm
from slurm_runs import TINY, SlurmRuns
from virtual_hosts import ROOT, VirtualCluster

from launcher import run_dir as rd
from launcher.sbatch_parts import JOB_SBATCH
from launcher.starter_lock import LOCK

pytestmark = pytest.mark.cluster
sys.path.insert(0, str(ROOT / "tests" / "golden"))
from sbatch_cases import FOLDER  # noqa: E402


def test_a_job_finishes_whatever_its_names_are_and_nothing_runs_in_a_shell(
    runs: SlurmRuns, cluster: VirtualCluster
) -> None:
    name = "a b;touch pwned $(touch pwned) `touch pwned` 'q\" ü #1"
    done = runs.wait(name, job_name=name, extra=[f"--comment={name}"])
    assert done.returncode == 0, done.stderr
    run_dir = runs.folder / name
    # Two ranks on two hosts, which meet on the first at the job's port.
    log = (run_dir / rd.LAUNCHER_LOG).read_text()
    meeting = f"at node1:{20_000 + int(runs.job_id(run_dir))}"
    assert f"0: rank 0 of 2 {meeting}" in log
    assert f"1: rank 1 of 2 {meeting}" in log
    assert done.stdout == log
    assert not list(runs.folder.rglob("pwned"))
    assert runs.status(run_dir)["state"] == "finished"
    own = runs.zerofit("logs", run_dir, "--rank", "1")
    assert own.stdout == f"rank 1 of 2 {meeting}\n"
    assert cluster.leftovers() == {}


def test_a_pending_job_shows_its_reason_and_cancel_ends_it(runs: SlurmRuns) -> None:
    run_dir = runs.submit("later", extra=["--begin=now+1hour"])
    assert runs.status(run_dir)["state"] == "pending"
    expected = "BeginTime, expected to start 2"
    runs.until(lambda: runs.status(run_dir)["reason"].startswith(expected))
    cancelled = runs.zerofit("cancel", run_dir)
    assert cancelled.stdout.startswith("killed: "), cancelled.stderr
    listed = json.loads(runs.zerofit("list", runs.folder, "--json").stdout)
    assert [(item["state"], item["job_id"]) for item in listed] == [
        ("killed", runs.job_id(run_dir))
    ]
    assert rd.read_status(run_dir).state == "interrupted"


def test_a_job_that_must_stop_saves_and_is_started_again(
    runs: SlurmRuns, cluster: VirtualCluster, slurm: Slurm
) -> None:
    run_dir = runs.submit("stop", "stop")
    runs.until_ranks_run(run_dir)
    job_id = runs.job_id(run_dir)
    # What Slurm sends before the time limit: USR1 to the batch script alone.
    cluster.run("head", ["scancel", "--signal=USR1", "--batch", job_id], check=True)
    runs.until(lambda: runs.status(run_dir)["state"] == "pending")
    slurm.start_again(job_id)
    runs.until(lambda: rd.read_status(run_dir).state == "finished")
    log = (run_dir / rd.LAUNCHER_LOG).read_text()
    assert "asking the ranks to save a checkpoint" in log
    assert "1: rank 1 saves" in log
    assert log.count("0: rank 0 of 2") == 2
    # Once more by hand: there is nothing to do.
    runs.until(lambda: not (run_dir / LOCK).exists())
    cluster.run("head", ["sbatch", run_dir / JOB_SBATCH], cwd=run_dir, check=True)
    runs.until(lambda: "this run has finished" in (run_dir / rd.LAUNCHER_LOG).read_text())


def test_a_job_that_slurm_may_not_start_again_is_followed_by_another_one(
    runs: SlurmRuns, cluster: VirtualCluster, slurm: Slurm
) -> None:
    """And what comes while data is tokenised is no end of the run."""
    watching = runs.start("chain", "stop", requeue=False)
    run_dir = runs.folder / "chain"
    first = runs.job_id(run_dir)
    cluster.run("head", ["scancel", "--signal=USR1", "--batch", first], check=True)
    assert watching.wait() == 0, watching.output
    second = runs.job_id(run_dir)
    assert second != first
    assert f"job {first} goes on as job {second}" in watching.output
    assert rd.read_status(run_dir).state == "finished"
    data = runs.submit("data", "stop", HAS_DATA="1", requeue=False)
    log = data / rd.LAUNCHER_LOG
    runs.until(lambda: "rendezvous" in log.read_text())
    slurm.set_partition("DOWN")  # the next job is to wait for the data
    cluster.run("head", ["scancel", "--signal=USR1", "--batch", runs.job_id(data)], check=True)
    runs.until(lambda: "the chain goes on as job" in log.read_text())
    # It finds the data, trains, is told to stop, and is followed by a third one.
    (data / "data").mkdir()
    (data / "data" / "summary.json").touch()
    slurm.set_partition("UP")
    runs.until(lambda: "rank 0 of 2" in log.read_text())
    assert log.read_text().count("the chain goes on as job") == 1
    cluster.run("head", ["scancel", "--signal=USR1", "--batch", runs.job_id(data)], check=True)
    runs.until(lambda: rd.read_status(data).state == "finished")
    assert log.read_text().count("the chain goes on as job") == 2


def test_a_running_job_is_followed_and_cancelled_with_all_its_processes(
    runs: SlurmRuns, cluster: VirtualCluster
) -> None:
    run_dir = runs.submit("sleep", "sleep")
    runs.until_ranks_run(run_dir)
    assert runs.status(run_dir)["state"] == "running"
    assert runs.status(run_dir)["host"] == "node[1-2]"
    argv = [sys.executable, "-m", "launcher.cli", "logs", "-f", run_dir]
    follower = cluster.start("head", argv, env=runs.environment())
    # A second job of the same run leaves at once, and says which one it found.
    cluster.run("head", ["sbatch", run_dir / JOB_SBATCH], cwd=run_dir, check=True)
    log = run_dir / rd.LAUNCHER_LOG
    runs.until(lambda: "error: this run is held by" in log.read_text())
    assert f'"slurm_job": "{runs.job_id(run_dir)}"' in log.read_text()
    assert runs.status(run_dir)["state"] == "running"
    assert runs.zerofit("cancel", run_dir).stdout.startswith("killed: ")
    assert follower.wait() == 0
    assert "rank 1 of 2" in follower.output
    assert "killed" in follower.output
    assert cluster.leftovers() == {}


def test_several_recipes_are_one_job_array(runs: SlurmRuns) -> None:
    for name in ("a", "b"):
        (runs.folder / f"{name}.yaml").write_text(TINY)
    submit = ["submit", "--array", "a.yaml", "b.yaml", "--max-parallel", "1"]
    done = runs.zerofit(
        *submit, "--output-dir", "sweep", "--json", "slurm.extra=[--begin=now+1hour]"
    )
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)
    number = first["job_id"].removesuffix("_0")
    assert second["job_id"] == f"{number}_1"
    listed = json.loads(runs.zerofit("list", "sweep", "--json").stdout)
    assert [item["state"] for item in listed] == ["pending", "pending"]
    # One task is cancelled, the other waits on.
    runs.zerofit("cancel", second["run_dir"])
    listed = json.loads(runs.zerofit("list", "sweep", "--json").stdout)
    assert [item["state"] for item in listed] == ["pending", "killed"]
    script = (runs.folder / "sweep" / "job.sbatch").read_text()
    assert "#SBATCH --array=0-1%1\n" in script


def test_slurm_takes_the_scripts_of_typical_sites(runs: SlurmRuns, cluster: VirtualCluster) -> None:
    """Not its own time limit, account or QOS: this cluster enforces none; features it has none."""
    files = sorted(path for path in FOLDER.iterdir() if path.name != "constraint.sbatch")
    assert len(files) == 9
    script = "; ".join(f"sbatch --test-only {shlex.quote(str(path))} || echo BAD" for path in files)
    done = cluster.run("head", ["sh", "-c", script])
    assert "BAD" not in done.stdout, done.stderr
    assert done.stderr.count("to start at") == len(files)
