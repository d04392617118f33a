"""What an attempt that ran out of memory has taught: predictions that the next plan stays below."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.predict.memory import MemoryEstimate, Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """The most that may be predicted for a plan; ``None`` sets no limit beyond the machine's."""

    phase: Phase | None = None
    """The phase that ran out of device memory."""
    phase_bytes: int | None = None
    """Allocated bytes in that phase."""
    device_bytes: int | None = None
    """Device memory in use, as nvidia-smi shows it."""
    host_bytes: int | None = None
    """Host memory of a node."""

    def admits(self, memory: MemoryEstimate) -> bool:
        """Return whether a prediction stays below."""
        in_phase = memory.phase(self.phase).allocated_bytes if self.phase else 0
        return (
            (self.phase_bytes is None or in_phase <= self.phase_bytes)
            and (self.device_bytes is None or memory.device_used_bytes <= self.device_bytes)
            and (self.host_bytes is None or memory.host_bytes_per_node <= self.host_bytes)
        )


NO_CEILING = Ceiling()
