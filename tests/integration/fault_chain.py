"""One run through fault after fault, on any backend and at any ZeRO stage.

Each fault strikes at its own step, so that one run and a few restarts make all rows of the fault
table that need no harm to hosts.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

import pytest
from fault_rows import add_row, losses_of_steps, skip_if_kept, steps_lost
from worker_runs import make_model_with_nan

from launcher import run_dir as rd
from launcher.errors import JobFailedError
from launcher.failure_kind import FailureKind
from launcher.post_mortem import post_mortem_file
from launcher.recovery.record import FailedAttempt, read_failed_attempts
from launcher.resume import ATTEMPTS
from launcher.run_checkpoints import newest_checkpoint
from launcher.strategy import ZeroStage

NUM_STEPS = 8
GLOBAL_BATCH_SIZE = 8
NUM_EXAMPLES = NUM_STEPS * GLOBAL_BATCH_SIZE
SEED = 42
WAIT_SECONDS = 1800.0  # for machines that do much else
GONE_WITHIN_SECONDS = 30.0
"""From a rank's post-mortem to the record of it, which is written when all others are gone. 10 s
are promised (tests/unit/test_stopping.py adds up the waits); here a machine may do much else."""
FAULTS = (
    "kill:forward:step=2:rank=1",
    "hang:backward:step=3:rank=0",
    "oom:backward:step=4:rank=1",
    "slow:save:step=5",
    "host_oom:forward:step=6:rank=1",
    "disk_full:save:step=7:rank=0",
)
SLOW = 3
"""Number of the fault that makes a save slow."""
KILLED = "a rank is killed (SIGKILL)"
HUNG = "a rank hangs (watchdog at 5 s)"
GPU_OOM = "a rank's GPU memory runs out (injected)"
SLOW_SAVE = "a save takes 12 s longer (watchdog at 5 s)"
HOST_OOM = "a rank's host memory runs out (injected)"
DISK_FULL = "the disk is full in a save (injected)"
NAN = "a batch's loss is NaN"
ROWS = (KILLED, HUNG, GPU_OOM, SLOW_SAVE, HOST_OOM, DISK_FULL, NAN)
RECIPE = """\
model: {{name_or_path: {folder}/model, precision: fp32}}
method: lora
max_seq_len: 64
data: {{path: {folder}/train.jsonl}}
optim: {{global_batch_size: {batch}, max_steps: {steps}, save_steps: 1, seed: {seed}}}
strategy:
  {{zero_stage: {stage}, micro_batch_size_per_gpu: 4, gradient_checkpointing: none, loss: full}}
cluster: {cluster}
recovery: {{watchdog_seconds: 5}}
"""


class Process(Protocol):
    """A command of zerofit that runs."""

    def signal(self, number: signal.Signals) -> None:
        """Signal the command itself."""

    def wait(self, *, timeout: float) -> int:
        """Return its exit status."""

    @property
    def output(self) -> str:
        """What it has printed so far."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a chain runs."""

    folder: Path
    backend: str
    cluster: str
    """The section of the recipe."""
    start: Callable[..., Process]
    """Starts zerofit with these arguments, in the folder, with these variables."""

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.folder / "run"

    def zerofit(self, *arguments: str) -> Process:
        """Start zerofit, with all faults."""
        return self.start(*arguments, ZEROFIT_FAULT=",".join(FAULTS))


def write_recipe(place: Place, stage: ZeroStage) -> None:
    """Write a tiny model, and data whose last step of the epoch has a loss that is NaN."""
    from launcher.worker.batches import LongestFirst

    make_model_with_nan(place.folder / "model", "Z")
    # Of one length, so that the seed alone decides which row comes last.
    order = list(LongestFirst([1] * NUM_EXAMPLES, group_size=GLOBAL_BATCH_SIZE, seed=SEED))
    texts = [f"number {index:03d}" for index in range(NUM_EXAMPLES)]
    texts[order[-1]] = texts[order[-1]].replace("n", "Z")
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (place.folder / "train.jsonl").write_text("".join(lines))
    text = RECIPE.format(
        folder=place.folder, batch=GLOBAL_BATCH_SIZE, steps=NUM_STEPS, seed=SEED, stage=stage,
        cluster=place.cluster,
    )  # fmt: skip
    (place.folder / "recipe.yaml").write_text(text)


def marks_of(run: Path, number: int) -> list[Path]:
    """Return the marks that ranks leave when a fault strikes."""
    return list((run / ".faults").glob(f"{number}-*"))


def until(is_so: Callable[[], object], process: Process) -> None:
    """Wait until something has come true."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not is_so():
        assert time.monotonic() < deadline, process.output
        with suppress(subprocess.TimeoutExpired):
            pytest.fail(f"ended with {process.wait(timeout=0.05)}: {process.output}")


def saved_step(run: Path) -> int:
    """Return the step of the newest complete checkpoint."""
    newest = newest_checkpoint(run)
    return int(newest.name.rpartition("-")[2]) if newest else 0


def go_through(
    place: Place,
    stage: ZeroStage,
    *,
    stop_and_go_on: Callable[[Process], tuple[Process, float]],
    stop_row: str,
    stopped: str,
) -> None:
    """Run the chain, check what followed from each fault, and keep its rows.

    Args:
        place: where.
        stage: of ZeRO.
        stop_and_go_on: tells the run to save and end, which is in the middle of a slow save;
            returns what goes on with it, and the seconds until everything had ended.
        stop_row: what that is called in the table.
        stopped: its result there.
    """
    skip_if_kept(place.backend, stage, *ROWS, stop_row)
    write_recipe(place, stage)
    run = place.run

    def keep(fault: str, noticed_seconds: float | None, result: str, lost: int = 0) -> None:
        add_row(
            fault=fault, backend=place.backend, zero_stage=stage,
            noticed_seconds=noticed_seconds, steps_lost=lost, result=result,
        )  # fmt: skip

    process = place.zerofit("train", "recipe.yaml", "--output-dir", "run")
    until(lambda: marks_of(run, SLOW), process)
    first = read_failed_attempts(run)
    assert [attempt.kind for attempt in first] == ["killed", "hang", "gpu_oom"], process.output
    assert [steps_lost(attempt) for attempt in first] == [0, 0, 0]
    for number, (attempt, name) in enumerate(zip(first, (KILLED, HUNG, GPU_OOM), strict=True)):
        result = "resumed with another plan" if attempt.changes else "resumed"
        keep(name, seconds_to_record(run, attempt, number), result)
    assert first[2].changes["micro_batch_size_per_gpu"] == (4, 2)
    _check_that_others_were_gone(first[2], run / ATTEMPTS / "3")

    process, seconds = stop_and_go_on(process)
    keep(stop_row, seconds, stopped)

    assert process.wait(timeout=WAIT_SECONDS) == JobFailedError.exit_code, process.output
    ended = _last_attempt(run, FailureKind.host_oom, process)
    _check_that_others_were_gone(ended, run)
    kinds = [attempt.kind for attempt in read_failed_attempts(run)]
    assert kinds.count(FailureKind.hang) == 1
    keep(SLOW_SAVE, None, "the checkpoint is whole; training goes on")
    keep(HOST_OOM, seconds_to_record(run, ended, 4), "ended: says that no plan needs less")
    assert "no plan is left for this host" in process.output

    process = place.zerofit("resume", "run")
    assert process.wait(timeout=WAIT_SECONDS) == JobFailedError.exit_code, process.output
    ended = _last_attempt(run, FailureKind.storage, process)
    assert f"nothing is lost up to {run}/checkpoints/checkpoint-6" in process.output
    assert saved_step(run) == 6
    keep(DISK_FULL, seconds_to_record(run, ended, 5), "ended: names the last whole checkpoint", 1)

    process = place.zerofit("resume", "run")
    assert process.wait(timeout=WAIT_SECONDS) == JobFailedError.exit_code, process.output
    ended = _last_attempt(run, FailureKind.nan, process)
    struck_at = min(path.stat().st_mtime for path in (run / "bad_batches").iterdir())
    assert sorted(losses_of_steps(run)) == list(range(1, NUM_STEPS))
    keep(NAN, _seconds_after(ended, struck_at), "ended: the batch is recorded, nothing saved")


def go_through_with_sigterm(place: Place, stage: ZeroStage) -> None:
    """Run the chain, of which SIGTERM to zerofit stops the slow save."""

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


def seconds_to_record(run: Path, attempt: FailedAttempt, number: int) -> float:
    """Return the seconds from a fault to the moment when what follows was recorded."""
    return _seconds_after(attempt, min(path.stat().st_mtime for path in marks_of(run, number)))


def _seconds_after(attempt: FailedAttempt, struck_at: float) -> float:
    return datetime.fromisoformat(attempt.failed_at).timestamp() - struck_at


def _check_that_others_were_gone(attempt: FailedAttempt, folder: Path) -> None:
    assert attempt.rank is not None
    said_at = post_mortem_file(folder, attempt.rank).stat().st_mtime
    assert _seconds_after(attempt, said_at) < GONE_WITHIN_SECONDS


def _last_attempt(run: Path, kind: FailureKind, process: Process) -> FailedAttempt:
    attempt = read_failed_attempts(run)[-1]
    assert (attempt.kind, attempt.action) == (kind, "stop"), process.output
    return attempt
