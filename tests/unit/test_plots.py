"""Charts are SVG of the right width, and no content stops them from being drawn."""

from __future__ import annotations

import math
import re
import struct
import subprocess
import sys
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest
from report_inputs import LOG, PLAN, RESULTS, phase, rank

from launcher.report.build import build_report
from launcher.report.chart_findings import chart_findings
from launcher.report.loss_png import draw_loss_png
from launcher.report.plots import draw_charts
from launcher.report.run_report import Chart, Lengths, RunFiles
from launcher.report.svg import Axis
from launcher.timeline import MemorySample, Timeline
from launcher.units import GIB


def charts_of(**content: Any) -> dict[str, Chart]:
    charts = draw_charts(build_report(RunFiles(name="run", **content)))
    return {chart.name: chart for chart in charts}


def svg_width(svg: str) -> float:
    """Width in CSS pixels; the text is well-formed XML."""
    root = ElementTree.fromstring(svg)  # noqa: S314 - our own text
    assert root.tag == "svg"
    numbers = [float(value) for value in re.findall(r"(?<=[\d\"])-?\d+\.\d+", svg)]
    assert all(math.isfinite(number) for number in numbers)
    assert "nan" not in svg
    return float(root.attrib["viewBox"].split()[2])


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
    # A column of 1160 pixels with its padding, and a phone of 390 with its padding.
    assert (svg_width(chart.wide_svg), svg_width(chart.narrow_svg)) == (1120, 366)


def test_without_data_there_is_no_chart() -> None:
    assert charts_of() == {}


def test_many_ranks_are_drawn_as_one_area() -> None:
    ranks = tuple(rank(n, world_size=200, phases={"step": phase(4 + n % 5)}) for n in range(200))
    chart = charts_of(ranks=ranks)["ranks"]
    assert svg_width(chart.wide_svg) == 1120
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
    assert svg_width(charts["memory"].narrow_svg) == 366


def test_nothing_of_a_report_needs_matplotlib() -> None:
    program = (
        "import sys\n"
        "from launcher.report import files\n"
        "from launcher.report.build import build_report\n"
        "from launcher.report.run_report import RunFiles\n"
        "log = ({'step': 1, 'loss': 2.0}, {'step': 2, 'loss': 1.0})\n"
        "report = build_report(RunFiles(name='run', log=log))\n"
        "assert files.draw_charts(report)\n"
        "assert files.draw_loss_png(report, 'loss')\n"
        "assert 'matplotlib' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("losses", [(2.0, 1.5, 1.0), (0.0, 0.0), (5.0,), (-1e17, 1e17)])
def test_the_loss_is_drawn_as_a_png(losses: tuple[float, ...]) -> None:
    log = ({"step": 0, "eval_loss": 3.0}, *({"step": n, "loss": x} for n, x in enumerate(losses)))
    png = draw_loss_png(build_report(RunFiles(name="run", log=log)), "Loss fell → 世界")
    # ISO 15948: signature, length and name of the first chunk, then width and height.
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", png[16:24]) == (2240, 920)


def test_memory_over_time_is_drawn_for_device_and_host() -> None:
    samples = tuple(
        MemorySample(
            seconds=float(n), step=n, phase="forward", allocated_bytes=n * GIB, host_rss_bytes=GIB,
            reserved_bytes=None, device_used_bytes=None,
        )
        for n in range(3)
    )  # fmt: skip
    timeline = Timeline(rank=5, interval_seconds=1.0, samples=samples)
    charts = charts_of(timelines=(timeline,))
    assert charts["timeline"].finding == (
        "Rank 5 over time: highest sample 2.00 GiB after 2 s in forward"
    )
    assert charts["host"].finding == "Host memory of rank 5 over time: at most 1.00 GiB each"


def test_no_line_is_drawn_where_memory_was_not_measured() -> None:
    sizes = (GIB, 2 * GIB, None, None, GIB, 2 * GIB)
    samples = tuple(
        MemorySample(
            seconds=float(n), step=n, phase="forward", allocated_bytes=size, host_rss_bytes=GIB,
            reserved_bytes=None, device_used_bytes=None,
        )
        for n, size in enumerate(sizes)
    )  # fmt: skip
    charts = charts_of(timelines=(Timeline(rank=0, interval_seconds=1.0, samples=samples),))
    # The host's memory is one line, and so is all else of a drawing.
    num_of_host = charts["host"].wide_svg.count("<polyline")
    assert charts["timeline"].wide_svg.count("<polyline") == num_of_host + 1


def test_throughput_is_drawn_beside_the_prediction() -> None:
    log = tuple({"step": step, "tokens_per_s": 3000 + step} for step in range(3))
    chart = charts_of(plan=PLAN, log=log)["throughput"]
    # Predicted: 2000 tokens/s a GPU, two of them.
    assert chart.finding == "Throughput of all ranks: 3k tokens/s (median), 4k tokens/s predicted"


def test_lengths_say_how_many_records_were_cut() -> None:
    lengths = Lengths(bins=((1, 64, 10), (65, 128, 0), (129, 200, 4)), max_seq_len=128,
                      num_truncated=4)  # fmt: skip
    chart = charts_of(lengths=lengths)["lengths"]
    assert chart.finding == "4 of 14 records are longer than 128 tokens and were cut"
    assert "cut off" in chart.wide_svg


def test_a_curve_of_a_long_run_stays_small() -> None:
    # A point takes some 12 characters: all of these would be 250,000.
    log = tuple({"step": step, "loss": 3 - step / 2e4} for step in range(20_000))
    assert len(charts_of(log=log)["loss"].wide_svg) < 40_000


@pytest.mark.parametrize("values", [(0.0, 0.0), (5.0,), (-1e17, 1e17), (1e-12, 2e-12)])
def test_a_curve_of_any_values_is_drawn(values: tuple[float, ...]) -> None:
    log = tuple({"step": step, "loss": value} for step, value in enumerate(values))
    assert svg_width(charts_of(log=log)["loss"].wide_svg) == 1120


def test_axis_ticks_are_round() -> None:
    axis = Axis(low=0.3, high=7.2, start=0, end=100)
    assert axis.ticks(most=6) == [2, 4, 6]
    assert Axis(low=1, high=2, start=0, end=1).ticks(most=6, whole=True) == [1, 2]
