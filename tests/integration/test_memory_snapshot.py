"""torch's memory snapshots: of a step, and when memory runs out."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launcher.errors import SetupError
from launcher.worker.memory_snapshot import (
    StepSnapshot,
    snapshot_file,
    snapshot_when_out_of_memory,
)

pytestmark = pytest.mark.integration


def test_a_run_without_a_gpu_is_told_that_there_is_no_snapshot(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="allocations of GPUs only"):
        StepSnapshot(tmp_path, rank=3, step=2, device=torch.device("cpu"))
    snapshot_when_out_of_memory(tmp_path, rank=3, device=torch.device("cpu"))


@pytest.mark.gpu
def test_the_wanted_step_alone_is_recorded(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    callback = StepSnapshot(tmp_path, rank=3, step=2, device=device)
    state = SimpleNamespace(global_step=0)
    callback.on_train_begin(None, state, None)
    for step in (1, 2, 3):
        kept = torch.empty(step * 2**20, dtype=torch.uint8, device=device)
        state.global_step = step
        callback.on_step_end(None, state, None)
        del kept
    (path,) = (tmp_path / "snapshots").iterdir()
    assert path == snapshot_file(tmp_path, 3, of="step-2")
    snapshot = pickle.loads(path.read_bytes())  # noqa: S301 - ours
    allocations = [e for e in snapshot["device_traces"][0] if e["action"] == "alloc"]
    assert [event["size"] for event in allocations] == [2 * 2**20]
    assert any("test_memory_snapshot" in frame["filename"] for frame in allocations[0]["frames"])


@pytest.mark.gpu
def test_running_out_of_memory_leaves_what_was_held(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    snapshot_when_out_of_memory(tmp_path, rank=3, device=device)
    held = torch.empty(3 * 2**20, dtype=torch.uint8, device=device)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2**45, dtype=torch.uint8, device=device)
    snapshot = pickle.loads(snapshot_file(tmp_path, 3, of="oom").read_bytes())  # noqa: S301
    sizes = [
        block["size"]
        for segment in snapshot["segments"]
        for block in segment["blocks"]
        if block["state"] == "active_allocated"
    ]
    assert held.nbytes in sizes
