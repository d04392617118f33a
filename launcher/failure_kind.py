"""Why a run failed, in the few words that decide what happens next."""

from __future__ import annotations

from enum import StrEnum


class FailureKind(StrEnum):
    """What went wrong; each kind has its own reaction in ``launcher/recovery/decide.py``."""

    gpu_oom = "gpu_oom"
    """A GPU's memory ran out; on a processor, the memory that stands for it."""
    host_oom = "host_oom"
    """The host's memory ran out: the kernel or Slurm killed a rank, or an allocation failed."""
    lost_host = "lost_host"
    hang = "hang"
    killed = "killed"
    """A signal from outside ended a rank, and nothing says that memory was the reason."""
    interrupted = "interrupted"
    """Asked to stop: Ctrl-C, SIGTERM, preemption, a time limit."""
    nan = "nan"
    """The numbers went wrong."""
    storage = "storage"
    """A disk is full, read-only, or gone."""
    other = "other"


EXIT_STATUS = {
    FailureKind.other: 1,
    FailureKind.gpu_oom: 81,
    FailureKind.host_oom: 82,
    FailureKind.lost_host: 83,
    FailureKind.hang: 84,
    FailureKind.killed: 85,
    FailureKind.interrupted: 86,
    FailureKind.nan: 87,
    FailureKind.storage: 88,
}
"""What a rank, and a Slurm job, end with.

Between sysexits.h, which ends at 78, and 126 and above, where shells and launchers have theirs.
"""
