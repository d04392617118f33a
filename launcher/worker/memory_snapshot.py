"""torch's own record of every block of GPU memory, for https://pytorch.org/memory_viz.

Of one step with each allocation and the Python lines that made it, where the recipe asks; and
of what is held, without that history, when a rank runs out of memory.
"""

from __future__ import annotations

import logging
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from launcher.errors import SetupError

logger = logging.getLogger(__name__)

FOLDER = "snapshots"
MAX_EVENTS = 200_000
"""Allocations and frees that are kept, the newest; a step of a 7B model with LoRA makes some
20,000. An entry takes a few KB of host memory (torch 2.13 ``cuda/memory.py``: "Expect each entry
to be several KB") and about 2 us of the step ("fast (2us per trace)", same place)."""


def snapshot_file(folder: Path, rank: int, *, of: str) -> Path:
    """Return where a rank writes a snapshot: ``snapshots/00003-oom.pickle``."""
    return folder / FOLDER / f"{rank:05d}-{of}.pickle"


class StepSnapshot(TrainerCallback):  # type: ignore[misc]
    """Record one optimizer step's allocations, and write them when the step has ended."""

    def __init__(self, folder: Path, *, rank: int, step: int, device: torch.device) -> None:
        if device.type != "cuda":
            raise SetupError(
                "torch records allocations of GPUs only, and this run has none",
                where="tracking.memory_snapshot_step",
                fix="leave it out; `zerofit trace` counts tensors on a processor",
            )
        self._path = snapshot_file(folder, rank, of=f"step-{step}")
        self._step = step

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Begin to record if the step is the next one."""
        self._begin_before(state.global_step + 1)

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Write the step that has ended, or begin to record the next one."""
        if state.global_step == self._step:
            _write(self._path)
            torch.cuda.memory._record_memory_history(enabled=None)
        self._begin_before(state.global_step + 1)

    def _begin_before(self, step: int) -> None:
        if step == self._step:
            torch.cuda.memory._record_memory_history(
                enabled="all", context="alloc", stacks="python", max_entries=MAX_EVENTS
            )


def snapshot_when_out_of_memory(folder: Path, *, rank: int, device: torch.device) -> None:
    """Have the allocator call us before it raises, when all that does not fit is still there.

    It costs nothing until then. Where a library catches the error and tries something smaller,
    the last time counts.
    """
    if device.type != "cuda":
        return
    path = snapshot_file(folder, rank, of="oom")

    def observe(_device: int, _wanted_bytes: int, _limit_bytes: int, _free_bytes: int) -> None:
        _write(path)

    # Not public; the one that torch's guide to snapshots uses.
    attach = getattr(torch._C, "_cuda_attach_out_of_memory_observer", None)
    if attach is None:
        logger.error("torch %s leaves no memory snapshot when memory runs out", torch.__version__)
        return
    torch.cuda.init()  # type: ignore[no-untyped-call]
    attach(observe)


def _write(path: Path) -> None:
    """Replace a snapshot; one that cannot be written is said and ends nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            # As torch.cuda.memory._dump_snapshot does it.
            pickle.dump(torch.cuda.memory._snapshot(), stream)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        logger.error("no memory snapshot in %s: %s", path, error)
        return
    name = path.relative_to(path.parents[1])
    logger.error("memory snapshot: %s (open it at https://pytorch.org/memory_viz)", name)
