"""Runs that are told to stop: by signals, at different moments, and by a file."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
from fault_rows import add_row, losses_of_steps
from worker_runs import Nursery, environment, make_model, write_chats

from launcher import run_dir as rd
from launcher.dispatch import process_group
from launcher.dispatch.base import JobInterruptedError, read_handle, run_to_end
from launcher.dispatch.warm import ForkServers
from launcher.errors import JobFailedError
from launcher.launch import create_run
from launcher.prepare import Prepared, prepare
from launcher.recipe import parse_recipe
from launcher.resume import prepare_resume, resume_run
from launcher.run_checkpoints import UNFINISHED, newest_checkpoint
from launcher.stop_file import STOP_FILE
from launcher.worker.checkpoints import find_newest
from launcher.worker.faults import MARKS

pytestmark = pytest.mark.integration

ZEROFIT = [sys.executable, "-m", "launcher.cli"]
WAIT_SECONDS = 900.0  # for machines that do much else


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
            started.process.communicate(timeout=WAIT_SECONDS)


def is_asked_or_over(run: Path) -> bool:
    return (run / STOP_FILE).exists() or rd.read_status(run).state != "running"


def newest_step(run: Path) -> int | None:
    newest, skipped = find_newest(run / rd.CHECKPOINTS)
    assert skipped == []
    assert not (run / rd.CHECKPOINTS / UNFINISHED).exists()
    return newest.step if newest else None


def test_sigterm_saves_the_step_that_was_reached_and_the_run_goes_on_from_there(
    folder: Path, start: Callable[..., Started]
) -> None:
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
    second.until(lambda: len(second.entries("loss")) > last_step)
    second.process.terminate()
    status, printed = second.end()
    assert status == JobFailedError.exit_code, printed
    steps = second.entries("loss")
    assert steps == list(range(1, steps[-1] + 1))
    assert newest_step(second.run) == steps[-1] > last_step


FAULTS = {
    "SIGTERM to zerofit in load": "wait:load:rank=1",
    "a file named stop in the evaluation before the first step": "wait:eval:step=0:rank=0",
    "SIGTERM to all processes in an evaluation": "wait:eval:step=2",
    "SIGTERM to zerofit, twice, in a save that hangs": "hang:save:step=3:rank=0",
    "SIGUSR1 to zerofit in a save": "wait:save:step=3:rank=0",
    "SIGUSR1 to one rank in the evaluation after the last step": "wait:eval:step=6:rank=1",
}
"""Rows of the fault table, each with what keeps a rank in the phase until it happens."""
NUM_STEPS = 6
TOLERANCE = 1e-5  # float32, losses near 5: the sums are the same ones


@pytest.fixture(scope="module")
def evaluated(folder: Path) -> Prepared:
    """Return the plan of a run that evaluates every second step and saves every third."""
    write_chats(folder / "eval.jsonl", 8)
    recipe = f"""
model: {{name_or_path: {folder / "model"}, precision: fp32}}
max_seq_len: 64
data: {{path: {folder / "train.jsonl"}, eval_path: {folder / "eval.jsonl"}}}
optim:
  {{global_batch_size: 4, max_steps: {NUM_STEPS}, eval_steps: 2, save_steps: 3,
    save_total_limit: null}}
strategy: {{zero_stage: 2, micro_batch_size_per_gpu: 2}}
cluster: {{gpus_per_node: 2}}
recovery: {{phase_seconds: {WAIT_SECONDS}}}
"""
    return prepare(parse_recipe(recipe, source="test"), source="test")


@pytest.fixture
def undisturbed(nursery: Nursery, evaluated: Prepared, tmp_path: Path) -> Mapping[int, float]:
    """Return the losses of that run when nobody disturbs it."""
    run, _, _ = create_run(evaluated, tmp_path / "undisturbed")
    nursery.tokenize(run)
    assert nursery.train(run).returncode == 0
    return losses_of_steps(run)


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ForkServers]:
    """Return what forks ranks that meet the faults; a signal that comes late harms nobody."""
    for variable, value in {**environment(), "ZEROFIT_FAULT": ",".join(FAULTS.values())}.items():
        monkeypatch.setenv(variable, value)
    before = {
        number: signal.signal(number, lambda _number, _frame: None)
        for number in (signal.SIGTERM, signal.SIGUSR1)
    }
    with ForkServers(tmp_path / "server.log") as started:
        yield started
    for number, handler in before.items():
        signal.signal(number, handler)


class Disturbed:
    """A run whose every attempt is told to stop, in this process, as ``zerofit`` would run it."""

    def __init__(self, run: Path, servers: ForkServers) -> None:
        self.run, self._servers = run, servers
        self.ends: list[tuple[str, float]] = []
        """Why each attempt ended, and how many seconds after it was told to."""

    def stops(self, tell: Callable[[], None], attempt: Callable[[], object]) -> str:
        """Run an attempt, and tell it to stop when a fault keeps it waiting; return the reason."""
        told_at: list[float] = []

        def when_it_waits() -> None:
            self.until(lambda: list((self.run / MARKS).glob(f"{len(self.ends)}-*")))
            told_at.append(time.monotonic())
            tell()

        telling = threading.Thread(target=when_it_waits)
        telling.start()
        with pytest.raises(JobInterruptedError) as caught:
            attempt()
        seconds = time.monotonic() - told_at[0]
        telling.join()
        assert caught.value.exit_code == JobFailedError.exit_code == 4
        assert not (self.run / STOP_FILE).exists()
        assert process_group.find_processes("", session_id=read_handle(self.run).session_id) == []
        status = rd.read_status(self.run)
        assert status.state == "interrupted"
        self.ends.append((status.reason or "", seconds))
        return self.ends[-1][0]

    def go_on(self) -> None:
        """Go on with the run."""
        resume_run(
            self.run, prepare_resume(self.run, []),
            say=lambda _line: None, console=io.BytesIO(), servers=self._servers,
        )  # fmt: skip

    def until(self, is_so: Callable[[], object]) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not is_so():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def until_asked(self) -> None:
        """Wait until the ranks were asked to save, or have done so."""
        self.until(partial(is_asked_or_over, self.run))

    def tell_twice(self) -> None:
        signal_this_command(signal.SIGTERM)
        self.until_asked()
        signal_this_command(signal.SIGTERM)

    def tell_all_processes(self) -> None:
        """As a service manager does, which the ranks are then to leave alone."""
        signal_this_command(signal.SIGTERM)
        self.until_asked()
        session = read_handle(self.run).session_id
        for process in process_group.find_processes("", session_id=session):
            with suppress(psutil.NoSuchProcess):
                process.terminate()

    def tell_rank_1(self) -> None:
        """As Slurm does where a site lets it signal every process of a job."""
        path = rd.rank_file(self.run, 1)
        self.until(path.exists)
        os.kill(rd.read_rank(path).pid, signal.SIGUSR1)


def signal_this_command(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.faults
def test_a_signal_in_any_phase_leads_to_a_checkpoint_and_to_the_losses_of_a_run_without(
    nursery: Nursery,
    evaluated: Prepared,
    undisturbed: Mapping[int, float],
    servers: ForkServers,
    tmp_path: Path,
) -> None:
    run, backend, request = create_run(evaluated, tmp_path / "run")
    nursery.tokenize(run)
    disturbed = Disturbed(run, servers)
    stops, go_on = disturbed.stops, disturbed.go_on

    # In load, and in the evaluation before the first step: nothing is to be saved yet.
    forked = servers.warmed(backend, evaluated.plan)
    first = partial(run_to_end, forked, request, run_dir=run, console=io.BytesIO())
    assert stops(partial(signal_this_command, signal.SIGTERM), first) == "stopped by SIGTERM"
    reason = stops((run / STOP_FILE).touch, go_on)
    assert (reason, newest_step(run)) == ("a file named stop: before its first step", None)
    # In an evaluation, which is made again later.
    assert stops(disturbed.tell_all_processes, go_on) == "SIGTERM: saved after step 2"
    assert newest_step(run) == 2
    # In a save that hangs, twice: the last whole checkpoint is left.
    assert stops(disturbed.tell_twice, go_on) == "stopped by SIGTERM"
    assert newest_checkpoint(run) == run / rd.CHECKPOINTS / "checkpoint-2"
    # In a save: that one is enough.
    reason = stops(partial(signal_this_command, signal.SIGUSR1), go_on)
    assert (reason, newest_step(run)) == ("SIGUSR1: saved after step 3", 3)
    # In the evaluation after the last step.
    assert stops(disturbed.tell_rank_1, go_on) == "SIGUSR1: saved after step 6"
    assert newest_step(run) == 6
    go_on()
    assert rd.read_status(run).state == "finished"
    assert losses_of_steps(run) == pytest.approx(undisturbed, abs=TOLERANCE)
    log = [json.loads(line) for line in (run / rd.TRAINER_LOG).read_text().splitlines()]
    assert {entry["step"] for entry in log if "eval_loss" in entry} == {0, 2, 4, 6}
    for fault, (reason, seconds) in zip(FAULTS, disturbed.ends, strict=True):
        add_row(
            fault=fault, backend="local", zero_stage=2, noticed_seconds=seconds,
            steps_lost=int("hangs" in fault), result=f"{reason}; same losses as without",
        )  # fmt: skip
