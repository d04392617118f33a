"""Let no file that torch reads run code: checkpoints and weights are tensors and plain values."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pickle import UnpicklingError
from typing import Any

FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""Stronger than ``weights_only=False``, which DeepSpeed's loaders say (torch 2.13
``torch/serialization.py``, ``load``)."""


def load_weights_only() -> None:
    """Confine every ``torch.load`` of this process and of those that it starts.

    Files are still read that hold the few classes which DeepSpeed 0.19.8 writes into its
    checkpoints beside tensors; all of them are plain records.
    """
    os.environ[FORCED] = "1"
    import torch
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def stage(kind: object, name: str) -> Any:
        stages: Mapping[str, Any] = ZeroStageEnum.__members__
        if kind is not ZeroStageEnum or name not in stages:
            raise UnpicklingError(f"this file asks for {name!r} of {kind!r}")
        return stages[name]

    torch.serialization.add_safe_globals(
        [
            DynamicLossScaler,
            LossScaler,
            ZeroStageEnum,
            fragment_address,
            # So Debian 12's Python 3.11.2 writes down an enum's member.
            (stage, "builtins.getattr"),
        ]
    )
