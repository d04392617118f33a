"""What a thread sees of a rank ten times a second: host, device, and all of it over time."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch

from launcher import run_dir
from launcher.peaks import MemoryNow
from launcher.timeline import MemorySample, TimelineRecorder, timeline_to_json
from launcher.worker.process_memory import HostPeak, Sampler, monitor_device, resident_bytes
from launcher.worker.running_peak import RunningPeak, higher_known

logger = logging.getLogger(__name__)

SAMPLE_INTERVAL_SECONDS = 0.1
SAMPLES_PER_LOAD = 10
"""NVML's utilisation is a mean over up to a second: asking more often says nothing new."""
TIMELINE_INTERVAL_SECONDS = 5.0
TIMELINE_FRACTION = 0.1
"""The timeline is written when it became a tenth longer: a file system sees few writes."""


class MemorySampler:
    """Samples of one rank; those of a phase are handed over when it ends."""

    def __init__(self, folder: Path, *, rank: int, device: torch.device) -> None:
        self._path = folder / run_dir.TIMELINES / run_dir.rank_file(folder, rank).name
        self._timeline = TimelineRecorder(rank=rank, interval_seconds=SAMPLE_INTERVAL_SECONDS)
        self._device = monitor_device(device)
        self._host = HostPeak()
        self._thread: Sampler | None = None
        self._phase: str | None = None
        self._device_used_bytes: int | None = None
        self._pinned_bytes: int | None = None
        self._load: tuple[float | None, float | None] | None = None
        self._count = 0
        self.now: MemoryNow | None = None
        """What was seen last."""
        self._started = self._written = time.monotonic()

    def start(self, take: Callable[[], None]) -> None:
        """Call ``take`` regularly from now on."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._thread = Sampler(take, interval_seconds=SAMPLE_INTERVAL_SECONDS)

    def stop(self) -> None:
        """End the thread, and write the timeline for the last time."""
        if self._thread is not None:
            self._thread.stop()
            self._thread = None
            self._write()

    def begin_phase(self, phase: str | None, *, is_cheap: bool) -> None:
        """Forget the last phase's samples.

        Args:
            phase: which one begins.
            is_cheap: look at the host's memory only ten times a second: in steps that are like
                those before, the exact peak is known already and costs too much.
        """
        self._phase = phase
        self._device_used_bytes = self._load = None
        if is_cheap:
            self._host.restart_cheaply()
        else:
            self._host.restart()

    def end_phase(self, peak: RunningPeak) -> None:
        """Add what was seen in the phase that ends."""
        if self._device is not None:
            # A phase that is shorter than the interval is looked at once.
            if self._device_used_bytes is None and peak.device_used_bytes is None:
                self._device_used_bytes = self._device.used_bytes()
            peak.device_used_bytes = higher_known(peak.device_used_bytes, self._device_used_bytes)
            if peak.host_pinned_bytes is None:
                self._pinned_bytes = _pinned_bytes()
            peak.host_pinned_bytes = higher_known(peak.host_pinned_bytes, self._pinned_bytes)
        if self._load is not None:
            peak.keep_load(utilisation_fraction=self._load[0], power_watts=self._load[1])
        peak.host_rss_bytes = max(peak.host_rss_bytes, self._host.peak_bytes())

    def take(
        self, allocated_bytes: int | None, reserved_bytes: int | None, *, steps_done: int
    ) -> None:
        """Look at the host and the device, and note all of it; called by the thread."""
        resident = resident_bytes()
        self._host.sample(resident)
        used = None
        if self._device is not None:
            used = self._device.used_bytes()
            self._device_used_bytes = higher_known(self._device_used_bytes, used)
            if self._count % SAMPLES_PER_LOAD == 0:
                self._load = self._device.utilisation_fraction(), self._device.power_watts()
                self._pinned_bytes = _pinned_bytes()
        self._count += 1
        now = time.monotonic()
        sample = MemorySample(
            seconds=round(now - self._started, 3),
            step=steps_done,
            phase=self._phase,
            allocated_bytes=allocated_bytes,
            reserved_bytes=reserved_bytes,
            device_used_bytes=used,
            host_rss_bytes=resident,
        )
        self._timeline.add(sample)
        self.now = MemoryNow(
            allocated_bytes=allocated_bytes,
            reserved_bytes=reserved_bytes,
            device_used_bytes=used,
            host_rss_bytes=resident,
        )
        wait_seconds = max(TIMELINE_INTERVAL_SECONDS, TIMELINE_FRACTION * sample.seconds)
        if now - self._written > wait_seconds:
            self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        value = timeline_to_json(self._timeline.timeline())
        try:
            run_dir.write_text(self._path, json.dumps(value, separators=(",", ":")) + "\n")
        except OSError as error:  # a full disk: the run must not end for a picture
            logger.warning("the memory timeline was not written: %s", error)


def _pinned_bytes() -> int:
    """Return the page-locked host memory that torch's allocator holds now."""
    stats = torch.cuda.host_memory_stats()
    return int(stats.get("allocated_bytes.current", 0))
