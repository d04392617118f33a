"""Runs that are told to stop: by signals, at different moments, and by a file."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from worker_runs import (
    Nursery,
    environment,
    make_model,
    small_buckets,
    write_chats,
    write_run,
)

from launcher import run_dir as rd
from launcher.dispatch import process_group
from launcher.errors import JobFailedError, RunDirError
from launcher.run_checkpoints import UNFINISHED
from launcher.stop_file import STOP_FILE
from launcher.worker.checkpoints import find_newest

pytestmark = pytest.mark.integration

ZEROFIT = [sys.executable, "-m", "launcher.cli"]
WAIT_SECONDS = 300.0  # for machines that do much else


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a recipe that saves no checkpoint by itself and never ends soon."""
    folder = tmp_path_factory.mktemp("stop")
    make_model(folder / "model")
    write_chats(folder / "train.jsonl", 32)
    (folder / "recipe.yaml").write_text(
        f"model: {{name_or_path: {folder / 'model'}}}\nmax_seq_len: 64\n"
        "data: {path: train.jsonl}\ncluster: {gpus_per_node: 2}\nstrategy: {zero_stage: 2}\n"
        "optim: {max_steps: 5000, global_batch_size: 4}\n"
    )
    return folder


class Started:
    """A ``zerofit`` command that runs, and what it leaves."""

    def __init__(self, folder: Path, *args: str, run: str) -> None:
        self.run = folder / run
        self.process = subprocess.Popen(
            [*ZEROFIT, *args], cwd=folder, env=environment(),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def until(self, is_reached: Callable[[], bool]) -> None:
        """Wait until something has come true; the command must still run."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not is_reached():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def end(self) -> tuple[int, str]:
        """Return the exit status and what was printed; nothing of the run may be left."""
        printed, _ = self.process.communicate(timeout=WAIT_SECONDS)
        run_id = json.loads((self.run / rd.JOB).read_text())["run_id"]
        assert process_group.find_processes(run_id) == []
        assert not (self.run / STOP_FILE).exists()
        return self.process.returncode, printed

    def entries(self, key: str) -> list[int]:
        """Return the steps for which the log has a value."""
        path = self.run / rd.TRAINER_LOG
        # Without a last line that is being written.
        lines = path.read_text().rpartition("\n")[0].splitlines() if path.is_file() else []
        return [entry["step"] for line in lines if key in (entry := json.loads(line))]


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Started]]:
    """Return a function that starts a command in the folder; what still runs is ended."""
    begun: list[Started] = []

    def run(*args: str, run: str) -> Started:
        begun.append(Started(folder, *args, run=run))
        return begun[-1]

    yield run
    for started in begun:
        if started.process.poll() is None:
            started.process.send_signal(signal.SIGINT)
            started.process.communicate(timeout=30)


def newest_step(run: Path) -> int | None:
    newest, skipped = find_newest(run / rd.CHECKPOINTS)
    assert skipped == []
    assert not (run / rd.CHECKPOINTS / UNFINISHED).exists()
    return newest.step if newest else None


def test_sigterm_saves_the_step_that_was_reached_and_the_run_goes_on_from_there(
    folder: Path, start: Callable[..., Started]
) -> None:
    """First to the command alone, then to every process of the run at once."""
    first = start("train", "recipe.yaml", "--output-dir", "one", run="one")
    first.until(lambda: len(first.entries("loss")) >= 3)
    first.process.send_signal(signal.SIGTERM)
    status, printed = first.end()
    assert status == JobFailedError.exit_code, printed
    last_step = first.entries("loss")[-1]
    assert newest_step(first.run) == last_step
    state = rd.read_status(first.run)
    assert (state.state, state.reason) == ("interrupted", f"SIGTERM: saved after step {last_step}")
    assert {peaks.state for peaks in rd.read_ranks(first.run)} == {"interrupted"}
    assert "the ranks save a checkpoint after this step" in printed
    assert "zerofit resume" in printed
    assert "Traceback" not in printed

    second = start("train", "recipe.yaml", "--output-dir", "one", run="one")
    second.until(lambda: len(second.entries("loss")) >= last_step + 3)
    run_id = json.loads((second.run / rd.JOB).read_text())["run_id"]
    for process in [psutil.Process(second.process.pid), *process_group.find_processes(run_id)]:
        process.terminate()
    status, printed = second.end()
    assert status == JobFailedError.exit_code, printed
    steps = second.entries("loss")
    assert steps == list(range(1, steps[-1] + 1))
    assert newest_step(second.run) == steps[-1] > last_step


def ask_when(is_reached: Callable[[], bool], folder: Path) -> threading.Thread:
    """Make the stop file as soon as something has come true."""

    def ask() -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not is_reached() and time.monotonic() < deadline:
            time.sleep(0.001)
        (folder / STOP_FILE).touch()

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def phase_of(folder: Path) -> str | None:
    try:
        return rd.read_rank(rd.rank_file(folder, 0)).phase
    except RunDirError:
        return None


@pytest.fixture
def evaluated(nursery: Nursery, folder: Path, tmp_path: Path) -> Path:
    """Return a run directory whose run evaluates every second step, for long, and saves then."""
    write_chats(tmp_path / "eval.jsonl", 200)
    recipe = f"""
model: {{name_or_path: {folder / "model"}, precision: fp32}}
max_seq_len: 64
data: {{path: {folder / "train.jsonl"}, eval_path: {tmp_path / "eval.jsonl"}}}
optim: {{global_batch_size: 4, max_steps: 6, eval_steps: 2, save_steps: 3, save_total_limit: null}}
"""
    strategy = small_buckets(zero_stage=2, micro_batch_size_per_gpu=2)
    written = write_run(tmp_path / "run", recipe, strategy, world_size=2)
    nursery.tokenize(written)
    return written


def test_a_request_is_met_in_every_phase_and_each_time_the_run_goes_on(
    nursery: Nursery, evaluated: Path
) -> None:
    checkpoints = evaluated / rd.CHECKPOINTS
    log = evaluated / rd.TRAINER_LOG

    def steps(key: str) -> list[int]:
        lines = log.read_text().splitlines() if log.is_file() else []
        return [entry["step"] for line in lines if key in (entry := json.loads(line))]

    def attempt(is_reached: Callable[[], bool], *, says: str) -> None:
        asking = ask_when(is_reached, evaluated)
        outcome = nursery.train(evaluated)
        asking.join()
        assert outcome.returncode == 0, outcome.stderr
        found = rd.read_status(evaluated)
        assert (found.state, found.reason) == ("interrupted", f"a file named stop: {says}")
        assert not (evaluated / STOP_FILE).exists()

    # While the ranks are starting, and in the evaluation before the first step.
    attempt(lambda: True, says="before its first step")
    attempt(lambda: phase_of(evaluated) == "eval", says="before its first step")
    assert newest_step(evaluated) is None
    # In an evaluation, which follows the line in the log and is made again after the restart.
    attempt(lambda: steps("loss") == [1, 2], says="saved after step 2")
    assert (newest_step(evaluated), steps("eval_loss")) == (2, [0])
    # While a checkpoint is saved: that one is enough.
    saving = checkpoints / UNFINISHED / "checkpoint-3"
    attempt(saving.exists, says="saved after step 3")
    assert (newest_step(evaluated), steps("eval_loss")) == (3, [0, 2])
    # In the evaluation after the last step.
    attempt(lambda: steps("loss")[-1] == 6, says="saved after step 6")
    assert nursery.train(evaluated).returncode == 0
    assert rd.read_status(evaluated).state == "finished"
    assert (steps("loss"), steps("eval_loss")[:4]) == ([1, 2, 3, 4, 5, 6], [0, 2, 4, 6])
