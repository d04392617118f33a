"""What one rank measured, as it stands in the run directory: ``ranks/00003.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from launcher.failure_kind import FailureKind

if TYPE_CHECKING:
    import msgspec

SCHEMA_VERSION = 1

T = TypeVar("T")

RankState = Literal["running", "finished", "failed", "out_of_memory", "interrupted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPeaks:
    """The allocator's highest bytes in one phase of one optimizer step."""

    allocated_bytes: int
    reserved_bytes: int
    active_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PhasePeaks:
    """Highest bytes that one rank saw in one phase, over all times the phase ran.

    On CPU, where torch keeps no statistics, ``peak_allocated_bytes`` is the live tensor
    storage counted during the first steps, and reserved equals it.
    """

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    device_used_bytes: int | None
    """Whole-device use as nvidia-smi shows it; ``None`` on CPU."""
    host_rss_bytes: int
    """Peak resident memory of the process in this phase."""
    seconds: float
    """Total wall time spent in the phase."""
    count: int
    """How many times the phase ran."""
    peak_active_bytes: int | None = None
    """Allocated, and freed blocks that another stream may still read; ``None`` on CPU."""
    host_pinned_bytes: int | None = None
    """Page-locked host memory of torch's allocator, sampled; ``None`` on CPU."""
    gpu_utilisation_fraction: float | None = None
    """Share of time in which a kernel ran (0-1), mean of NVML's samples in this phase."""
    power_watts: float | None = None
    """Draw of the GPU, mean of NVML's samples in this phase."""
    first_step: StepPeaks | None = None
    """The first optimizer step; ``None`` for phases outside steps."""
    steady_state: StepPeaks | None = None
    """The median of the last hundred steps, the first left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNow:
    """Bytes at the moment when the file was written; ``None`` where nothing counts them."""

    allocated_bytes: int | None
    reserved_bytes: int | None
    device_used_bytes: int | None
    host_rss_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFailure:
    """Why a rank stopped early."""

    phase: str
    type: str
    message: str
    traceback: str
    kind: FailureKind = FailureKind.other


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPeaks:
    """Everything one rank measured; keys of ``phases`` are ``launcher.memory.PHASES``."""

    rank: int
    local_rank: int
    world_size: int
    host: str
    pid: int
    device: str
    """``cuda`` or ``cpu``."""
    device_name: str
    state: RankState
    steps_done: int
    phases: Mapping[str, PhasePeaks] = field(default_factory=dict)
    step_seconds: tuple[float, ...] = ()
    """Wall seconds of optimizer steps in order: the first, and the most recent thousand."""
    tokens_per_step: int = 0
    """Tokens that this rank processes in one optimizer step, padding included."""
    allocator_retries: int = 0
    allocator_ooms: int = 0
    failure: RankFailure | None = None
    phase: str | None = None
    """Where the rank was when the file was written; ``None`` between two phases."""
    beats: int = 0
    """Borders between phases passed so far; ranks that wait for each other have about as many."""
    progress_at: float | None = None
    """When it passed the last one: Unix time of its host."""
    first_step_at: float | None = None
    """When the first step ended: Unix time of this rank's host. All ranks end it together, so
    that a difference is one of their clocks."""
    now: MemoryNow | None = None
    host_autograd_op_seconds: float | None = None
    """What the rank's host needed for an operation and its gradient before the run; ``None`` on
    CPU. ``launcher.worker.host_speed`` says more."""


def peaks_to_json(peaks: RankPeaks) -> dict[str, Any]:
    """Return a JSON value that :func:`peaks_from_json` reads back."""
    return {"schema_version": SCHEMA_VERSION, **asdict(peaks)}


def peaks_to_text(peaks: RankPeaks) -> str:
    """Return the content of a rank's file: short, because each rank writes it every few seconds."""
    return json.dumps(peaks_to_json(peaks), separators=(",", ":")) + "\n"


def peaks_from_text(content: bytes) -> RankPeaks:
    """Read a rank's file; a report of 8,192 ranks does so within 0.2 s.

    Raises:
        ValueError: it is broken, of another schema version, or holds something else than a
            rank's file does; unknown keys are passed over.
    """
    import msgspec  # 10 ms that no other command needs

    try:
        version = _decoder(_Version).decode(content).schema_version
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"broken or half-written JSON: {error}") from None
    _check_version(version)
    try:
        peaks: RankPeaks = _decoder(RankPeaks).decode(content)
    except msgspec.DecodeError as error:
        raise ValueError(f"not a rank file: {error}") from None
    return peaks


def peaks_from_json(value: Mapping[str, Any]) -> RankPeaks:
    """Read what :func:`peaks_to_json` has returned.

    Raises:
        ValueError: another schema version, a key is missing, or a value is of another kind.
    """
    import msgspec

    _check_version(value.get("schema_version"))
    try:
        return msgspec.convert(value, RankPeaks)
    except msgspec.ValidationError as error:
        raise ValueError(f"not a rank file: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Version:
    schema_version: object = None


@cache
def _decoder(kind: type[T]) -> msgspec.json.Decoder[T]:
    import msgspec

    return msgspec.json.Decoder(kind)


def _check_version(version: object) -> None:
    if version != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {version!r}, this zerofit reads {SCHEMA_VERSION}")
