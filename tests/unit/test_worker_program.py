"""How the worker's programs begin and end, without the training stack."""

from __future__ import annotations

import subprocess
import sys

import pytest

from launcher.strategy import Method, Optimizer, Strategy, needs_bitsandbytes

PROGRAM = """
import atexit, gc, os, sys, threading, time
from launcher.worker.prerequisites import leave_out_bitsandbytes
from launcher.worker.program import collect_garbage_from_now_on, run_program

class Kept:
    def __del__(self, write=os.write):
        write(1, b"taken apart\\n")

def main():
    global kept, finish
    kept, finish = Kept(), threading.Event()
    kept.itself = kept
    assert not gc.isenabled()
    leave_out_bitsandbytes()
    try:
        import bitsandbytes
    except ModuleNotFoundError:
        print("no bitsandbytes")
    collect_garbage_from_now_on()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 1000
    atexit.register(print, "at exit")
    threading.Thread(target=lambda: finish.wait() and print("a thread")).start()
    threading.Thread(target=lambda: time.sleep(0.05) or finish.set()).start()
    if len(sys.argv) > 2:
        finish.set()
        raise SystemExit(7)
    return int(sys.argv[1])

run_program(main)
"""


def ended(*arguments: str) -> tuple[int, list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def test_a_program_ends_with_its_status_when_its_threads_have_and_takes_nothing_apart() -> None:
    assert ended("5") == (5, ["no bitsandbytes", "a thread", "at exit"])


def test_a_program_that_raises_ends_as_python_ends_it_and_keeps_nothing_frozen() -> None:
    said = ["no bitsandbytes", "a thread", "at exit", "taken apart"]
    assert ended("0", "raise") == (7, said)


@pytest.mark.parametrize(
    ("method", "optimizer", "needs"),
    [
        (Method.full, Optimizer.adamw, False),
        (Method.lora, Optimizer.adamw_foreach, False),
        (Method.qlora, Optimizer.adamw, True),
        (Method.lora, Optimizer.adamw_8bit, True),
        (Method.full, Optimizer.paged_adamw_8bit, True),
    ],
)
def test_bitsandbytes_is_for_packed_weights_and_8_bit_states(
    method: Method, optimizer: Optimizer, needs: bool
) -> None:
    assert needs_bitsandbytes(method, Strategy(zero_stage=2, optimizer=optimizer)) is needs
