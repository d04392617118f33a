"""Faults on purpose, for tests of recovery: ``ZEROFIT_FAULT="oom:backward:step=2:rank=1"``.

Nothing else in the worker knows of them. A fault is ``KIND:PHASE`` with any of ``:step=N`` and
``:rank=N``; several are separated by commas. PHASE is one of the phases that are measured
(``load``, ``init``, ``forward``, ``loss``, ``backward``, ``step``, ``save``, ``eval``). Steps
count from 1 over all attempts; for ``save`` and ``eval`` it is the last step that was done. Without
a step the fault strikes the first time that the phase begins, without a rank on every rank.

A fault strikes once in a run directory (on each of its ranks), so that the next attempt is spared;
written twice, it strikes twice. ``wait`` keeps a rank in a phase until the run, or this rank, is
told to stop. On several hosts the variable must be passed on:
``cluster.pass_env: [ZEROFIT_FAULT]``.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, get_args

from launcher.errors import SetupError, did_you_mean
from launcher.predict.memory import Phase
from launcher.stop_file import is_asked_to_stop
from launcher.worker.interruption import stop_was_requested

VARIABLE = "ZEROFIT_FAULT"
MARKS = ".faults"
"""Folder in the run directory with a mark for each fault that has struck."""
SLOW_SECONDS = 12.0
"""How long a slow file system keeps a phase waiting: more than the watchdogs of tests allow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What goes wrong, and when."""

    kind: str
    phase: Phase
    step: int | None = None
    rank: int | None = None


class Faults:
    """The faults of one rank; :meth:`strike` is called whenever a phase begins."""

    def __init__(self, faults: tuple[Fault, ...], *, folder: Path, rank: int) -> None:
        self._faults = faults
        self._run = folder
        self._folder = folder / MARKS
        self._rank = rank

    def strike(self, phase: Phase, steps_done: int) -> None:
        """Let happen what is due now.

        Args:
            phase: the phase that begins.
            steps_done: optimizer steps that have ended, over all attempts.
        """
        is_in_step = phase not in ("save", "eval")
        step = steps_done + is_in_step
        for number, fault in enumerate(self._faults):
            if (
                fault.phase == phase
                and fault.step in (None, step)
                and fault.rank in (None, self._rank)
                and self._is_first_time(number)
            ):
                _STRIKES[fault.kind](phase, self._run)

    def _is_first_time(self, number: int) -> bool:
        self._folder.mkdir(exist_ok=True)
        try:
            (self._folder / f"{number}-{self._rank}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def faults_from_environment(
    environment: Mapping[str, str], *, folder: Path, rank: int
) -> Faults | None:
    """Return the faults that the environment asks for; ``None`` when it asks for none.

    Raises:
        SetupError: they cannot be read.
    """
    text = environment.get(VARIABLE, "")
    if not text:
        return None
    return Faults(tuple(map(_parse, text.split(","))), folder=folder, rank=rank)


def _parse(text: str) -> Fault:
    kind, _, rest = text.strip().partition(":")
    phase, *options = rest.split(":")
    if kind not in _STRIKES:
        raise _wrong(f"there is no fault {kind!r}", fix=did_you_mean(kind, list(_STRIKES)))
    phases: tuple[Phase, ...] = get_args(Phase)
    found = next((name for name in phases if name == phase), None)
    if found is None:
        raise _wrong(f"there is no phase {phase!r}", fix=did_you_mean(phase, phases))
    numbers: dict[str, int] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in ("step", "rank") or not value.isdecimal():
            raise _wrong(f"cannot read {option!r}", fix="write step=2 or rank=1")
        numbers[key] = int(value)
    return Fault(kind=kind, phase=found, **numbers)


def _wrong(problem: str, *, fix: str) -> SetupError:
    return SetupError(problem, where=VARIABLE, fix=fix)


def _run_out_of_memory(phase: Phase, _run: Path) -> NoReturn:
    import torch

    raise torch.OutOfMemoryError(f"out of memory on purpose, in {phase} ({VARIABLE})")


def _run_out_of_host_memory(phase: Phase, _run: Path) -> NoReturn:
    raise MemoryError(f"out of host memory on purpose, in {phase} ({VARIABLE})")


def _be_killed(_phase: Phase, _run: Path) -> None:
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def _fill_the_disk(phase: Phase, _run: Path) -> NoReturn:
    raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (on purpose, in {phase})")


def _be_slow(_phase: Phase, _run: Path) -> None:
    time.sleep(SLOW_SECONDS)


def _hang(_phase: Phase, _run: Path) -> None:
    while True:
        time.sleep(3600)


def _wait_for_a_request(_phase: Phase, run: Path) -> None:
    while not (is_asked_to_stop(run) or stop_was_requested()):
        time.sleep(0.05)


_STRIKES: Mapping[str, Callable[[Phase, Path], None]] = {
    "oom": _run_out_of_memory,
    "host_oom": _run_out_of_host_memory,
    "kill": _be_killed,
    "hang": _hang,
    "disk_full": _fill_the_disk,
    "slow": _be_slow,
    "wait": _wait_for_a_request,
}
