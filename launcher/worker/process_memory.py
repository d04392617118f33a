"""Memory of this process and its device, as Linux and the NVIDIA driver report it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

_STATUS = Path("/proc/self/status")
_STATM = Path("/proc/self/statm")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_LINE_BYTES = 256
"""More than the seven numbers of /proc/self/statm can take."""
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# proc(5): writing 5 resets the peak resident set size ("high water mark") to its present value.
_RESET_PEAK = "5"


class HostPeak:
    """Peak resident memory of this process since the last restart.

    The kernel's own counter is exact, and costs 0.13 ms for each phase. Where the kernel refuses
    to reset it (some containers), the peak is that of the samples taken at :meth:`restart`,
    :meth:`sample` and :meth:`peak_bytes`; where both cost too much, of :meth:`sample` alone.
    """

    def __init__(self) -> None:
        self._sampled_bytes = 0
        self.is_exact = self._reset_kernel_counter()
        self._is_cheap = False

    def restart(self) -> None:
        """Start a new peak at the present resident size."""
        self._is_cheap = False
        if self.is_exact:
            self._reset_kernel_counter()
        else:
            self._sampled_bytes = resident_bytes()

    def restart_cheaply(self) -> None:
        """Start a new peak that only :meth:`sample` raises; without a sample it is 0."""
        self._is_cheap = True
        self._sampled_bytes = 0

    def sample(self, resident: int) -> None:
        """Count the present resident size, in bytes."""
        self._sampled_bytes = max(self._sampled_bytes, resident)

    def peak_bytes(self) -> int:
        """Return the peak since the last restart."""
        if self._is_cheap:
            return self._sampled_bytes
        if self.is_exact:
            return _status_bytes("VmHWM")
        self.sample(resident_bytes())
        return self._sampled_bytes

    def _reset_kernel_counter(self) -> bool:
        try:
            _CLEAR_REFS.write_text(_RESET_PEAK, encoding="ascii")
        except OSError:
            return False
        return True


def resident_bytes() -> int:
    """Return the resident size of this process now."""
    # Without Python's layers of text and buffers, which ask the kernel four more times: a third.
    file = os.open(_STATM, os.O_RDONLY)
    try:
        return int(os.read(file, _LINE_BYTES).split()[1]) * _PAGE_BYTES
    finally:
        os.close(file)


def _status_bytes(key: str) -> int:
    """Return a line of /proc/self/status in bytes; it is written in units of 1024 bytes."""
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMonitor:
    """One GPU as its driver sees it, through NVML; what it does not say is ``None``."""

    nvml: Any
    handle: Any

    def used_bytes(self) -> int | None:
        """Return the whole device's used bytes, as nvidia-smi shows them."""
        value = self._ask(self.nvml.nvmlDeviceGetMemoryInfo)
        return None if value is None else int(value.used)

    def utilisation_fraction(self) -> float | None:
        """Return the share of the last second or less in which a kernel ran, 0-1."""
        value = self._ask(self.nvml.nvmlDeviceGetUtilizationRates)
        return None if value is None else value.gpu / 100

    def power_watts(self) -> float | None:
        """Return what the GPU draws; NVML says it in milliwatts."""
        value = self._ask(self.nvml.nvmlDeviceGetPowerUsage)
        return None if value is None else value / 1000

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        try:
            return question(self.handle)
        except self.nvml.NVMLError:  # a slice of a GPU (MIG) does not know its load or power
            return None


def monitor_device(device: torch.device) -> DeviceMonitor | None:
    """Return what asks the driver about a device.

    Returns:
        ``None`` on CPU, and where the driver's library does not know the device.
    """
    if device.type != "cuda":
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        # By its identity: the driver's own numbering ignores CUDA_VISIBLE_DEVICES.
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except (pynvml.NVMLError, AttributeError) as error:
        logger.warning("device memory is not sampled: NVML says %s", error)
        return None
    return DeviceMonitor(nvml=pynvml, handle=handle)


class Sampler:
    """Call a function every ``interval_seconds`` in a thread until :meth:`stop`."""

    def __init__(self, function: Callable[[], None], *, interval_seconds: float) -> None:
        self._function = function
        self._interval_seconds = interval_seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_seconds):
            self._function()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join()
