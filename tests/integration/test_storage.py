"""Disks that fail while a checkpoint is saved: full, read-only, gone."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from worker_runs import Nursery, Outcome, small_buckets, write_run

from launcher import run_dir as rd
from launcher.failure_kind import EXIT_STATUS, FailureKind
from launcher.run_checkpoints import UNFINISHED
from launcher.worker.checkpoints import find_newest

pytestmark = pytest.mark.integration

# 112,448 trained parameters: states of 12 bytes each on two ranks, weights of 4 bytes.
CHECKPOINT_BYTES = 112_448 * 16
STORAGE = EXIT_STATUS[FailureKind.storage]
WAIT_SECONDS = 900.0


def mount(*argv: str | Path) -> None:
    subprocess.run(["mount", *argv], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk that two checkpoints and a half fit on; it is seen in a second place, too."""
    run, behind = tmp_path / "run" / rd.CHECKPOINTS, tmp_path / "behind"
    for folder in (run, behind):
        folder.mkdir(parents=True)
    try:
        mount("-t", "tmpfs", "-o", f"size={int(2.5 * CHECKPOINT_BYTES)}", "tmpfs", behind)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    mount("--bind", behind, run)
    yield behind
    for folder in (run, behind):
        subprocess.run(["umount", "-l", folder], check=False, capture_output=True)


def once(is_reached: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    """Do something as soon as something has come true."""

    def wait() -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not is_reached() and time.monotonic() < deadline:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def make_read_only(disk: Path) -> None:
    """Retry while a file is open for writing."""
    while subprocess.run(["mount", "-o", "remount,ro", disk], check=False).returncode:
        time.sleep(0.01)


def test_a_disk_that_fails_in_mid_save_costs_no_complete_checkpoint_and_the_run_goes_on(
    nursery: Nursery, workplace: Path, disk: Path
) -> None:
    """Full, then read-only, then unmounted; each time the run goes on from what it had saved."""
    recipe = f"""
model: {{name_or_path: {workplace / "model"}, precision: fp32}}
method: full
max_seq_len: 64
data: {{path: {workplace / "train.jsonl"}}}
optim: {{global_batch_size: 4, max_steps: 100, save_steps: 1, save_total_limit: null}}
"""
    strategy = small_buckets(zero_stage=1, micro_batch_size_per_gpu=2)
    run = disk.parent / "run"
    made = write_run(disk.parent / "made", recipe, strategy, world_size=2)
    for path in made.iterdir():
        path.rename(run / path.name)
    nursery.tokenize(run)

    def failed(outcome: Outcome, *, reason: str) -> int:
        """Check how the run ended, and return the step that it can go on from."""
        newest, skipped = find_newest(disk)
        assert newest is not None
        assert skipped == []
        # The others may only see that one has gone.
        noticed = [rank for rank, status in enumerate(outcome.statuses) if status == STORAGE]
        assert noticed, outcome.stderr
        assert reason in outcome.stderr
        last = run / rd.CHECKPOINTS / f"checkpoint-{newest.step}"
        assert f"nothing is lost up to {last}" in outcome.stderr
        assert not any(f"[rank {rank}] Traceback" in outcome.stderr for rank in noticed)
        assert rd.read_status(run).state == "failed"
        return newest.step

    outcome = nursery.train(run)
    assert failed(outcome, reason="the disk is full") in (1, 2)
    # A rank that waits for the other one may have made a folder again.
    assert outcome.statuses != (STORAGE, STORAGE) or not (disk / UNFINISHED).exists()
    mount("-o", "remount,size=256m", disk)

    act = once((disk / "checkpoint-4").exists, lambda: make_read_only(disk))
    locked_at = failed(nursery.train(run), reason="the file system is read-only")
    act.join()
    assert locked_at >= 4
    mount("-o", "remount,rw", disk)

    def unmount() -> None:
        subprocess.run(["umount", "-l", run / rd.CHECKPOINTS], check=True)

    act = once((disk / f"checkpoint-{locked_at + 1}").exists, unmount)
    gone_at = failed(nursery.train(run), reason="the folder has vanished")
    act.join()
    assert gone_at > locked_at
    assert list((run / rd.CHECKPOINTS).iterdir()) == []
    mount("--bind", disk, run / rd.CHECKPOINTS)

    last = gone_at + 2
    (run / rd.RECIPE).write_text(recipe.replace("max_steps: 100", f"max_steps: {last}"))
    outcome = nursery.train(run)
    assert outcome.returncode == 0, outcome.stderr
    assert f"continuing from {run / rd.CHECKPOINTS}/checkpoint-{gone_at}" in outcome.stderr
    lines = (run / rd.TRAINER_LOG).read_text().splitlines()
    steps = [entry["step"] for line in lines if "loss" in (entry := json.loads(line))]
    assert steps == list(range(1, last + 1))
    assert rd.read_status(run).state == "finished"
