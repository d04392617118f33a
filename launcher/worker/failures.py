"""What an error in a rank means for the run."""

from __future__ import annotations

import torch

from launcher.errors import LauncherError
from launcher.failure_kind import FailureKind

_HOST_ALLOCATION_FAILED = "can't allocate memory"  # torch's CPU allocator
_OUT_OF_MEMORY_MESSAGES = (
    "out of memory",  # CUDA driver, cuBLAS, NCCL
    "failed to allocate memory",  # cudnn
)


def failure_kind(error: BaseException) -> FailureKind:
    """Return what an error means for the run."""
    if isinstance(error, LauncherError):
        return error.kind
    if isinstance(error, torch.OutOfMemoryError):
        return FailureKind.gpu_oom
    if isinstance(error, MemoryError):
        return FailureKind.host_oom
    message = str(error).lower()
    if isinstance(error, RuntimeError) and _HOST_ALLOCATION_FAILED in message:
        return FailureKind.host_oom
    if isinstance(error, RuntimeError) and any(m in message for m in _OUT_OF_MEMORY_MESSAGES):
        return FailureKind.gpu_oom
    return FailureKind.other
