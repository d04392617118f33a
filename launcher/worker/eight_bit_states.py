"""Adam's moments in bitsandbytes' 8 bits and as fp32 tensors, one way and back.

bitsandbytes rounds each tensor in blocks of 256 elements of their own scale, and again in each
step. DeepSpeed's universal checkpoints are of fp32 moments: converting makes them that, loading
rounds them in the blocks of the ranks that go on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

MOMENTS = ("exp_avg", "exp_avg_sq")
"""The names that torch and DeepSpeed give to what bitsandbytes calls state1 and state2."""
_BLOCK_ELEMENTS = 256  # bitsandbytes 0.50.2 optim/optimizer.py:Optimizer2State.init_state
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


def round_states(optimizer: Any) -> None:
    """Replace fp32 moments by what bitsandbytes keeps, in the blocks of these tensors.

    Args:
        optimizer: bitsandbytes' AdamW, with states as DeepSpeed's universal loader leaves them.
    """
    import torch
    from bitsandbytes.functional import quantize_blockwise

    group = optimizer.param_groups[0]
    listed = group["params"]
    for parameter, loaded in list(optimizer.state.items()):
        # Asked for a parameter's settings, it looks it up in its group; ZeRO-3's are empty.
        group["params"] = [parameter]
        optimizer.state[parameter] = {}
        optimizer.init_state(group, parameter, 0, 0)
        with torch.no_grad():
            state = optimizer.state[parameter]
            state["step"] = int(loaded["step"])
            for number, moment in enumerate(MOMENTS, start=1):
                value = loaded.pop(moment).to(parameter.device, torch.float32)
                if state[f"state{number}"].dtype == torch.uint8:
                    value, scales = quantize_blockwise(
                        value, code=state[f"qmap{number}"], blocksize=_BLOCK_ELEMENTS
                    )
                    state[f"absmax{number}"].copy_(scales.absmax)
                # In place: of a paged optimizer these are the pages.
                state[f"state{number}"].copy_(value.view_as(parameter))
    group["params"] = listed
