"""Where Liger's kernels work: the architectures that it patches, the GPUs that run Triton."""

from __future__ import annotations

from launcher.hardware import GpuSpec

# liger_kernel 0.8.5 transformers/monkey_patch.py: MODEL_TYPE_TO_APPLY_LIGER_FN, the language
# models of it that the memory model was compared with. Of others Liger only logs that it does
# nothing (``_apply_liger_kernel``), and the run would not be the one that was planned.
LIGER_MODEL_TYPES = frozenset(
    {
        "gemma2", "gemma3_text", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3",
        "qwen3_moe", "smollm3",
    }
)  # fmt: skip


def has_liger_kernels(model_type: str, gpu: GpuSpec) -> bool:
    """Return whether Liger knows the architecture, and the GPU runs what it is written in."""
    return model_type in LIGER_MODEL_TYPES and runs_triton(gpu)


def runs_triton(gpu: GpuSpec) -> bool:
    """Return whether Triton, in which Liger's kernels are written, supports the GPU.

    Source: triton README, "Compatibility": NVIDIA from compute capability 8.0, and AMD.
    """
    return gpu.compute_capability is not None and gpu.compute_capability >= (8, 0)
