"""A sweep as a job array on a real Slurm: submitted by one call, gathered by the next."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from slurm_runs import SlurmRuns

from launcher import run_dir as rd

pytestmark = pytest.mark.cluster

# A polynomial schedule cannot end (1e-7) above where it starts, which only the ranks find out.
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 300,
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip
SWEEP = """\
defaults:
  model: {name_or_path: model, random_weights: true, precision: fp32}
  method: lora
  max_seq_len: 32
  optim: {max_steps: 3, global_batch_size: 1}
  cluster: {num_nodes: 1, gpus_per_node: 1, backend: slurm}
  slurm: {preflight: false}
cases:
- {name: works, strategy: {zero_stage: 2}}
- {name: breaks, optim: {lr_scheduler_type: polynomial, learning_rate: 1.0e-8}}
"""


def test_a_sweep_goes_through_slurm_and_comes_back_with_predictions_and_measurements(
    runs: SlurmRuns, shared_folder: Path
) -> None:
    (shared_folder / "model").mkdir()
    (shared_folder / "model" / "config.json").write_text(json.dumps(CONFIG))
    (shared_folder / "sweep.yaml").write_text(SWEEP)
    command = ("bench", "sweep.yaml", "--array", "--out", "out")
    submitted = runs.zerofit(*command)
    assert submitted.returncode == 0, submitted.stderr
    assert "submitted job array" in submitted.stdout
    results_file = shared_folder / "out" / "sweep.jsonl"
    states = ("finished", "failed")

    def have_ended() -> bool:
        found = [*(shared_folder / "out" / "runs").glob("*/*/status.json")]
        return len(found) == 2 and all(rd.read_status(p.parent).state in states for p in found)

    def are_gathered() -> bool:
        # Slurm may take a job that has written its end for a running one for some moments.
        runs.zerofit(*command)
        return results_file.is_file() and len(results_file.read_text().splitlines()) == 2

    runs.until(have_ended, seconds=600)
    runs.until(are_gathered, seconds=600)
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
