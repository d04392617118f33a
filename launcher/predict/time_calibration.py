"""Constants of the step-time model, each with where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from launcher.hardware import GpuSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelEfficiency:
    """Fractions of a GPU's peaks that training kernels reach."""

    matmul_fraction: float
    """Of the dense peak, in a large linear layer."""
    flash_fraction: float
    """Of the dense peak, in FlashAttention-2, forward and backward together."""
    masked_fraction: float
    """Of the dense peak, in SDPA's memory-efficient kernel (padding mask, or no flash kernel);
    fp32, which runs outside the tensor cores, reaches ``flash_fraction`` of its own peak."""
    memory_fraction: float
    """Of the memory rate, in elementwise kernels."""


# Fitted on the 18 plain runs that tests/unit/step_inputs.py lists; the long runs of
# benchmarks/results/h100.jsonl confirm them (8k-16k tokens within 3 %). torch's SDPA picks cuDNN's
# attention on Hopper, hence the high flash_fraction; the others scale the byte counts of
# launcher/predict/compute_cost.py.
_HOPPER = KernelEfficiency(
    matmul_fraction=0.71, flash_fraction=0.59, masked_fraction=0.15, memory_fraction=0.72
)
# mosaicml/llm-foundry scripts/train/benchmarking/README.md: 73 % of peak with checkpointing on
# A100-80; FlashAttention-2 (arXiv:2307.08691, section 4.1): 50-73 % of peak.
_AMPERE = KernelEfficiency(
    matmul_fraction=0.78, flash_fraction=0.55, masked_fraction=0.25, memory_fraction=0.72
)
# torchtune's README: Llama-3.1-8B LoRA at 3,083 tokens/s on one RTX 4090 is 0.84 of its
# (fp32-accumulate) peak over the whole step; attention as on A100, for lack of a figure.
_WORKSTATION = KernelEfficiency(
    matmul_fraction=0.95, flash_fraction=0.55, masked_fraction=0.25, memory_fraction=0.85
)
# L4, L40S, A10, A10G: small cards run into their power limits. Prior.
_INFERENCE = KernelEfficiency(
    matmul_fraction=0.70, flash_fraction=0.45, masked_fraction=0.25, memory_fraction=0.72
)
# ZeRO-Offload (arXiv:2101.06840): 40 of V100's 125 TFLOPS in whole steps. Prior.
_VOLTA = KernelEfficiency(
    matmul_fraction=0.50, flash_fraction=0.20, masked_fraction=0.20, memory_fraction=0.72
)
_PROCESSOR = KernelEfficiency(
    matmul_fraction=0.50, flash_fraction=0.25, masked_fraction=0.25, memory_fraction=0.50
)


REFERENCE_AUTOGRAD_OP_SECONDS = 46.5e-6
"""What ``launcher.worker.host_speed`` would have measured on the host of the fitted runs.

It was not measured there. On another H100's host benchmarks/step_parts.py found 61.6 µs, and runs
whose time above the GPU's share was 1.32 (LoRA, ZeRO-2), 1.32 (full, ZeRO-3), 1.33 and 1.47 times
the predicted (full, ZeRO-2, checkpoints on host and GPU): benchmarks/step_parts_h100.jsonl. The
median is 1.326. Five minutes later: 60.2 µs, and 1.27 in the median of 14 runs without offload.
"""
HOST_SECONDS = (
    "host_op_seconds", "zero3_hook_seconds", "zero3_module_seconds", "gather_seconds",
    "gradient_hook_seconds", "step_fixed_seconds", "trainer_step_seconds", "reuse_search_seconds",
)  # fmt: skip
"""Those that are a processor's time: a host that is slower in one is slower in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeCalibration:
    """Physical constants of a step.

    "Fitted" means: together, on the runs at even positions of benchmarks/results/h100.jsonl
    (zerofit's own worker) and the plain runs of tests/unit/step_inputs.py, both on H100
    hosts. What is the host's (``HOST_SECONDS``) scales with its processor, which
    ``launcher.worker.host_speed`` measures.
    """

    host_op_seconds: float = 21e-6
    """Python, dispatch and kernel launch of one eager operation. Fitted; pinned by 7B and 1B
    steps of 256 to 1024 tokens."""
    lora_linear_ops: float = 7.5
    """Operations that an adapter adds to a linear layer in one direction: two products, scale
    and sum (four are counted), four module calls and PEFT's own Python. Fitted; pinned by
    all-linear against q and v alone."""
    fused_attention_ops: float = 10.0
    """Plain operations that one call of SDPA or FlashAttention costs on the host. Of samples of
    the stack in benchmarks/step_parts_h100.jsonl, transformers' sdpa_attention_forward holds 204
    to 245 µs a call, brought to the fitted host; backward is taken to cost as much."""
    quantized_linear_ops: float = 12.0
    """Operations that bitsandbytes adds to a linear layer in one pass. Fitted; 7B QLoRA."""
    liger_gradient_touches: float = 10.0
    """How often Liger's loss moves the output matrix's gradient for each chunk of tokens. Twice
    would do, but a product of some 64 rows that is added to it reaches a fifth of the memory
    rate. From h100's 1b-full-z2-2048-liger (fitting half), set to be as far off as that half's
    other 1B full fine-tunings; corrected after blind_h100's two runs of the kind."""
    triton_ops: float = 5.0
    """Operations of one call of Liger's in one direction. Counted with its kernels taken out
    (liger_kernel 0.8, ops/rms_norm.py, ops/swiglu.py): an autograd.Function of views, allocations
    and a launch, five forward; four to six backward."""
    checkpoint_hook_fraction: float = 1.05
    """Added to a checkpointed forward by saved-tensor hooks and RNG bookkeeping. Fitted; 3B
    and 7B with and without checkpointing."""
    zero3_hook_seconds: float = 0.16e-3
    """ZeRO-3's hooks around one call of any module, per pass. On a processor a module without
    parameters costs 0.076 to 0.094 ms (benchmarks/hook_seconds.jsonl); the fitted host's Python
    takes 1.9 to 2.0 times as long (step_parts_h100.jsonl: python_call by 1.326)."""
    zero3_module_seconds: float = 0.40e-3
    """More for a module that owns parameters: gather, release, DeepSpeed's own linear function.
    The full-z3 step of benchmarks/step_parts_h100.jsonl needs 0.42 besides, on that host; the runs
    without a Trainer (tests/unit/step_inputs.py) less."""
    reuse_search_seconds: float = 7e-6
    """A look at one module for parameters that are used again. From the second steps of the 15
    runs in benchmarks/results with over 300,000 looks: 5 to 10 µs, median 7."""
    gather_seconds: float = 0.25e-3
    """More for each collective of several ranks that gathers parameters: its launch, buffers and
    copies. Two H200: 0.27 to 0.74 ms are missing without it in five ZeRO-3 runs of the worker,
    none in two of plain DeepSpeed; chosen between."""
    gradient_hook_seconds: float = 0.3e-3
    """DeepSpeed's Python on the gradient of one trainable tensor: hook, bucket, partition, norm,
    flattening. Chosen between 0.25 and 0.35 ms, which fit equally well; pinned by the 1B full
    fine-tune with four micro-steps."""
    gradient_check_fraction: float = 0.57
    """Of that, the search for infinities and the norm. In benchmarks/step_parts_h100.jsonl
    has_overflow and scaled_global_norm took 0.53 to 0.60 of their own and the hooks' time."""
    step_fixed_seconds: float = 0.010
    """The rest of DeepSpeed's step and the scheduler's. Prior."""
    trainer_step_seconds: float = 0.027
    """transformers' Trainer and its callbacks, a log entry each step included. Fitted; what the
    plain runs, which have no Trainer, do not pay."""
    bottleneck_exponent: float = 4.0
    """Host and GPU take turns as the bottleneck: (host^p + gpu^p)^(1/p). Prior."""
    overlap_fraction: float = 0.8
    """Part of the smaller of compute and communication hidden with overlap_comm. Prior."""
    gpu_adam_bytes_per_param: float = 70.0
    """Norm in fp64 (2+8+8), flatten (2+2), cast (2+4), clip (4+4), Adam (16 read, 12 written),
    bf16 copy (4+2)."""
    eight_bit_adam_bytes_per_param: float = 37.0
    """More for bitsandbytes' 8-bit AdamW, whose kernels are bound by more than memory: 26.8 ps a
    parameter at 1.24e9 on an H100 (benchmarks/step_parts_h100.jsonl), as long as 65 bytes take
    where 28 would do for torch's."""
    cpu_adam_bytes_per_param: float = 56.0
    """Gradient clipped (4+4); master, moments and gradient read (16), master and moments written
    (12, and as much read to fill the caches); bf16 copy (4+2+2). With H100 hosts' 150 GB/s that
    is 0.37 ns; measured on three: 0.45 at 1.2B parameters (h100), 0.35 at 3.2B (study_h100), 0.33
    at 6.7B (h200x2)."""
    collective_latency_seconds: float = 20e-6
    """Per collective and per doubling of the ranks. Prior."""
    efficiency: Mapping[str, KernelEfficiency] = field(default_factory=dict)
    """Overrides by GPU name."""

    def on_host(self, times: float) -> TimeCalibration:
        """Return the constants on a host that needs so many times the seconds."""
        slower: dict[str, Any] = {name: times * getattr(self, name) for name in HOST_SECONDS}
        return replace(self, **slower)

    def efficiency_of(self, gpu: GpuSpec) -> KernelEfficiency:
        """Return the kernel efficiencies of a GPU, by name or by its generation."""
        if gpu.name in self.efficiency:
            return self.efficiency[gpu.name]
        capability = gpu.compute_capability
        if gpu.device_type == "cpu" or capability is None:
            return _PROCESSOR
        if capability < (8, 0):
            return _VOLTA
        if capability == (8, 0):
            return _AMPERE
        if capability < (9, 0):
            return _WORKSTATION if gpu.name.startswith("RTX") else _INFERENCE
        return _HOPPER
