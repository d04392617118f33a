"""Real runs on this machine through faults: they end as if nothing had happened.

Each test keeps rows of the fault table in docs/reliability.md (``make test-faults``).
"""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from fault_rows import add_row, failed_attempts, losses_of_steps, rows_of_steps, steps_lost
from worker_runs import Nursery, end_tree, environment, make_model, write_chats

from launcher import run_dir as rd
from launcher.dispatch import process_group
from launcher.dispatch.warm import ForkServers
from launcher.errors import JobFailedError
from launcher.failure_kind import FailureKind
from launcher.prepare import prepare, read_recipe
from launcher.recovery.supervise import train_to_end
from launcher.run_checkpoints import newest_checkpoint
from launcher.strategy import ZeroStage

pytestmark = [pytest.mark.integration, pytest.mark.faults]

ZEROFIT = [sys.executable, "-m", "launcher.cli"]
NUM_EXAMPLES = 32
RECORDED = {"ZEROFIT_RECORD_BATCHES": "1"}
NUM_STEPS = 8
STEPS_PER_EPOCH = 4
WAIT_SECONDS = 1000.0  # for machines that do much else
# Sums over ranks and micro-batches in another order: float32, losses near 5, eight steps of Adam.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and a recipe of two epochs that saves every second step."""
    root = tmp_path_factory.mktemp("faults")
    make_model(root / "model")
    write_chats(root / "train.jsonl", NUM_EXAMPLES)
    (root / "recipe.yaml").write_text(
        f"model: {{name_or_path: {root / 'model'}, precision: fp32}}\n"
        "method: full\nmax_seq_len: 64\ndata: {path: train.jsonl}\n"
        "optim: {global_batch_size: 8, num_train_epochs: 2, warmup_ratio: 0.0, save_steps: 2}\n"
        "strategy: {micro_batch_size_per_gpu: 2}\ncluster: {gpus_per_node: 2}\n"
        "recovery: {watchdog_seconds: 5}\n"
    )
    return root


class Run:
    """A run that ``zerofit`` sees to its end, with faults."""

    def __init__(self, place: Path, name: str, *changes: str, faults: str = "") -> None:
        self.folder = place / name
        self.log = place / f"{name}.log"
        self._variables = {**RECORDED, "ZEROFIT_FAULT": faults}
        self._command("train", "recipe.yaml", *changes, "--output-dir", name)

    def resume(self) -> None:
        """Go on with the run."""
        self._command("resume", self.folder.name)

    def _command(self, *arguments: str) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*ZEROFIT, *arguments],
                cwd=self.log.parent,
                env=environment() | self._variables,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def until_step(self, step: int) -> None:
        """Wait until a step has been logged."""
        deadline = time.monotonic() + WAIT_SECONDS
        path = self.folder / rd.TRAINER_LOG
        while not (path.exists() and f'"step": {step},' in path.read_text()):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def end(self) -> int:
        """Return the exit status; nothing of the run may be left."""
        status = self.process.wait(timeout=WAIT_SECONDS)
        run_id = json.loads((self.folder / rd.JOB).read_text())["run_id"]
        assert process_group.find_processes(run_id) == []
        return status


@pytest.fixture
def start(place: Path) -> Iterator[Callable[..., Run]]:
    """Return a function that starts a run; what still runs is ended."""
    started: list[Run] = []

    def run(name: str, *changes: str, faults: str = "") -> Run:
        started.append(Run(place, name, *changes, faults=faults))
        return started[-1]

    yield run
    for item in started:
        end_tree(item.process)


def assert_as_if_nothing_had_happened(nursery: Nursery, run: Path) -> None:
    """Compare with the same run without faults: losses, and which examples each step took."""
    first = run / "attempts" / "1"
    undisturbed = run.with_name(f"{run.name}-undisturbed")
    undisturbed.mkdir()
    for name in (rd.RECIPE, rd.PLAN, rd.DS_CONFIG):
        (undisturbed / name).write_bytes((first / name).read_bytes())
    (undisturbed / "data").symlink_to((run / "data").resolve())
    assert nursery.train(undisturbed).returncode == 0
    losses, expected = losses_of_steps(run), losses_of_steps(undisturbed)
    assert sorted(losses) == list(range(1, NUM_STEPS + 1))
    assert losses == pytest.approx(expected, abs=TOLERANCE)
    assert rd.read_status(run).state == "finished"


def assert_each_example_was_seen_once_an_epoch(run: Path) -> None:
    taken = rows_of_steps(run)
    assert sorted(taken) == list(range(1, NUM_STEPS + 1))
    for epoch in range(NUM_STEPS // STEPS_PER_EPOCH):
        first = epoch * STEPS_PER_EPOCH + 1
        rows = [row for step in range(first, first + STEPS_PER_EPOCH) for row in taken[step]]
        assert sorted(rows) == list(range(NUM_EXAMPLES))


FAULTS = {
    FailureKind.killed: "kill:forward:step=4:rank=1",
    FailureKind.hang: "hang:backward:step=6:rank=0",
    FailureKind.gpu_oom: "oom:backward:step=8:rank=1",
}


def train_with_faults(
    place: Path,
    name: str,
    changes: Sequence[str],
    faults: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Path, list[str]]:
    """See a run to its end in this process; return its folder and what was said.

    With forked ranks: each attempt starts in a second and not in ten.
    """
    recipe, _ = read_recipe([str(place / "recipe.yaml"), *changes], {})
    monkeypatch.chdir(place)
    variables = {**environment(), **RECORDED, "ZEROFIT_FAULT": ",".join(faults)}
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    said: list[str] = []
    with ForkServers(place / f"{name}-server.log") as servers:
        run = train_to_end(
            prepare(recipe, source="test"), place / name,
            say=said.append, console=io.BytesIO(), servers=servers,
        )  # fmt: skip
    return run, said


@pytest.mark.parametrize(
    "stage",
    [2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 3))],
)
def test_a_run_with_three_faults_ends_with_the_losses_of_one_without(
    nursery: Nursery, place: Path, monkeypatch: pytest.MonkeyPatch, stage: ZeroStage
) -> None:
    run, said = train_with_faults(
        place, f"zero{stage}", [f"strategy.zero_stage={stage}"], [*FAULTS.values()], monkeypatch
    )
    found = list(failed_attempts(run))
    assert [attempt.kind for attempt, _ in found] == list(FAULTS)
    # Step 4, 6 and 8 were under way, and every second one had been saved.
    assert [steps_lost(attempt) for attempt, _ in found] == [1, 1, 1]
    assert "rank 0 on" in found[1][0].problem
    assert "in _hang" in found[1][0].problem
    assert "in _hang" in (run / "attempts/2/logs/stack-00000.txt").read_text()
    assert sum("failed" in line for line in said) == 3
    assert_each_example_was_seen_once_an_epoch(run)
    assert_as_if_nothing_had_happened(nursery, run)


# So small that partitioned weights are less than the buffers that ZeRO-3 takes for them.
SMALL_BUCKETS = ",".join(
    f"{name}: {number}"
    for name, number in {
        "reduce_bucket_size": 20_000,
        "stage3_prefetch_bucket_size": 20_000,
        "stage3_max_live_parameters": 20_000,
        "stage3_param_persistence_threshold": 100,
    }.items()
)


@pytest.mark.slow
def test_lack_of_memory_in_the_step_ends_at_a_higher_stage_with_the_same_losses(
    nursery: Nursery, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = (
        "strategy.zero_stage=1",
        "strategy.micro_batch_size_per_gpu=1",
        "strategy.gradient_checkpointing=full",
        "strategy.loss=chunked",
        f"deepspeed={{zero_optimization: {{{SMALL_BUCKETS}}}}}",
    )
    run, said = train_with_faults(
        place, "higher-stage", changes, ["oom:step:step=4:rank=1"], monkeypatch
    )
    ((attempt, noticed_seconds),) = failed_attempts(run)
    assert attempt.kind is FailureKind.gpu_oom
    assert attempt.changes["zero_stage"] == (1, 3)
    assert attempt.resumes_from_step == 2
    assert any("zero_stage 1 → 3" in line for line in said)
    assert_each_example_was_seen_once_an_epoch(run)
    assert_as_if_nothing_had_happened(nursery, run)
    add_row(
        fault="a rank's GPU memory runs out in the step (injected)", backend="local",
        zero_stage=1, noticed_seconds=noticed_seconds, steps_lost=steps_lost(attempt),
        result="resumed at ZeRO-3 from a converted checkpoint; same losses as without",
    )  # fmt: skip


def last_step(run: Path) -> int:
    return max(losses_of_steps(run))


def newest_checkpoint_step(run: Path) -> int:
    newest = newest_checkpoint(run)
    return int(newest.name.rpartition("-")[2]) if newest else 0


@pytest.mark.slow
def test_a_run_outlives_a_second_starter_a_frozen_rank_and_signals(
    start: Callable[..., Run], place: Path
) -> None:
    endless = ("optim.max_steps=100000", "optim.save_steps=25", "strategy.zero_stage=2")
    run = start("signals", *endless)

    run.until_step(3)
    began = time.time()
    second = subprocess.run(
        [*ZEROFIT, "resume", "signals"], cwd=place, env=environment(), capture_output=True,
        text=True, check=False, timeout=WAIT_SECONDS,
    )  # fmt: skip
    assert second.returncode == 2
    assert "this run is in progress" in second.stderr
    add_row(
        fault="a second starter", backend="local", zero_stage=2, steps_lost=0,
        noticed_seconds=time.time() - began, result="refused, and told who runs it",
    )  # fmt: skip

    step = last_step(run.folder) + 30
    run.until_step(step)
    frozen = psutil.Process(rd.read_rank(rd.rank_file(run.folder, 1)).pid)
    frozen.suspend()
    struck_at = time.time()
    run.until_step(step + 100)
    ((attempt, seconds),) = failed_attempts(run.folder, [struck_at])
    assert attempt.kind is FailureKind.hang
    failure = run.log.read_text()
    assert "it may wait for rank 1 on" in failure
    add_row(
        fault="a rank is frozen (SIGSTOP; watchdog at 5 s)", backend="local", zero_stage=2,
        noticed_seconds=seconds, steps_lost=steps_lost(attempt), result="named, and resumed",
    )  # fmt: skip

    for number in (signal.SIGTERM, signal.SIGUSR1):
        run.process.send_signal(number)
        struck_at = time.time()
        assert run.end() == JobFailedError.exit_code, run.log.read_text()
        steps = last_step(run.folder)
        assert newest_checkpoint_step(run.folder) == steps
        add_row(
            fault=f"{number.name} to zerofit", backend="local", zero_stage=2, steps_lost=0,
            noticed_seconds=time.time() - struck_at, result="saved and ended; resumed when asked",
        )  # fmt: skip
        if number is signal.SIGTERM:
            run.resume()
            run.until_step(steps + 3)
    assert sorted(losses_of_steps(run.folder)) == list(range(1, steps + 1))
