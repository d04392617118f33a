"""The lock of a run directory, with real processes that want it at the same time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.dispatch.run_lock import STALE_SECONDS, RunLockedError, find_holder, hold
from launcher.errors import RunDirError
from launcher.starter_lock import LOCK

pytestmark = pytest.mark.integration

# Waits for a line, so that all of them begin at once; says whether it got the lock.
STARTER = """
import sys
from pathlib import Path
from launcher.dispatch.run_lock import RunLockedError, hold

print("ready", flush=True)
sys.stdin.readline()
try:
    with hold(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.readline()
except RunLockedError as error:
    print(error.problem, flush=True)
"""


class Starter:
    """A process that wants the lock."""

    def __init__(self, run_dir: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", STARTER, str(run_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.line() == "ready"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def change_lock(run_dir: Path, **changes: object) -> None:
    content = json.loads((run_dir / LOCK).read_text())
    (run_dir / LOCK).write_text(json.dumps({**content, **changes}))


def test_of_many_starters_at_once_one_holds_the_run_and_the_others_name_it(tmp_path: Path) -> None:
    starters = [Starter(tmp_path) for _ in range(8)]
    try:
        for starter in starters:
            starter.go_on()
        said = {starter.process.pid: starter.line() for starter in starters}
        (winner,) = [pid for pid, line in said.items() if line == "held"]
        others = {line for line in said.values() if line != "held"}
        assert len(others) == 1
        assert f"held by process {winner} on {os.uname().nodename}, since 2" in others.pop()
        # Ended by force, it leaves a lock that the next starter sees through.
        next(item for item in starters if item.process.pid == winner).end()
        with hold(tmp_path):
            holder = find_holder(tmp_path)
            assert holder is not None
            assert holder.pid == os.getpid()
        assert find_holder(tmp_path) is None
        assert os.listdir(tmp_path) == []  # noqa: PTH208  also hidden ones
    finally:
        for starter in starters:
            starter.end()


def test_of_many_who_find_a_stale_lock_one_takes_it(tmp_path: Path) -> None:
    dead = Starter(tmp_path)
    dead.go_on()
    assert dead.line() == "held"
    dead.end()
    starters = [Starter(tmp_path) for _ in range(8)]
    try:
        for starter in starters:
            starter.go_on()
        said = [starter.line() for starter in starters]
        assert said.count("held") == 1
    finally:
        for starter in starters:
            starter.end()


def test_a_pid_that_another_process_has_now_holds_nothing(tmp_path: Path) -> None:
    with hold(tmp_path):
        change_lock(tmp_path, started_ticks=1)
        assert find_holder(tmp_path) is None
        change_lock(tmp_path, pid=os.getppid())
        assert find_holder(tmp_path) is None


def test_a_process_that_is_stopped_still_holds_the_run_on_its_host(tmp_path: Path) -> None:
    starter = Starter(tmp_path)
    try:
        starter.go_on()
        assert starter.line() == "held"
        starter.process.send_signal(signal.SIGSTOP)
        os.utime(tmp_path / LOCK, (0, 0))
        with pytest.raises(RunLockedError, match=f"process {starter.process.pid}"):
            hold(tmp_path).__enter__()
    finally:
        starter.end()


def test_on_another_host_the_age_of_its_last_sign_of_life_decides(tmp_path: Path) -> None:
    with hold(tmp_path):
        change_lock(tmp_path, host="elsewhere", place="another machine")
        now = time.time()
        os.utime(tmp_path / LOCK, (now, now - STALE_SECONDS / 2))
        with pytest.raises(RunLockedError, match=r"process \d+ on elsewhere"):
            hold(tmp_path).__enter__()
        os.utime(tmp_path / LOCK, (now, now - STALE_SECONDS - 5))
        with hold(tmp_path):
            assert "elsewhere" not in (tmp_path / LOCK).read_text()


def test_a_lock_that_is_just_being_written_is_somebody_s(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    with pytest.raises(RunLockedError, match="somebody who is just starting it"):
        hold(tmp_path).__enter__()


def test_a_folder_that_is_not_there_is_an_error_and_no_traceback(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="cannot write here"):
        hold(tmp_path / "missing").__enter__()
