"""What a Slurm job decides by itself when its ranks have failed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher import run_dir as rd
from launcher.failure_kind import EXIT_STATUS, FailureKind
from launcher.launch import create_run
from launcher.peaks import RankFailure, RankPeaks, peaks_to_json
from launcher.prepare import prepare
from launcher.recipe import parse_recipe
from launcher.recovery.in_job import decide_in_job, main, why_the_ranks_failed
from launcher.recovery.record import read_failed_attempts
from launcher.sbatch_parts import JOB_SBATCH

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


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory of a job whose ranks have not written anything."""
    prepared = prepare(parse_recipe(RECIPE, source="test"), source="test")
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
