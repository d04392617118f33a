"""Bytes of one decoder layer of any architecture, traced without numbers on the meta device."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest.mock import patch

import torch

from launcher.strategy import Precision
from launcher.traced_layer import TracedAttention, TracedBytes, TracedLayer, TracedMoment
from launcher.worker.model_facts import config_of, decoder_of, layers_of
from launcher.worker.storage_tracker import StorageTracker
from launcher.worker.trace_model import (
    FUSED_ATTENTION,
    TORCH_DTYPE,
    add_adapters,
    register_fused_attention,
    replace_dropout,
)
from launcher.workload import LoraSpec

# One layer below and one above the layer that is measured.
_LAYERS, _MEASURED = 3, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRequest:
    """What to trace; ``lora`` is ``None`` for full fine-tuning. Lengths in tokens."""

    hf_config: Mapping[str, Any]
    max_seq_len: int
    precision: Precision
    lora: LoraSpec | None
    attention: TracedAttention
    has_zero3_linear: bool
    is_moe: bool = False
    layer_index: int | None = None
    """The layer to trace, below and above copies of itself; ``None``: the model's first three."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _GradientReading:
    """Backward up to one parameter's gradient; bytes are the layer's own."""

    name: str
    peak_bytes: int
    bytes_when_done: int
    """Without the gradient itself."""
    elements: int


@dataclass(slots=True, kw_only=True)
class _Reading:
    """What one pass showed of the measured layer, in bytes."""

    saved: int = 0
    saved_input: int = 0
    saved_by_first_layer: int = 0
    forward: int = 0
    gradients: list[_GradientReading] = field(default_factory=list)
    last_peak: int = 0
    """Backward after the last gradient."""


def trace_layer(request: LayerRequest) -> dict[str, Any]:
    """Return the layer's trace as JSON values; exact at ``max_seq_len``, any micro-batch.

    Three passes tell what grows with tokens, with pairs of tokens, and not at all.
    """
    length = request.max_seq_len
    half = max(1, length // 2)
    sizes = ((1, length), (1, half), (2, length))
    traced = [_Pass(request, batch, tokens).run() for batch, tokens in sizes]
    plain = [_Pass(request, batch, tokens).run_without_graph() for batch, tokens in sizes]

    def fit(read: Callable[[_Reading], int], readings: list[_Reading] = traced) -> TracedBytes:
        return _fit([read(reading) for reading in readings], length=length, half=half)

    layer = TracedLayer(
        attention=request.attention,
        has_zero3_linear=request.has_zero3_linear,
        is_moe=request.is_moe,
        saved=fit(lambda reading: reading.saved),
        saved_input=fit(lambda reading: reading.saved_input),
        unused_in_first_layer=fit(
            lambda reading: max(0, reading.saved - reading.saved_by_first_layer)
        ),
        forward=fit(lambda reading: reading.forward),
        inference=fit(lambda reading: reading.forward, plain),
        backward=_moments(fit, traced[0].gradients),
    )
    return asdict(layer)


def _moments(
    fit: Callable[[Callable[[_Reading], int]], TracedBytes], gradients: list[_GradientReading]
) -> tuple[TracedMoment, ...]:
    found = []
    earlier = last = 0
    for index, gradient in enumerate(gradients):
        before = {"last_gradient_elements": last, "earlier_gradient_elements": earlier}
        found.append(
            TracedMoment(
                name=f"backward to {gradient.name}",
                peak=fit(lambda reading, i=index: reading.gradients[i].peak_bytes),  # type: ignore[misc]
                new_gradient_elements=0,  # the peak holds it, if it was there
                is_parameter_done=False,
                **before,
            )
        )
        found.append(
            TracedMoment(
                name=f"{gradient.name} (gradient hook)",
                peak=fit(lambda reading, i=index: reading.gradients[i].bytes_when_done),  # type: ignore[misc]
                new_gradient_elements=gradient.elements,
                is_parameter_done=True,
                **before,
            )
        )
        last, earlier = gradient.elements, earlier + gradient.elements
    found.append(
        TracedMoment(
            name="backward to the layer's input",
            peak=fit(lambda reading: reading.last_peak),
            new_gradient_elements=0,
            last_gradient_elements=last,
            earlier_gradient_elements=earlier,
            is_parameter_done=False,
        )
    )
    return tuple(found)


def _fit(values: list[int], *, length: int, half: int) -> TracedBytes:
    """Return bytes per token, per token pair and fixed, from batches 1, 1 and 2.

    Where a mask begins between the two lengths no parabola fits: then all that grows is put on
    tokens, exact at ``length``.
    """
    once, shorter, twice = values
    growing = twice - once
    fixed = once - growing
    if half < length:
        rest = shorter - fixed
        pairs = (growing - rest * length / half) / (length * (length - half))
        tokens = growing / length - pairs * length
        if pairs >= 0 and tokens >= 0:
            return tokens, pairs, float(fixed)
    return growing / length, 0.0, float(fixed)


class _Pass:
    """One forward, and backward, of a short model."""

    def __init__(self, request: LayerRequest, batch: int, tokens: int) -> None:
        self._request, self._shape = request, (batch, tokens)
        self._tracker = StorageTracker(include_meta=True)
        self._reading = _Reading()
        self._starts: list[int] = []
        self._input: weakref.ref[torch.UntypedStorage] | None = None
        self._input_bytes = self._output_bytes = self._base = 0

    def run(self) -> _Reading:
        """Run forward and backward."""
        decoder, layers = self._build()
        layers[_MEASURED].register_forward_hook(self._after_layer)
        for name, param in layers[_MEASURED].named_parameters():
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(self._gradient_hook(name))  # type: ignore[no-untyped-call]
        measured = {id(param) for param in layers[_MEASURED].parameters()}
        for param in decoder.parameters():
            if param.requires_grad and id(param) not in measured:
                param.register_post_accumulate_grad_hook(_drop_gradient)
        self._run(decoder, layers, has_graph=True)
        return self._reading

    def run_without_graph(self) -> _Reading:
        """Run forward alone, as checkpointing and evaluation do."""
        decoder, layers = self._build()
        layers[_MEASURED].register_forward_hook(self._after_plain_layer)
        self._run(decoder, layers, has_graph=False)
        return self._reading

    def _build(self) -> tuple[Any, torch.nn.ModuleList]:
        from transformers import AutoModelForCausalLM

        request = self._request
        register_fused_attention(scale=1)
        index = request.layer_index
        num_layers = _LAYERS if index is None else index + 1
        config = config_of(request.hf_config, num_layers=num_layers)
        config._attn_implementation = "eager" if request.attention == "eager" else FUSED_ATTENTION
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(
                config, dtype=TORCH_DTYPE[request.precision]
            )
            model.train()
            decoder = decoder_of(model)
            if index is not None:
                _repeat_layer(decoder, index)
            if request.lora is not None:
                add_adapters(model, request.lora, scale=1)
                # PEFT takes over the base weight's precision, but not from a meta tensor.
                model.to(TORCH_DTYPE[request.precision])
        replace_dropout(model)
        return decoder, layers_of(decoder, _LAYERS)[1]

    def _run(self, decoder: Any, layers: torch.nn.ModuleList, *, has_graph: bool) -> None:
        tracker = self._tracker
        for layer in layers:
            layer.register_forward_pre_hook(self._before_layer, with_kwargs=True)
        ids = torch.zeros(self._shape, dtype=torch.long, device="meta")
        tracker.add_external_all([*decoder.parameters(), *decoder.buffers(), ids])
        with ExitStack() as stack:
            if self._request.has_zero3_linear:
                from deepspeed.runtime.zero.linear import zero3_linear_wrap

                stack.enter_context(patch("torch.nn.functional.linear", zero3_linear_wrap))
            # The search for packed sequences reads values, and a meta tensor has none.
            stack.enter_context(
                patch("transformers.masking_utils.find_packed_sequence_indices", _nothing)
            )
            stack.enter_context(torch.set_grad_enabled(has_graph))
            stack.enter_context(tracker)
            output = decoder(input_ids=ids).last_hidden_state
            if has_graph:
                self._after_forward()
                output.sum().backward()

    def _before_layer(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        index = len(self._starts)
        self._starts.append(self._tracker.current_bytes)
        if index == _MEASURED:
            self._tracker.reset_peak()
            self._input_bytes = hidden.untyped_storage().nbytes()
            self._input = weakref.ref(hidden.untyped_storage())
            if hidden.requires_grad:
                hidden.register_hook(self._after_measured_backward)

    def _after_plain_layer(self, *_: Any) -> None:
        self._reading.forward = self._tracker.peak_bytes - self._starts[_MEASURED]

    def _after_layer(self, _module: Any, _args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self._reading.forward = self._tracker.peak_bytes - self._starts[_MEASURED]
        self._output_bytes = hidden.untyped_storage().nbytes()
        hidden.register_hook(self._before_measured_backward)

    def _after_forward(self) -> None:
        reading, (first, measured, above) = self._reading, self._starts
        reading.saved = above - measured
        reading.saved_by_first_layer = measured - first
        assert self._input is not None
        if self._input() is not None:
            reading.saved_input = self._input_bytes
        reading.forward += reading.saved_input

    def _before_measured_backward(self, _gradient: torch.Tensor) -> None:
        # Below the layer: what is alive now without what it saved and its output's gradient.
        own = self._reading.saved + self._output_bytes
        self._base = self._tracker.current_bytes - own
        self._tracker.reset_peak()

    def _gradient_hook(self, name: str) -> Callable[[torch.Tensor], None]:
        def hook(param: torch.Tensor) -> None:
            tracker = self._tracker
            gradient_bytes = param.numel() * param.element_size()
            self._reading.gradients.append(
                _GradientReading(
                    name=name,
                    peak_bytes=tracker.peak_bytes - self._base,
                    bytes_when_done=tracker.current_bytes - self._base - gradient_bytes,
                    elements=param.numel(),
                )
            )
            param.grad = None
            tracker.reset_peak()

        return hook

    def _after_measured_backward(self, _gradient: torch.Tensor) -> None:
        self._reading.last_peak = self._tracker.peak_bytes - self._base


def _repeat_layer(decoder: Any, index: int) -> None:
    """Leave a decoder three layers like its last one, the layer ``index``."""
    _, layers = layers_of(decoder, index + 1)
    wanted, config = layers[index], decoder.config
    del layers[:]
    layers.extend([wanted, copy.deepcopy(wanted), copy.deepcopy(wanted)])
    config.num_hidden_layers = _LAYERS
    kinds = getattr(config, "layer_types", None)
    if kinds:
        # A layer may look its own up by its old number.
        config.layer_types = [kinds[index]] * max(_LAYERS, index + 1)


def _drop_gradient(param: torch.Tensor) -> None:
    param.grad = None


def _nothing(*_: Any, **__: Any) -> None:
    return None
