"""Run one of the worker's programs to its end: they import torch, this process does not."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from launcher.dispatch import process_group
from launcher.dispatch.base import InterruptionError, new_run_id
from launcher.dispatch.interruptions import Interruptions
from launcher.errors import JobFailedError, SetupError
from launcher.job_script import RUN_ID_VARIABLE

# What the worker imports in any run; optional packages are checked against the plan.
_TRAIN_EXTRA = ("torch", "deepspeed", "transformers", "accelerate", "peft", "datasets")
_POLL_SECONDS = 0.2


class WorkerError(JobFailedError):
    """A worker program ended with an error that it has already shown on stderr."""

    is_shown = True

    def __init__(self, module: str, exit_code: int) -> None:
        super().__init__(
            f"ended with exit status {exit_code}", where=module, fix="see its message above"
        )
        self.exit_code = exit_code if exit_code in (2, 3, 4) else 4


def check_train_extra() -> None:
    """Look for the training stack without importing it.

    Raises:
        SetupError: a package is not installed.
    """
    missing = [name for name in _TRAIN_EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise SetupError(
            f"not installed: {', '.join(missing)}",
            where=f"the Python environment of {sys.executable}",
            fix="pip install 'zerofit[train]'",
        )


def check_trackers(names: Sequence[str]) -> None:
    """Look for the packages of the trackers that a recipe names.

    Raises:
        SetupError: one is not installed.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise SetupError(
            f"not installed: {', '.join(missing)}",
            where="tracking.report_to",
            fix=f"pip install {' '.join(missing)}, or leave it out; trainer_log.jsonl in the run "
            "directory has every number",
        )


def run_worker(module: str, args: Sequence[str]) -> dict[str, Any]:
    """Run ``python -m module args``; its messages pass through, its last line is JSON.

    Returns:
        The JSON object on the last line of its output.

    Raises:
        SetupError: the training stack is not installed.
        WorkerError: it ended with another exit status than 0; the message is already shown.
        JobFailedError: it was killed, and could not say why.
        InterruptionError: Ctrl-C or its like; the program has ended.
    """
    check_train_extra()
    run_id = new_run_id()
    # Its own session, so that Ctrl-C in the terminal comes to us alone: no traceback of an
    # interrupted import, and no child that lives on when only we are told to end.
    with (
        Interruptions() as interruptions,
        subprocess.Popen(
            [sys.executable, "-m", module, *args],
            env={**os.environ, RUN_ID_VARIABLE: run_id},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        try:
            output = _output(process, interruptions)
        finally:
            process_group.end_processes(run_id, session_id=process.pid)
    if interruptions.received:
        number = interruptions.received[0]
        raise InterruptionError(
            f"stopped by {signal.Signals(number).name}",
            where=module,
            fix="run the same command again",
            signal_number=number,
        )
    if process.returncode < 0:
        raise JobFailedError(
            f"was killed by signal {-process.returncode}",
            where=module,
            fix="the host probably ran out of memory (`dmesg` shows it)",
        )
    if process.returncode > 0:
        raise WorkerError(module, process.returncode)
    value = json.loads(output.splitlines()[-1])
    assert isinstance(value, dict)
    return value


def _output(process: subprocess.Popen[str], interruptions: Interruptions) -> str:
    """Return what the program printed on stdout; the rest of it after a signal does not matter."""
    while not interruptions.received:
        try:
            return process.communicate(timeout=_POLL_SECONDS)[0]
        except subprocess.TimeoutExpired:
            continue
    return ""
