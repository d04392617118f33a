"""Results of a sweep: read, compared, tabulated, and what is left to do."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from launcher.bench.result import (
    Result,
    describe_result,
    measurement_of,
    parse_results,
    remaining,
    results_to_csv,
    state_of,
)
from launcher.bench.sweep import parse_sweep
from launcher.errors import RunDirError
from launcher.peaks import PhasePeaks, RankPeaks

OLD_RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "h100.jsonl"
SWEEP = """
cases:
- {name: a, model: {name_or_path: llama2-7b}, max_seq_len: 256}
- {name: b, model: {name_or_path: llama2-7b}, max_seq_len: 512}
"""


def line(name: str, state: str = "finished", *, tokens: int = 256, **more: Any) -> str:
    recipe = {"model": {"name_or_path": "llama2-7b"}, "max_seq_len": tokens}
    return json.dumps({"case": name, "recipe": recipe, "state": state, **more}) + "\n"


def rank(number: int, *, peak: int = 10, state: Any = "finished") -> RankPeaks:
    phase = PhasePeaks(
        peak_allocated_bytes=peak,
        peak_reserved_bytes=peak + 1,
        device_used_bytes=peak + 2,
        host_rss_bytes=5,
        seconds=1.0,
        count=1,
    )
    return RankPeaks(
        rank=number, local_rank=number, world_size=2, host="n", pid=1, device="cuda",
        device_name="H", state=state, steps_done=5, phases={"forward": phase},
        step_seconds=(9.0, 3.0, 1.0, 2.0, 1.5), tokens_per_step=300,
    )  # fmt: skip


def test_the_step_time_is_the_median_after_two_steps() -> None:
    measured = measurement_of(rank(0))
    assert measured["step_seconds"] == 1.5
    assert measured["all_step_seconds"] == [9.0, 3.0, 1.0, 2.0, 1.5]
    assert measured["peak_allocated_bytes"] == 10
    assert measured["device_used_bytes"] == 12


def test_one_rank_out_of_memory_names_the_run_so_whatever_the_others_say() -> None:
    ranks = (rank(0, state="failed"), rank(1, state="out_of_memory"))
    assert state_of(ranks, has_failed=True) == "out_of_memory"
    assert state_of((rank(0),), has_failed=True) == "failed"
    assert state_of((), has_failed=False) == "failed"
    assert state_of((rank(0), rank(1)), has_failed=False) == "finished"


def test_results_of_the_first_sixty_runs_are_read() -> None:
    results = parse_results(OLD_RESULTS.read_text(), source="h100")
    assert len(results) == 60
    first = results[0]
    assert first.state == "finished"
    # The file's own numbers: predicted 3503138816, measured 3503158272.
    assert first.error_fraction("peak_allocated_bytes") == pytest.approx(-5.6e-6, abs=1e-6)
    assert first.recipe.max_seq_len == 256


def test_errors_compare_with_the_fullest_rank() -> None:
    measured = [measurement_of(rank(0, peak=10)), measurement_of(rank(1, peak=20))]
    text = line("a", predicted={"peak_allocated_bytes": 25, "step_seconds": 3.0}, measured=measured)
    (result,) = parse_results(text, source="x")
    assert result.error_fraction("peak_allocated_bytes") == 0.25
    assert result.error_fraction("step_seconds") == 1.0
    assert result.error_fraction("device_used_bytes") is None


def test_what_was_measured_before_running_out_of_memory_is_no_peak_of_the_run() -> None:
    measured = [measurement_of(rank(0, state="out_of_memory"))]
    (result,) = parse_results(line("a", "out_of_memory", measured=measured), source="x")
    assert result.measured("peak_allocated_bytes") is None
    assert not result.is_failure


def test_of_several_results_of_a_case_the_last_counts_and_half_a_line_at_the_end_does_not() -> None:
    text = line("a", "failed") + line("b") + line("a") + line("b", "failed")[:40]
    results = parse_results(text, source="x")
    assert [(result.case, result.state) for result in results] == [
        ("b", "finished"), ("a", "finished"),
    ]  # fmt: skip


@pytest.mark.parametrize("broken", ["{}\n", "[1]\n", "nonsense\n", '{"case": "a"}\n'])
def test_a_line_that_is_no_result_is_named(broken: str) -> None:
    with pytest.raises(RunDirError, match="x:2"):
        parse_results(line("a") + broken, source="x")


def test_a_case_with_a_result_is_not_run_again() -> None:
    cases = parse_sweep(SWEEP, source="x")
    results = parse_results(line("a", "failed"), source="x")
    left = remaining(cases, results, source="r", retry_failed=False)
    assert [case.name for case in left] == ["b"]
    left = remaining(cases, results, source="r", retry_failed=True)
    assert [case.name for case in left] == ["a", "b"]


def test_running_out_of_memory_is_not_tried_again() -> None:
    cases = parse_sweep(SWEEP, source="x")
    results = parse_results(line("a", "out_of_memory"), source="x")
    left = remaining(cases, results, source="r", retry_failed=True)
    assert [case.name for case in left] == ["b"]


def test_a_result_of_other_settings_is_never_taken_for_the_cases_own() -> None:
    cases = parse_sweep(SWEEP, source="x")
    results = parse_results(line("a", tokens=1024), source="x")
    with pytest.raises(RunDirError, match="case a is of other settings"):
        remaining(cases, results, source="r", retry_failed=False)


def test_the_csv_has_a_line_for_each_case_with_units_in_its_header() -> None:
    predicted = {"peak_allocated_bytes": 12, "strategy": {"zero_stage": 2}, "fits": True}
    text = line("a", predicted=predicted, measured=[measurement_of(rank(0))])
    text += line("b", "refused", failure="x: no\n  fix: y")
    rows = list(csv.DictReader(io.StringIO(results_to_csv(parse_results(text, source="x")))))
    assert rows[0]["measured_peak_allocated_bytes"] == "10.0"
    assert rows[0]["measured_tokens_per_second_per_rank"] == "200.0"  # 300 tokens in 1.5 s
    assert rows[0]["zero_stage"] == "2"
    assert rows[1]["state"] == "refused"
    assert rows[1]["failure"] == "x: no fix: y"


def test_a_failure_is_described_with_its_phase() -> None:
    failure = {"phase": "forward", "message": "OutOfMemoryError: tried to\nallocate"}
    result = Result(content=json.loads(line("a", "out_of_memory", failure=failure)))
    assert "in phase forward: OutOfMemoryError: tried to allocate" in describe_result(result)
