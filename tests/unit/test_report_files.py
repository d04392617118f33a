"""Reading a run directory in any state, and writing the report into it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from report_inputs import LOG, PLAN, RESULTS, rank
from rich.console import Console

from launcher.errors import RunDirError
from launcher.peaks import peaks_to_json
from launcher.report.build import build_report
from launcher.report.files import write_report
from launcher.report.run_reader import load_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A complete run directory of two ranks."""
    (tmp_path / "ranks").mkdir()
    for number in (0, 1):
        text = json.dumps(peaks_to_json(rank(number)))
        (tmp_path / "ranks" / f"{number:05d}.json").write_text(text)
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    (tmp_path / "status.json").write_text('{"schema_version": 1, "state": "finished"}')
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    (tmp_path / "trainer_log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in LOG))
    return tmp_path


def change_rank(run: Path, **changes: Any) -> None:
    path = run / "ranks" / "00001.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_complete_run_is_read_whole(run: Path) -> None:
    files = load_run(run)
    assert files.ranks == (rank(0), rank(1))
    assert files.log == LOG
    assert files.results == RESULTS
    assert files.problems == ()


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="no such run directory"):
        load_run(tmp_path / "nowhere")


def test_a_directory_without_a_run_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(RunDirError, match=r"not a run directory: it has none of recipe\.yaml"):
        load_run(tmp_path)


def test_a_half_written_rank_file_is_named_and_left_out(run: Path) -> None:
    path = run / "ranks" / "00001.json"
    path.write_text(path.read_text()[:100])
    files = load_run(run)
    assert [item.rank for item in files.ranks] == [0]
    assert files.problems[0].startswith("ranks/00001.json was left out: broken or half-written")


@pytest.mark.parametrize("name", ["plan.json", "status.json", "results.json"])
@pytest.mark.parametrize(
    "content", [b'{"state": "run', b"[1, 2]", b"\xff\xfe", b"", b"[" * 100_000]
)
def test_a_broken_file_is_named_and_left_out(run: Path, name: str, content: bytes) -> None:
    (run / name).write_bytes(content)
    files = load_run(run)
    assert [problem.partition(" ")[0] for problem in files.problems] == [name]
    assert build_report(files).state in ("finished", "running")


def test_a_plan_that_was_never_written_is_told(run: Path) -> None:
    (run / "plan.json").unlink()
    assert load_run(run).problems[0].startswith("plan.json is missing")


def test_a_rank_file_of_another_schema_is_named(run: Path) -> None:
    change_rank(run, schema_version=7)
    assert "schema_version is 7" in load_run(run).problems[0]


def test_a_plan_of_another_schema_is_read_as_far_as_it_goes(run: Path) -> None:
    (run / "plan.json").write_text(json.dumps(PLAN | {"schema_version": 9}))
    files = load_run(run)
    assert "schema_version 9" in files.problems[0]
    assert build_report(files).prediction.model_name == "tiny-llama"


@pytest.mark.parametrize(
    "changes",
    [
        {"step_seconds": [1.0, "fast"]},
        {"step_seconds": [float("nan")]},
        {"steps_done": None},
        {"world_size": 10**9},
        {"host": 5},
        {"phases": {"step": {"peak_allocated_bytes": 1}}},
        {"phases": [1]},
        {"failure": {"phase": 1, "type": 2, "message": 3, "traceback": 4}},
    ],
)
def test_a_rank_file_with_impossible_values_is_left_out(run: Path, changes: dict[str, Any]) -> None:
    change_rank(run, **changes)
    files = load_run(run)
    assert [item.rank for item in files.ranks] == [0]
    assert files.problems[0].startswith("ranks/00001.json was left out")


def test_a_rank_file_under_another_ranks_name_is_left_out(run: Path) -> None:
    change_rank(run, rank=0)
    files = load_run(run)
    assert files.problems == ("ranks/00001.json was left out: it is of rank 0.",)


def test_ranks_of_another_run_are_noticed(run: Path) -> None:
    change_rank(run, world_size=8)
    assert "different world sizes (2, 8)" in load_run(run).problems[0]


def test_temporary_files_of_writers_are_no_ranks(run: Path) -> None:
    (run / "ranks" / ".00001.json.77.tmp").write_text("{")
    assert load_run(run).problems == ()


def test_a_log_line_that_is_still_being_written_waits(run: Path) -> None:
    with (run / "trainer_log.jsonl").open("a") as log:
        log.write('{"step": 5, "lo')
    files = load_run(run)
    assert files.log == LOG
    assert files.problems == ()


def test_a_broken_log_line_is_named_by_its_number(run: Path) -> None:
    (run / "trainer_log.jsonl").write_text('{"step": 1, "loss": 2.0}\nnot json\n{"step": 2}\n')
    files = load_run(run)
    assert len(files.log) == 2
    assert files.problems == ("trainer_log.jsonl: line 2 cannot be read and was left out.",)


def test_many_broken_rank_files_are_counted(run: Path) -> None:
    for number in range(1000):
        (run / "ranks" / f"{number:05d}.json").write_text("{")
    problems = load_run(run).problems
    assert len(problems) == 6
    assert problems[-1] == "995 more rank files were left out."


def test_the_report_is_written_as_four_files(run: Path) -> None:
    made = write_report(run)
    assert [path.name for path in made.paths] == [
        "report.json",
        "report.md",
        "report.html",
        "loss.png",
    ]
    assert json.loads((run / "report.json").read_text()) == made.json_value
    assert "![Training and held-out loss by step](loss.png)" in (run / "report.md").read_text()
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    # The report of a report's directory is the same: nothing that was written confuses the reader.
    assert load_run(run).problems == ()


def test_a_run_that_has_just_begun_can_be_reported(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    made = write_report(tmp_path)
    assert [path.name for path in made.paths] == ["report.json", "report.md", "report.html"]


def test_a_folder_that_cannot_be_written_is_reported_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    (tmp_path / "report.json").mkdir()
    made = write_report(tmp_path)
    assert made.paths == ()
    stream = io.StringIO()
    Console(file=stream, width=200).print(made.terminal)
    assert "No file was written" in stream.getvalue()
