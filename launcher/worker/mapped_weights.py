"""Weights that stay in their files while ZeRO-3 deals them out."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open

_DTYPES = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
"""Names in a safetensors header (safetensors documentation, "Format")."""


@contextlib.contextmanager
def weights_stay_in_files() -> Iterator[None]:
    """Let transformers map safetensors files into memory where it would read them whole.

    Under ZeRO-3, rank 0 hands each layer's weights to the others; transformers reads all files
    into its memory first (5.23 ``modeling_utils.py:_load_pretrained_model``), 140 GB for a 70B
    model on one host. Mapped pages are the file's own: the system drops them when it needs room.
    """
    from transformers import modeling_utils

    plain = modeling_utils.load_state_dict

    def load(checkpoint_file: Any, *arguments: Any, **options: Any) -> dict[str, torch.Tensor]:
        place = options.get("map_location", arguments[0] if arguments else "cpu")
        path = Path(checkpoint_file)
        if path.suffix == ".safetensors" and str(place) == "cpu":
            return map_safetensors(path)
        weights: dict[str, torch.Tensor] = plain(checkpoint_file, *arguments, **options)
        return weights

    modeling_utils.load_state_dict = load
    try:
        yield
    finally:
        modeling_utils.load_state_dict = plain


def map_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Return a file's tensors as views of its mapped bytes; writing to them is not allowed.

    Raises:
        SafetensorError: the file is damaged or short.
    """
    with safe_open(path, framework="pt"):
        pass  # checks the header and the length
    with path.open("rb") as stream:
        (header_bytes,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, Any] = json.loads(stream.read(header_bytes))
    data = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
    start = 8 + header_bytes
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        dtype, raw = _DTYPES[entry["dtype"]], data[start + begin : start + end]
        if (start + begin) % dtype.itemsize:
            raw = raw.clone()  # a view must begin at a multiple of its type's size
        tensors[name] = raw.view(dtype).reshape(entry["shape"])
    return tensors
