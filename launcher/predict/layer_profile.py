"""What one decoder layer keeps and needs: from the ledger of its operations, or as traced."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

from launcher.predict.attention_parts import ATTENTION_OUTPUTS
from launcher.predict.autograd_tape import Moment, Size
from launcher.predict.decoder_layer import write_final_norm, write_layer
from launcher.predict.layer_parts import LayerSetting
from launcher.traced_layer import TracedArchitecture, TracedAttention


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProfile:
    """What one layer keeps, and its moments; polynomials, for any number of tokens."""

    saved: Size
    saved_input: Size
    """The part of ``saved`` that is the layer's own input, which checkpointing holds anyway."""
    unused_in_first_layer: Size
    """What the first layer need not keep when its input has no gradient (frozen embeddings)."""
    forward: tuple[Moment, ...]
    inference: tuple[Moment, ...]
    backward: tuple[Moment, ...]
    final_norm_forward: tuple[Moment, ...]
    final_norm_backward: tuple[Moment, ...]


def _undominated(moments: Iterable[Moment]) -> tuple[Moment, ...]:
    """Leave out moments that another with the same gradients exceeds at any length."""
    kept: dict[tuple[int, int, bool], list[Moment]] = {}
    for moment in moments:
        key = (
            moment.new_gradient_elements,
            moment.earlier_gradient_elements,
            moment.is_parameter_done,
        )
        rivals = kept.setdefault(key, [])
        if any(_exceeds(rival, moment) for rival in rivals):
            continue
        rivals[:] = [rival for rival in rivals if not _exceeds(moment, rival)]
        rivals.append(moment)
    return tuple(moment for rivals in kept.values() for moment in rivals)


def _exceeds(one: Moment, other: Moment) -> bool:
    left, right = one.saved + one.passing, other.saved + other.passing
    return (
        left.token >= right.token
        and left.score >= right.score
        and left.fixed + one.weight_bytes >= right.fixed + other.weight_bytes
    )


@functools.lru_cache(maxsize=256)
def layer_profile(setting: LayerSetting) -> LayerProfile:
    """Return a layer's moments, those that another moment always exceeds left out."""
    if setting.model.traced is not None:
        return _traced_profile(setting, setting.model.traced)
    tape, final_norm = write_layer(setting), write_final_norm(setting)
    saved = tape.saved()
    hidden = tape.size(0)
    keeps_input = tape.is_saved(0)
    return LayerProfile(
        saved=saved,
        saved_input=hidden if keeps_input else Size(),
        unused_in_first_layer=(
            tape.saved_by_prefix(("RMS norm", "layer norm")) + _first_dropout_masks(setting)
        ),
        final_norm_forward=_undominated(final_norm.forward_moments()),
        final_norm_backward=_undominated(final_norm.backward_moments()),
        forward=_undominated(tape.forward_moments()),
        inference=_undominated(tape.forward_moments(keeps_graph=False)),
        backward=_undominated(tape.backward_moments()),
    )


def _first_dropout_masks(setting: LayerSetting) -> Size:
    """Return the masks of adapters on the first norm's output: no gradient, no mask."""
    if not setting.has_adapter_dropout:
        return Size()
    adapted = [
        weight
        for weight in setting.model.weights
        if weight.name in setting.adapter_targets and weight.shape[1] == setting.model.hidden_size
    ]
    inputs = [w for w in adapted if "attn" in w.name or "attention" in w.name]
    mask_bytes = 1 if setting.is_cuda else setting.adapter_bytes
    count = sum(w.module not in ATTENTION_OUTPUTS for w in inputs)
    return Size(token=count * mask_bytes * setting.model.hidden_size)


def _traced_profile(setting: LayerSetting, traced: TracedArchitecture) -> LayerProfile:
    """Return the profile of a layer that was traced; a quantized weight is dequantized on top."""
    attention: TracedAttention = "eager" if setting.attention in ("eager", "math") else "fused"
    # Trained and quantized linear layers keep the same with and without ZeRO-3.
    is_plain = setting.is_frozen and setting.quantization is None
    layer = traced.layer(
        attention,
        has_zero3_linear=setting.has_zero3_linear and is_plain,
        is_moe=setting.is_moe,
    )
    dequantized = 0.0
    if setting.quantization is not None:
        linears = [w for w in setting.model.weights if w.in_layer and w.role == "linear"]
        dequantized = setting.element_bytes * max(w.num_elements for w in linears)
    final_norm = write_final_norm(setting)
    saved_input = Size(*layer.saved_input)

    def moment(name: str, peak: tuple[float, float, float]) -> Moment:
        # The layer's own input, if kept, is what checkpointing holds anyway.
        rest = Size(*peak) + saved_input * -1
        return Moment(name=name, saved=saved_input, passing=rest, weight_bytes=dequantized)

    return LayerProfile(
        saved=Size(*layer.saved),
        saved_input=saved_input,
        unused_in_first_layer=Size(*layer.unused_in_first_layer),
        forward=(moment("traced forward", layer.forward),),
        inference=(
            Moment(
                name="traced forward",
                saved=Size(),
                passing=Size(*layer.inference),
                weight_bytes=dequantized,
            ),
        ),
        backward=tuple(
            replace(
                moment(part.name, part.peak),
                new_gradient_elements=part.new_gradient_elements,
                last_gradient_elements=part.last_gradient_elements,
                earlier_gradient_elements=part.earlier_gradient_elements,
                is_parameter_done=part.is_parameter_done,
            )
            for part in layer.backward
        ),
        final_norm_forward=_undominated(final_norm.forward_moments()),
        final_norm_backward=_undominated(final_norm.backward_moments()),
    )
