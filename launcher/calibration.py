"""Physical constants that no formula gives, in one place, each with its source."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.units import GIB, MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Constants of torch, CUDA and NCCL that measured runs pin down."""

    cublas_workspace_bytes: int = 8_519_680
    """Per handle and stream below compute capability 9.0: 4096 x 2 KiB + 16 x 8 KiB.
    Source: torch 2.13 ``aten/src/ATen/cuda/CublasHandlePool.cpp:parseChosenWorkspaceSize``."""
    cublas_workspace_bytes_hopper: int = 32 * MIB
    """The same from compute capability 9.0. Same source."""
    num_cublas_handles: int = 2
    """One for the thread that runs forward, one for autograd's. H100 after a step: 2 x 32 MiB
    beyond parameters and states."""
    nccl_bytes: int = int(1.15 * GIB)
    """Device memory of NCCL's communicator and kernels, outside torch; DeepSpeed makes one
    even for a single rank. H100, driver 580: nvidia-smi minus reserved is 1.81 GB."""
    block_slack_bytes: int = 200_000_000
    """Reserved and never handed out: block rounding, the small-block pool, a second stream's.
    H100, seven runs of ZeRO-2 whose peak is in backward: 0.17 to 0.36 GB."""
    transient_fragmentation: float = 0.02
    """Reserved but unusable, as a fraction of what comes and goes, expandable segments. Prior
    0.01 to 0.04; H200, ZeRO-1 full fine-tuning: 0.10."""
    transient_fragmentation_fixed_segments: float = 0.15
    """The same without expandable segments. Prior; not measured."""
    gathers_in_flight: int = 2
    """ZeRO-3 gathers whose buffers wait for another stream. Source: DeepSpeed 0.19.8
    ``partitioned_param_coordinator.py:__max_ongoing_fetch_events``."""
    process_host_bytes: int = int(2.5 * GIB)
    """Resident memory of one training process on CUDA before any offload. Prior 1.5 to 3 GiB."""
    process_host_bytes_cpu: int = int(0.9 * GIB)
    """The same without CUDA. CPU runs of DeepSpeed with transformers: 0.7 to 1.0 GiB."""


CALIBRATION = Calibration()
