"""A rank without torch, as the worker behaves towards Slurm: it starts in a moment.

What it does is in PROBE: ``finish``, ``raise RANK``, ``kill RANK``, ``sleep``, ``deaf`` (sleeps
through a request to stop, too), ``stop`` (sleeps; when asked to stop, leaves a checkpoint and the
marker that asks for another start, and finishes when started again).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

from launcher import run_dir as rd
from launcher.peaks import RankFailure, RankPeaks
from launcher.watchdog import Patience
from launcher.worker.heartbeat import Heartbeat

run_dir = Path(sys.argv[sys.argv.index("--run-dir") + 1])
rank, size = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
what, _, who = os.environ.get("PROBE", "finish").partition(" ")


endless = Patience(training_seconds=0.0, phase_seconds=0.0)
heartbeat = Heartbeat(run_dir, endless, rank=rank, local_rank=0, world_size=size)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def peaks_of(state: str, failure: RankFailure | None = None) -> RankPeaks:
    return RankPeaks(
        rank=rank, local_rank=int(os.environ["SLURM_LOCALID"]), world_size=size,
        host=socket.gethostname(), pid=os.getpid(), device="cpu", device_name="cpu",
        state=state, steps_done=0, failure=failure,  # type: ignore[arg-type]
    )  # fmt: skip


def write(state: str, failure: RankFailure | None = None) -> None:
    heartbeat.write(peaks_of(state, failure))


def until_all(state: str | None = None) -> None:
    """Wait until all ranks have files, in a state if one is given."""
    while len([peaks for peaks in rd.read_ranks(run_dir) if state in (None, peaks.state)]) < size:
        time.sleep(0.05)


def finish() -> None:
    write("finished")
    if rank == 0:  # the last, as after a barrier
        until_all("finished")
        rd.write_status(run_dir, "finished")
    sys.exit(0)


def save_and_stop() -> None:
    say(f"rank {rank} saves")
    if rank == 0:
        (run_dir / "checkpoints" / "checkpoint-1").mkdir(parents=True)
        (run_dir / "requeue").touch()
        rd.write_status(run_dir, "interrupted", reason="its time was up")
    time.sleep(1)
    os._exit(0)


say(f"rank {rank} of {size} at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}")
if rank == 0:
    rd.write_status(run_dir, "running")
write("running")
heartbeat.start()
if what == "finish" or (what == "stop" and (run_dir / "checkpoints").is_dir()):
    finish()
if who == str(rank):
    until_all()
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        raise ValueError("deliberate")
    except ValueError as error:
        failure = RankFailure(
            phase="forward", type="ValueError", message=str(error), traceback=traceback.format_exc()
        )
        write("failed", failure)
        say(f"[rank {rank}] ValueError: {error}")
        sys.exit(1)
for _tick in range(3000):
    time.sleep(0.1)
    if what != "deaf" and "stop" in os.listdir(run_dir):  # noqa: PTH208
        save_and_stop()
