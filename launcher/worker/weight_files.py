"""Writing weights as safetensors files, with one file's tensors in host memory at a time."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from launcher.predict.host_memory import SAVED_FILE_BYTES

_NAME = "model{suffix}.safetensors"
_INDEX = "model.safetensors.index.json"
_LAYER = re.compile(r".*?\.\d+\.")

Tensors = Mapping[str, torch.Tensor]


def write_files(
    folder: Path,
    files: Sequence[Sequence[str]],
    read: Callable[[str], torch.Tensor | None],
    *,
    finish: Callable[[dict[str, torch.Tensor]], Tensors] = dict,
) -> None:
    """Write tensors as Hugging Face's weight files, with an index where there are several.

    Args:
        folder: holds config.json already, whose permissions the files get.
        files: names of tensors, file by file.
        read: returns a tensor, or ``None`` on a rank that only helps to gather it.
        finish: what becomes of a file's tensors before they are written.
    """
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, names in enumerate(files, start=1):
        suffix = f"-{number:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        path = folder / _NAME.format(suffix=suffix)
        found = {name: value for name in names if (value := read(name)) is not None}
        if not found:
            continue
        tensors = {name: value.contiguous() for name, value in finish(found).items()}
        del found
        save_file(dict(tensors), path, metadata={"format": "pt"})
        # safetensors makes files that only their owner may read.
        shutil.copymode(folder / "config.json", path)
        weight_map |= dict.fromkeys(tensors, path.name)
        total_bytes += sum(value.nbytes for value in tensors.values())
        del tensors
    if len(files) > 1 and weight_map:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def deal_into_files(sizes_bytes: Mapping[str, int], *, limit_bytes: int) -> list[list[str]]:
    """Return the names, in their order, file by file; none is larger unless one group is.

    A group is what one decoder layer has: formats of checkpoints join or split tensors of one
    layer, never of two.
    """
    files: list[list[str]] = []
    room_bytes = 0
    for names in _groups(sizes_bytes):
        group_bytes = sum(sizes_bytes[name] for name in names)
        if not files or group_bytes > room_bytes:
            files.append([])
            room_bytes = limit_bytes
        files[-1] += names
        room_bytes -= group_bytes
    return files


def _groups(names: Iterable[str]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        layer = _LAYER.match(name)
        groups.setdefault(layer.group() if layer else name, []).append(name)
    return list(groups.values())


def save_model(
    engine: Any, folder: Path, *, is_writer: bool, file_bytes: int = SAVED_FILE_BYTES
) -> None:
    """Write the weights of a whole model that DeepSpeed trains; all ranks call it.

    Under ZeRO-3 one tensor at a time is whole on the devices; transformers and accelerate would
    first copy the whole model to the host, below ZeRO-3 on every rank (transformers 5.23
    ``trainer.py:save_model``, accelerate 1.15 ``accelerator.py:get_state_dict``).

    Args:
        engine: DeepSpeed's.
        folder: holds config.json already.
        is_writer: on one rank.
        file_bytes: size of a file, unless one layer is larger.
    """
    from transformers.core_model_loading import revert_weight_conversion

    model = engine.module
    tensors = saved_tensors(model)
    sizes = {name: _num_elements(value) * value.element_size() for name, value in tensors.items()}

    def read(name: str) -> torch.Tensor | None:
        return _whole(tensors[name], is_wanted=is_writer)

    def finish(found: dict[str, torch.Tensor]) -> Tensors:
        names: Tensors = revert_weight_conversion(model, found)
        return names

    if is_writer:
        (folder / _NAME.format(suffix="")).unlink(missing_ok=True)  # transformers' empty one
    with _partitioned(engine):
        files = deal_into_files(sizes, limit_bytes=file_bytes)
        write_files(folder, files, read, finish=finish)


def trained_tensors(engine: Any, *, is_writer: bool) -> dict[str, torch.Tensor]:
    """Return what ZeRO-3 trains, whole, on the host of one rank; all ranks call it.

    What is frozen stays in its parts; DeepSpeed's own function gathers that, too (0.19.8
    ``engine.py:_zero3_consolidated_16bit_state_dict``).
    """
    found = {}
    with _partitioned(engine):
        for name, parameter in engine.module.named_parameters():
            if parameter.requires_grad:
                value = _whole(parameter, is_wanted=is_writer)
                if value is not None:
                    found[name] = value
    return found


def saved_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return what transformers saves of a model, tied tensors once."""
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    persistent = set(model.state_dict()) - ignored
    every = (*model.named_parameters(), *model.named_buffers())
    return {name: value for name, value in every if name in persistent}


def _num_elements(value: Any) -> int:
    return int(getattr(value, "ds_numel", value.numel()))


def _whole(value: torch.Tensor, *, is_wanted: bool) -> torch.Tensor | None:
    import deepspeed

    # Without a rank that modifies it, nothing is sent back when it is dealt out again.
    with deepspeed.zero.GatheredParameters([value], enabled=hasattr(value, "ds_id")):
        return value.detach().cpu() if is_wanted else None


@contextmanager
def _partitioned(engine: Any) -> Iterator[None]:
    """Have ZeRO-3 hold its parts alone, as DeepSpeed does before it saves, and go on after."""
    if not engine.zero_optimization_partition_weights():
        yield
        return
    engine.optimizer.checkpoint_event_prologue()
    try:
        yield
    finally:
        engine.optimizer.checkpoint_event_epilogue()
