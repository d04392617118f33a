"""Sums over a workload's weights that the step-time model asks for again and again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from launcher.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightTotals:
    """Sums over a workload's weights, in elements unless a name says otherwise."""

    num_params: int
    num_trainable_params: int
    matmul_params: float
    """Linear weights of the layers that one token meets: of experts, the active ones."""
    stored_matmul_params: int
    """The same with all experts."""
    head_params: int
    num_quantized_params: int
    num_linears: int
    num_tensors: int
    lora_params: int
    lora_linears: int
    lora_in_features: int
    lora_out_features: int


@lru_cache(maxsize=64)
def weight_totals(workload: Workload) -> WeightTotals:
    """Return the sums; remembered, because a planner asks thousands of times for one model."""
    model = workload.model
    active = model.num_experts_per_token / model.num_experts if model.num_experts else 0.0
    matmul_params, stored, linears = 0.0, 0, 0
    for weight in model.weights:
        if weight.role in ("linear", "router"):
            matmul_params += weight.num_params
            stored += weight.num_params
            linears += weight.count
        elif weight.role == "expert":
            matmul_params += weight.num_params * active
            stored += weight.num_params
    lora_weights = workload.lora_weights
    lora_in = sum(weight.shape[1] * weight.count for weight in lora_weights)
    lora_out = sum(weight.shape[0] * weight.count for weight in lora_weights)
    return WeightTotals(
        num_params=model.num_params,
        num_trainable_params=workload.num_trainable_params,
        matmul_params=matmul_params,
        stored_matmul_params=stored,
        head_params=model.vocab_size * model.hidden_size,
        num_quantized_params=workload.num_quantized_params,
        num_linears=linears,
        num_tensors=sum(weight.count for weight in model.weights),
        lora_params=workload.lora.r * (lora_in + lora_out),
        lora_linears=sum(weight.count for weight in lora_weights),
        lora_in_features=lora_in,
        lora_out_features=lora_out,
    )
