"""Which runs can be resumed, with what, and where an earlier attempt's files go."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from launcher import run_dir as rd
from launcher.dispatch.base import JobHandle, write_handle
from launcher.errors import RecipeError, RunDirError
from launcher.job_script import RUN_ID_VARIABLE
from launcher.resume import check_has_stopped, prepare_resume, set_aside
from launcher.run_checkpoints import MANIFEST
from launcher.strategy import Optimizer


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run directory that was interrupted."""
    path = rd.create(tmp_path / "run")
    rd.write_text(path / rd.RECIPE, "model: {name_or_path: llama2-7b}\n")
    rd.write_text(path / rd.PLAN, '{"precision": "fp16"}')
    rd.write_text(path / rd.TRAINER_LOG, '{"step": 1}\n')
    rd.write_text(rd.rank_file(path, 0), "{}")
    os.utime(rd.rank_file(path, 0), (0, 0))
    rd.write_status(path, "interrupted", reason="stopped by SIGINT")
    return path


def handle(path: Path, run_id: str) -> JobHandle:
    return JobHandle(
        backend="local", run_dir=path, run_id=run_id, job_id="1", host="here", session_id=1,
        master_port=1,
    )  # fmt: skip


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="not a run directory"):
        prepare_resume(tmp_path, [])
    with pytest.raises(RunDirError, match="no such run directory"):
        prepare_resume(tmp_path / "nowhere", [])


def test_a_finished_run_is_refused(run: Path) -> None:
    rd.write_status(run, "finished")
    with pytest.raises(RunDirError, match="has finished"):
        check_has_stopped(run)


def test_a_run_whose_processes_live_is_refused(run: Path) -> None:
    run_id = uuid.uuid4().hex
    write_handle(handle(run, run_id))
    check_has_stopped(run)
    with subprocess.Popen(
        [sys.executable, "-c", "input()"],
        env={**os.environ, RUN_ID_VARIABLE: run_id},
        stdin=subprocess.PIPE,
    ) as process:
        with pytest.raises(RunDirError, match=f"in progress \\(process {process.pid}\\)"):
            check_has_stopped(run)
        process.kill()
    check_has_stopped(run)


def test_a_run_that_writes_on_another_machine_is_refused(run: Path) -> None:
    rd.write_status(run, "running")
    check_has_stopped(run)  # long silent: its machine went down
    os.utime(rd.rank_file(run, 0))
    with pytest.raises(RunDirError, match="less than a minute ago"):
        check_has_stopped(run)


@pytest.mark.parametrize(
    "override",
    ["optim.global_batch_size=4", "data.path=x.jsonl", "method=full", "optim.learning_rate=1e-3",
     "model.name_or_path=other", "optim.seed=1", "clusters.gpu=H100"],
)  # fmt: skip
def test_what_would_make_it_another_training_is_refused(run: Path, override: str) -> None:
    with pytest.raises(RecipeError, match="cannot change in mid-training"):
        prepare_resume(run, [override])


def test_gpus_and_stage_may_change_and_the_precision_stays(run: Path) -> None:
    prepared = prepare_resume(
        run, ["cluster.gpu=A100-40GB", "cluster.gpus_per_node=4", "strategy.zero_stage=3"]
    )
    assert prepared.plan.cluster.world_size == 4
    assert prepared.plan.strategy.zero_stage == 3
    # An A100 would else be given bf16.
    assert prepared.plan.workload.precision.value == "fp16"


def test_of_several_optimizers_the_one_that_has_trained_stays(run: Path) -> None:
    listed = "model: {name_or_path: llama2-7b}\nstrategy: {optimizer: [adamw, adamw_8bit]}\n"
    rd.write_text(run / rd.RECIPE, listed)
    place = ["cluster.gpu=A100-80GB", "cluster.gpus_per_node=4"]
    with pytest.raises(RunDirError, match="with which optimizer"):
        prepare_resume(run, place)
    plan = '{"precision": "bf16", "strategy": {"optimizer": "adamw_8bit"}}'
    rd.write_text(run / rd.PLAN, plan)
    # Four GPUs of 80 GB would else be given the one that is named first.
    assert prepare_resume(run, place).plan.strategy.optimizer is Optimizer.adamw_8bit


def test_states_that_other_ranks_cannot_load_are_refused_before_the_job(run: Path) -> None:
    checkpoint = run / rd.CHECKPOINTS / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    changes = ["cluster.gpu=A100-40GB", "cluster.gpus_per_node=1", "strategy.zero_stage=3"]
    layout = {"world_size": 4, "zero_stage": 3, "optimizer": "adamw", "offload_optimizer": "nvme"}
    rd.write_json(checkpoint / MANIFEST, {"layout": layout})
    with pytest.raises(RunDirError, match="swapped to NVMe") as caught:
        prepare_resume(run, changes)
    assert "go on with 4 ranks and strategy.zero_stage=3" in caught.value.fix


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_states_on_gpus_go_to_other_ranks_and_another_optimizer(run: Path, optimizer: str) -> None:
    checkpoint = run / rd.CHECKPOINTS / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    layout = {"world_size": 4, "zero_stage": 2, "optimizer": optimizer, "offload_optimizer": "none"}
    rd.write_json(checkpoint / MANIFEST, {"layout": layout})
    changes = ["cluster.gpu=A100-40GB", "cluster.gpus_per_node=1", "strategy.zero_stage=3"]
    plan = prepare_resume(run, [*changes, "strategy.optimizer=paged_adamw_8bit"]).plan
    assert plan.strategy.optimizer is Optimizer.paged_adamw_8bit


def test_the_earlier_attempt_is_kept_and_the_log_goes_on(run: Path) -> None:
    assert set_aside(run).name == "1"
    assert rd.read_status(run).state == "created"
    assert (run / "attempts/1" / rd.RECIPE).is_file()
    assert rd.rank_file(run / "attempts/1", 0).is_file()
    assert list((run / rd.RANKS).iterdir()) == []
    assert (run / rd.TRAINER_LOG).is_file()
    assert set_aside(run).name == "2"


def test_a_plan_without_a_precision_is_refused_in_words(run: Path) -> None:
    rd.write_text(run / rd.PLAN, "{}")
    with pytest.raises(RunDirError, match="which precision"):
        prepare_resume(run, [])
