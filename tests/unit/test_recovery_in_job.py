"""What a Slurm job decides by itself when its ranks have failed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher import run_dir as rd
from launcher.failure_kind import EXIT_STATUS, FailureKind
from launcher.launch import create_run
from launcher.peaks import RankFailure, RankPeaks, peaks_to_json
from launcher.prepare import Prepared, prepare
from launcher.recipe import parse_recipe
from launcher.recovery.in_job import decide_in_job, fit_to_nodes, main, why_the_ranks_failed
from launcher.recovery.record import read_failed_attempts
from launcher.sbatch_parts import JOB_SBATCH, REQUEUE_MARKER
from launcher.sbatch_script import NODES, PREFLIGHT
from launcher.starter_lock import LOCK

RECIPE = """
model: {name_or_path: llama3.2-1b, random_weights: true}
max_seq_len: 1024
optim: {global_batch_size: 16, max_steps: 4}
cluster: {backend: slurm, gpu: A100-40GB, num_nodes: 2, gpus_per_node: 2}
"""
# As Slurm 22.05 prints them (slurmstepd of a step whose task the kernel killed, then srun).
OOM_KILL = (
    "slurmstepd: error: Detected 1 oom_kill event in StepId=12.0. Some of the step tasks have "
    "been OOM Killed.\nsrun: error: node2: task 3: Out Of Memory\n"
)
KILLED = "srun: error: node2: task 3: Killed\n"


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return prepare(parse_recipe(RECIPE, source="test"), source="test")


@pytest.fixture
def run(prepared: Prepared, tmp_path: Path) -> Path:
    """A run directory of a job whose ranks have not written anything."""
    folder, _, _ = create_run(prepared, tmp_path / "run")
    return folder


def write_log(run: Path, text: str) -> None:
    (run / rd.LAUNCHER_LOG).write_text(text)


def fail_rank(run: Path) -> None:
    peaks = RankPeaks(
        rank=3, local_rank=1, world_size=4, host="node2", pid=1, device="cuda", device_name="A100",
        state="out_of_memory", steps_done=1,
        failure=RankFailure(phase="backward", type="OutOfMemoryError", message="CUDA out of memory",
                            traceback="", kind=FailureKind.gpu_oom),
    )  # fmt: skip
    rd.write_json(rd.rank_file(run, 3), peaks_to_json(peaks))


def test_slurm_s_words_tell_lack_of_memory_from_another_kill(run: Path) -> None:
    write_log(run, OOM_KILL)
    error = why_the_ranks_failed(run)
    assert error.kind is FailureKind.host_oom
    assert error.problem.startswith("rank 3 on node2 was killed: the memory that Slurm gave")
    write_log(run, KILLED)
    assert why_the_ranks_failed(run).kind is FailureKind.killed


def test_what_an_earlier_attempt_printed_does_not_count(run: Path) -> None:
    write_log(run, f"job 12 on node[1-2], rendezvous node1:20012\n{OOM_KILL}")
    assert why_the_ranks_failed(run).kind is FailureKind.host_oom
    write_log(run, f"{OOM_KILL}starting the ranks again\n{KILLED}")
    assert why_the_ranks_failed(run).kind is FailureKind.killed


def test_the_next_plan_is_written_into_the_run_directory_of_the_job(run: Path) -> None:
    fail_rank(run)
    write_log(run, "rank 3: CUDA out of memory\n")
    before = json.loads((run / rd.PLAN).read_text())
    script = (run / JOB_SBATCH).read_text()
    assert decide_in_job(run, job_id="12") == 0
    after = json.loads((run / rd.PLAN).read_text())
    need, limit = (
        plan["memory"]["phases"]["backward"]["allocated_bytes"] for plan in (after, before)
    )
    assert need <= 0.95 * limit
    assert (after["num_nodes"], after["gpus_per_node"]) == (2, 2)
    assert (after["global_batch_size"], after["precision"]) == (16, before["precision"])
    (record,) = read_failed_attempts(run)
    assert (record.supervisor, record.rank, record.kind) == ("slurm:12", 3, FailureKind.gpu_oom)
    # Slurm writes on into the log that it has opened; the failed rank's file is set aside.
    assert (run / rd.LAUNCHER_LOG).is_file()
    assert (run / JOB_SBATCH).read_text() == script
    assert (run / "attempts" / "1" / rd.RANKS / "00003.json").is_file()
    assert not (run / rd.RANKS / "00003.json").exists()


def test_a_job_ends_with_the_status_of_what_it_gave_up_on(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = (run / rd.RECIPE).read_text()
    (run / rd.RECIPE).write_text(f"{recipe}recovery: {{oom: stop}}\n")
    fail_rank(run)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert main(["--run-dir", str(run)]) == EXIT_STATUS[FailureKind.gpu_oom] == 81
    assert rd.read_status(run).state == "failed"
    assert "goes on with a plan that fits" in capsys.readouterr().err


@pytest.fixture
def shrinking(run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same on two nodes, of which one is enough, and with nothing to wait for."""
    monkeypatch.setattr("launcher.starter_lock.FENCE_SECONDS", 0.0)
    recipe = (run / rd.RECIPE).read_text()
    (run / rd.RECIPE).write_text(f"{recipe}recovery: {{min_nodes: 1}}\n")
    (run / NODES).write_text("node1,node2\n")
    (run / LOCK).write_text('{"host": "node1", "pid": 1, "slurm_job": "12", "since": "10:00"}\n')
    return run


def test_a_job_that_lost_a_node_goes_on_with_a_plan_for_the_others(shrinking: Path) -> None:
    held = (shrinking / LOCK).read_text()
    assert decide_in_job(shrinking, job_id="12", left=["node2"]) == 0
    plan = json.loads((shrinking / rd.PLAN).read_text())
    strategy = plan["strategy"]
    assert (plan["num_nodes"], plan["gpus_per_node"]) == (1, 2)
    samples = strategy["micro_batch_size_per_gpu"] * strategy["gradient_accumulation_steps"] * 2
    assert samples == plan["global_batch_size"] == 16
    assert (shrinking / NODES).read_text() == "node2\n"
    (record,) = read_failed_attempts(shrinking)
    assert record.kind is FailureKind.lost_host
    assert record.problem == "node1 was lost: Slurm cannot start anything there"
    assert record.changes["num_nodes"] == (2, 1)
    # Ranks that live on a node out of reach find a lock that is not theirs.
    assert json.loads(held).items() - json.loads((shrinking / LOCK).read_text()).items() == {
        ("since", "10:00")
    }


def test_a_spare_node_that_looked_good_takes_the_place_of_one_that_is_lost(shrinking: Path) -> None:
    looked = [
        {"name": "node0", "ok": False},
        *({"name": f"node{i}", "ok": True} for i in (1, 2, 3)),
    ]
    rd.write_json(shrinking / PREFLIGHT, {"hosts": looked})
    assert decide_in_job(shrinking, job_id="12", left=["node0", "node2", "node3"]) == 0
    assert json.loads((shrinking / rd.PLAN).read_text())["num_nodes"] == 2
    assert (shrinking / NODES).read_text() == "node2,node3\n"
    # Also after the next loss.
    assert decide_in_job(shrinking, job_id="12", left=["node0", "node3"]) == 0
    assert (shrinking / NODES).read_text() == "node3\n"


def test_with_too_few_nodes_the_job_goes_back_into_the_queue_and_says_why(
    shrinking: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = (shrinking / rd.RECIPE).read_text()
    (shrinking / rd.RECIPE).write_text(recipe.replace("min_nodes: 1", "min_nodes: 2"))
    before = (shrinking / rd.PLAN).read_text()
    status = decide_in_job(shrinking, job_id="12", left=["node2"])
    assert status == EXIT_STATUS[FailureKind.lost_host]
    assert (shrinking / REQUEUE_MARKER).exists()
    assert (shrinking / rd.PLAN).read_text() == before
    said = "1 of 2 hosts are left; recovery.min_nodes: 2"
    assert said in capsys.readouterr().out
    assert rd.read_status(shrinking).reason == "node1 was lost: Slurm cannot start anything there"
    assert read_failed_attempts(shrinking)[0].action == "requeue"


def test_a_job_that_comes_back_gets_a_plan_for_the_nodes_that_it_has(shrinking: Path) -> None:
    for left, number in (["node4"], 1), (["node4", "node5", "node6"], 2):
        assert fit_to_nodes(shrinking, left=left, num_wanted=2) == 0
        plan = json.loads((shrinking / rd.PLAN).read_text())
        assert (plan["num_nodes"], plan["global_batch_size"]) == (number, 16)
        assert (shrinking / NODES).read_text() == ",".join(left[:number]) + "\n"
    changes = [record.changes["num_nodes"] for record in read_failed_attempts(shrinking)]
    assert changes == [(2, 1), (1, 2)]
    first, second = (record.problem for record in read_failed_attempts(shrinking))
    assert first == "the job came back without node1, node2"
    assert second == "the job came back with another number of nodes than the plan's 1"
    # As it is: nothing to do, and nothing to record.
    assert fit_to_nodes(shrinking, left=["node4", "node6"], num_wanted=2) == 0
    assert len(read_failed_attempts(shrinking)) == 2
