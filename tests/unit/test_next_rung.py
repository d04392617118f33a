"""Which plan follows when memory has run out."""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from pathlib import Path

import pytest

from launcher import run_dir as rd
from launcher.errors import JobFailedError
from launcher.failure_kind import FailureKind
from launcher.planning.ceiling import Ceiling
from launcher.planning.plan import Plan, strategy_from_json
from launcher.post_mortem import PostMortem, post_mortem_file, read_post_mortems
from launcher.prepare import Prepared, prepare
from launcher.recipe import parse_recipe, render_recipe
from launcher.recovery.judge import judge
from launcher.recovery.next_rung import Rung, ceiling_after, next_rung
from launcher.run_checkpoints import MANIFEST
from launcher.strategy import Offload
from launcher.units import GIB

GPU_OOM = FailureKind.gpu_oom


@functools.cache
def prepared(*overrides: str) -> Prepared:
    given = ["model.name_or_path=llama3.2-1b", "max_seq_len=1024", "optim.global_batch_size=16",
             "cluster.gpu=A100-40GB", "cluster.gpus_per_node=2", *overrides]  # fmt: skip
    return prepare(parse_recipe("", source="test", overrides=given), source="test")


def post_mortem(**changes: object) -> PostMortem:
    found = PostMortem(
        rank=1, host="node2", kind=GPU_OOM, phase="backward", step=3, message="out of memory",
        allocated_bytes=30 * GIB, reserved_bytes=38 * GIB, requested_bytes=2 * GIB,
        device_free_bytes=0, device_total_bytes=40 * GIB, host_available_bytes=GIB,
        host_total_bytes=2 * GIB, host_rss_bytes=GIB, predicted_bytes=20 * GIB,
        predicted={"parameters": 20 * GIB}, measured={"weights": GIB}, next_rung=None,
    )  # fmt: skip
    return replace(found, **changes)  # type: ignore[arg-type]


def rung_of(run: Path, plan: Prepared, phase: str, *, earlier: int = 0) -> Rung:
    return next_rung(run, plan, kind=GPU_OOM, phase=phase, num_earlier=earlier)


def test_a_post_mortem_is_read_back(tmp_path: Path) -> None:
    assert read_post_mortems(tmp_path) == ()
    path = post_mortem_file(tmp_path, 1)
    path.parent.mkdir()
    rd.write_json(path, post_mortem().to_json())
    assert read_post_mortems(tmp_path) == (post_mortem(),)


def test_the_next_plan_needs_less_in_the_phase_that_failed(tmp_path: Path) -> None:
    before = prepared()
    rung = rung_of(tmp_path, before, "backward")
    after = rung.prepared.plan
    assert after.fits
    old, new = before.plan.memory.phase("backward"), after.memory.phase("backward")
    assert new.allocated_bytes <= 0.95 * old.allocated_bytes
    assert rung.changes


def test_further_rungs_go_down_faster(tmp_path: Path) -> None:
    before = prepared()
    fourth = rung_of(tmp_path, before, "loss", earlier=3).prepared.plan
    old, new = before.plan.memory.phase("loss"), fourth.memory.phase("loss")
    # 0.95 to the power of 8.
    assert new.allocated_bytes <= 0.6635 * old.allocated_bytes


def test_what_is_trained_stays_the_same(tmp_path: Path) -> None:
    before = prepared()
    after = rung_of(tmp_path, before, "loss").prepared
    assert after.recipe.optim == before.recipe.optim
    assert after.recipe.method is before.recipe.method
    strategy, cluster = after.plan.strategy, after.plan.cluster
    samples = strategy.micro_batch_size_per_gpu * strategy.gradient_accumulation_steps
    assert samples * cluster.world_size == 16
    assert after.plan.workload.precision is before.plan.workload.precision
    # So that whoever resumes the run does not plan the hungry one again.
    assert after.recipe.strategy.micro_batch_size_per_gpu == strategy.micro_batch_size_per_gpu


def test_a_micro_batch_by_hand_is_given_up_first_and_that_is_said(tmp_path: Path) -> None:
    by_hand = prepared("strategy.micro_batch_size_per_gpu=8", "strategy.zero_stage=1",
                       "strategy.gradient_checkpointing=none", "strategy.loss=full")  # fmt: skip
    rung = rung_of(tmp_path, by_hand, "forward")
    assert rung.prepared.plan.fits
    assert rung.given_up == ("micro_batch_size_per_gpu",)
    assert rung.prepared.plan.strategy.zero_stage == 1


def test_other_keys_by_hand_are_given_up_where_nothing_else_is_left(tmp_path: Path) -> None:
    by_hand = prepared("cluster.gpus_per_node=1",
                       "strategy.micro_batch_size_per_gpu=1", "strategy.loss=full",
                       "strategy.gradient_checkpointing=none", "strategy.zero_stage=2")  # fmt: skip
    rung = rung_of(tmp_path, by_hand, "forward")
    assert rung.prepared.plan.fits
    assert "gradient_checkpointing" in rung.given_up


def test_a_second_rung_may_change_what_the_first_has_set(tmp_path: Path) -> None:
    by_hand = prepared("strategy.zero_stage=2", "recovery.oom=within_recipe")
    first = rung_of(tmp_path, by_hand, "loss").prepared
    assert "zero_stage" not in first.recipe.recovery.chosen
    assert "micro_batch_size_per_gpu" in first.recipe.recovery.chosen
    second = rung_of(tmp_path, first, "loss", earlier=1)
    assert second.prepared.plan.fits
    assert second.given_up == ()
    # What a recovery has set is written down, and read back, as its own.
    again = parse_recipe(render_recipe(first.recipe), source="test")
    assert again.recovery.chosen == first.recipe.recovery.chosen


def test_gpus_share_sequences_before_a_key_by_hand_is_given_up(tmp_path: Path) -> None:
    by_hand = prepared("strategy.micro_batch_size_per_gpu=1", "strategy.loss=full",
                       "strategy.gradient_checkpointing=none", "strategy.zero_stage=2")  # fmt: skip
    rung = rung_of(tmp_path, by_hand, "forward")
    assert rung.given_up == ()
    # One group of two instead of two GPUs: each has 16 samples a step, in halves.
    assert rung.changes == {
        "sequence_parallel_size": (1, 2), "gradient_accumulation_steps": (8, 16)
    }  # fmt: skip
    after = rung.prepared.recipe
    assert after.strategy.sequence_parallel_size == 2
    assert "sequence_parallel_size" in after.recovery.chosen


def test_a_recipe_may_keep_its_keys(tmp_path: Path) -> None:
    by_hand = prepared("strategy.micro_batch_size_per_gpu=1", "strategy.loss=full",
                       "strategy.gradient_checkpointing=none", "strategy.zero_stage=2",
                       "strategy.sequence_parallel_size=1",
                       "recovery.oom=within_recipe")  # fmt: skip
    rung = rung_of(tmp_path, by_hand, "forward")
    assert not rung.prepared.plan.fits
    assert any("gradient_checkpointing" in line for line in rung.prepared.plan.suggestions)


def test_a_checkpoint_keeps_the_states_from_going_to_a_drive(tmp_path: Path) -> None:
    checkpoint = tmp_path / rd.CHECKPOINTS / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / MANIFEST).touch()
    before = prepared("strategy.nvme_path=/nvme", "method=full")
    after = rung_of(tmp_path, before, "step").prepared
    assert after.plan.strategy.offload_optimizer is not Offload.nvme
    assert after.recipe.strategy.nvme_path == "/nvme"


def ceiling_after_backward(plan: Plan, found: PostMortem) -> Ceiling:
    limit_bytes = plan.limit_bytes
    return ceiling_after(
        plan.memory, GPU_OOM, "backward", limit_bytes=limit_bytes, num_earlier=0, found=[found]
    )


def test_a_prediction_that_was_too_low_lowers_the_limit_by_as_much() -> None:
    plan = prepared().plan
    predicted = plan.memory.phase("backward").allocated_bytes
    reserved = plan.memory.peak_reserved_bytes
    # Twice what was predicted, requested bytes included, on a GPU that nobody else uses.
    found = post_mortem(
        allocated_bytes=2 * predicted - GIB, requested_bytes=GIB,
        reserved_bytes=reserved, device_free_bytes=40 * GIB,
    )  # fmt: skip
    ceiling = ceiling_after_backward(plan, found)
    assert ceiling.device_bytes == pytest.approx(plan.limit_bytes / 2, rel=1e-6)
    assert ceiling.phase_bytes == int(0.95 * predicted)


def test_what_other_processes_hold_is_not_counted_on() -> None:
    plan = prepared().plan
    outside = plan.memory.device_used_bytes - plan.memory.peak_reserved_bytes
    found = post_mortem(
        allocated_bytes=GIB, requested_bytes=None, reserved_bytes=GIB, device_free_bytes=9 * GIB
    )
    ceiling = ceiling_after_backward(plan, found)
    assert ceiling.device_bytes == 10 * GIB + outside


def test_lack_of_host_memory_limits_the_host_alone() -> None:
    plan = prepared().plan
    ceiling = ceiling_after(
        plan.memory, FailureKind.host_oom, None, limit_bytes=plan.limit_bytes, num_earlier=0
    )
    assert ceiling.host_bytes == int(0.95 * plan.memory.host_bytes_per_node)
    assert (ceiling.phase, ceiling.device_bytes) == (None, None)


FIXED = {
    "zero_stage": 2, "micro_batch_size_per_gpu": 1, "gradient_checkpointing": "none",
    "attention": "eager", "loss": "full", "optimizer": "adamw", "offload_optimizer": "none",
    "offload_param": "none", "grad_accum_dtype": "fp32", "sequence_parallel_size": 1,
}  # fmt: skip


@pytest.mark.parametrize("oom", ["ladder", "stop", "within_recipe"])
def test_a_post_mortem_names_the_next_strategy_and_the_keys_it_takes_where_all_are_fixed(
    tmp_path: Path, oom: str
) -> None:
    before = prepared(f"recovery.oom={oom}", *(f"strategy.{k}={v}" for k, v in FIXED.items()))
    assert not before.plan.ladder
    path = post_mortem_file(tmp_path, 1)
    path.parent.mkdir()
    rd.write_json(path, post_mortem().to_json())
    os.utime(path, (1_000_000, 1_000_000))
    error = JobFailedError("out of memory", where="rank 1", fix="less", kind=GPU_OOM)
    verdict = judge(tmp_path, before, error, [], supervisor="test")
    (found,) = read_post_mortems(tmp_path)
    assert found.next_rung is not None
    named = found.next_rung["strategy"]
    changed = {key for key, value in FIXED.items() if named[key] != value}
    assert set(found.next_rung["given_up"]) == changed != set()
    assert found.next_rung["device_used_bytes"] < before.plan.memory.device_used_bytes
    assert found.next_rung["step_seconds"] > 0
    assert path.stat().st_mtime == 1_000_000, "the moment of the rank's last word"
    assert (verdict.following is not None) == (oom == "ladder")
    if verdict.following:
        assert strategy_from_json(named) == verdict.following.prepared.plan.strategy


def test_a_post_mortem_that_names_a_rung_of_its_plans_ladder_keeps_it(tmp_path: Path) -> None:
    path = post_mortem_file(tmp_path, 1)
    path.parent.mkdir()
    said = post_mortem(next_rung={"strategy": {}, "device_used_bytes": 1, "step_seconds": 1.0})
    rd.write_json(path, said.to_json())
    error = JobFailedError("out of memory", where="rank 1", fix="less", kind=GPU_OOM)
    judge(tmp_path, prepared(), error, [], supervisor="test")
    assert read_post_mortems(tmp_path) == (said,)
