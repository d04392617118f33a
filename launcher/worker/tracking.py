"""Experiment trackers: everything below the run directory, and offline unless told otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from launcher.recipe_sections import TrackingSection

FOLDER = "tracking"
"""Folder in the run directory that all trackers write to."""


def tracker_environment(tracking: TrackingSection, folder: Path) -> Mapping[str, str]:
    """Return the variables that trackers are steered by; what the user has set comes first.

    Args:
        tracking: the recipe's section.
        folder: the run directory.

    Source:
        transformers 5.23 ``integrations/integration_utils.py``; wandb 0.31 and mlflow 3.17
        documentation of environment variables.
    """
    root = folder.resolve() / FOLDER
    every = {
        "tensorboard": {"TENSORBOARD_LOGGING_DIR": str(root / "tensorboard")},
        # transformers prints a line about wandb, used or not, where it finds the mode.
        "wandb": {
            "WANDB_MODE": "offline",
            "WANDB_DIR": str(root),
            "WANDB_PROJECT": tracking.project,
            "WANDB_SILENT": "true",
            "WANDB_DISABLE_GIT": "true",
        },
        "mlflow": {
            "MLFLOW_TRACKING_URI": (root / "mlruns").as_uri(),
            "MLFLOW_EXPERIMENT_NAME": tracking.project,
            # mlflow 3.17 warns that plain files are in maintenance; they need no server.
            "MLFLOW_ALLOW_FILE_STORE": "true",
        },
    }
    return {name: value for used in tracking.report_to for name, value in every[used].items()}
