"""Adam's moments in bitsandbytes' 8 bits and as fp32 tensors, one way and back.

bitsandbytes rounds each tensor in blocks of 256 elements of their own scale, and again in each
step. DeepSpeed's universal checkpoints are of fp32 moments: converting makes them that, loading
rounds them in the blocks of the ranks that go on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MOMENTS = ("exp_avg", "exp_avg_sq")
"""The names that torch and DeepSpeed give to what bitsandbytes calls state1 and state2."""
_BLOCK_ELEMENTS = 256  # bitsandbytes 0.50.2 optim/optimizer.py:Optimizer2State.init_state
_PIECE_ELEMENTS = 2**24
"""Rounded at a time, so that 64 MiB of fp32 are on the device; whole blocks."""
_WRAPPED = "__bnb_optimizer_quant_state__"  # Optimizer8bit.state_dict there


def is_eight_bit(optimizer: Any) -> bool:
    """Return whether an optimizer is one of bitsandbytes' with two 8-bit states."""
    return type(optimizer).__module__.startswith("bitsandbytes.")


def fp32_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the saved state of one parameter with moments in fp32; others come back as they are.

    Args:
        state: an element of ``state_dict()["state"]`` of any AdamW, on the processor.
    """
    if MOMENTS[0] in state:
        return dict(state)
    import torch
    from bitsandbytes.functional import dequantize_blockwise

    flat = {**state, **state.get(_WRAPPED, {})}
    moments = {}
    for number, moment in enumerate(MOMENTS, start=1):
        value = flat[f"state{number}"]
        if value.dtype == torch.uint8:  # small tensors stay fp32
            value = dequantize_blockwise(
                value,
                absmax=flat[f"absmax{number}"],
                code=flat[f"qmap{number}"],
                blocksize=_BLOCK_ELEMENTS,
            )
        moments[moment] = value.float()
    return {"step": flat["step"], **moments}


def write_with_fp32_moments(source: Path, target: Path) -> None:
    """Copy DeepSpeed's shards of a checkpoint, with moments in fp32; link the other files.

    Args:
        source: the folder of shards (``global_step…``) that a run with 8-bit states saved.
        target: a folder to make.
    """
    import torch

    target.mkdir(parents=True)
    for path in source.iterdir():
        if not path.name.endswith("optim_states.pt"):
            (target / path.name).symlink_to(path.resolve())
            continue
        saved = torch.load(path, map_location="cpu", weights_only=True)
        shard = saved["optimizer_state_dict"]
        base = shard.get("base_optimizer_state") or shard["optimizer_state_dict"]
        base["state"] = {number: fp32_state(state) for number, state in base["state"].items()}
        torch.save(saved, target / path.name)


class _OnHost(dict[str, Any]):
    """The state of one tensor; a moment that is put into it moves to the host's memory."""

    def __setitem__(self, key: str, value: Any) -> None:
        if key in MOMENTS:
            left, value = value.untyped_storage(), value.to("cpu", copy=True)
            # The loader of stages 1 and 2 keeps views of it, which would keep it on the device.
            if left.resizable():
                left.resize_(0)
        super().__setitem__(key, value)


def keep_moments_on_host(optimizer: Any) -> None:
    """Have fp32 moments wait in the host's memory for :func:`round_states`.

    DeepSpeed's universal loaders (0.19.8) make them on the device, 8 bytes for each element of a
    rank's part; now one partition (stages 1 and 2) or sub-group (3) is there at a time.
    """
    optimizer.state = defaultdict(
        _OnHost, {parameter: _OnHost(state) for parameter, state in optimizer.state.items()}
    )


def round_states(optimizer: Any) -> None:
    """Replace fp32 moments by what bitsandbytes keeps, in the blocks of these tensors.

    Args:
        optimizer: bitsandbytes' AdamW, with states as DeepSpeed's universal loader leaves them.
    """
    import torch

    group = optimizer.param_groups[0]
    listed = group["params"]
    waiting, optimizer.state = optimizer.state, defaultdict(dict)
    for parameter, loaded in waiting.items():
        # Asked for a parameter's settings, it looks it up in its group; ZeRO-3's are empty.
        group["params"] = [parameter]
        optimizer.init_state(group, parameter, 0, 0)
        state = optimizer.state[parameter]
        state["step"] = int(loaded["step"])
        with torch.no_grad():
            for number, moment in enumerate(MOMENTS, start=1):
                _round(loaded.pop(moment), state, number, parameter.device)
    group["params"] = listed


def _round(moment: Any, state: Mapping[str, Any], number: int, device: Any) -> None:
    """Write a moment into bitsandbytes' tensors, in place.

    Those of a paged optimizer are pages, which torch takes for the host's memory.
    """
    import torch
    from bitsandbytes.functional import quantize_blockwise

    target = state[f"state{number}"].view(-1)
    for start in range(0, target.numel(), _PIECE_ELEMENTS):
        piece = moment.view(-1)[start : start + _PIECE_ELEMENTS].to(device)
        end = start + piece.numel()
        if target.dtype == torch.uint8:
            piece, scales = quantize_blockwise(
                piece, code=state[f"qmap{number}"], blocksize=_BLOCK_ELEMENTS
            )
            first = start // _BLOCK_ELEMENTS
            state[f"absmax{number}"][first : first + scales.absmax.numel()] = scales.absmax
        target[start:end] = piece
