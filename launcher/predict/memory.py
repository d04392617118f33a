"""ZeRO's bytes per rank, phase and component; host, NVMe and disk bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from launcher.hardware import ClusterSpec
from launcher.predict.activations import timeline
from launcher.predict.allocator import outside_bytes, reserved_bytes, workspace_bytes
from launcher.predict.components import INPUTS, WORKSPACE, Candidate
from launcher.predict.host_memory import checkpoint_bytes, host_components, nvme_bytes
from launcher.predict.micro_step import MicroStep
from launcher.predict.run_phases import RunPhases
from launcher.predict.site_constants import memory_constants
from launcher.predict.zero_runtime import zero_runtime
from launcher.strategy import Strategy
from launcher.workload import Workload

Phase = Literal["load", "init", "forward", "loss", "backward", "step", "save", "eval"]
PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseEstimate:
    """The fullest moment of one phase on the fullest rank.

    ``components`` are named bytes that are alive together at that moment; their sum is
    ``allocated_bytes``. ``moment`` says which instant of the phase it is.
    """

    phase: Phase
    moment: str
    components: Mapping[str, int]

    @property
    def allocated_bytes(self) -> int:
        """Sum of the components."""
        return sum(self.components.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Predicted bytes on the fullest rank, per phase; and on a node's host and disks."""

    phases: tuple[PhaseEstimate, ...]
    peak_reserved_bytes: int
    device_used_bytes: int
    """What nvidia-smi shows: reserved, context, NCCL buffers and paged optimizer states."""
    host_bytes_per_node: int
    host_components: Mapping[str, int]
    nvme_bytes_per_node: int
    checkpoint_bytes: int
    """Disk for one checkpoint of all ranks."""

    @property
    def fullest(self) -> PhaseEstimate:
        """The phase that sets the peak."""
        return max(self.phases, key=lambda phase: phase.allocated_bytes)

    @property
    def peak_allocated_bytes(self) -> int:
        """Highest allocated bytes of any phase."""
        return self.fullest.allocated_bytes

    def phase(self, name: Phase) -> PhaseEstimate:
        """Return one phase's estimate."""
        return next(phase for phase in self.phases if phase.phase == name)


def estimate_memory(workload: Workload, strategy: Strategy, cluster: ClusterSpec) -> MemoryEstimate:
    """Predict the fullest rank's bytes for every phase.

    Args:
        workload: model, method, length and precision.
        strategy: everything that a plan decides.
        cluster: GPU kind and number of ranks; decides partitions, kernels and constants.

    Returns:
        Bytes per phase and component; what the allocator reserves and nvidia-smi shows; host,
        NVMe and checkpoint bytes.

    Source:
        The modules that it adds up: ``activations``, ``zero_runtime``, ``micro_step``,
        ``run_phases``, ``allocator``, ``host_memory``; constants in ``calibration``.
    """
    gpu, calibration = cluster.gpu, memory_constants(cluster)
    zero = zero_runtime(workload, strategy, world_size=cluster.world_size)
    adapter_bytes = zero.trained_width if not zero.is_full else zero.width
    acts = timeline(workload, strategy, gpu, adapter_bytes=adapter_bytes)
    resident = zero.static_bytes()
    resident[WORKSPACE] = float(workspace_bytes(gpu, calibration) * calibration.num_cublas_handles)
    resident[INPUTS] = acts.inputs_bytes
    micro_step = MicroStep(zero, acts, {**resident, **zero.carried_bytes()})
    run = RunPhases(zero, acts, resident)
    candidates = _moments(run, micro_step)
    phases = tuple(_fullest(name, candidates[name]) for name in PHASES)
    reserved = reserved_bytes(
        {phase.phase: phase.components for phase in phases},
        {name: [parts for _, parts in found] for name, found in candidates.items()},
        zero=zero,
        is_cuda=gpu.device_type == "cuda",
        logits_hole_bytes=acts.logits_hole_bytes,
        calibration=calibration,
    )
    peak = max(phase.allocated_bytes for phase in phases)
    host = host_components(
        zero,
        cluster,
        calibration,
        saved_inputs_bytes=acts.hidden_bytes * acts.num_layers,
        peak_allocated_bytes=peak,
    )
    return MemoryEstimate(
        phases=phases,
        peak_reserved_bytes=reserved,
        device_used_bytes=reserved
        + outside_bytes(gpu, calibration, zero_stage=zero.stage, world_size=cluster.world_size)
        + round(zero.paged_bytes()),
        host_bytes_per_node=sum(host.values()),
        host_components=host,
        nvme_bytes_per_node=nvme_bytes(zero, cluster),
        checkpoint_bytes=checkpoint_bytes(zero),
    )


def _moments(run: RunPhases, micro_step: MicroStep) -> dict[Phase, list[Candidate]]:
    """Return every moment of each phase that may be its fullest."""
    return {
        "load": list(run.load()),
        "init": list(run.init()),
        "forward": list(micro_step.forward()),
        "loss": list(micro_step.loss()),
        "backward": list(micro_step.backward()),
        "step": list(run.step()),
        "save": list(run.save()),
        "eval": list(run.evaluate()),
    }


def _fullest(name: Phase, candidates: Iterable[Candidate]) -> PhaseEstimate:
    """Return the candidate moment with the most bytes, its empty components left out."""
    moment, components = max(candidates, key=lambda item: sum(item[1].values()))
    return PhaseEstimate(
        phase=name,
        moment=moment,
        components={part: math.ceil(size) for part, size in components.items() if size >= 0.5},
    )
