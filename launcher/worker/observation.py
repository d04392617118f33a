"""What lets others look into a rank: metrics of its node, and snapshots of its memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.recipe_sections import TrackingSection
from launcher.worker.ranks import Ranks

if TYPE_CHECKING:
    import torch


def open_to_view(
    tracking: TrackingSection, folder: Path, ranks: Ranks, device: torch.device
) -> None:
    """Serve the node's metrics where the recipe asks for it; be ready to run out of memory."""
    from launcher.worker.memory_snapshot import snapshot_when_out_of_memory

    snapshot_when_out_of_memory(folder, rank=ranks.rank, device=device)
    if tracking.metrics_port is not None:
        # Needs a package that nothing else does.
        from launcher.worker.metrics import serve_metrics

        serve_metrics(tracking, folder, ranks)


def add_step_snapshot(trainer: Any, tracking: TrackingSection, folder: Path, ranks: Ranks) -> None:
    """Have the step recorded that the recipe names, if it names one.

    Raises:
        SetupError: the rank has no GPU, or there is no such step.
    """
    if tracking.memory_snapshot_step is not None:
        from launcher.worker.memory_snapshot import StepSnapshot

        step, device = tracking.memory_snapshot_step, trainer.args.device
        trainer.add_callback(StepSnapshot(folder, rank=ranks.rank, step=step, device=device))
