"""A program that imports the training stack once and forks the ranks of many runs from it.

Each line of its standard input is one run: ``{"folder": …, "world_size": …, "module": …,
"environment": {…}}``. It
answers each with a line ``{"statuses": […]}``, one exit status a rank; what the ranks printed is
in ``rank-N.err`` and ``rank-N.out`` of the folder. Importing costs 15 s, a forked run 2 s.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from worker_runs import free_port

from launcher.worker.program import QUIET_ENVIRONMENT, collect_garbage_from_now_on

STACK = (
    "torch", "deepspeed", "transformers", "peft", "accelerate", "datasets", "bitsandbytes",
    "bitsandbytes.optim", "transformers.models.llama.modeling_llama",
    "launcher.worker.data", "launcher.worker.model", "launcher.worker.train",
    "launcher.worker.trainer", "launcher.worker.peak_memory", "launcher.worker.sample",
)  # fmt: skip
SECONDS_FOR_OTHERS = 5.0
"""How long ranks may live on after one of them has failed."""


def main() -> None:
    """Serve runs until standard input ends."""
    for name, value in QUIET_ENVIRONMENT.items():  # as a rank does, before it imports the stack
        os.environ.setdefault(name, value)
    gc.disable()
    for name in STACK:
        importlib.import_module(name)
    collect_garbage_from_now_on()
    answers = os.fdopen(os.dup(1), "w")  # what libraries print goes to stderr
    os.dup2(2, 1)
    answers.write(json.dumps({"ready": True}) + "\n")
    answers.flush()
    for line in sys.stdin:
        request = json.loads(line)
        os.environ.update(request["environment"])
        statuses = run(Path(request["folder"]), request["world_size"], request["module"])
        for name in request["environment"]:
            del os.environ[name]
        answers.write(json.dumps({"statuses": statuses}) + "\n")
        answers.flush()


def run(folder: Path, world_size: int, module: str) -> list[int]:
    """Fork the ranks of one run and return their exit statuses."""
    port = free_port()
    pids = {_fork(folder, module, rank, world_size, port): rank for rank in range(world_size)}
    statuses = [0] * world_size
    deadline = float("inf")
    while pids:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            statuses[pids.pop(pid)] = os.waitstatus_to_exitcode(status)
            if status:
                deadline = min(deadline, time.monotonic() + SECONDS_FOR_OTHERS)
            continue
        if time.monotonic() > deadline:
            for other in pids:
                os.kill(other, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.02)
    return statuses


def _fork(folder: Path, module: str, rank: int, world_size: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    status = 1
    try:
        for stream, suffix in ((1, "out"), (2, "err")):
            with (folder / f"rank-{rank}.{suffix}").open("wb") as log:
                os.dup2(log.fileno(), stream)
        status = importlib.import_module(module).main(["--run-dir", str(folder)])
    except BaseException:  # noqa: BLE001 - the child must not return into the parent's loop
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
