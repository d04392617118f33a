"""What marks a checkpoint of a run directory as finished or unfinished."""

from __future__ import annotations

from pathlib import Path

from launcher.run_dir import CHECKPOINTS

MANIFEST = "zerofit_checkpoint.json"
"""Written into a checkpoint last: a folder without it was not finished."""
UNFINISHED = ".unfinished"
"""Folder below ``checkpoints`` with what is being written or removed."""


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the finished checkpoint of the most steps, its files not looked at."""
    steps = {
        path: int(path.name.removeprefix("checkpoint-"))
        for path in (run_dir / CHECKPOINTS).glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit() and (path / MANIFEST).is_file()
    }
    return max(steps, key=lambda path: steps[path], default=None)


def why_bound_to_layout(*, offload_optimizer: str) -> str | None:
    """Return why saved optimizer states can be loaded by the same ranks and stage alone.

    ``None``: DeepSpeed's universal checkpoints convert them for others.
    """
    if offload_optimizer == "nvme":
        return "its optimizer states were swapped to NVMe in DeepSpeed's own files"
    return None
