"""Activation bytes of a decoder layer as traced from the real architecture, for any length.

What ``launcher.worker.trace_architecture`` measures of a model whose operations the closed form
does not know; ``launcher.predict.layer_profile`` reads it in place of the ledger.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

TracedBytes = tuple[float, float, float]
"""Bytes per token, per pair of tokens, and fixed."""

TracedAttention = Literal["fused", "eager"]
"""``fused`` masks where the model needs a mask, as torch's SDPA does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedMoment:
    """The fullest instant of the layer's backward between two parameter gradients.

    ``peak`` is everything of the layer that is alive, a gradient in the making included. At
    ``is_parameter_done`` it stands without the gradient, which ``new_gradient_elements`` counts.
    """

    name: str
    peak: TracedBytes
    new_gradient_elements: int
    last_gradient_elements: int
    earlier_gradient_elements: int
    is_parameter_done: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedLayer:
    """One layer under one attention kernel and one kind of linear layer."""

    attention: TracedAttention
    has_zero3_linear: bool
    saved: TracedBytes
    """Kept from forward to backward, the layer's own input included if it is."""
    saved_input: TracedBytes
    unused_in_first_layer: TracedBytes
    """What the first layer, whose input has no gradient, keeps less."""
    forward: TracedBytes
    """Peak of the layer's forward, with its graph."""
    inference: TracedBytes
    """The same without a graph."""
    backward: tuple[TracedMoment, ...]
    is_moe: bool = False
    """The layer has routed experts."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TracedArchitecture:
    """All traces of one model, method and precision; compared by identity, as it is made once."""

    layers: tuple[TracedLayer, ...]

    def layer(
        self, attention: TracedAttention, *, has_zero3_linear: bool, is_moe: bool = False
    ) -> TracedLayer:
        """Return the trace for a kernel and a kind of layer, or the nearest there is.

        Only suggestions of another method ask for what was not traced: full fine-tuning, which
        was, keeps more than what they suggest.
        """
        return max(
            self.layers,
            key=lambda layer: (
                layer.is_moe == is_moe,
                layer.attention == attention,
                layer.has_zero3_linear == has_zero3_linear,
            ),
        )


def traced_from_json(value: Mapping[str, Any]) -> TracedArchitecture:
    """Read back what ``dataclasses.asdict`` makes of the traces."""
    return TracedArchitecture(layers=tuple(_layer(item) for item in value["layers"]))


def _layer(value: Mapping[str, Any]) -> TracedLayer:
    sizes = ("saved", "saved_input", "unused_in_first_layer", "forward", "inference")
    moments = tuple(
        TracedMoment(**{**item, "peak": tuple(item["peak"])}) for item in value["backward"]
    )
    return TracedLayer(
        **{**value, **{name: tuple(value[name]) for name in sizes}, "backward": moments}
    )
