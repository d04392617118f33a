"""Memory has run out on this rank: keep what is known of it, for people and for the next plan."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from launcher import run_dir
from launcher.errors import RunDirError
from launcher.failure_kind import FailureKind
from launcher.post_mortem import PostMortem, post_mortem_file

if TYPE_CHECKING:
    from launcher.worker.peak_memory import PeakRecorder

logger = logging.getLogger(__name__)

# torch 2.13 c10/cuda/CUDACachingAllocator.cpp, format_size.
_REQUESTED = re.compile(r"Tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def keep_post_mortem(
    error: BaseException, kind: FailureKind, recorder: PeakRecorder, *, folder: Path
) -> None:
    """Write this rank's post-mortem; call it while the error's frames still hold their tensors.

    Whatever else is worth keeping of that moment is kept here, too. Nothing that goes wrong here
    hides the error itself.
    """
    try:
        found = _examine(error, kind, recorder, folder=folder)
        path = post_mortem_file(folder, found.rank)
        path.parent.mkdir(exist_ok=True)
        run_dir.write_json(path, found.to_json())
    except (OSError, RuntimeError, MemoryError, RunDirError) as problem:
        logger.error("the post-mortem cannot be written: %s", problem)


def _examine(
    error: BaseException, kind: FailureKind, recorder: PeakRecorder, *, folder: Path
) -> PostMortem:
    device, known = recorder.device, recorder.snapshot()
    phase = recorder.phase_of_failure
    plan = json.loads(run_dir.read_text(folder / run_dir.PLAN))
    estimate = plan.get("memory", {}).get("phases", {}).get(phase, {})
    components: Mapping[str, int] = estimate.get("components", {})
    host = psutil.virtual_memory()
    allocated = reserved = free = total = None
    if device.type == "cuda":
        allocated = torch.cuda.memory_allocated(device)
        reserved = torch.cuda.memory_reserved(device)
        free, total = torch.cuda.mem_get_info(device)
    return PostMortem(
        rank=known.rank,
        host=known.host,
        kind=kind,
        phase=phase,
        step=recorder.earlier_steps + recorder.steps_done,
        message=str(error).partition("\n")[0],
        allocated_bytes=allocated,
        reserved_bytes=reserved,
        requested_bytes=requested_bytes(str(error)),
        device_free_bytes=free,
        device_total_bytes=total,
        host_available_bytes=host.available,
        host_total_bytes=host.total,
        host_rss_bytes=psutil.Process().memory_info().rss,
        predicted_bytes=estimate.get("allocated_bytes"),
        predicted=dict(sorted(components.items(), key=lambda item: -item[1])),
        measured=_measure(recorder, allocated),
        next_rung=next(iter(plan.get("ladder", [])), None),
    )


def requested_bytes(message: str) -> int | None:
    """Return what torch's allocator was asked for, from the message of its error."""
    match = _REQUESTED.search(message)
    return int(float(match[1]) * _UNITS[match[2]]) if match else None


def _measure(recorder: PeakRecorder, allocated_bytes: int | None) -> dict[str, int]:
    """Return the bytes of each group of tensors on the device; a storage counts once."""
    seen: set[int] = set()

    def count(tensors: Iterable[Any]) -> int:
        found = 0
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor) or tensor.device.type != recorder.device.type:
                continue
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                found += storage.nbytes()
        return found

    groups = {
        "weights": count(_weights(recorder)),
        "gradients": count(parameter.grad for parameter in _parameters(recorder)),
        "optimizer states": count(_optimizer_states(recorder.engine)),
    }
    if allocated_bytes is not None:
        groups["everything else"] = allocated_bytes - sum(groups.values())
    return groups


def _parameters(recorder: PeakRecorder) -> Iterable[Any]:
    return recorder.model.parameters() if recorder.model is not None else ()


def _weights(recorder: PeakRecorder) -> Iterator[Any]:
    for parameter in _parameters(recorder):
        yield parameter.data
        yield getattr(parameter, "ds_tensor", None)  # ZeRO-3's own partition


def _optimizer_states(engine: Any) -> Iterator[Any]:
    """Yield master weights and states of the torch optimizer inside DeepSpeed's wrapper."""
    wrapped = getattr(engine, "optimizer", None)
    optimizer = getattr(wrapped, "optimizer", wrapped)
    for group in getattr(optimizer, "param_groups", ()):
        yield from group["params"]
    for state in getattr(optimizer, "state", {}).values():
        yield from state.values()
