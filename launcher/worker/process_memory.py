"""Memory of this process and its device, as Linux and the NVIDIA driver report it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
# proc(5): writing 5 resets the peak resident set size ("high water mark") to its present value.
_RESET_PEAK = "5"


class HostPeak:
    """Peak resident memory of this process since the last :meth:`restart`.

    Where the kernel refuses to reset its own counter (some containers), the peak is that of
    the samples taken at :meth:`restart`, :meth:`sample` and :meth:`peak_bytes`.
    """

    def __init__(self) -> None:
        self._sampled_bytes = 0
        self.is_exact = self._reset_kernel_counter()

    def restart(self) -> None:
        """Start a new peak at the present resident size."""
        if self.is_exact:
            self._reset_kernel_counter()
        else:
            self._sampled_bytes = _status_bytes("VmRSS")

    def sample(self) -> None:
        """Look at the present resident size, where the kernel's counter cannot be reset."""
        if not self.is_exact:
            self._sampled_bytes = max(self._sampled_bytes, _status_bytes("VmRSS"))

    def peak_bytes(self) -> int:
        """Return the peak since the last restart."""
        if self.is_exact:
            return _status_bytes("VmHWM")
        self.sample()
        return self._sampled_bytes

    def _reset_kernel_counter(self) -> bool:
        try:
            _CLEAR_REFS.write_text(_RESET_PEAK, encoding="ascii")
        except OSError:
            return False
        return True


def _status_bytes(key: str) -> int:
    """Return a line of /proc/self/status in bytes; it is written in units of 1024 bytes."""
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0


def device_memory_reader(device: torch.device) -> Callable[[], int] | None:
    """Return a function giving the whole device's used bytes, as nvidia-smi shows them.

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
    return lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)


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
