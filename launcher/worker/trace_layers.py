"""Activation bytes of any architecture, from 2- and 3-layer models of its real config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from launcher.errors import ModelError
from launcher.strategy import Precision, Strategy
from launcher.worker.storage_tracker import StorageTracker
from launcher.worker.trace_model import (
    TORCH_DTYPE,
    add_adapters,
    build_model,
    enable_checkpointing,
    use_loss,
)
from launcher.workload import LoraSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTraceRequest:
    """What to trace; lengths in tokens. ``lora`` is ``None`` for full fine-tuning."""

    hf_config: Mapping[str, Any]
    max_seq_len: int
    strategy: Strategy
    """Attention, checkpointing and micro-batch are read; nothing else changes activations."""
    precision: Precision = Precision.bf16
    lora: LoraSpec | None = None
    adapter_precision: Precision = Precision.bf16
    """fp32 under ZeRO-3, where DeepSpeed does not cast PEFT's adapters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTrace:
    """Activation bytes of one micro-batch; weights are left out.

    A model of L layers keeps ``fixed_saved_bytes + L * saved_bytes_per_layer`` from forward
    to backward. ``forward``, ``loss`` and ``blocks`` transients come on top of that, one at a
    time. ``embedding_bytes`` stands alone: all that is alive once the layers are done. A
    weight's gradient counts while it is being made and is dropped once it is whole.
    """

    saved_bytes_per_layer: int
    fixed_saved_bytes: int
    forward_transient_bytes: int
    """Inside a layer's forward pass."""
    loss_transient_bytes: int
    """From the last hidden state to its gradient: logits and cross-entropy."""
    blocks_transient_bytes: int
    """Inside a layer's backward pass, recomputation included."""
    embedding_bytes: int

    def saved_bytes(self, num_layers: int) -> int:
        """Return what a model of ``num_layers`` keeps from forward to backward."""
        return self.fixed_saved_bytes + num_layers * self.saved_bytes_per_layer


def trace_layers(request: LayerTraceRequest) -> LayerTrace:
    """Trace the architecture on the meta device: no weight is allocated, nothing is computed.

    Raises:
        ModelError: transformers cannot build the architecture, or cannot run it without
            real numbers (mixtures of experts that route on the CPU).
    """
    try:
        two, three = (_Pass(request, num_layers).run() for num_layers in (2, 3))
    except (RuntimeError, ValueError, NotImplementedError, KeyError) as error:
        raise ModelError(
            f"the architecture cannot be traced: {type(error).__name__}: {error}",
            where=str(request.hf_config.get("model_type")),
            fix="use a model type that the plan knows, or trace it on a GPU with a short run",
        ) from error
    per_layer = three.saved_bytes - two.saved_bytes
    return LayerTrace(
        saved_bytes_per_layer=per_layer,
        fixed_saved_bytes=two.saved_bytes - 2 * per_layer,
        forward_transient_bytes=three.peaks["forward"] - three.saved_bytes,
        loss_transient_bytes=three.peaks["loss"] - three.saved_bytes,
        blocks_transient_bytes=three.peaks["blocks"] - three.saved_bytes,
        embedding_bytes=three.peaks.get("embedding", 0),
    )


class _Pass:
    """One forward and backward pass of a short model; bytes are above its weights."""

    def __init__(self, request: LayerTraceRequest, num_layers: int) -> None:
        self._request, self._num_layers = request, num_layers
        self._tracker = StorageTracker(include_meta=True)
        self._weights_bytes = 0
        self.peaks: dict[str, int] = {}
        self.saved_bytes = 0

    def run(self) -> _Pass:
        """Trace; the results are in ``peaks`` and ``saved_bytes``."""
        request, tracker = self._request, self._tracker
        with torch.device("meta"):
            model, decoder = self._build()
            shape = (request.strategy.micro_batch_size_per_gpu, request.max_seq_len)
            ids = torch.zeros(shape, dtype=torch.long)
        decoder.register_forward_hook(self._after_decoder)
        _layers_of(decoder, self._num_layers)[0].register_forward_pre_hook(self._before_layers)
        for param in model.parameters():
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(_drop_gradient)  # type: ignore[no-untyped-call]
        tracker.add_external_all([*model.parameters(), *model.buffers(), ids])
        self._weights_bytes = tracker.current_bytes
        tracker.reset_peak()
        # The search for packed sequences reads values, and a meta tensor has none.
        no_packing = patch("transformers.masking_utils.find_packed_sequence_indices", _nothing)
        with tracker, no_packing:
            loss = model(input_ids=ids, labels=ids).loss
            tracker.tag = "loss"
            loss.backward()
            del loss
        self._end(tracker.tag)
        return self

    def _build(self) -> tuple[torch.nn.Module, torch.nn.Module]:
        request = self._request
        config = {**request.hf_config, "num_hidden_layers": self._num_layers}
        if config.get("layer_types"):
            config["layer_types"] = list(config["layer_types"])[: self._num_layers]
        base: Any = build_model(config, request.strategy, precision=request.precision, scale=1)
        model, decoder = base, base.get_decoder()
        tokens = request.strategy.micro_batch_size_per_gpu * request.max_seq_len
        use_loss(base, request.strategy.loss, max_tokens=tokens, scale=1)
        if request.lora is not None:
            model = add_adapters(model, request.lora, scale=1)
            for param in (p for p in model.parameters() if p.requires_grad):
                param.data = param.data.to(TORCH_DTYPE[request.adapter_precision])
        enable_checkpointing(base, request.strategy.gradient_checkpointing)
        return model, decoder

    def _end(self, phase: str) -> None:
        peak = self._tracker.peak_bytes - self._weights_bytes
        self.peaks[phase] = max(self.peaks.get(phase, 0), peak)
        self._tracker.reset_peak()

    def _after_decoder(self, _module: torch.nn.Module, _args: Any, output: Any) -> None:
        self._end("forward")
        self.saved_bytes = self._tracker.current_bytes - self._weights_bytes
        output[0].register_hook(self._after_head)

    def _after_head(self, _gradient: torch.Tensor) -> None:
        self._end("loss")
        self._tracker.tag = "blocks"

    def _before_layers(self, _module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if args and args[0].requires_grad:
            args[0].register_hook(self._after_layers)

    def _after_layers(self, _gradient: torch.Tensor) -> None:
        self._end("blocks")
        self._tracker.tag = "embedding"


def _layers_of(decoder: torch.nn.Module, num_layers: int) -> torch.nn.ModuleList:
    for module in decoder.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers:
            return module
    raise ValueError(f"the decoder has no list of {num_layers} layers")


def _drop_gradient(param: torch.Tensor) -> None:
    param.grad = None


def _nothing(*_: Any, **__: Any) -> None:
    return None
