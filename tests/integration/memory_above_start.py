"""How much memory a process takes beside the pages of files."""

from __future__ import annotations

from pathlib import Path

from launcher.worker.process_memory import Sampler


class AnonymousMemory:
    """Samples what this process holds beside the pages of files, above where it started."""

    def __init__(self) -> None:
        self._start = self._peak = self._now()
        self._sampler = Sampler(self._sample, interval_seconds=0.005)

    @property
    def peak_bytes(self) -> int:
        return self._peak - self._start

    def _sample(self) -> None:
        self._peak = max(self._peak, self._now())

    @staticmethod
    def _now() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    def __enter__(self) -> AnonymousMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self._sampler.stop()
