"""QLoRA under ZeRO-3: every weight is dealt out as soon as it is quantized."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

Partition = Callable[[Iterable[torch.nn.Parameter]], None]
"""Keeps this rank's part of each parameter; all ranks call it in the same order."""


def partitioner() -> Partition:
    """Return a function that makes parameters ZeRO-3's, as ``deepspeed.zero.Init`` does.

    transformers' DeepSpeed configuration must be alive.
    """
    import deepspeed
    from transformers.integrations.deepspeed import deepspeed_config

    nothing = torch.nn.Module()
    context = deepspeed.zero.Init(module=nothing, config_dict_or_path=deepspeed_config())
    convert: Partition = context._convert_to_zero_parameters
    return convert


@contextlib.contextmanager
def partitioned_while_loading() -> Iterator[None]:
    """Have transformers deal out each weight as it comes from the files.

    For quantized models it opens no ``deepspeed.zero.Init`` (5.23
    ``modeling_utils.py:get_init_context``): each rank would hold the whole model until
    ``deepspeed.initialize``. It quantizes one weight after another, in the order of their names.
    """
    from transformers import core_model_loading

    plain = core_model_loading.set_param_for_module
    partition = partitioner()

    def set_and_partition(model: Any, name: str, *arguments: Any) -> None:
        plain(model, name, *arguments)
        module_name, _, attribute = name.rpartition(".")
        value = getattr(model.get_submodule(module_name), attribute)
        if isinstance(value, torch.nn.Parameter) and not value.is_meta:
            partition([value])

    core_model_loading.set_param_for_module = set_and_partition
    try:
        yield
    finally:
        core_model_loading.set_param_for_module = plain
