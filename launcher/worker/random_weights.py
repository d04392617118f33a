"""Quantized models with random weights: benchmarks of QLoRA without a download."""

from __future__ import annotations

from typing import Any

import torch

from launcher.worker.partitioned_4bit import Partition

# Standard deviation of transformers' own initialisation (``initializer_range`` of Llama).
_STANDARD_DEVIATION = 0.02


def quantized_model_with_random_weights(
    config: Any,
    quantization: Any,
    *,
    dtype: torch.dtype,
    device: torch.device,
    partition: Partition | None = None,
) -> Any:
    """Return a bitsandbytes model whose weights are random, one matrix at a time on ``device``.

    transformers can only quantize weights that it reads from files. This builds the model
    without storage, lets transformers swap the linear layers, and then fills in each weight,
    so that the full-precision model never exists; ``partition`` makes it ZeRO-3's at once.
    """
    from transformers import AutoModelForCausalLM
    from transformers.quantizers import AutoHfQuantizer

    # Not from_config: under ZeRO-3 it would partition weights that do not exist yet.
    with torch.device("meta"):
        model = AutoModelForCausalLM._model_mapping[type(config)](config)
    quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": device})
    for module in list(model.modules()):
        _fill_parameters(module, dtype=dtype, device=device)
        if partition is not None:
            partition(module.parameters(recurse=False))
    _fill_buffers(model, config, device=device)
    model.tie_weights()
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer
    return model


def _fill_parameters(module: torch.nn.Module, *, dtype: torch.dtype, device: torch.device) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        shape = parameter.shape
        if isinstance(module, torch.nn.Linear) or parameter.dim() > 1:
            value = torch.empty(shape, dtype=dtype, device=device).normal_(std=_STANDARD_DEVIATION)
        else:
            value = torch.ones(shape, dtype=dtype, device=device)
        if type(parameter) is torch.nn.Parameter:
            filled: torch.Tensor = torch.nn.Parameter(value, requires_grad=False)
        else:
            # bitsandbytes quantizes when its parameter moves to a device, int8 only when it
            # comes from the host (bitsandbytes 0.50 nn/modules.py:Int8Params.to); its
            # constructor takes back the settings that transformers gave the empty one.
            on_host = value.cpu()
            filled = type(parameter)(on_host, requires_grad=False, **parameter.__dict__).to(device)
        setattr(module, name, filled)


def _fill_buffers(model: Any, config: Any, *, device: torch.device) -> None:
    """Make rotary embeddings anew, whose buffers follow from the configuration; scales too."""
    for name, module in list(model.named_modules()):
        if not any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            continue
        if hasattr(module, "scalar_embed_scale"):
            # transformers 5.23 models/gemma3: the embedding's weight is filled in already.
            module.embed_scale = torch.tensor(module.scalar_embed_scale, device=device)
        else:
            model.set_submodule(name, type(module)(config).to(device))
