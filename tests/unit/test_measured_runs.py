"""Today's predictions against every run in ``benchmarks/results``: what a GPU measured.

The runs were made by zerofit's own worker; each line holds its recipe and what every rank
measured. No formula is fitted to allocated bytes; reserved bytes have constants that were fitted
on the runs at even positions, so the others judge them.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
from generators import script

from launcher.planning.safety import SAFETY_FRACTION

measured = script("measured")
RESULTS = measured.RESULTS
WORST_ALLOCATED, MEAN_ALLOCATED, MEAN_RESERVED = 0.06, 0.02, 0.04


def rows(path: Path) -> tuple[Any, ...]:
    return tuple(row for row in measured.read_rows(path) if not row.is_outdated)


def errors(path: Path, quantity: str, *, held_out_only: bool = False) -> list[float]:
    found = (row.error(quantity) for row in rows(path) if row.is_held_out or not held_out_only)
    return [abs(error) for error in found if error is not None]


def test_at_least_40_runs_were_measured() -> None:
    assert sum(len(rows(path)) for path in RESULTS) >= 40


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_peak_of_allocated_bytes_is_within_6_percent(path: Path) -> None:
    quantity = "peak_allocated_bytes"
    found = {row.case: row.error(quantity) for row in rows(path)}
    assert {k: e for k, e in found.items() if e is None or abs(e) > WORST_ALLOCATED} == {}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_mean_error_of_allocated_bytes_is_at_most_2_percent(path: Path) -> None:
    assert statistics.mean(errors(path, "peak_allocated_bytes")) <= MEAN_ALLOCATED


@pytest.mark.parametrize("held_out_only", [False, True], ids=["all", "held out"])
@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_mean_error_of_reserved_bytes_is_at_most_4_percent(
    path: Path, *, held_out_only: bool
) -> None:
    found = errors(path, "peak_reserved_bytes", held_out_only=held_out_only)
    assert statistics.mean(found) <= MEAN_RESERVED


def test_every_phase_of_every_run_is_within_6_percent_or_20_mb() -> None:
    """Init with an offloaded optimizer is left out: DeepSpeed reset the counter in its middle.

    0.19.8 ``runtime/utils.py:empty_cache`` did so in these runs; what was measured is the rest.
    And a forward of 1.2 GB, 1.0 below the peak: parameters arrive before it is at its fullest.
    QLoRA under ZeRO-3 was loaded whole then and partitioned in init, now while it is loaded.
    """
    worse = {
        (row.case, phase): predicted / measured - 1
        for path in RESULTS
        for row in rows(path)
        for phase, (predicted, measured) in row.phases.items()
        if abs(predicted / measured - 1) > WORST_ALLOCATED and abs(predicted - measured) > 20e6
    }
    reset = {("1b-full-z2-1024-off", "init"), ("1b-full-z1-1024-off", "init")}
    arriving = {("7b-lora-z3-2048-gc-offload-param", "forward")}
    partitioned_in_init = {("3b-qlora-all-z3-2048-gc", "init")}
    assert worse.keys() <= reset | arriving | partitioned_in_init


def test_the_safety_margin_covers_every_measured_run_that_the_planner_may_choose() -> None:
    # After a change of the prediction: python benchmarks/safety_margin.py
    safety_margin = script("safety_margin")
    found = safety_margin.counted_rows()
    assert sum(row.is_planned for row in found) >= 40
    assert safety_margin.margin(found) <= SAFETY_FRACTION
