"""One run on this machine through fault after fault (``make test-faults``)."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_chain import Place, go_through_with_sigterm
from worker_runs import end_tree, environment

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
        end_tree(item.popen)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_local_run_goes_through_all_faults(place: Place, stage: ZeroStage) -> None:
    go_through_with_sigterm(place, stage)
