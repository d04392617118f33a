"""Rates that were measured on a cluster, and what a plan makes of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from planning_inputs import cluster, workload

from launcher.errors import HardwareError
from launcher.hardware import SiteConstants
from launcher.measured_rates import rates_from_json, with_measured_rates
from launcher.planning.plan import plan_to_json
from launcher.planning.planner import choose_strategy, make_plan
from launcher.planning.view import render_plan
from launcher.predict.site_constants import host_slowness, time_constants, with_site_constants
from launcher.predict.time_calibration import REFERENCE_AUTOGRAD_OP_SECONDS
from launcher.prepare import prepare
from launcher.recipe import parse_recipe
from launcher.strategy import Method, Offload

TEN_GIGABIT = {
    "schema": 1,
    "intra_node_all_reduce_gbit_per_s": 2900,
    "inter_node_all_reduce_gbit_per_s": 9.4,
    "gemm_tflop_per_s": None,
    "hosts": [],
}


def test_gigabits_become_bytes_and_null_changes_nothing() -> None:
    usual = cluster("H100-80GB", nodes=2)
    rates = rates_from_json(json.dumps(TEN_GIGABIT), source="x.json")
    measured = with_measured_rates(usual, rates)
    assert measured.inter_node_bytes_per_s == pytest.approx(1.175e9)
    assert measured.gpu.peer_link_bytes_per_s == pytest.approx(362.5e9)
    assert measured.gpu.matmul_flops_per_s == usual.gpu.matmul_flops_per_s


def test_a_slower_processor_is_planned_slower() -> None:
    # 0.8 of the peak is what a large product reaches: half of that is half of the peak.
    usual = cluster("H100-80GB")
    half = {**TEN_GIGABIT, "gemm_tflop_per_s": usual.gpu.matmul_flops_per_s * 0.4 / 1e12}
    measured = with_measured_rates(usual, rates_from_json(json.dumps(half), source="x.json"))
    assert measured.gpu.matmul_flops_per_s == pytest.approx(usual.gpu.matmul_flops_per_s / 2)


def test_a_slower_host_is_planned_slower_and_its_gpu_is_not() -> None:
    # Twice the reference: the fitted 21 µs for an operation become 42, and 27 ms of Trainer 54.
    slow = {**TEN_GIGABIT, "host_autograd_op_microseconds": 2 * REFERENCE_AUTOGRAD_OP_SECONDS * 1e6}
    usual = cluster("H100-80GB")
    measured = with_measured_rates(usual, rates_from_json(json.dumps(slow), source="x.json"))
    constants = time_constants(measured)
    assert host_slowness(measured) == pytest.approx(2)
    assert constants.host_op_seconds == pytest.approx(42e-6)
    assert constants.trainer_step_seconds == pytest.approx(0.054)
    assert constants.efficiency_of(usual.gpu) == time_constants(usual).efficiency_of(usual.gpu)


def test_a_plan_says_how_slow_the_measured_hosts_are() -> None:
    from rich.console import Console

    place = replace(
        cluster("H100-80GB"), host_autograd_op_seconds=1.3 * REFERENCE_AUTOGRAD_OP_SECONDS
    )
    plan = make_plan(workload(place=place), place)
    console = Console(width=200)
    with console.capture() as captured:
        console.print(render_plan(plan))
    assert "measured by doctor: these hosts need 1.30 times the usual time" in captured.get()
    assert plan_to_json(plan)["host_slowness"] == pytest.approx(1.3)


def test_what_a_site_fitted_to_its_own_runs_does_not_follow_the_measured_host() -> None:
    site = SiteConstants(values=(("host_op_seconds", 30e-6),), num_runs=9, fitted_at="2026-01-01")
    measured = replace(
        with_site_constants(cluster("H100-80GB"), site),
        host_autograd_op_seconds=2 * REFERENCE_AUTOGRAD_OP_SECONDS,
    )
    constants = time_constants(measured)
    assert constants.host_op_seconds == pytest.approx(30e-6)
    assert constants.trainer_step_seconds == pytest.approx(0.054)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("no json", "not JSON"),
        ("[]", "schema is None"),
        ('{"schema": 2}', "schema is 2"),
        ('{"schema": 1, "gemm_tflop_per_s": "fast"}', "gemm_tflop_per_s is 'fast'"),
        ('{"schema": 1, "gemm_tflop_per_s": 0}', "above 0"),
        ('{"schema": 1, "inter_node_all_reduce_gbit_per_s": true}', "above 0"),
    ],
)
def test_a_file_of_another_kind_is_refused(text: str, problem: str) -> None:
    with pytest.raises(HardwareError, match=problem):
        rates_from_json(text, source="x.json")


def test_ten_gigabit_ethernet_changes_the_chosen_stage() -> None:
    usual = cluster("H100-80GB", nodes=2)
    rates = rates_from_json(json.dumps(TEN_GIGABIT), source="x.json")
    job = workload("llama2-13b", place=usual, tokens=4096, batch=256)
    fast = make_plan(job, usual).strategy
    slow = make_plan(job, with_measured_rates(usual, rates)).strategy
    # ZeRO-2 reduces gradients on every micro-step, ZeRO-1 once (ZeRO, arXiv:1910.02054, 7.2).
    assert (fast.zero_stage, slow.zero_stage) == (2, 1)


def speedup(model: str, *overrides: str) -> float | None:
    recipe = parse_recipe(
        f"model: {{name_or_path: {model}}}\nmethod: full\nmax_seq_len: 512",
        source="x",
        overrides=["cluster.num_nodes=2", "cluster.gpus_per_node=8", *overrides],
    )
    return prepare(recipe, source="x").plan.speedup_over_one_node


def test_a_slow_network_makes_two_nodes_slower_than_one() -> None:
    at = ["cluster.gpu=H100-80GB", "optim.global_batch_size=256"]
    fast = speedup("llama2-7b", *at)
    slow = speedup("llama2-7b", *at, "cluster.inter_node_gbit_per_s=10")
    assert fast is not None
    assert slow is not None
    assert slow < 1 < fast


def test_nodes_are_compared_with_the_best_plan_of_one_node() -> None:
    # 16 bytes for each of 13e9 parameters, 208 GB, are more than 8 x 22 GiB: one node of A10G
    # can train only with the states in host memory, and two need no offload.
    two = cluster("A10G", nodes=2)
    work = workload("llama2-13b", place=two, method=Method.full, tokens=512, batch=16)
    one = choose_strategy(work, replace(two, num_nodes=1)).best
    both = choose_strategy(work, two).best
    moved = [item.strategy.offload_optimizer for item in (one, both)]
    assert moved == [Offload.cpu, Offload.none]
    gain = speedup("llama2-13b", "cluster.gpu=A10G", "optim.global_batch_size=16")
    assert gain == pytest.approx(one.time.step_seconds / both.time.step_seconds, rel=0.03)


def test_one_node_that_has_not_the_memory_is_no_comparison() -> None:
    # 18 bytes for each of 70e9 parameters are 1,260 GB; a node of 8 V100-32GB has 978 in all.
    at = ["cluster.gpu=V100-32GB", "optim.global_batch_size=16"]
    assert speedup("llama2-70b", *at) is None


def test_a_recipe_with_rates_and_a_price_says_what_its_steps_cost(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(TEN_GIGABIT), encoding="utf-8")
    recipe = parse_recipe(
        "model: {name_or_path: llama2-7b}",
        source="x",
        overrides=[
            "cluster.gpu=H100-80GB",
            "cluster.gpus_per_node=8",
            f"cluster.measured={path}",
            "cluster.price_per_gpu_hour=2.5",
            "optim.max_steps=100",
        ],
    )
    plan = prepare(recipe, source="x").plan
    assert plan.cluster.inter_node_bytes_per_s == pytest.approx(1.175e9)
    assert plan.run is not None
    assert plan.run.seconds == pytest.approx(100 * plan.time.step_seconds)
    assert plan.run.cost == pytest.approx(100 * plan.time.step_seconds * 8 / 3600 * 2.5)


def test_without_steps_the_run_is_unknown_and_the_price_is_kept() -> None:
    recipe = parse_recipe(
        "model: {name_or_path: llama2-7b}",
        source="x",
        overrides=["cluster.gpu=H100-80GB", "cluster.price_per_gpu_hour=2.5"],
    )
    plan = prepare(recipe, source="x").plan
    assert plan.run is None
    assert plan.price_per_gpu_hour == 2.5
