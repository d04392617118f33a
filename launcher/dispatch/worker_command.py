"""Run one of the worker's programs to its end: they import torch, this process does not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from launcher.errors import JobFailedError


class WorkerError(JobFailedError):
    """A worker program ended with an error that it has already shown on stderr."""

    def __init__(self, module: str, exit_code: int) -> None:
        super().__init__(
            f"ended with exit status {exit_code}", where=module, fix="see its message above"
        )
        self.exit_code = exit_code if exit_code in (2, 3, 4) else 4


def run_worker(module: str, args: Sequence[str]) -> dict[str, Any]:
    """Run ``python -m module args``; its messages pass through, its last line is JSON.

    Returns:
        The JSON object on the last line of its output.

    Raises:
        WorkerError: it ended with another exit status than 0; the message is already shown.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *args], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        raise WorkerError(module, done.returncode)
    value = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(value, dict)
    return value
