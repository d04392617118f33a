"""One run on this machine through fault after fault (``make test-faults``)."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from fault_chain import WAIT_SECONDS, Place, Process, go_through, saved_step
from worker_runs import environment

from launcher import run_dir as rd
from launcher.errors import JobFailedError
from launcher.strategy import ZeroStage

pytestmark = [pytest.mark.integration, pytest.mark.faults, pytest.mark.slow]


class LocalProcess:
    """``zerofit`` in a folder."""

    def __init__(self, folder: Path, *arguments: str, **variables: str) -> None:
        self._log = folder / f"{arguments[0]}-{time.monotonic_ns()}.log"
        with self._log.open("wb") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "launcher.cli", *arguments],
                cwd=folder, env=environment() | variables, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def wait(self, *, timeout: float) -> int:
        return self.popen.wait(timeout)

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """Return a place where commands of zerofit run; what still runs is ended."""
    started: list[LocalProcess] = []

    def start(*arguments: str, **variables: str) -> LocalProcess:
        started.append(LocalProcess(tmp_path, *arguments, **variables))
        return started[-1]

    yield Place(folder=tmp_path, backend="local", cluster="{gpus_per_node: 2}", start=start)
    for item in started:
        if item.popen.poll() is None:
            for process in psutil.Process(item.popen.pid).children(recursive=True):
                process.kill()
            item.popen.kill()
            item.popen.wait()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_local_run_goes_through_all_faults(place: Place, stage: ZeroStage) -> None:
    def stop_and_go_on(process: Process) -> tuple[Process, float]:
        began = time.time()
        process.signal(signal.SIGTERM)
        assert process.wait(timeout=WAIT_SECONDS) == JobFailedError.exit_code, process.output
        seconds = time.time() - began
        assert saved_step(place.run) == 5
        assert rd.read_status(place.run).reason == "SIGTERM: saved after step 5"
        return place.zerofit("resume", "run"), seconds

    go_through(
        place, stage, stop_and_go_on=stop_and_go_on,
        stop_row="SIGTERM to zerofit in a save that takes 12 s",
        stopped="the save under way is the last; resumed when asked",
    )  # fmt: skip
