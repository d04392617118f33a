"""How a run is doing, from its directory and its processes; the processes here are real."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launcher import run_dir as rd
from launcher.dispatch import cancel
from launcher.dispatch import slurm_commands as slurm
from launcher.dispatch.base import InterruptionError, JobHandle, write_handle
from launcher.dispatch.cancel import cancel_run
from launcher.dispatch.interruptions import Interruptions
from launcher.dispatch.rank_lines import lines_of_rank
from launcher.dispatch.rank_watch import RankWatch
from launcher.dispatch.run_state import find_runs, observe, observe_all
from launcher.dispatch.watch import watch
from launcher.errors import JobFailedError, RunDirError, SetupError
from launcher.job_script import RUN_ID_VARIABLE


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Make a run directory whose ranks are said to run."""
    folder = rd.create(tmp_path / "runs" / "one")
    (folder / rd.RECIPE).write_text("model: {name_or_path: tiny}\n")
    rd.write_status(folder, "running")
    return folder


@pytest.fixture
def rank() -> Iterator[subprocess.Popen[bytes]]:
    """Start a process that bears the mark of run "id"."""
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(1000)"],
        env={**os.environ, RUN_ID_VARIABLE: "id"},
        start_new_session=True,
    )
    yield process
    process.kill()
    process.wait()


def handle(run: Path, **changes: object) -> JobHandle:
    fields = {
        "backend": "local", "run_dir": run, "run_id": "id", "job_id": "1",
        "host": socket.gethostname(), **changes,
    }  # fmt: skip
    made = JobHandle(**fields)  # type: ignore[arg-type]
    write_handle(made)
    return made


def state(run: Path) -> tuple[str, str | None]:
    (seen,) = observe([run])
    return seen.state, seen.reason


def test_a_run_that_was_only_written_has_not_started(run: Path) -> None:
    rd.write_status(run, "created")
    assert state(run) == ("not started", None)


def test_a_run_whose_processes_live_is_running(run: Path, rank: subprocess.Popen[bytes]) -> None:
    handle(run)
    (run / rd.TRAINER_LOG).write_text('{"step": 3, "loss": 2.5}\n{"step": 4, "lo')
    (seen,) = observe([run])
    assert (seen.state, seen.step, seen.loss) == ("running", 3, 2.5)


def test_a_run_whose_processes_are_gone_without_a_word_was_killed(run: Path) -> None:
    handle(run)
    assert state(run) == ("killed", "its processes are gone, and none could say why")


@pytest.mark.parametrize(
    ("written", "shown"),
    [("finished", "finished"), ("failed", "failed"), ("interrupted", "killed")],
)
def test_an_end_that_was_written_down_is_shown_wherever_it_ran(
    run: Path, written: rd.RunState, shown: str
) -> None:
    handle(run, host="elsewhere")
    rd.write_status(run, written, reason="so it was" if written != "finished" else None)
    assert state(run) == (shown, "so it was" if written != "finished" else None)


def test_processes_on_another_host_cannot_be_seen_nor_cancelled(run: Path) -> None:
    handle(run, host="elsewhere")
    assert state(run) == ("unknown", "its processes are on elsewhere: ask there")
    with pytest.raises(SetupError, match="run `zerofit cancel` on elsewhere"):
        cancel_run(run)


def test_a_run_started_by_hand_is_unknown(run: Path) -> None:
    assert state(run)[0] == "unknown"


def test_cancel_ends_the_processes_and_writes_it_down(
    run: Path, rank: subprocess.Popen[bytes]
) -> None:
    handle(run)
    seen = cancel_run(run)
    assert (seen.state, seen.reason) == ("killed", "stopped by zerofit cancel")
    assert rank.wait(timeout=300) == -signal.SIGTERM
    # Once more changes nothing.
    assert cancel_run(run) == seen


def test_cancel_asks_the_watcher_and_does_not_end_it(run: Path) -> None:
    """It may be a sweep with further runs to come."""
    wait = (
        "import pathlib, sys, time\nwhile not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.01)"
    )
    sweep = subprocess.Popen([sys.executable, "-c", wait, run / rd.CANCEL])
    handle(run, watcher_pid=sweep.pid)
    assert cancel_run(run).reason == "stopped by zerofit cancel"
    assert sweep.wait(timeout=300) == 0


def test_a_watched_run_ends_when_somebody_asks_for_it(run: Path) -> None:
    sleeping = subprocess.Popen(["sleep", "60"], start_new_session=True)
    (run / rd.CANCEL).touch()
    ranks = RankWatch(run_id="id", session_id=sleeping.pid)
    made = handle(run, session_id=sleeping.pid, master_port=20_000)
    with Interruptions() as nothing, pytest.raises(JobFailedError, match="by zerofit cancel") as e:
        watch(sleeping, made, ranks, interruptions=nothing, console=None)
    # A sweep goes on after it, which it does not after Ctrl-C.
    assert not isinstance(e.value, InterruptionError)
    assert sleeping.poll() is not None
    assert rd.read_status(run).state == "interrupted"


def test_cancel_survives_that_the_run_ends_by_itself_this_moment(
    run: Path, rank: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    handle(run)
    watcher = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    gone = psutil.Process(watcher.pid)
    watcher.kill()
    watcher.wait()
    monkeypatch.setattr(cancel, "watcher", lambda _handle: gone)
    assert cancel_run(run).state == "killed"
    assert rank.wait(timeout=300) == -signal.SIGTERM


def test_runs_and_sweeps_are_listed_and_a_broken_one_hides_no_other(run: Path) -> None:
    sweep = rd.create(run.parent / "sweep" / "00-a")
    (sweep / rd.RECIPE).write_text("")
    broken = rd.create(run.parent / "broken")
    (broken / rd.RECIPE).write_text("")
    (broken / rd.STATUS).write_text("{")
    listed = {seen.run_dir.name: seen.state for seen in observe_all(run.parent)}
    assert listed == {"one": "unknown", "00-a": "not started", "broken": "unknown"}
    with pytest.raises(RunDirError, match="no such folder"):
        find_runs(run.parent / "nothere")


def test_a_status_json_of_another_program_is_no_run(run: Path) -> None:
    (run.parent / "other").mkdir()
    (run.parent / "other" / rd.STATUS).write_text("{}")
    assert find_runs(run.parent) == [run]


@pytest.mark.parametrize(
    "changes", [{"job_id": None}, {"job_id": "--user=me"}, {"watcher_pid": "1"}, {"host": 5}]
)
def test_a_job_file_that_zerofit_has_not_written_is_refused(
    run: Path, changes: dict[str, object]
) -> None:
    handle(run, **changes)
    with pytest.raises(RunDirError, match="not a job file"):
        observe([run])


def test_a_line_of_the_log_that_is_no_object_is_passed_over(run: Path) -> None:
    (run / rd.TRAINER_LOG).write_text('{"step": 3, "loss": 2.5}\nnull\n')
    (seen,) = observe([run])
    assert (seen.step, seen.loss) == (3, 2.5)


def test_slurm_that_does_not_answer_makes_a_run_unknown_and_not_failed(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle(run, backend="slurm", job_id="7")
    monkeypatch.setenv("PATH", str(run))
    assert state(run)[0] == "unknown"
    assert rd.read_status(run).state == "running"


def test_a_job_that_slurm_has_forgotten_has_failed_unless_it_finished(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text("#!/bin/sh\necho 'error: Invalid job id specified' >&2; exit 1\n")
    squeue.chmod(0o755)
    sacct = tmp_path / "bin" / "sacct"
    sacct.write_text(
        "#!/bin/sh\necho 'sacct: error: Problem talking to the database' >&2; exit 1\n"
    )
    sacct.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:/usr/bin:/bin")
    handle(run, backend="slurm", job_id="7")
    assert state(run) == ("unknown", "sacct: Problem talking to the database")
    sacct.write_text("#!/bin/sh\necho 'Slurm accounting storage is disabled' >&2; exit 1\n")
    assert slurm.ask(["7"]) == {}
    shown, reason = state(run)
    assert shown == "failed"
    assert reason is not None
    assert "no longer knows job 7" in reason
    # And so it stays when nobody can be asked.
    assert rd.read_status(run).state == "failed"


def test_lines_are_told_apart_by_srun_s_labels_or_by_our_own_marks() -> None:
    labelled = [" 0: step 1\n", "10: hello\n", " 1: 0: nested\n", "job 7 on node1\n"]
    assert list(lines_of_rank(labelled, 1, is_labelled=True)) == ["0: nested\n"]
    assert list(lines_of_rank(labelled, 10, is_labelled=True)) == ["hello\n"]
    marked = ["step 1\n", "[rank 1] error: x\n"]
    assert list(lines_of_rank(marked, 0, is_labelled=False)) == ["step 1\n"]
    assert list(lines_of_rank(marked, 1, is_labelled=False)) == ["[rank 1] error: x\n"]
