"""Names of the components that estimates and reports show."""

from __future__ import annotations

PARAMETERS = "parameters"
ADAPTERS = "adapter weights"
QUANTIZED = "quantized parameters"
OPTIMIZER = "optimizer states (fp32 master, momentum, variance)"
MASTER = "fp32 master weights"
GRADIENTS = "gradients"
FLAT_GRADIENTS = "flat gradients"
FP32_GRADIENTS = "fp32 gradients"
TEMPORARIES = "optimizer temporaries"
BUCKETS = "reduce buckets"
GATHERED = "gathered parameters (ZeRO-3)"
REDUCTION = "gradient reduction copy"
NORM = "gradient norm (fp64)"
LEAVING = "gradient partition on its way to the host"
SAVED = "saved activations"
RECOMPUTED = "recomputed layer"
PASSING = "passing activations and their gradients"
LOGITS = "logits and cross-entropy"
DEQUANTIZED = "dequantized weight"
PENDING = "gradients of single tensors"
CARRIED = "accumulated gradients"
OWNED = "gradients of the own partition"
INT8_INPUTS = "inputs held by int8 layers"
WORKSPACE = "cuBLAS workspace"
INPUTS = "batch, positions and attention mask"

Components = dict[str, float]
"""Bytes by name, alive at one moment."""
Candidate = tuple[str, Components]
"""A moment that can be its phase's fullest, and what is alive in it."""
