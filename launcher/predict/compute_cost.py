"""Work of one micro-step on one GPU: FLOPs, bytes and host operations, before any rates.

Byte counts per element follow the eager modules of transformers 5.23 operation by operation
(reads plus writes); a comment gives each sum for 2-byte numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from launcher.hardware import GpuSpec
from launcher.model_spec import ModelSpec
from launcher.predict.attention_kernel import attention_kernel
from launcher.predict.host_work import host_operations, num_modules, num_modules_with_params
from launcher.predict.layer_parts import AttentionKernel
from launcher.predict.time_calibration import TimeCalibration
from launcher.predict.weight_totals import WeightTotals, weight_totals
from launcher.strategy import LOSS_CHUNK_ELEMENTS, Checkpointing, Loss, Method, Strategy
from launcher.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroStepWork:
    """Work of one forward and backward pass of one micro-batch, on one GPU."""

    tokens: float
    matmul_flops: float
    flash_attention_flops: float
    masked_attention_flops: float
    """In the memory-efficient kernel, or in eager attention's products."""
    fp32_attention_flops: float
    """In SDPA's fall-back to plain products, which computes in fp32 whatever it is given."""
    elementwise_bytes: float
    weight_bytes: float
    """Weights read for the matrices, and dequantized before them."""
    gradient_bytes: float
    """Moved by DeepSpeed between the backward pass and the optimizer."""
    host_ops: float
    model_flops: float
    """FLOPs without recomputation: the numerator of MFU."""
    module_visits: float
    """Calls of modules, over all passes."""
    modules_with_params: float
    """Those of modules that own parameters."""
    trainable_tensors: int
    num_passes: int
    """2, or 3 when the forward is recomputed."""
    trains_adapters: bool

    @property
    def attention_flops(self) -> float:
        """FLOPs of attention in all kernels."""
        return self.flash_attention_flops + self.masked_attention_flops + self.fp32_attention_flops


def micro_step_work(
    workload: Workload,
    strategy: Strategy,
    calibration: TimeCalibration,
    *,
    gpu: GpuSpec,
) -> MicroStepWork:
    """Return the work of one micro-step.

    Args:
        workload: model, method and sequence length.
        strategy: micro-batch, checkpointing, attention, loss and kernels.
        calibration: operation counts of adapters and quantized layers.
        gpu: decides which attention kernel runs.

    Source:
        FLOPs: Korthikanti et al., arXiv:2205.05198, appendix A, split into forward, input
        gradients and weight gradients; frozen matrices have no weight gradient.
    """
    totals = weight_totals(workload)
    tokens = (
        strategy.micro_batch_size_per_gpu * workload.max_seq_len / strategy.sequence_parallel_size
    )
    recomputes = strategy.gradient_checkpointing is not Checkpointing.none
    is_full = workload.method is Method.full
    num_passes = 3 if recomputes else 2
    # forward, input gradient, (weight gradient); the head is never recomputed.
    products = 3 if is_full else 2
    head_products = products + (strategy.loss is Loss.chunked)
    body_flops = 2 * totals.matmul_params * tokens
    head_flops = 2 * totals.head_params * tokens
    lora_flops = 2 * totals.lora_params * tokens
    attention = _AttentionWork(workload, strategy, gpu)
    chunks = num_loss_chunks(workload.model, strategy.loss, tokens)
    return MicroStepWork(
        tokens=tokens,
        matmul_flops=(products + recomputes) * body_flops
        + head_products * head_flops
        + (3 + recomputes) * lora_flops,
        flash_attention_flops=attention.flops({"flash"}),
        masked_attention_flops=attention.flops({"efficient", "efficient_masked", "eager"}),
        fp32_attention_flops=attention.flops({"math"}),
        elementwise_bytes=_elementwise_bytes(workload, strategy, totals, tokens)
        + attention.score_bytes(),
        weight_bytes=_weight_bytes(workload, totals, products + recomputes, num_passes)
        + _head_weight_bytes(workload, strategy, totals, tokens, calibration),
        # zero/stage_1_and_2.py (DeepSpeed 0.19.8): copied into the bucket, divided by the
        # number of ranks in place, copied out of the bucket: 4 bytes each for 16-bit numbers.
        gradient_bytes=6 * workload.precision.bytes_per_element * totals.num_trainable_params,
        host_ops=host_operations(workload, strategy, totals, calibration, num_loss_chunks=chunks),
        model_flops=products * (body_flops + head_flops)
        + 3 * (lora_flops + attention.forward_flops()),
        module_visits=num_passes * num_modules(workload, totals),
        modules_with_params=num_passes * num_modules_with_params(workload, totals),
        trainable_tensors=totals.num_tensors if is_full else 2 * totals.lora_linears,
        num_passes=num_passes,
        trains_adapters=not is_full,
    )


class _AttentionWork:
    """Attention of one micro-step, by the kernel that runs it."""

    def __init__(self, workload: Workload, strategy: Strategy, gpu: GpuSpec) -> None:
        self._model, self._seq_len = workload.model, workload.max_seq_len
        self._strategy, self._width = strategy, workload.precision.bytes_per_element
        self._tokens = (
            strategy.micro_batch_size_per_gpu * self._seq_len / strategy.sequence_parallel_size
        )
        self._recomputes = strategy.gradient_checkpointing is not Checkpointing.none
        sliding = self._model.num_sliding_layers
        layers = {True: sliding, False: self._model.num_hidden_layers - sliding}
        self._layers: list[tuple[AttentionKernel, bool, int]] = [
            (attention_kernel(workload, strategy, gpu, has_window=windowed), windowed, count)
            for windowed, count in layers.items()
            if count
        ]

    def forward_flops(self) -> float:
        """Return 4 x tokens x visible keys x heads x head_dim, summed over layers."""
        return sum(
            self._forward_flops(kernel, windowed=windowed, count=count)
            for kernel, windowed, count in self._layers
        )

    def flops(self, kernels: set[AttentionKernel]) -> float:
        """Return the FLOPs of forward, backward and recomputation in these kernels."""
        total = 0.0
        for kernel, windowed, count in self._layers:
            if kernel in kernels:
                # Fused kernels compute the scores again in backward: 5 products for 2.
                passes = 3.0 if kernel in ("eager", "math") else 3.5
                total += (passes + self._recomputes) * self._forward_flops(
                    kernel, windowed=windowed, count=count
                )
        return total

    def score_bytes(self) -> float:
        """Return the bytes that attention moves for scores that a kernel writes out."""
        per_head = 0.0
        for kernel, _, count in self._layers:
            if kernel == "eager":
                # Forward: scores written 2, scaled 4, masked 6, softmax in fp32 2 + 4, cast 6,
                # read 2; backward: 2 + 6 casts, softmax gradient 12, scale 4, two products 4.
                per_head += count * self._width / 2 * (26 * (1 + self._recomputes) + 28)
            elif kernel == "math":
                # All in fp32, torch 2.13 transformers/attention.cpp. Forward: written 4, masked
                # 8, softmax 8, rows without a key sought (5 + 1) and zeroed 8, read 4; backward:
                # written 4, read for the values 4, times the output 12, softmax gradient 16,
                # read by two products 8.
                per_head += count * (38 * (1 + self._recomputes) + 44)
        return per_head * self._tokens * self._model.num_attention_heads * self._seq_len

    def _forward_flops(self, kernel: AttentionKernel, *, windowed: bool, count: int) -> float:
        keys, width = self._keys(kernel, windowed=windowed), self._model.head_dim
        return 4 * count * self._tokens * keys * self._model.num_attention_heads * width

    def _keys(self, kernel: AttentionKernel, *, windowed: bool) -> float:
        """Return the keys that a query meets; a kernel with a mask computes all of them."""
        if kernel not in ("flash", "efficient"):
            return self._seq_len
        window = self._model.sliding_window if windowed else None
        if window is None or window >= self._seq_len:
            return self._seq_len / 2
        return window - window**2 / (2 * self._seq_len)


def _weight_bytes(
    workload: Workload, totals: WeightTotals, products: int, num_passes: int
) -> float:
    width = workload.precision.bytes_per_element
    # Every expert is read even though a token uses few: a micro-batch touches all of them.
    read = width * totals.stored_matmul_params * products
    if workload.method is not Method.qlora:
        return read
    # Packed weights read and 16-bit ones written before each product (bitsandbytes 0.50,
    # autograd/_functions.py:MatMul4Bit; nf4 0.52 and int8 1.0 bytes per parameter).
    packed = 0.52 if workload.quantization.kind == "nf4" else 1.0
    return read + (packed + width) * totals.num_quantized_params * num_passes


def _head_weight_bytes(
    workload: Workload,
    strategy: Strategy,
    totals: WeightTotals,
    tokens: float,
    calibration: TimeCalibration,
) -> float:
    """Return bytes moved for the output layer's weight and gradient; chunked losses repeat it."""
    is_full = workload.method is Method.full
    touches: float = {
        Loss.full: 2.0 + is_full,
        # Read in forward, again in backward, and for the input's gradient; autograd writes each
        # chunk's weight gradient (1) and adds it to the sum (3).
        Loss.chunked: 3.0 + 4 * is_full,
        # liger_kernel 0.8 ops/fused_linear_cross_entropy.py: read for the logits and for the
        # input's gradient; the weight's gradient is read and written (addmm).
        Loss.liger: 2 + calibration.liger_gradient_touches * is_full,
    }[strategy.loss]
    num_chunks = num_loss_chunks(workload.model, strategy.loss, tokens)
    return workload.precision.bytes_per_element * totals.head_params * touches * num_chunks


def num_loss_chunks(model: ModelSpec, loss: Loss, tokens: float) -> int:
    """Return into how many parts the loss cuts the tokens of a micro-step."""
    if loss is Loss.full:
        return 1
    if loss is Loss.chunked:
        return math.ceil(tokens * model.vocab_size / LOSS_CHUNK_ELEMENTS)
    # liger_kernel 0.8: logits as large as the hidden states, rows rounded up to a power of two.
    rows = math.ceil(tokens / math.ceil(model.vocab_size / model.hidden_size))
    return math.ceil(tokens / (1 << math.ceil(math.log2(rows))))


def _elementwise_bytes(
    workload: Workload, strategy: Strategy, totals: WeightTotals, tokens: float
) -> float:
    """Return bytes that kernels other than matrix products and attention move."""
    model, fused = workload.model, strategy.liger_kernels
    forward, backward = _layer_bytes(model, fused=fused, is_full=workload.method is Method.full)
    # PEFT Linear.forward: adapter output written 2, scaled 4, added 6; input read 2. Backward:
    # scale 4, read twice 4; input read 2, its gradient written 2 and accumulated 6.
    lora_forward = 12 * totals.lora_out_features + 2 * totals.lora_in_features
    lora_backward = 8 * totals.lora_out_features + 10 * totals.lora_in_features
    dropped = 5 * totals.lora_in_features if workload.lora.dropout > 0 else 0
    forward = forward * model.num_hidden_layers + lora_forward + dropped
    backward = backward * model.num_hidden_layers + lora_backward + dropped
    recomputes = strategy.gradient_checkpointing is not Checkpointing.none
    # Logits: float 6, log_softmax 8, their gradients 4 + 12, cast back 6, written 2 and read 2;
    # Liger reads and writes each 16-bit logit about twice.
    per_logit = 8 if strategy.loss is Loss.liger else 40
    if strategy.loss is Loss.chunked:
        per_logit += 14  # float and log_softmax again, in backward
    per_logit += 12 if model.logit_softcap else 0
    width = workload.precision.bytes_per_element / 2
    return width * tokens * ((1 + recomputes) * forward + backward + per_logit * model.vocab_size)


def _layer_bytes(model: ModelSpec, *, fused: bool, is_full: bool) -> tuple[float, float]:
    """Return bytes per token of one layer's norms, rope, activation and residuals."""
    hidden = model.hidden_size
    q_width = model.num_attention_heads * model.head_dim
    kv_width = model.num_key_value_heads * model.head_dim
    # RMSNorm: to fp32 6, square 8, mean 4, scale 8, to 16 bit 6, weight 4; backward the same
    # in reverse with two accumulations; torch and Liger do it in one kernel.
    norm = (36.0, 62.0) if model.norm == "rmsnorm" and not fused else (4.0, 8.0)
    norm_width = model.num_norms_per_layer * hidden
    norm_width += (q_width + kv_width) if model.has_qk_norm else 0
    weight_grad = 8 * norm_width if is_full else 0
    # Rope on q and k: two products 8, rotation 6, sum 6. Liger works in place.
    rope = (4.0, 4.0) if fused else (20.0, 24.0)
    width = model.intermediate_size
    if model.num_moe_layers:
        # Gathered to experts, weighted and summed back as well: 8 more per hidden element.
        width = model.num_experts_per_token * (model.moe_intermediate_size + hidden)
    activation = _activation_bytes(model, fused=fused)
    residuals = 6 if model.has_parallel_residual else 12
    forward = (
        norm[0] * norm_width
        + rope[0] * (q_width + kv_width)
        + 4 * q_width
        + activation[0] * width
        + residuals * hidden
    )
    backward = (
        norm[1] * norm_width
        + weight_grad
        + rope[1] * (q_width + kv_width)
        + 4 * q_width
        + activation[1] * width
        + residuals * hidden
    )
    return forward, backward


def _activation_bytes(model: ModelSpec, *, fused: bool) -> tuple[float, float]:
    """Return forward and backward bytes per element of the MLP's inner width."""
    if model.mlp == "gated":
        # silu 4 and product 6; backward 12 and 6. Liger SwiGLU and GeGLU: 6 and 10.
        return (6.0, 10.0) if fused else (10.0, 18.0)
    # gelu_new and gelu_fast are written out in Python: eight operations.
    return (36.0, 60.0) if model.activation in ("gelu_new", "gelu_fast") else (4.0, 6.0)
