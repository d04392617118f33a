"""A sweep as a job array on a real Slurm: submitted by one call, gathered by the next."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from slurm_daemons import Slurm
from slurm_runs import SlurmRuns
from virtual_hosts import VirtualCluster

pytestmark = pytest.mark.cluster

# A polynomial schedule cannot end (1e-7) above where it starts, which only the ranks find out.
SWEEP = """\
defaults:
  model: {name_or_path: smollm2-135m, random_weights: true, precision: fp32}
  method: lora
  max_seq_len: 32
  optim: {max_steps: 3, global_batch_size: 1}
  cluster: {num_nodes: 1, gpus_per_node: 1, backend: slurm}
cases:
- {name: works, strategy: {zero_stage: 2}}
- {name: breaks, optim: {lr_scheduler_type: polynomial, learning_rate: 1.0e-8}}
"""


def test_a_sweep_goes_through_slurm_and_comes_back_with_predictions_and_measurements(
    slurm: Slurm, cluster: VirtualCluster, shared_folder: Path
) -> None:
    runs = SlurmRuns(cluster=cluster, folder=shared_folder)
    (shared_folder / "sweep.yaml").write_text(SWEEP)
    command = ("bench", "sweep.yaml", "--array", "--out", "out")
    submitted = runs.zerofit(*command)
    assert submitted.returncode == 0, submitted.stderr
    assert "submitted job array" in submitted.stdout
    results_file = shared_folder / "out" / "sweep.jsonl"

    def have_ended() -> bool:
        runs.zerofit(*command)
        return len(results_file.read_text().splitlines()) == 2

    runs.until(have_ended, seconds=240)
    lines = results_file.read_text().splitlines()
    results = {item["case"]: item for item in map(json.loads, lines)}
    assert {name: item["state"] for name, item in results.items()} == {
        "works": "finished", "breaks": "failed",
    }  # fmt: skip
    works = results["works"]
    assert works["predicted"]["peak_allocated_bytes"] > 0
    assert works["measured"][0]["steps_done"] == 3
    assert "Error" in results["breaks"]["failure"]["message"]
    # Nothing is submitted twice.
    again = runs.zerofit(*command)
    assert "2 of 2 cases have results already" in again.stdout
    assert "submitted" not in again.stdout
