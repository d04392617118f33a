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
    nccl_bytes: int = 1_255_000_000
    """Device memory of NCCL's communicator and kernels, outside torch; DeepSpeed makes one
    even for a single rank. H100, driver 580, ZeRO-3: nvidia-smi minus reserved is 1.90 GB, of
    which 0.64 GB is the context. Fitted on the even runs of ``benchmarks/results/h100.jsonl``."""
    all_reduce_bytes: int = 410_000_000
    """More of the same where gradients are all-reduced, ZeRO-0 to 2: 2.31 GB. Same runs; plain
    DeepSpeed without zerofit's worker: none. The cause is not established."""
    peer_buffers_bytes: int = 540_000_000
    """More of the same where there are other ranks: NCCL's buffers for each channel to a peer. Two
    H200 on NVLink: 2.85 GB in place of 2.31, ZeRO-3 2.54 in place of 1.90; plain DeepSpeed showed
    none of it there. Why is not established, and nothing was measured between hosts."""
    block_slack_bytes: int = 200_000_000
    """Reserved and never handed out: block rounding, the small-block pool, a second stream's.
    Fitted on the same runs; 0.1 to 0.6 GB where the peak is in the loss or in backward."""
    transient_fragmentation: float = 0.02
    """Reserved but unusable, as a fraction of what comes and goes, expandable segments. Fitted
    on the same runs together with the slack, flat between 0.01 and 0.02."""
    transient_fragmentation_fixed_segments: float = 0.15
    """The same without expandable segments. Prior; not measured."""
    gathers_in_flight: int = 2
    """ZeRO-3 gathers whose buffers wait for another stream. Source: DeepSpeed 0.19.8
    ``partitioned_param_coordinator.py:__max_ongoing_fetch_events``."""
    process_host_bytes: int = 2_100_000_000
    """Resident memory of one training process on CUDA before any offload. H100, even runs that
    neither offload nor save a model: 1.96 to 2.16 GB."""
    bitsandbytes_host_bytes: int = 300_000_000
    """More with bitsandbytes' CUDA library loaded. Same runs: 2.37 to 2.47 GB in all."""
    process_host_bytes_cpu: int = int(0.87 * GIB)
    """The same without CUDA, the tensors apart. CPU demo: 1,866 MiB with 981 MiB of tensors."""


CALIBRATION = Calibration()
