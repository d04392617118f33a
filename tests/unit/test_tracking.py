from __future__ import annotations

from pathlib import Path

from launcher.recipe_sections import TrackingSection
from launcher.worker.tracking import tracker_environment


def test_a_tracker_that_is_not_used_is_not_steered(tmp_path: Path) -> None:
    assert tracker_environment(TrackingSection(), tmp_path) == {}
    one = tracker_environment(TrackingSection(report_to=("wandb",)), tmp_path)
    assert one["WANDB_MODE"] == "offline"
    assert one["WANDB_DIR"] == str(tmp_path / "tracking")
    assert all(name.startswith("WANDB_") for name in one)
    two = tracker_environment(TrackingSection(report_to=("wandb", "mlflow")), tmp_path)
    assert two["MLFLOW_TRACKING_URI"] == (tmp_path / "tracking" / "mlruns").as_uri()
