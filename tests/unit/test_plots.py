"""Charts are PNG files of the right width, and no content stops them from being drawn."""

from __future__ import annotations

import struct
import sys
from dataclasses import replace
from typing import Any

import pytest
from report_inputs import LOG, PLAN, RESULTS, phase, rank

from launcher.report.build import build_report
from launcher.report.plots import chart_findings, draw_charts
from launcher.report.run_report import Chart, RunFiles
from launcher.units import GIB


def charts_of(**content: Any) -> dict[str, Chart]:
    charts = draw_charts(build_report(RunFiles(name="run", **content)))
    return {chart.name: chart for chart in charts}


def png_width(png: bytes) -> int:
    """Width in pixels: bytes 16 to 20 of a PNG, after signature and chunk header (ISO 15948)."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    (width,) = struct.unpack(">I", png[16:20])
    return int(width)


def findings_of(**content: Any) -> dict[str, str]:
    return chart_findings(build_report(RunFiles(name="run", **content)))


def test_titles_say_the_finding() -> None:
    ranks = (rank(0), rank(1, phases={"backward": phase(5.5)}))
    # By hand: 0.5 of 5.5 is 9.1 %, 5.5 over the mean 5.25 is 4.8 % more, 0.6 of 3 is 20 %.
    assert findings_of(plan=PLAN, ranks=ranks, log=LOG, results=RESULTS) == {
        "memory": "Fullest rank: 6.00 GiB predicted, 5.50 GiB measured (+9.1 %)",
        "ranks": "Rank 1 is the fullest: 5.50 GiB, 4.8 % above the mean",
        "loss": "Held-out loss fell from 3.000 to 2.400 (-20.0 %)",
    }


def test_equal_ranks_and_a_lone_rank_are_told_as_such() -> None:
    assert findings_of(ranks=(rank(0), rank(1)))["ranks"] == "All 2 ranks peaked at 5.00 GiB"
    assert findings_of(ranks=(rank(0),))["ranks"] == "Rank 0 peaked at 5.00 GiB"


def test_a_plan_alone_says_that_nothing_was_measured() -> None:
    assert findings_of(plan=PLAN) == {"memory": "Predicted peak: 6.00 GiB; nothing measured yet"}


def test_each_chart_has_a_width_for_screens_and_one_for_phones() -> None:
    chart = charts_of(log=LOG)["loss"]
    # Two device pixels for each CSS pixel of 1120 and 360.
    assert (png_width(chart.wide_png), png_width(chart.narrow_png)) == (2240, 720)


def test_without_data_there_is_no_chart() -> None:
    assert charts_of() == {}


def test_many_ranks_are_drawn_as_one_area() -> None:
    ranks = tuple(rank(n, world_size=200, phases={"step": phase(4 + n % 5)}) for n in range(200))
    chart = charts_of(ranks=ranks)["ranks"]
    assert png_width(chart.wide_png) == 2240
    assert chart.finding.startswith("Rank 4 is the fullest")


@pytest.mark.parametrize(
    "sizes",
    [
        {"$x_1$": 2 * GIB, "世界" * 40: GIB, "_hidden": GIB},
        {f"part {number}": GIB for number in range(30)},
        {"zero": 0, "negative": -5},
    ],
)
def test_component_names_and_sizes_of_any_kind_are_drawn(sizes: dict[str, int]) -> None:
    memory = {
        "peak_allocated_bytes": 6 * GIB,
        "phases": {
            "$phase$": {"allocated_bytes": max(sum(sizes.values()), 0), "components": sizes}
        },
    }
    charts = charts_of(plan=PLAN | {"memory": memory}, ranks=(replace(rank(0), phases={}),))
    assert png_width(charts["memory"].narrow_png) == 720


def test_drawing_leaves_pyplot_alone() -> None:
    charts_of(log=LOG)
    assert "matplotlib.pyplot" not in sys.modules
