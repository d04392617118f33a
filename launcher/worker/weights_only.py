"""Let no file that torch reads run code: checkpoints and weights are tensors and plain values."""

from __future__ import annotations

import os

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

    torch.serialization.add_safe_globals(
        [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    )
