"""QLoRA under ZeRO-3: let go of gathered 4-bit weights until backward needs them."""

# Shape suffixes: b = sequences, s = tokens, i = inputs, o = outputs, p = packed elements.

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch
from bitsandbytes.autograd._functions import MatMul4Bit
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, is_zero_param
from peft.tuners.lora import dora


def release_gathered_4bit_weights() -> None:
    """Have every 4-bit layer of this process save its parameter, not the gathered numbers.

    bitsandbytes keeps the packed weights as an attribute of the autograd node (0.50
    ``autograd/_functions.py:MatMul4Bit``), out of sight of ZeRO-3 and of checkpointing: each
    rank then holds the whole gathered model from forward to the end of the step. Measured on
    two H200 with Llama-2-7B: 8.5 GB in place of 4.5 GB. As DeepSpeed does for other linear
    layers (0.19 ``zero/linear.py``), the parameter is saved; it is gathered when used.
    """
    bitsandbytes.matmul_4bit = _matmul_4bit


def let_dora_read_4bit_weights() -> None:
    """Have DoRA dequantize the gathered parameters themselves, not copies of their layers.

    PEFT copies a 4-bit layer for FSDP's sake, with weights that ZeRO-3 then does not know, and puts
    a copy of the weight into a layer on a processor (0.21 ``tuners/lora/dora.py:update_layer``,
    ``utils/integrations.py:dequantize_module_weight``).
    """
    dora.deepcopy = lambda layer: layer
    dora.dequantize_module_weight = _dequantized


def _dequantized(layer: Any) -> torch.Tensor:
    weight: torch.Tensor = layer.weight
    if isinstance(weight, bitsandbytes.nn.Params4bit):
        weight = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    return weight


class _MatMulSavingParameter(MatMul4Bit):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, a_bsi: torch.Tensor, weight_p: Any, *rest: Any) -> Any:
        output_bso = MatMul4Bit.forward(ctx, a_bsi, weight_p, *rest)
        ctx.tensors = (None, None)
        ctx.save_for_backward(weight_p)
        return output_bso

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (weight_p,) = ctx.saved_tensors
        is_away = is_zero_param(weight_p) and weight_p.ds_status is ZeroParamStatus.NOT_AVAILABLE
        if is_away:
            weight_p.all_gather()
        try:
            ctx.tensors = (None, weight_p.view(-1, 1))
            return MatMul4Bit.backward(ctx, *grads)
        finally:
            ctx.tensors = (None, None)
            if is_away:
                weight_p.partition()


_matmul_without_gradient = bitsandbytes.matmul_4bit


def _matmul_4bit(
    a_bsi: torch.Tensor, weight_p: Any, quant_state: Any, out: Any = None, bias: Any = None
) -> Any:
    if torch.is_grad_enabled() and a_bsi.requires_grad:
        return _MatMulSavingParameter.apply(a_bsi, weight_p, out, bias, quant_state)
    return _matmul_without_gradient(a_bsi, weight_p, quant_state, out=out, bias=bias)
