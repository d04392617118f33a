"""The rate at which earlier runs saved, and what plans do with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from planning_inputs import cluster, workload

from launcher import run_dir as rd
from launcher.checkpoint_time import USUAL_RATE, SaveRate
from launcher.peaks import PhasePeaks, RankPeaks, peaks_to_text
from launcher.planning.plan import plan_to_json
from launcher.planning.planner import make_plan
from launcher.recipe_sections import StrategySection
from launcher.run_checkpoints import MANIFEST
from launcher.saves_timed import rate_beside


def save(run: Path, *, saved_bytes: int, count: int, seconds: float) -> None:
    """Leave behind what a run does that has saved ``count`` times."""
    phase = PhasePeaks(
        peak_allocated_bytes=0, peak_reserved_bytes=0, device_used_bytes=None, host_rss_bytes=0,
        seconds=seconds, count=count,
    )  # fmt: skip
    rank = RankPeaks(
        rank=0, local_rank=0, world_size=1, host="h", pid=1, device="cpu", device_name="cpu",
        state="finished", steps_done=4, phases={"save": phase},
    )  # fmt: skip
    checkpoint = run / rd.CHECKPOINTS / "checkpoint-4"
    for folder in (run / rd.RANKS, checkpoint):
        folder.mkdir(parents=True)
    rd.rank_file(run, 0).write_text(peaks_to_text(rank))
    files = {"a": {"bytes": saved_bytes - 1}, "b": {"bytes": 1}}
    rd.write_json(checkpoint / MANIFEST, {"files": files})


def test_the_slowest_measured_rate_beside_a_run_wins_over_the_usual_one(tmp_path: Path) -> None:
    assert rate_beside(tmp_path / "absent") == USUAL_RATE
    save(tmp_path / "tiny", saved_bytes=10**6, count=2, seconds=8.0)
    assert rate_beside(tmp_path) == USUAL_RATE
    # 2 saves of 4 GB in 4 s, and 3 of 2 GB in 20 s.
    save(tmp_path / "quick", saved_bytes=4 * 10**9, count=2, seconds=4.0)
    save(tmp_path / "slow", saved_bytes=2 * 10**9, count=3, seconds=20.0)
    found = rate_beside(tmp_path)
    assert found.bytes_per_s == pytest.approx(300e6)
    assert found.source == "measured: the saves of slow"
    rd.rank_file(tmp_path / "slow", 0).write_text("broken")
    assert rate_beside(tmp_path).source == "measured: the saves of quick"


def test_a_plan_says_how_long_a_checkpoint_takes_and_how_it_knows() -> None:
    plan = make_plan(workload(), cluster(), fixed=StrategySection())
    rate = SaveRate(bytes_per_s=1e9, source="measured: the saves of a")
    written = plan_to_json(replace(plan, save_rate=rate))["checkpoint"]
    assert written == {
        "bytes": plan.memory.checkpoint_bytes,
        "write_seconds": plan.memory.checkpoint_bytes / 1e9,
        "write_bytes_per_s": 1e9,
        "source": "measured: the saves of a",
    }
