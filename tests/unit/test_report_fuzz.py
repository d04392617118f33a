"""A report never fails, whatever a real run's files have become."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from launcher.report.as_html import render_html
from launcher.report.as_json import report_to_json
from launcher.report.as_markdown import render_markdown
from launcher.report.as_terminal import render_terminal
from launcher.report.build import build_report
from launcher.report.compare import compare_runs
from launcher.report.plots import draw_charts
from launcher.report.run_reader import load_run
from launcher.report.run_report import RunReport

RUN = Path(__file__).parents[1] / "data" / "run"
RECOVERY = {
    "schema_version": 1, "attempt": 1, "action": "next_rung", "problem": "rank 1: out of memory",
    "failed_at": "2026-11-22T10:01:00.000+00:00",
    "reason": "the next rung", "changes": {"strategy.zero_stage": [2, 3]},
}  # fmt: skip
# What may stand where a number, a text or an object belongs.
ODD = st.sampled_from(
    [None, True, -1, 0, 1.5, 10**30, 1e308, float("nan"), float("inf"), "", "x" * 5000, "\ud800",
     "<b>\x1b[2J", [], [[]], {}, {"a": {}}, [None, -1], "∞", 2**63]
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stored run with an earlier attempt."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    shutil.copytree(RUN, folder)
    attempt = folder / "attempts" / "1"
    attempt.mkdir(parents=True)
    shutil.copy(RUN / "plan.json", attempt)
    status = {"state": "failed", "changed_at": "2026-11-22T10:00:00.000+00:00"}
    (attempt / "status.json").write_text(json.dumps(status))
    shutil.copytree(RUN / "ranks", attempt / "ranks")
    (folder / "recovery.jsonl").write_text(json.dumps(RECOVERY) + "\n")
    return folder


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".jsonl", ".yaml"))


def report_in_every_form(folder: Path) -> RunReport:
    report = build_report(load_run(folder))
    render_html(report, draw_charts(report)).encode()
    render_markdown(report).encode()
    Console(file=io.StringIO(), width=80).print(render_terminal(report))
    json.dumps(report_to_json(report), allow_nan=False)
    json.dumps(compare_runs([report, report]).json_value, allow_nan=False)
    return report


def test_the_stored_run_is_whole(whole: Path) -> None:
    report = report_in_every_form(whole)
    assert report.problems == ()
    assert len(files_of(whole)) == 15
    assert [chart.name for chart in draw_charts(report)] == [
        "memory", "ranks", "timeline", "host", "loss", "throughput", "lengths",
    ]  # fmt: skip
    (attempt,) = report.attempts
    assert attempt.reason == "rank 1: out of memory"
    assert attempt.reaction == "the next rung; strategy.zero_stage: 2 → 3"


FUZZ = settings(
    deadline=None,
    max_examples=10,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@FUZZ
@given(data=st.data())
def test_files_that_are_cut_or_overwritten_never_stop_a_report(
    whole: Path, data: st.DataObject
) -> None:
    path = data.draw(st.sampled_from(files_of(whole)))
    content = path.read_bytes()
    start = data.draw(st.integers(0, len(content)))
    rest = data.draw(st.sampled_from([b"", content[start + 7 :], b"\0" * 9, b"\xff", b"[" * 9999]))
    path.write_bytes(content[:start] + rest)
    try:
        report_in_every_form(whole)
    finally:
        path.write_bytes(content)


@FUZZ
@given(data=st.data())
def test_values_of_any_kind_never_stop_a_report(whole: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from([p for p in files_of(whole) if p.suffix != ".yaml"]))
    content = path.read_text()
    lines = content.splitlines() if path.suffix == ".jsonl" else [content]
    at = data.draw(st.integers(0, len(lines) - 1))
    value = json.loads(lines[at])
    for holder, key in data.draw(
        st.lists(st.sampled_from(list(places_in(value))), min_size=1, max_size=3)
    ):
        if not isinstance(holder, list) or key < len(holder):
            holder[key] = data.draw(ODD)
    lines[at] = json.dumps(value)
    path.write_text("\n".join(lines) + "\n")
    try:
        report_in_every_form(whole)
    finally:
        path.write_text(content)


def places_in(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every place in a JSON value, as its holder and key."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(pairs):
        yield value, key
        if isinstance(item, dict | list):
            yield from places_in(item)


@pytest.mark.parametrize("name", ["plan.json", "ranks", "timeline", "recipe.yaml", "data"])
def test_a_folder_in_place_of_a_file_or_none_at_all(whole: Path, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    report_in_every_form(folder)
    path.mkdir() if path.suffix else path.write_text("x")
    report_in_every_form(folder)
