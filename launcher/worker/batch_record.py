"""Which examples each step took, written down for tests: ``ZEROFIT_RECORD_BATCHES=1``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

VARIABLE = "ZEROFIT_RECORD_BATCHES"
FOLDER = "batches"
"""In the run directory: ``batches/00001.jsonl``, over all attempts."""


class BatchRecord(TrainerCallback):  # type: ignore[misc]
    """Appends a line for each step that this rank has done: number, ranks, rows of the data.

    Steps that were lost and done again stand there twice.
    """

    def __init__(self, batch: Callable[[], list[list[int]]], folder: Path, *, rank: int) -> None:
        self._batch = batch
        self._path = folder / FOLDER / f"{rank:05d}.jsonl"
        self._path.parent.mkdir(exist_ok=True)

    def on_step_end(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Write the step's line."""
        line = {"step": state.global_step, "ranks": args.world_size, "rows": self._batch()}
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
