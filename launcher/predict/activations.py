"""Bytes of activations at the moments of one micro-step, for any decoder in the catalogue."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from launcher.hardware import GpuSpec
from launcher.predict.attention_kernel import attention_kernel, has_cudnn_attention
from launcher.predict.attention_parts import ATTENTION_OUTPUTS
from launcher.predict.autograd_tape import Moment
from launcher.predict.decoder_layer import MLP_OUTPUTS
from launcher.predict.layer_parts import AttentionKernel, LayerSetting
from launcher.predict.layer_profile import LayerProfile, layer_profile
from launcher.predict.output_layer import LossMoment, OutputLayer
from launcher.strategy import Checkpointing, Loss, Method, Offload, Precision, Strategy
from launcher.workload import Workload

_BATCH_BYTES = 24  # a token's id, label and mask, 8 B each


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMoment:
    """One instant of a layer in bytes; gradients are counted in elements for ZeRO to place."""

    name: str
    saved_bytes: float
    passing_bytes: float
    weight_bytes: float
    new_gradient_elements: int
    last_gradient_elements: int
    is_parameter_done: bool
    earlier_gradient_elements: int
    total_bytes: float
    """Everything of the layer that is alive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationTimeline:
    """Activations of one micro-step on one rank, in bytes."""

    inputs_bytes: float
    """Token ids, labels, positions and the attention mask: alive until backward is over."""
    batch_bytes: float
    """Of them, what the step still has: ids and labels."""
    layer_saved_bytes: float
    """What one layer keeps until its backward (its input only, when checkpointed)."""
    first_layer_discount_bytes: float
    num_layers: int
    is_recomputed: bool
    is_on_host: bool
    """Checkpointed layer inputs wait in host memory."""
    kept_embeddings_bytes: float
    """Embeddings made to require a gradient, a leaf that only the host's copy replaces."""
    int8_inputs_bytes: float
    """What int8 layers hold until the loss is gone: the step is over, checkpointing or not."""
    norm_saved_bytes: float
    final_norm_forward: LayerMoment
    final_norm_backward: LayerMoment
    forward: LayerMoment
    inference: LayerMoment
    loss: tuple[LossMoment, ...]
    backward: tuple[LayerMoment, ...]
    hidden_bytes: float
    """One hidden state: tokens x hidden size."""
    evaluation_loss_bytes: float
    logits_hole_bytes: float
    """The logits in the model's precision, when all exist at once before their fp32 copy."""

    @property
    def saved_bytes(self) -> float:
        """What all layers keep when forward is over."""
        return self.layer_saved_bytes * self.num_layers - self.first_layer_discount_bytes


def timeline(
    workload: Workload, strategy: Strategy, gpu: GpuSpec, *, adapter_bytes: int
) -> ActivationTimeline:
    """Return the activations of one micro-step.

    Args:
        workload: model, method and length.
        strategy: micro-batch, checkpointing, kernels and loss.
        gpu: decides the attention kernel and whether CUDA's temporaries exist.
        adapter_bytes: bytes per element of LoRA weights and of what flows through them.

    Source:
        transformers 5.23 modules, operation by operation (``launcher/predict/decoder_layer.py``).
    """
    return _timeline(
        workload,
        _Choices(
            kernel=attention_kernel(workload, strategy, gpu),
            kernel_without_window=attention_kernel(workload, strategy, gpu, has_window=False),
            checkpointing=strategy.gradient_checkpointing,
            loss=strategy.loss,
            micro_batch_size=strategy.micro_batch_size_per_gpu,
            sequence_parallel_size=strategy.sequence_parallel_size,
            adapter_bytes=adapter_bytes,
            has_liger=strategy.liger_kernels and gpu.device_type == "cuda",
            has_zero3_linear=strategy.zero_stage == 3,
            has_offloaded_params=strategy.offload_param is not Offload.none,
            is_cuda=gpu.device_type == "cuda",
            has_cudnn_attention=has_cudnn_attention(gpu),
        ),
    )


class _Choices(NamedTuple):
    """What activations depend on besides the workload."""

    kernel: AttentionKernel
    kernel_without_window: AttentionKernel
    checkpointing: Checkpointing
    loss: Loss
    micro_batch_size: int
    sequence_parallel_size: int
    adapter_bytes: int
    has_liger: bool
    has_zero3_linear: bool
    has_offloaded_params: bool
    is_cuda: bool
    has_cudnn_attention: bool


@functools.lru_cache(maxsize=4096)
def _timeline(workload: Workload, choices: _Choices) -> ActivationTimeline:
    model, length = workload.model, workload.max_seq_len
    tokens = choices.micro_batch_size * length / choices.sequence_parallel_size
    # Ulysses gives each rank all tokens of a share of the heads during attention.
    scores = tokens * length
    kinds = list(_layer_kinds(workload, choices))
    # Layers of several kinds: the one that keeps most stands where the peak is.
    kinds.sort(key=lambda kind: kind[1].saved.at(tokens, scores))
    profile = kinds[-1][1]
    is_recomputed = choices.checkpointing is not Checkpointing.none
    width = workload.precision.bytes_per_element
    hidden = tokens * model.hidden_size * width
    held = sum(count * kind.saved.at(tokens, scores) for count, kind in kinds)
    layer_saved = held / model.num_hidden_layers
    if choices.checkpointing is Checkpointing.full:
        layer_saved = hidden
    elif choices.checkpointing is Checkpointing.cpu_offload:
        layer_saved = 0.0
    is_frozen = workload.method is not Method.full
    discount = 0.0
    if is_frozen and not is_recomputed:
        discount = kinds[0][1].unused_in_first_layer.at(tokens, scores)
    output = _output_layer(workload, choices, tokens)
    return ActivationTimeline(
        inputs_bytes=_inputs_bytes(workload, choices, tokens, scores),
        batch_bytes=_BATCH_BYTES * tokens,
        layer_saved_bytes=layer_saved,
        first_layer_discount_bytes=discount,
        num_layers=model.num_hidden_layers,
        is_recomputed=is_recomputed,
        is_on_host=choices.checkpointing is Checkpointing.cpu_offload,
        kept_embeddings_bytes=(
            hidden if is_frozen and choices.checkpointing is Checkpointing.cpu_offload else 0.0
        ),
        int8_inputs_bytes=_int8_inputs_bytes(workload, tokens),
        norm_saved_bytes=output.final_norm_bytes(
            is_rms=model.norm == "rmsnorm", is_frozen=is_frozen, has_liger=choices.has_liger
        ),
        final_norm_forward=_fullest(profile.final_norm_forward, tokens, scores),
        final_norm_backward=_fullest(profile.final_norm_backward, tokens, scores),
        forward=_fullest(profile.inference if is_recomputed else profile.forward, tokens, scores),
        inference=_fullest(profile.inference, tokens, scores),
        loss=output.moments(choices.loss),
        backward=_backward(profile, tokens, scores, is_recomputed=is_recomputed),
        hidden_bytes=hidden,
        evaluation_loss_bytes=output.evaluation_bytes(choices.loss),
        logits_hole_bytes=(
            tokens * model.vocab_size * width if choices.loss is Loss.full and width != 4 else 0.0
        ),
    )


def _layer_kinds(workload: Workload, choices: _Choices) -> Iterator[tuple[int, LayerProfile]]:
    """Yield how many layers are of each kind: with experts or without, with a window or without.

    No model of the catalogue mixes both.
    """
    model = workload.model
    count, windows, experts = (
        model.num_hidden_layers,
        model.num_sliding_layers,
        model.num_moe_layers,
    )
    parts = (
        (windows or count, choices.kernel, bool(experts)),
        (count - windows if windows else 0, choices.kernel_without_window, bool(experts)),
    )
    if 0 < experts < count:
        parts = ((count - experts, choices.kernel, False), (experts, choices.kernel, True))
    for number, kernel, is_moe in parts:
        if number:
            yield number, layer_profile(_layer_setting(workload, choices, kernel, is_moe=is_moe))


def _layer_setting(
    workload: Workload, choices: _Choices, kernel: AttentionKernel, *, is_moe: bool
) -> LayerSetting:
    """Return what decides a layer's activations."""
    is_frozen = workload.method is not Method.full
    is_fp16_kernel = choices.is_cuda and workload.precision is Precision.fp16
    return LayerSetting(
        model=workload.model,
        is_moe=is_moe,
        element_bytes=workload.precision.bytes_per_element,
        adapter_targets=frozenset(weight.name for weight in workload.lora_weights),
        adapter_rank=workload.lora.r if is_frozen else 0,
        adapter_bytes=choices.adapter_bytes,
        has_adapter_dropout=is_frozen and workload.lora.dropout > 0,
        has_dora=is_frozen and workload.lora.use_dora,
        is_frozen=is_frozen,
        has_zero3_linear=choices.has_zero3_linear,
        quantization=workload.quantization.kind if workload.method is Method.qlora else None,
        attention=kernel,
        has_fp32_softmax_input=workload.precision is not Precision.fp32 and not is_fp16_kernel,
        has_liger=choices.has_liger,
        is_cuda=choices.is_cuda,
        has_cudnn_attention=choices.has_cudnn_attention,
        exchanged_key_copies=(
            max(1, choices.sequence_parallel_size // workload.model.num_key_value_heads)
            if choices.sequence_parallel_size > 1
            else 0
        ),
    )


def _output_layer(workload: Workload, choices: _Choices, tokens: float) -> OutputLayer:
    model = workload.model
    return OutputLayer(
        tokens=tokens,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        element_bytes=workload.precision.bytes_per_element,
        is_head_trained=workload.method is Method.full,
        keeps_hidden=workload.method is Method.full or choices.has_zero3_linear,
        has_softcap=model.logit_softcap is not None,
        adds_gradients_in_place=choices.has_zero3_linear and not choices.has_offloaded_params,
    )


def _int8_inputs_bytes(workload: Workload, tokens: float) -> float:
    """Return the inputs that all int8 layers hold in their autograd contexts.

    As plain attributes, which neither checkpointing drops nor backward frees; and a copy of the
    columns with an element above 6, of which an MLP's product has many.

    Source: bitsandbytes 0.50 ``autograd/_functions.py:MatMul8bitLt`` (``ctx.tensors``).
    """
    if workload.method is not Method.qlora or workload.quantization.kind != "int8":
        return 0.0
    linears = [w for w in workload.model.weights if w.in_layer and w.role == "linear"]
    inputs: dict[tuple[bool, bool], int] = {}
    for weight in linears:
        is_attention = "attn" in weight.name or "attention" in weight.name
        is_output = weight.module in ATTENTION_OUTPUTS | MLP_OUTPUTS
        inputs[is_attention, is_output] = weight.shape[1]
    copied = _outlier_columns_fraction(workload.model.hidden_size, tokens)
    elements = sum(inputs.values()) + copied * inputs.get((False, True), 0)
    width = workload.precision.bytes_per_element
    return float(tokens * width * elements * workload.model.num_hidden_layers)


def _outlier_columns_fraction(hidden_size: int, tokens: float) -> float:
    """Return the expected share of an MLP product's columns with an element above 6.

    The product is silu(gate) * up, both normal with deviation 0.02 sqrt(hidden_size): inputs are
    normalized, and transformers' initial weights have deviation 0.02. Trained weights differ.

    Source: H100, Llama-2-7B: 95 % of 1,024 tokens' columns; Qwen2.5-0.5B, 15,360 tokens: none.
    """
    deviation, step = 0.02 * math.sqrt(hidden_size), 0.05
    above = 0.0
    for index in range(-160, 161):  # eight standard deviations
        gate = index * step
        silu = deviation * gate / (1 + math.exp(-deviation * gate))
        density = math.exp(-gate * gate / 2) / math.sqrt(2 * math.pi)
        if silu:
            above += step * density * math.erfc(6 / (abs(silu) * deviation * math.sqrt(2)))
    return float(1 - (1 - above) ** tokens)


def _inputs_bytes(workload: Workload, choices: _Choices, tokens: float, scores: float) -> float:
    """Return the batch, cos and sin, and the 2-D mask."""
    width = workload.precision.bytes_per_element
    length = workload.max_seq_len / choices.sequence_parallel_size
    positions = 2 * width * length * workload.model.head_dim
    mask = scores * {"eager": width, "math": width, "efficient_masked": 1}.get(choices.kernel, 0)
    return _BATCH_BYTES * tokens + positions + mask


def _in_bytes(moment: Moment, tokens: float, scores: float, *, less: float = 0.0) -> LayerMoment:
    saved = max(0.0, moment.saved.at(tokens, scores) - less)
    passing = moment.passing.at(tokens, scores)
    return LayerMoment(
        name=moment.name,
        saved_bytes=saved,
        passing_bytes=passing,
        weight_bytes=moment.weight_bytes,
        new_gradient_elements=moment.new_gradient_elements,
        last_gradient_elements=moment.last_gradient_elements,
        is_parameter_done=moment.is_parameter_done,
        earlier_gradient_elements=moment.earlier_gradient_elements,
        total_bytes=saved + passing + moment.weight_bytes,
    )


def _fullest(moments: tuple[Moment, ...], tokens: float, scores: float) -> LayerMoment:
    return max(
        (_in_bytes(moment, tokens, scores) for moment in moments),
        key=lambda moment: moment.total_bytes,
    )


def _backward(
    profile: LayerProfile, tokens: float, scores: float, *, is_recomputed: bool
) -> tuple[LayerMoment, ...]:
    """Return the layer's backward moments; of those with the same gradients, the fullest."""
    less = profile.saved_input.at(tokens, scores) if is_recomputed else 0.0
    fullest: dict[tuple[int, int, bool], LayerMoment] = {}
    # Recomputing runs the layer's forward once more, with its graph.
    for moment in (*(profile.forward if is_recomputed else ()), *profile.backward):
        found = _in_bytes(moment, tokens, scores, less=less)
        key = (
            found.new_gradient_elements,
            found.earlier_gradient_elements,
            found.is_parameter_done,
        )
        if key not in fullest or fullest[key].total_bytes < found.total_bytes:
            fullest[key] = found
    return _rivals(tuple(fullest.values()))


def _rivals(moments: tuple[LayerMoment, ...]) -> tuple[LayerMoment, ...]:
    """Leave out moments that their own gradients cannot lift above the fullest one.

    16 B per element bounds them: at most 4 while pending, 4 kept and 8 for a norm. Moments with
    and without buckets, and those of gradient hooks, are compared among themselves.
    """
    kinds: dict[tuple[bool, bool], list[LayerMoment]] = {}
    for moment in moments:
        has_buckets = moment.is_parameter_done or moment.earlier_gradient_elements > 0
        kinds.setdefault((moment.is_parameter_done, has_buckets), []).append(moment)
    kept: list[LayerMoment] = []
    for rivals in kinds.values():
        most = max(moment.total_bytes for moment in rivals)
        for moment in rivals:
            elements = (
                moment.new_gradient_elements
                + moment.last_gradient_elements
                + moment.earlier_gradient_elements
            )
            if moment.total_bytes + 16 * elements >= most:
                kept.append(moment)
    return tuple(kept)
