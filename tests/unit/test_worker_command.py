from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from launcher.dispatch import worker_command
from launcher.dispatch.base import InterruptionError
from launcher.dispatch.worker_command import WorkerError, run_worker
from launcher.errors import JobFailedError, SetupError


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file of a module that ``run_worker("a_worker")`` runs; no torch is needed."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(worker_command, "_TRAIN_EXTRA", ())
    return tmp_path / "a_worker.py"


def test_the_last_line_is_the_result_and_arguments_arrive(module: Path) -> None:
    module.write_text("import json, sys\nprint('chatter')\nprint(json.dumps({'a': sys.argv[1:]}))")
    assert run_worker("a_worker", ["--x", "1"]) == {"a": ["--x", "1"]}


@pytest.mark.parametrize(("status", "exit_code"), [(2, 2), (3, 3), (4, 4), (1, 4), (77, 4)])
def test_its_exit_status_becomes_ours_and_its_message_is_not_repeated(
    module: Path, status: int, exit_code: int
) -> None:
    module.write_text(f"raise SystemExit({status})")
    with pytest.raises(WorkerError) as caught:
        run_worker("a_worker", [])
    assert caught.value.exit_code == exit_code
    assert caught.value.is_shown


def test_a_program_that_was_killed_said_nothing_so_we_do(module: Path) -> None:
    module.write_text("import os\nos.kill(os.getpid(), 9)")
    with pytest.raises(JobFailedError, match="killed by signal 9") as caught:
        run_worker("a_worker", [])
    assert not caught.value.is_shown


def test_a_missing_package_is_named_before_anything_is_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_command, "_TRAIN_EXTRA", ("no_such_package",))
    with pytest.raises(SetupError, match="no_such_package"):
        run_worker("a_worker", [])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_program_and_its_children(
    module: Path, tmp_path: Path, number: signal.Signals
) -> None:
    pid_file = tmp_path / "pids"
    module.write_text(
        "import os, pathlib, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"pathlib.Path({str(pid_file)!r}).write_text(f'{{os.getpid()}} {{child.pid}}')\n"
        "time.sleep(60)\n"
    )

    def interrupt() -> None:
        while not pid_file.exists() or not pid_file.read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    # A program that was started in the background ignores SIGINT, and so would this test.
    previous = signal.signal(number, signal.SIG_DFL)
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(InterruptionError) as caught:
            run_worker("a_worker", [])
    finally:
        signal.signal(number, previous)
    assert caught.value.exit_code == 128 + number
    for pid in pid_file.read_text().split():
        stat = Path(f"/proc/{pid}/stat")
        assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"
