"""What a plan promised, read from its JSON as far as the keys are there and usable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# An exabyte, in bytes; no time, count or loss comes near it either.
_LARGEST = 1e18
MAX_WORLD_SIZE = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedPhase:
    """Predicted bytes of the fullest rank at the fullest moment of one phase."""

    phase: str
    moment: str
    allocated_bytes: int
    components: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The numbers of a plan that a report compares; ``None`` where the plan has none."""

    model_name: str | None = None
    num_params: int | None = None
    num_trainable_params: int | None = None
    method: str | None = None
    precision: str | None = None
    max_seq_len: int | None = None
    """Tokens."""
    world_size: int | None = None
    gpus_per_node: int | None = None
    """Ranks of a node; on CPU, too."""
    gpu_name: str | None = None
    gpu_memory_bytes: int | None = None
    """What the plan could use, its safety margin included."""
    strategy: Mapping[str, str] = field(default_factory=dict)
    phases: tuple[PredictedPhase, ...] = ()
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    device_used_bytes: int | None = None
    host_bytes_per_node: int | None = None
    step_seconds: float | None = None
    tokens_per_second_per_gpu: float | None = None
    bound_by: str | None = None

    def phase(self, name: str) -> PredictedPhase | None:
        """Return the prediction for a phase, ``None`` when the plan has none."""
        return next((phase for phase in self.phases if phase.phase == name), None)


def prediction_from_plan(plan: Mapping[str, object] | None) -> Prediction:
    """Read a plan's JSON without ever failing: a key that is missing or odd becomes ``None``.

    A report has to stand when the plan is half there or of another version; the reader of the
    run directory says which file was unreadable.

    Args:
        plan: the value of ``plan.json``, or ``None`` when there is none.

    Returns:
        Bytes as ``int``, times in seconds.
    """
    if plan is None:
        return Prediction()
    model, memory, time = (_mapping(plan, key) for key in ("model", "memory", "time"))
    limit_bytes = read_int(plan, "limit_bytes")
    world_size = read_int(plan, "world_size")
    return Prediction(
        model_name=read_text(model, "name"),
        num_params=read_int(model, "num_params"),
        num_trainable_params=read_int(model, "num_trainable_params"),
        method=read_text(plan, "method"),
        precision=read_text(plan, "precision"),
        max_seq_len=read_int(plan, "max_seq_len"),
        world_size=world_size if world_size in range(1, MAX_WORLD_SIZE + 1) else None,
        gpus_per_node=read_int(plan, "gpus_per_node"),
        gpu_name=read_text(plan, "gpu"),
        gpu_memory_bytes=(
            limit_bytes + (read_int(plan, "safety_margin_bytes") or 0) if limit_bytes else None
        ),
        strategy=_plain_values(_mapping(plan, "strategy")),
        phases=_phases(_mapping(memory, "phases")),
        peak_allocated_bytes=read_int(memory, "peak_allocated_bytes"),
        peak_reserved_bytes=read_int(memory, "peak_reserved_bytes"),
        device_used_bytes=read_int(memory, "device_used_bytes"),
        host_bytes_per_node=read_int(memory, "host_bytes_per_node"),
        step_seconds=read_float(time, "step_seconds"),
        tokens_per_second_per_gpu=read_float(time, "tokens_per_second_per_gpu"),
        bound_by=read_text(time, "bound_by"),
    )


def read_float(value: Mapping[str, object], key: str) -> float | None:
    """Return a number, ``None`` for anything else: NaN, infinity and absurd sizes too."""
    number = value.get(key)
    if isinstance(number, bool) or not isinstance(number, int | float):
        return None
    # Compared before it is converted: JSON integers may be too long for a float.
    return float(number) if -_LARGEST < number < _LARGEST else None


def read_int(value: Mapping[str, object], key: str) -> int | None:
    """Return a whole count or bytes, ``None`` for anything else."""
    number = read_float(value, key)
    return None if number is None else round(number)


def read_text(value: Mapping[str, object], key: str) -> str | None:
    """Return a string, ``None`` for anything else."""
    text = value.get(key)
    return text if isinstance(text, str) else None


def _mapping(value: Mapping[str, object], key: str) -> Mapping[str, object]:
    item = value.get(key)
    return item if isinstance(item, Mapping) else {}


def _plain_values(value: Mapping[str, object]) -> dict[str, str]:
    return {str(key): str(item) for key, item in value.items() if isinstance(item, str | int)}


def _phases(phases: Mapping[str, object]) -> tuple[PredictedPhase, ...]:
    found = []
    for name in phases:
        phase = _mapping(phases, name)
        parts = _mapping(phase, "components")
        sizes = {str(key): read_int(parts, key) for key in parts}
        components = {key: size for key, size in sizes.items() if size is not None}
        allocated_bytes = read_int(phase, "allocated_bytes")
        if allocated_bytes is None and not components:
            continue
        found.append(
            PredictedPhase(
                phase=name,
                moment=read_text(phase, "moment") or "",
                allocated_bytes=(
                    sum(components.values()) if allocated_bytes is None else allocated_bytes
                ),
                components=components,
            )
        )
    return tuple(found)
