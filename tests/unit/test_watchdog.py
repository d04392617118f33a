"""How long a rank may get no further."""

from __future__ import annotations

import pytest

from launcher.watchdog import patience


@pytest.mark.parametrize(("step_seconds", "expected"), [(None, 100), (2.0, 100), (60.0, 600)])
def test_a_rank_may_take_ten_predicted_steps_and_100_seconds_at_least(
    step_seconds: float | None, expected: float
) -> None:
    limits = patience(watchdog_seconds=None, phase_seconds=None, step_seconds=step_seconds)
    assert limits.limit_seconds("backward", steps_done=1) == expected
    assert limits.limit_seconds(None, steps_done=1) == expected


@pytest.mark.parametrize(
    ("phase", "steps_done"), [("forward", 0), ("start", 0), ("load", 0), ("save", 9), ("eval", 9)]
)
def test_phases_without_micro_steps_and_the_first_step_have_their_own_allowance(
    phase: str, steps_done: int
) -> None:
    limits = patience(watchdog_seconds=5, phase_seconds=None, step_seconds=1.0)
    # Half an hour: when DeepSpeed's collectives give up by default.
    assert limits.limit_seconds(phase, steps_done=steps_done) == 1800


def test_a_slow_save_may_take_four_times_what_the_plan_predicts() -> None:
    # 1 TB at 200 MB/s: 5,000 s, longer than half an hour.
    limits = patience(
        watchdog_seconds=5, phase_seconds=None, step_seconds=1.0, write_seconds=5000.0
    )
    assert limits.limit_seconds("save", steps_done=9) == 20_000


def test_zero_turns_the_watchdog_off_everywhere() -> None:
    limits = patience(watchdog_seconds=0, phase_seconds=None, step_seconds=1.0)
    assert limits.limit_seconds("forward", steps_done=3) == 0
    assert limits.limit_seconds("load", steps_done=0) == 0
