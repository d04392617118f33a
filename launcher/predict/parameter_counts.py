"""How many elements of each kind a workload has, as DeepSpeed's partitions see them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from launcher.strategy import Method
from launcher.workload import Workload

# bitsandbytes block sizes: one absmax per 64 weights, double quantization per 256 of those.
_NF4_BLOCK = 64
_DOUBLE_QUANT_BLOCK = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCounts:
    """Elements of a workload's parameters; ``largest`` and ``expected_cut`` are of one tensor."""

    trainable: int
    frozen: int
    """Frozen and in the model's own precision."""
    quantized: int
    quantized_bytes: float
    quantization_state_bytes: float
    largest_trainable: int
    expected_cut: float
    """Mean rest of the tensor that a partition boundary falls into, sum(n^2) / 2 sum(n)."""
    head: int
    """Trained output matrix that is not the embedding; 0 if frozen or tied."""
    embedding: int
    """Trained embedding matrix; 0 if frozen."""
    output: int
    """The output matrix, trained or not, tied or not."""
    is_head_tied: bool
    trained_sizes: tuple[tuple[int, int], ...]
    """(elements, count) of every trained tensor."""
    largest_in_layers: int
    gatherable: int
    """All parameters that ZeRO-3 partitions; packed ones count as the numbers they look like."""
    largest_in_bytes: float
    """The largest tensor in the model's precision."""
    sizes: tuple[tuple[int, int], ...]
    """(elements, count) of every parameter tensor, adapters included."""

    def larger_than(self, limit: int) -> int:
        """Return elements of the trained tensors that exceed a bucket of ``limit``."""
        return sum(size * count for size, count in self.trained_sizes if size > limit)

    def persisted(self, threshold: int) -> int:
        """Return elements of the tensors that ZeRO-3 keeps gathered."""
        return sum(size * count for size, count in self.sizes if size <= threshold)


@functools.lru_cache(maxsize=512)
def count_parameters(workload: Workload) -> ParameterCounts:
    """Return the parameter counts of a workload.

    Source:
        bitsandbytes 0.50 ``functional.py:quantize_4bit`` (block 64, nested 256) and LLM.int8
        (one fp32 scale per output row); PEFT's A is (r, in) and B (out, r).
    """
    model, is_full = workload.model, workload.method is Method.full
    base = [(weight.num_elements, weight.count) for weight in model.weights]
    adapters = [
        (workload.lora.r * size, weight.count)
        for weight in workload.lora_weights
        for size in weight.shape
    ]
    if workload.lora.use_dora:
        adapters += [(weight.shape[0], weight.count) for weight in workload.lora_weights]
    trained = base if is_full else adapters
    total = sum(size * count for size, count in trained)
    squares = sum(size * size * count for size, count in trained)
    quantized_bytes, state_bytes = _quantized_bytes(workload)
    quantized = workload.num_quantized_params
    ends = {weight.role: weight.num_params for weight in model.weights if not weight.in_layer}
    in_layers = [weight for weight in model.weights if weight.in_layer]
    # ``bnb_4bit_quant_storage`` is the compute type: that many weights look like one number.
    packing = 2 * workload.precision.bytes_per_element if quantized else 1
    return ParameterCounts(
        trainable=total,
        frozen=0 if is_full else model.num_params - quantized,
        quantized=quantized,
        quantized_bytes=quantized_bytes,
        quantization_state_bytes=state_bytes,
        largest_trainable=max((size for size, _ in trained), default=0),
        expected_cut=squares / (2 * total) if total else 0.0,
        head=ends.get("lm_head", 0) if is_full else 0,
        embedding=ends.get("embedding", 0) if is_full else 0,
        output=ends.get("lm_head", ends.get("embedding", 0)),
        is_head_tied="lm_head" not in ends,
        trained_sizes=tuple(trained),
        largest_in_layers=max(weight.num_elements for weight in in_layers),
        gatherable=model.num_params - quantized + quantized // packing + (0 if is_full else total),
        largest_in_bytes=model.largest_tensor_elements * workload.precision.bytes_per_element,
        sizes=tuple(base if is_full else base + adapters),
    )


def _quantized_bytes(workload: Workload) -> tuple[float, float]:
    """Return bytes of packed weights and of their scales."""
    count = workload.num_quantized_params
    if not count:
        return 0.0, 0.0
    if workload.quantization.kind == "int8":
        rows = sum(
            weight.shape[0] * weight.count
            for weight in workload.model.weights
            if weight.role in ("linear", "router")
        )
        return float(count), 4.0 * rows
    if workload.quantization.double_quant:
        per_param = 1 / _NF4_BLOCK + 4 / (_NF4_BLOCK * _DOUBLE_QUANT_BLOCK)
    else:
        per_param = 4 / _NF4_BLOCK
    return count / 2, count * per_param
