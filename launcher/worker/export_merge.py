"""Merge an adapter into its base model, one layer at a time and one file at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from launcher.predict.host_memory import SAVED_FILE_BYTES
from launcher.worker.export_checks import ExportError
from launcher.worker.weight_files import deal_into_files, saved_tensors, write_files

_BASE = ".base_layer"


def write_merged(
    adapted: Any, folder: Path, *, dtype: torch.dtype, file_bytes: int = SAVED_FILE_BYTES
) -> None:
    """Write the model with its adapter merged into it, as ordinary safetensors files.

    Each adapted layer is merged in fp32, by PEFT, and rounded once. Memory holds the tensors of
    one file and one layer in fp32; all other weights stay in the files that they came from.

    Args:
        adapted: a PEFT model on the CPU, unchanged afterwards.
        folder: a new folder.
        dtype: of the merged weights.
        file_bytes: size of a file, unless one layer is larger.

    Raises:
        ExportError: a merged weight is not finite.
    """
    folder.mkdir()
    model = adapted.get_base_model()
    layers = _adapted_layers(model)
    sources = {
        name.replace(f"{_BASE}.", "."): value
        for name, value in saved_tensors(model).items()
        if "lora_" not in name
    }
    sizes = {
        name: value.numel() * _saved_dtype(value, dtype).itemsize for name, value in sources.items()
    }

    def read(name: str) -> torch.Tensor:
        with _merged_weight(layers.get(name), sources[name]) as value:
            return value.detach().to(_saved_dtype(value, dtype))

    model.config.dtype = dtype
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    write_files(folder, deal_into_files(sizes, limit_bytes=file_bytes), read)


def _saved_dtype(value: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if value.is_floating_point() else value.dtype


def _adapted_layers(model: Any) -> dict[str, Any]:
    """Return PEFT's layers by the name of the weight that they change."""
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if hasattr(module, "merge") and hasattr(module, "get_base_layer")
    }


@contextmanager
def _merged_weight(layer: Any, value: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield a weight with its adapter in it; the layer is afterwards as before."""
    if layer is None:
        yield value
        return
    base = layer.get_base_layer()
    before = base.weight
    base.weight = torch.nn.Parameter(before.detach().float(), requires_grad=False)
    try:
        try:
            layer.merge(safe_merge=True)  # refuses NaN and infinity
        except ValueError as error:
            raise ExportError(
                f"the adapter cannot be merged: {error}",
                where="the trained adapter",
                fix="do not use this checkpoint; train again from an earlier one",
            ) from None
        yield base.weight.data
    finally:
        layer.merged_adapters.clear()
        base.weight = before
