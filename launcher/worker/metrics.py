"""``/metrics`` of one node in Prometheus' format, from the files that its ranks write anyway."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from launcher import run_dir
from launcher.recipe_sections import TrackingSection
from launcher.report.live import (
    Progress,
    RankFolder,
    SeenRank,
    read_prediction,
    read_progress,
)
from launcher.report.prediction import Prediction
from launcher.worker.ranks import Ranks

logger = logging.getLogger(__name__)

METRICS = {
    "zerofit_memory_allocated_bytes": "Held by tensors of the rank, when it was looked at last.",
    "zerofit_memory_reserved_bytes": "Held by torch's allocator at the same moment.",
    "zerofit_memory_device_used_bytes": "In use on the rank's whole device at the same moment.",
    "zerofit_memory_host_bytes": "Resident memory of the rank's process at the same moment.",
    "zerofit_peak_allocated_bytes": "Highest so far in a phase.",
    "zerofit_peak_reserved_bytes": "Highest so far in a phase.",
    "zerofit_peak_device_used_bytes": "Highest so far in a phase.",
    "zerofit_predicted_peak_allocated_bytes": "Predicted for a phase before the run.",
    "zerofit_predicted_device_used_bytes": "Predicted highest use of the rank's device.",
    "zerofit_device_limit_bytes": "What the plan could use of the device.",
    "zerofit_predicted_step_seconds": "Predicted for an optimizer step.",
    "zerofit_allocator_retries": "Times that the allocator had to free its cache first.",
    "zerofit_allocator_ooms": "Times that the allocator ran out of memory.",
    "zerofit_steps_done": "Optimizer steps that the rank has done.",
    "zerofit_step_seconds": "Median of the rank's last five optimizer steps.",
    "zerofit_tokens_per_second": "Tokens of the rank, padding included, at that pace.",
    "zerofit_rank_age_seconds": "Since the rank's file was written; it is every 5 s or step.",
    "zerofit_rank_running": "1 while the rank trains, 0 after it ended.",
    "zerofit_ranks_unreadable": "Files of ranks of this node that cannot be read.",
    "zerofit_step": "Optimizer step that rank 0 logged last.",
    "zerofit_total_steps": "Optimizer steps that the run will have.",
    "zerofit_loss": "Training loss that rank 0 logged last.",
    "zerofit_eval_loss": "Held-out loss that rank 0 logged last.",
    "zerofit_learning_rate": "Learning rate that rank 0 logged last.",
}
"""Every gauge and what it says. Labels are run, host and rank; of a phase's, phase too."""
_PHASE = frozenset(
    {
        "zerofit_peak_allocated_bytes", "zerofit_peak_reserved_bytes",
        "zerofit_peak_device_used_bytes", "zerofit_predicted_peak_allocated_bytes",
    }
)  # fmt: skip
_NODE = frozenset({"zerofit_ranks_unreadable"})

_Sample = tuple[str, tuple[str, ...], float | None]
"""A gauge's name, the values of its labels, its value."""


class NodeMetrics(Collector):
    """Reads the files of a node's ranks whenever someone asks; training does nothing for it."""

    def __init__(self, folder: Path, *, first_rank: int, world_size: int) -> None:
        self._folder = folder
        self._run, self._host = _text(folder.resolve().name), _text(socket.gethostname())
        self._prediction = read_prediction(folder)
        # Launchers number the ranks of a node one after the other.
        num_local = _gpus_per_node(folder) or world_size
        self._ranks = range(first_rank, min(world_size, first_rank + num_local))
        self._rank_files = RankFolder(folder)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield every gauge with the values that are known now."""
        families = {
            name: GaugeMetricFamily(name, text, labels=_labels(name))
            for name, text in METRICS.items()
        }
        for name, labels, value in self._samples():
            if value is not None:
                families[name].add_metric(labels, value)
        yield from (family for family in families.values() if family.samples)

    def _samples(self) -> Iterator[_Sample]:
        for seen in self._rank_files.read(self._ranks):
            if seen.peaks.host != socket.gethostname():
                continue
            labels = (self._run, self._host, str(seen.peaks.rank))
            yield from _of_rank(seen, labels)
            yield from _predicted(self._prediction, labels)
        unreadable = len(self._rank_files.unreadable)
        yield "zerofit_ranks_unreadable", (self._run, self._host), unreadable
        if self._ranks.start == 0:
            yield from _logged(read_progress(self._folder), (self._run, self._host, "0"))


def _labels(name: str) -> tuple[str, ...]:
    if name in _NODE:
        return ("run", "host")
    return ("run", "host", "rank", "phase") if name in _PHASE else ("run", "host", "rank")


def _of_rank(seen: SeenRank, labels: tuple[str, ...]) -> Iterator[_Sample]:
    peaks = seen.peaks
    if (now := peaks.now) is not None:
        yield "zerofit_memory_allocated_bytes", labels, now.allocated_bytes
        yield "zerofit_memory_reserved_bytes", labels, now.reserved_bytes
        yield "zerofit_memory_device_used_bytes", labels, now.device_used_bytes
        yield "zerofit_memory_host_bytes", labels, now.host_rss_bytes
    for name, phase in peaks.phases.items():
        of_phase = (*labels, _text(name))
        yield "zerofit_peak_allocated_bytes", of_phase, phase.peak_allocated_bytes
        yield "zerofit_peak_reserved_bytes", of_phase, phase.peak_reserved_bytes
        yield "zerofit_peak_device_used_bytes", of_phase, phase.device_used_bytes
    yield "zerofit_allocator_retries", labels, peaks.allocator_retries
    yield "zerofit_allocator_ooms", labels, peaks.allocator_ooms
    yield "zerofit_steps_done", labels, peaks.steps_done
    yield "zerofit_step_seconds", labels, seen.step_seconds
    yield "zerofit_tokens_per_second", labels, seen.tokens_per_second
    yield "zerofit_rank_age_seconds", labels, seen.age_seconds
    yield "zerofit_rank_running", labels, float(peaks.state == "running")


def _predicted(prediction: Prediction, labels: tuple[str, ...]) -> Iterator[_Sample]:
    for phase in prediction.phases:
        of_phase = (*labels, _text(phase.phase))
        yield "zerofit_predicted_peak_allocated_bytes", of_phase, phase.allocated_bytes
    yield "zerofit_predicted_device_used_bytes", labels, prediction.device_used_bytes
    yield "zerofit_device_limit_bytes", labels, prediction.gpu_memory_bytes
    yield "zerofit_predicted_step_seconds", labels, prediction.step_seconds


def _logged(progress: Progress, labels: tuple[str, ...]) -> Iterator[_Sample]:
    yield "zerofit_step", labels, progress.step
    yield "zerofit_total_steps", labels, progress.total_steps
    yield "zerofit_loss", labels, progress.loss
    yield "zerofit_eval_loss", labels, progress.eval_loss
    yield "zerofit_learning_rate", labels, progress.learning_rate


def _gpus_per_node(folder: Path) -> int | None:
    try:
        value = json.loads((folder / run_dir.PLAN).read_text(encoding="utf-8"))["gpus_per_node"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return value if isinstance(value, int) and value > 0 else None


def _text(value: str) -> str:
    """Return a label's value that can be sent: a folder's name may hold bytes that are no text."""
    return value.encode("utf-8", "replace").decode("utf-8")


def serve_metrics(tracking: TrackingSection, folder: Path, ranks: Ranks) -> str | None:
    """Serve ``/metrics`` of this node until the process ends, where the recipe asks for it.

    One rank of each node does it, in a thread. An address that cannot be had is said, and does
    not stop the run.

    Returns:
        The URL; ``None`` where nothing is served.
    """
    if tracking.metrics_port is None or ranks.local_rank != 0:
        return None
    registry = CollectorRegistry()
    registry.register(NodeMetrics(folder, first_rank=ranks.rank, world_size=ranks.world_size))
    address, port = tracking.metrics_address, tracking.metrics_port
    try:
        server, _ = start_http_server(port, addr=address, registry=registry)
    except (OSError, OverflowError) as error:
        # At the level of errors: nodes without rank 0 say nothing else.
        logger.error("no metrics at %s port %s: %s", address, port, error)
        return None
    host = f"[{address}]" if ":" in address else address
    url = f"http://{host}:{server.server_port}/metrics"
    logger.info("metrics at %s", url)
    return url
