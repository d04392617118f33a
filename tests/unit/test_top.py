"""The terminal's view of a run, live or not."""

from __future__ import annotations

import io
import json
import os
import pty
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from report_inputs import PLAN, phase, rank
from rich.console import Console

from launcher import run_dir
from launcher.commands.top import _keys, _turn, top
from launcher.peaks import peaks_to_json
from launcher.report.live import Progress, RankFolder, SeenRank
from launcher.report.prediction import Prediction
from launcher.report.top_view import Page, RunView, num_pages, render_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two ranks in its third step."""
    folder = tmp_path / "a-run"
    (folder / run_dir.RANKS).mkdir(parents=True)
    run_dir.write_json(folder / run_dir.PLAN, PLAN)
    run_dir.write_status(folder, "running")
    for number in (0, 1):
        write_rank(folder, number)
    entry = {"step": 3, "total_steps": 9, "loss": 2.5, "tokens_per_s": 1234}
    (folder / run_dir.TRAINER_LOG).write_text(json.dumps(entry) + "\n")
    return folder


def write_rank(folder: Path, number: int, **changes: object) -> Path:
    path = run_dir.rank_file(folder, number)
    run_dir.write_json(path, peaks_to_json(rank(number, **{"state": "running", **changes})))
    return path


def shown(run: Path, *options: str) -> str:
    result = CliRunner(env={"COLUMNS": "160"}).invoke(top, [str(run), "--once", *options])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_running_run_shows_each_rank_beside_the_plan(run: Path) -> None:
    text = shown(run)
    assert "a-run  running  step 4/9  loss 2.5000  1,234 tokens/s" in text
    assert "2 ranks on 1 host" in text
    # 7 GiB of the 8 that the plan promised for the device.
    assert text.count("88%") == 2


def test_a_finished_run_shows_no_time_left_and_no_silence(run: Path) -> None:
    run_dir.write_status(run, "finished")
    for number in (0, 1):
        path = write_rank(run, number, state="finished")
        os.utime(path, (0, 0))
    text = shown(run)
    assert "a-run  finished" in text
    assert "left" not in text
    assert "nothing for over" not in text


def test_ranks_that_died_without_a_word_are_named_as_silent(run: Path) -> None:
    path = run_dir.rank_file(run, 1)
    os.utime(path, (time.time() - 3600, time.time() - 3600))
    assert "1 of 2 ranks have written nothing for over 60 s, rank 1 for 1 h 00 min" in (
        " ".join(shown(run).split())
    )


def test_a_clock_that_is_behind_makes_no_rank_older_than_it_is(run: Path) -> None:
    path = run_dir.rank_file(run, 1)
    os.utime(path, (time.time() + 3600, time.time() + 3600))
    assert [seen.age_seconds < 60 for seen in RankFolder(run).read([0, 1])] == [True, True]


def test_missing_and_broken_files_are_counted(run: Path) -> None:
    run_dir.write_json(run / run_dir.PLAN, PLAN | {"world_size": 4})
    run_dir.rank_file(run, 1).write_text('{"schema_version": 1, "ran')
    text = shown(run)
    assert "no file of 3 of 4 ranks: 1, 2, 3" in text
    assert "1 file of a rank is broken or of another version" in text


@pytest.mark.parametrize("name", [run_dir.PLAN, run_dir.STATUS, run_dir.TRAINER_LOG])
@pytest.mark.parametrize("content", ["", "{", "[1]", '{"world_size": "many"}', "\x00\n", "null\n"])
def test_no_broken_file_of_a_run_breaks_the_view(run: Path, name: str, content: str) -> None:
    (run / name).write_text(content)
    assert "2 ranks on 1 host" in shown(run)


def test_a_run_that_has_not_started_is_shown(tmp_path: Path) -> None:
    run_dir.write_status(tmp_path, "created")
    assert f"{tmp_path.name}  created  step 0" in shown(tmp_path)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(top, [str(tmp_path), "--once"])
    assert "this is not a run directory" in str(result.exception)


def test_json_has_every_rank(run: Path) -> None:
    result = CliRunner().invoke(top, [str(run), "--json"])
    content = json.loads(result.output)
    assert [item["rank"] for item in content["ranks"]] == [0, 1]
    assert content["progress"]["loss"] == 2.5
    assert content["ranks"][0]["step_seconds"] == 2.5


def test_a_file_is_read_again_only_when_it_was_replaced(run: Path) -> None:
    files = RankFolder(run)
    (first,) = files.read([0])
    assert files.read([0])[0].peaks is first.peaks
    write_rank(run, 0, steps_done=5)
    assert files.read([0])[0].peaks.steps_done == 5


def many(count: int) -> RunView:
    """Ranks of which each has done one step less than the one before it, and holds more."""
    ranks = tuple(
        SeenRank(
            peaks=rank(n, steps_done=count - n, phases={"step": phase(1 + n / 1000)}, host=f"n{n}"),
            age_seconds=0.0,
        )
        for n in range(count)
    )
    return RunView(
        name="large",
        state="running",
        reason=None,
        progress=Progress(),
        prediction=Prediction(),
        ranks=ranks,
        world_size=count,
        unreadable=frozenset(),
    )


def drawn(view: RunView, page: Page) -> str:
    console = Console(width=page.num_columns, file=io.StringIO())
    with console.capture() as captured:
        console.print(render_run(view, page))
    return captured.get()


def test_thousands_of_ranks_are_paged_and_summed_up() -> None:
    view = many(3000)
    text = drawn(view, Page(sorting="memory", num_rows=10, number=0))
    assert len(text.splitlines()) < 30
    assert "3000 ranks on 3000 hosts" in text
    assert "page 1 of 300, sorted by memory" in text
    rows = [line.split() for line in text.splitlines() if " finished " in line]
    # The fullest is the last rank; the furthest behind is, too.
    assert [row[0] for row in rows] == [str(n) for n in range(2999, 2989, -1)]
    assert "page 300 of 300" in drawn(view, Page(num_rows=10, number=4711))


def test_keys_turn_pages_and_sort() -> None:
    page = Page(num_rows=10)
    assert num_pages(25, 10) == 3
    assert _turn(page, "n", num_ranks=25).number == 1
    assert _turn(page, "p", num_ranks=25).number == 0
    assert _turn(Page(num_rows=10, number=2), "n", num_ranks=25).number == 2
    assert _turn(Page(number=2), "m", num_ranks=25) == Page(sorting="memory", number=0)
    assert _turn(page, "\x1b", num_ranks=25) == page


@pytest.mark.parametrize("num_columns", [62, 80, 120])
def test_no_number_is_cut_off_on_a_narrow_terminal(num_columns: int) -> None:
    text = drawn(many(3), Page(num_columns=num_columns))
    table = text[text.index("rank host") if num_columns >= 80 else text.index("rank phase") :]
    assert "…" not in table


def test_a_key_is_read_from_a_terminal_without_enter_and_the_terminal_is_left_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    user, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    with os.fdopen(terminal, "r") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        with _keys() as read_key:
            os.write(user, b"mq")
            assert [read_key(60.0), read_key(60.0), read_key(0.0)] == ["m", "q", ""]
        assert termios.tcgetattr(terminal) == before
    os.close(user)


@pytest.mark.parametrize("num_columns", [80, 160])
def test_a_hostile_name_of_a_host_writes_nothing_into_the_terminal(num_columns: int) -> None:
    hostile = SeenRank(peaks=rank(0, host="\x1b[31m[bold]red"), age_seconds=0.0)
    page = Page(num_columns=num_columns)
    text = drawn(replace(many(1), ranks=(hostile,)), page)
    assert "\x1b[31m" not in text
    assert "[bold]red" in text
