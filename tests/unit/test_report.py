"""What a report computes from hand-made measurements; expectations are worked out beside them."""

from __future__ import annotations

import pytest
from report_inputs import LOG, PLAN, RESULTS, failure, phase, rank

from launcher.report.build import build_report
from launcher.report.run_report import Observation, RunFiles, RunReport
from launcher.report.text import findings, warnings
from launcher.units import GIB


def report_of(**content: object) -> RunReport:
    return build_report(RunFiles(name="run", **content))  # type: ignore[arg-type]


def test_error_is_predicted_minus_measured_over_measured() -> None:
    report = report_of(plan=PLAN, ranks=(rank(0), rank(1)))
    backward, forward = (report.rank(0).phase(name) for name in ("backward", "forward"))
    assert backward is not None
    assert forward is not None
    # By hand: 1 too much of 5, and 4 of 4.
    assert backward.allocated_bytes.error_fraction == pytest.approx(0.2)
    assert forward.allocated_bytes.error_fraction == 0


def test_error_is_negative_when_more_was_used_than_predicted() -> None:
    report = report_of(plan=PLAN, ranks=(rank(0, phases={"forward": phase(5)}),))
    row = report.rank(0).phase("forward")
    assert row is not None
    assert row.allocated_bytes.error_fraction == pytest.approx(-0.2)  # (4 - 5) / 5


def test_reserved_and_device_memory_are_compared_over_all_phases() -> None:
    report = report_of(plan=PLAN, ranks=(rank(0),))
    # Backward reserved 5 + 1 and used 5 + 2; the plan says 7 and 8.
    assert report.rank(0).reserved_bytes.measured == 6 * GIB
    assert report.rank(0).reserved_bytes.error_fraction == pytest.approx(1 / 6)
    assert report.rank(0).device_used_bytes.error_fraction == pytest.approx(1 / 7)


def test_fullest_rank_imbalance_and_headroom() -> None:
    ranks = (rank(0, phases={"backward": phase(4)}), rank(1, phases={"backward": phase(6)}))
    balance = report_of(plan=PLAN, ranks=ranks).balance
    assert balance is not None
    assert (balance.fullest_rank, balance.emptiest_rank) == (1, 0)
    assert balance.imbalance_fraction == pytest.approx(0.2)  # 6 / mean(4, 6) - 1
    # 9 usable + 1 margin - (6 + 2) used on the device
    assert balance.headroom_bytes == 2 * GIB


def test_the_fullest_rank_of_a_phase_may_differ_from_the_fullest_of_all() -> None:
    ranks = (
        rank(0, phases={"forward": phase(4.5), "backward": phase(5)}),
        rank(1, phases={"forward": phase(4), "backward": phase(6)}),
    )
    report = report_of(plan=PLAN, ranks=ranks)
    fullest = report.fullest_in("forward")
    assert fullest is not None
    assert fullest.rank == 0
    assert report.balance is not None
    assert report.balance.fullest_rank == 1


def test_step_time_is_the_median_after_the_first_of_the_slowest_rank() -> None:
    ranks = (rank(0), rank(1, step_seconds=(8.0, 2.0, 1.0, 2.5)))
    time = report_of(plan=PLAN, ranks=ranks).time
    # Slowest rank of each step: 9, 2, 3, 2.5; after the first the median is 2.5.
    assert time.first_step_seconds == 9
    assert time.step_seconds.measured == 2.5
    assert time.max_step_seconds == 3
    assert time.step_seconds.error_fraction == pytest.approx(-0.4)  # (1.5 - 2.5) / 2.5


def test_tokens_per_second_follow_from_the_median_step() -> None:
    time = report_of(plan=PLAN, ranks=(rank(0), rank(1))).time
    assert time.tokens_per_second == 4096.0  # 2 ranks x 4096 tokens / median(1, 3, 2)
    assert time.tokens_per_second_per_gpu.measured == 2048.0


def test_zero_steps_leave_times_unmeasured() -> None:
    time = report_of(plan=PLAN, ranks=(rank(0, step_seconds=(), steps_done=0),)).time
    assert time.first_step_seconds is None
    assert time.step_seconds.measured is None
    assert time.step_seconds.error_fraction is None
    assert time.tokens_per_second is None


def test_host_memory_of_a_node_is_the_sum_of_its_ranks() -> None:
    ranks = (rank(0), rank(1), rank(2, host="node2"))
    nodes = report_of(plan=PLAN | {"world_size": 3}, ranks=ranks).nodes
    assert [(node.host, node.num_ranks, node.host_bytes.measured) for node in nodes] == [
        ("node1", 2, 6 * GIB),
        ("node2", 1, 3 * GIB),
    ]
    assert nodes[0].host_bytes.error_fraction == pytest.approx(0.5)  # (9 - 6) / 6


def test_host_memory_is_compared_only_where_all_ranks_of_the_node_have_reported() -> None:
    plan = {**PLAN, "world_size": 4, "gpus_per_node": 2}
    ranks = tuple(rank(number, host=f"n{number // 2}") for number in (0, 1, 3))
    whole, part = build_report(RunFiles(name="run", plan=plan, ranks=ranks)).nodes
    # 9 GiB are predicted for two ranks, and each rank of the inputs has 3 GiB.
    assert (whole.host_bytes.predicted, whole.host_bytes.measured) == (9 * GIB, 6 * GIB)
    assert (part.host_bytes.predicted, part.host_bytes.measured) == (None, 3 * GIB)


def test_missing_ranks_are_named() -> None:
    report = report_of(plan=PLAN | {"world_size": 4}, ranks=(rank(2), rank(0)))
    assert report.missing_ranks == (1, 3)
    assert [item.rank for item in report.ranks] == [0, 2]


def test_without_a_plan_the_ranks_say_how_many_they_should_be() -> None:
    report = report_of(ranks=(rank(0),))
    assert report.world_size == 2
    assert report.missing_ranks == (1,)
    assert report.rank(0).allocated_bytes.error_fraction is None
    assert report.rank(0).allocated_bytes.measured == 5 * GIB


def test_on_cpu_nothing_is_compared_with_device_memory() -> None:
    on_cpu = phase(5, device_used_bytes=None)
    report = report_of(plan=PLAN, ranks=(rank(0, device="cpu", phases={"step": on_cpu}),))
    assert report.is_on_cpu
    assert report.rank(0).reserved_bytes.error_fraction is None
    assert report.rank(0).device_used_bytes.measured is None
    assert report.balance is not None
    assert report.balance.headroom_bytes is None


def test_a_phase_that_never_ran_is_not_measured() -> None:
    report = report_of(plan=PLAN, ranks=(rank(0, phases={"backward": phase(5, count=0)}),))
    assert report.rank(0).phases == ()
    assert report.balance is None


@pytest.mark.parametrize(
    ("status", "rank_states", "expected"),
    [
        (None, (), "unknown"),
        ("created", (), "created"),
        ("running", (), "running"),
        ("running", ("running", "running"), "running"),
        ("running", ("finished", "finished"), "finished"),
        (None, ("finished", "running"), "running"),
        ("running", ("running", "failed"), "failed"),
        ("failed", ("failed", "out_of_memory"), "out_of_memory"),
        ("interrupted", ("failed", "failed"), "interrupted"),
        ("failed", ("running", "running"), "failed"),
        ("nonsense", ("finished",), "running"),
    ],
)
def test_state_is_the_worst_that_status_and_ranks_say(
    status: str | None, rank_states: tuple[str, ...], expected: str
) -> None:
    ranks = tuple(rank(number, state=state) for number, state in enumerate(rank_states))
    report = report_of(plan=PLAN, ranks=ranks, status={"state": status} if status else None)
    assert report.state == expected


def test_equal_failures_are_told_once_and_the_cause_comes_first() -> None:
    ranks = (
        rank(0, state="failed", failure=failure("DistBackendError", "peer gone")),
        rank(1, state="failed", failure=failure("DistBackendError", "peer gone")),
        rank(2, state="failed", failure=failure("ValueError", "bad batch")),
    )
    failures = report_of(plan=PLAN | {"world_size": 3}, ranks=ranks).failures
    assert [(item.rank, item.same_on_ranks) for item in failures] == [(2, ()), (0, (1,))]


def test_held_out_change_is_after_minus_before() -> None:
    loss = report_of(plan=PLAN, log=LOG, results=RESULTS).loss
    assert loss.held_out_change == pytest.approx(-0.6)  # 2.4 - 3.0
    assert loss.is_after_final
    assert loss.train == ((1, 3.0), (2, 2.5), (3, 2.25), (4, 2.0))


def test_without_results_the_last_evaluation_counts_so_far() -> None:
    loss = report_of(plan=PLAN, log=LOG).loss
    assert (loss.held_out_before, loss.held_out_after) == (3.0, 2.4)
    assert not loss.is_after_final


def test_a_loss_that_is_not_a_number_is_left_out_of_the_curve_and_named() -> None:
    log = ({"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")})
    loss = report_of(log=log).loss
    assert loss.train == ((1, 2.0),)
    assert loss.not_finite_steps == (2,)


def test_a_step_that_was_logged_again_after_a_restart_counts_once() -> None:
    log = ({"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.9}, {"step": 2, "loss": 1.8})
    assert report_of(log=log).loss.train == ((1, 2.0), (2, 1.8))


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"memory": None, "time": [], "model": 3, "world_size": "two"},
        {"memory": {"phases": {"forward": None, "backward": {"components": {"a": "b"}}}}},
        {"world_size": 10**30, "memory": {"peak_allocated_bytes": float("inf")}},
        {"world_size": -1, "max_seq_len": True},
    ],
)
def test_a_plan_of_any_shape_is_read_as_far_as_it_goes(broken: dict[str, object]) -> None:
    report = report_of(plan=broken, ranks=(rank(0),))
    assert report.world_size == 2
    assert report.rank(0).allocated_bytes.error_fraction is None


@pytest.mark.parametrize(
    ("said", "seen", "state"),
    [
        ("running", "running", "running"),
        ("running", "killed", "killed"),
        ("running", "unknown", "running"),
        ("created", "pending", "pending"),
        ("finished", "finished", "finished"),
        ("interrupted", "killed", "interrupted"),
    ],
)
def test_whoever_runs_a_run_tells_whether_it_was_killed(said: str, seen: str, state: str) -> None:
    ranks = (rank(0, state="running"),) if said == "running" else ()
    report = report_of(
        ranks=ranks, status={"state": said}, observation=Observation(state=seen, reason="why")
    )
    assert report.state == state
    assert report.state_reason == "why"


def test_hosts_whose_clock_differs_are_named() -> None:
    ranks = (
        rank(0, first_step_at=1000.0),
        rank(1, first_step_at=1000.4, host="node2"),
        rank(2, first_step_at=880.0, host="node3"),
    )
    report = report_of(ranks=ranks)
    assert report.clock_skews_seconds == {"node3": -120.0}
    assert "The clock of node3 is 2 min 00 s behind most others'" in " ".join(warnings(report))


def test_the_time_of_a_step_is_divided_among_its_phases() -> None:
    phases = {"forward": phase(4, seconds=3.0), "step": phase(2, seconds=6.0)}
    report = report_of(ranks=(rank(0, phases=phases),))
    # By hand: four steps of 9 + 1 + 3 + 2 = 15 s.
    assert report.time.phase_fractions == {"forward": 0.2, "step": 0.4}
    (share,) = [item.text for item in findings(report) if item.label == "Step went to"]
    assert share == "step 40 %, forward 20 %, data and the rest 40 %"
