"""What the host does in a step: operations that Python starts, modules that it calls, waiting.

Operations of a layer's forward were counted below autograd on tiny models of the same structure
(benchmarks/count_calls.py: transformers 5.23, PEFT 0.21, DeepSpeed 0.19.8).
"""

from __future__ import annotations

from launcher.model_spec import ModelSpec
from launcher.predict.time_calibration import TimeCalibration
from launcher.predict.weight_totals import WeightTotals
from launcher.strategy import (
    Attention,
    Checkpointing,
    Loss,
    Method,
    Offload,
    Precision,
    Strategy,
)
from launcher.workload import Workload

# Dropouts that a layer calls beside its linear layers and norms, whatever their probability:
# modeling_gpt_neox.py, modeling_phi.py and modeling_phi3.py of transformers 5.23.
_DROPOUT_CALLS = {"gpt_neox": 2, "phi": 2, "phi3": 2}


def num_modules(workload: Workload, totals: WeightTotals) -> float:
    """Count the modules that the decoder layers call in one pass, adapters' included."""
    model = workload.model
    # The layer itself, its attention, its MLP and the activation own nothing.
    bare = 4 + _DROPOUT_CALLS.get(model.model_type, 0)
    # An adapter's layer and its dropout own nothing either.
    return (
        num_modules_with_params(workload, totals)
        + bare * model.num_hidden_layers
        + 2 * totals.lora_linears
    )


def num_modules_with_params(workload: Workload, totals: WeightTotals) -> float:
    """Count those that own parameters, adapters' A and B included."""
    model = workload.model
    norms = model.num_norms_per_layer + 2 * model.has_qk_norm
    experts = 2 * model.num_moe_layers
    return totals.num_linears + norms * model.num_hidden_layers + experts + 2 * totals.lora_linears


def host_operations(
    workload: Workload,
    strategy: Strategy,
    totals: WeightTotals,
    calibration: TimeCalibration,
    *,
    num_loss_chunks: int,
) -> float:
    """Return operations that Python dispatches in one micro-step, backward included.

    One that costs more than a plain operation counts as several.
    """
    model = workload.model
    forward = _layer_operations(workload, strategy, calibration) * model.num_hidden_layers
    forward += totals.num_linears + calibration.lora_linear_ops * totals.lora_linears
    recomputed = 2 * (1 + calibration.checkpoint_hook_fraction) + 1
    # Embedding, masks, head, loss: about 60 in all, and more for every further chunk of the loss.
    # Ours is checkpointed chunk by chunk: slice, product, float, log_softmax, two of nll, sum.
    per_chunk = 7 * recomputed if strategy.loss is Loss.chunked else 12
    outside = 60.0 + per_chunk * (num_loss_chunks - 1)
    recomputes = strategy.gradient_checkpointing is not Checkpointing.none
    if workload.method is Method.qlora:
        # One autograd function around each product: it saves little, so hooks add little.
        outside += (2 + recomputes) * calibration.quantized_linear_ops * totals.num_linears
    return (recomputed if recomputes else 2) * forward + outside


def awaited_seconds(
    trainable_tensors: int, strategy: Strategy, calibration: TimeCalibration
) -> float:
    """Return the host's time in the last backward during which the GPU has nothing to do.

    With an offloaded optimizer each gradient is asked whether it is finite before it is copied
    down, and the answer is waited for: counted on a processor, once for each trained tensor.

    Source:
        DeepSpeed 0.19.8 ``zero/stage_1_and_2.py``: ``copy_grads_in_partition`` and
        ``update_offload_overflow_tracker``, at the accumulation boundary alone.
    """
    if strategy.offload_optimizer is Offload.none or strategy.zero_stage == 3:
        return 0.0
    seconds = calibration.gradient_hook_seconds * trainable_tensors
    return calibration.gradient_check_fraction * seconds


def _layer_operations(
    workload: Workload, strategy: Strategy, calibration: TimeCalibration
) -> float:
    """Return the operations of a layer's forward besides its linear layers."""
    model, fused = workload.model, strategy.liger_kernels
    triton = calibration.triton_ops
    norm = triton if fused else _norm_operations(model, workload.precision)
    norms = (model.num_norms_per_layer + 2 * model.has_qk_norm) * norm
    rope = triton if fused else 10
    # Written out: keys and values repeated, two products, scale, mask, softmax, two casts, a copy.
    is_eager = strategy.attention is Attention.eager
    attention = 10 if is_eager else calibration.fused_attention_ops
    is_written_out = model.mlp == "plain" and model.activation in ("gelu_new", "gelu_fast")
    activation = 8 if is_written_out else (triton if fused else 2)
    # Router, sorting and grouped products of transformers' experts.
    experts = 25 * model.num_moe_layers / model.num_hidden_layers
    return norms + rope + attention + activation + experts + 2


def _norm_operations(model: ModelSpec, precision: Precision) -> int:
    if model.norm != "rmsnorm":
        return 1
    # To fp32, square, mean, sum, root, product, back, weight; Gemma adds 1 to the weight in fp32.
    # fp32 itself needs no casts.
    operations = 10 if model.model_type.startswith("gemma") else 8
    return operations - 2 * (precision is Precision.fp32)
