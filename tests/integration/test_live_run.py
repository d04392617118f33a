"""A run that is watched while its ranks train: /metrics and zerofit top."""

from __future__ import annotations

import threading
import time
import urllib.request
from http.client import HTTPException
from pathlib import Path

import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families
from worker_runs import Nursery, Outcome, free_port, small_buckets, write_run

from launcher import run_dir
from launcher.commands.top import top
from launcher.stop_file import STOP_FILE

pytestmark = pytest.mark.integration

NUM_STEPS = 100_000
"""More than are made: the run is stopped when enough was seen."""


def scrape(port: int) -> dict[tuple[str, str | None], float]:
    """Return the values by gauge and rank; none when nobody answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
            text = answer.read().decode()
    except (OSError, HTTPException):  # nobody listens yet, or any more
        return {}
    return {
        (sample.name, sample.labels.get("rank")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_run_serves_its_metrics_while_it_trains_and_not_after(
    nursery: Nursery, workplace: Path, tmp_path: Path
) -> None:
    port = free_port()
    recipe = f"""
model: {{name_or_path: {workplace / "model"}, precision: fp32}}
max_seq_len: 64
optim: {{global_batch_size: 2, max_steps: {NUM_STEPS}}}
tracking: {{metrics_port: {port}}}
"""
    folder = write_run(tmp_path / "run", recipe, small_buckets(zero_stage=2), world_size=2)
    outcomes: list[Outcome] = []
    training = threading.Thread(target=lambda: outcomes.append(nursery.train(folder)))
    wanted = {("zerofit_loss", "0"), ("zerofit_total_steps", "0")} | {
        (f"zerofit_{gauge}", rank)
        for gauge in ("memory_host_bytes", "rank_running", "peak_allocated_bytes")
        for rank in ("0", "1")
    }
    training.start()
    seen: dict[tuple[str, str | None], float] = {}
    while training.is_alive() and not wanted <= seen.keys():
        time.sleep(0.1)
        seen = scrape(port)
    live = CliRunner().invoke(top, [str(folder), "--once"]).output
    (folder / STOP_FILE).touch()
    training.join()
    (outcome,) = outcomes
    assert outcome.returncode == 0, outcome.stderr
    assert seen.keys() >= wanted
    # ln(300) = 5.70: random tokens cannot be learnt.
    assert seen["zerofit_loss", "0"] == pytest.approx(5.7, abs=0.3)
    assert seen["zerofit_total_steps", "0"] == NUM_STEPS
    for rank in ("0", "1"):
        # A Python process with torch takes more than 100 MiB and less than 8 GiB.
        assert 2**27 < seen["zerofit_memory_host_bytes", rank] < 2**33
        assert seen["zerofit_rank_running", rank] == 1
        assert seen["zerofit_peak_allocated_bytes", rank] > 0
    assert "2 ranks on 1 host " in live
    assert scrape(port) == {}
    after = CliRunner().invoke(top, [str(folder), "--once"]).output
    assert "interrupted  step " in after
    assert run_dir.read_rank(run_dir.rank_file(folder, 1)).now is not None
