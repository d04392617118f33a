"""Runs beside each other: what differs, what was measured, in every form."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from report_inputs import LOG, PLAN, RESULTS, phase, rank
from rich.console import Console

from launcher.report.as_html import render_comparison_html
from launcher.report.as_markdown import render_comparison_markdown
from launcher.report.as_terminal import render_comparison_terminal
from launcher.report.build import build_report
from launcher.report.compare import RunsCompared, compare_runs
from launcher.report.run_report import RunFiles


def compared(*runs: dict[str, Any]) -> RunsCompared:
    return compare_runs([build_report(RunFiles(**{"name": "run", **run})) for run in runs])


FAST = {
    "name": "fast", "plan": PLAN, "ranks": (rank(0), rank(1)), "log": LOG, "results": RESULTS,
    "recipe": {"optim.learning_rate": 1e-4, "lora.r": 8},
}  # fmt: skip
SMALL = {
    "name": "small",
    "plan": PLAN | {"strategy": {**PLAN["strategy"], "micro_batch_size_per_gpu": 1}},
    "ranks": (rank(0, phases={"backward": phase(2.5)}, step_seconds=(9.0, 4.0)),),
    "recipe": {"optim.learning_rate": 1e-4, "lora.r": 16},
}


def test_only_what_differs_is_listed() -> None:
    rows = {row[0]: row[1:] for row in compared(FAST, SMALL).differences.rows}
    assert rows == {
        "plan: micro_batch_size_per_gpu": ("4", "1"),
        "recipe: lora.r": ("8", "16"),
    }


def test_figures_stand_beside_each_other() -> None:
    value = compared(FAST, SMALL).json_value
    fast, small = value["runs"]
    # By hand: 5 and 2.5 GiB measured of 6 predicted; medians of (1, 3, 2) and (4).
    gib = 2**30
    assert fast["peak_allocated_bytes"] == {
        "predicted": 6 * gib, "measured": 5 * gib, "error_fraction": 0.2
    }  # fmt: skip
    assert small["peak_allocated_bytes"]["measured"] == 2.5 * gib
    assert (fast["step_seconds"]["measured"], small["step_seconds"]["measured"]) == (2.0, 4.0)
    # 4096 tokens of each rank: two of them in 2 s, one in 4 s.
    assert (fast["tokens_per_second"], small["tokens_per_second"]) == (4096.0, 1024.0)
    assert json.loads(json.dumps(value, allow_nan=False)) == value


def test_charts_say_which_is_the_best() -> None:
    findings = {chart.name: chart.finding for chart in compared(FAST, SMALL).charts}
    assert findings == {
        "memory": "Peak memory of the fullest rank: small needs least, 2.50 GiB",
        "throughput": "Tokens per second of all ranks: fast is the fastest, 4.1k tokens/s",
        "loss": "Training loss",
    }


def test_every_form_has_every_run() -> None:
    runs = compared(FAST, SMALL)
    stream = io.StringIO()
    Console(width=120, file=stream).print(render_comparison_terminal(runs))
    for text in (
        stream.getvalue(), render_comparison_markdown(runs), render_comparison_html(runs)
    ):  # fmt: skip
        assert "fast" in text
        assert "small" in text
        assert "2.50 GiB" in text


def test_runs_without_anything_are_compared_all_the_same() -> None:
    runs = compared({}, {}, {"status": {"state": "created"}})
    assert runs.names == ("run", "run (2)", "run (3)")
    assert runs.differences.rows == ()
    assert runs.charts == ()
    assert "Nothing in recipe or plan differs" in render_comparison_html(runs)


def test_every_key_of_the_comparison_is_documented() -> None:
    document = (Path(__file__).parents[2] / "docs" / "report-json.md").read_text(encoding="utf-8")
    (run, *_), value = compared(FAST).json_value["runs"], compared(FAST).json_value
    assert [key for key in (*value, *run) if f"`{key}`" not in document] == []
