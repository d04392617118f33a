"""Training on the hosts of a hostfile that loses hosts and ranks and still ends.

Keeps rows of the fault table in docs/reliability.md (``make test-faults``).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from host_processes import HostProcess
from virtual_hosts import ROOT, VirtualCluster

sys.path.insert(0, str(ROOT / "tests" / "integration"))
from fault_rows import add_row, failed_attempts, rows_of_steps, steps_lost
from worker_runs import make_model, write_chats

from launcher import run_dir as rd

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.slow]

NUM_EXAMPLES = 32
NUM_STEPS = 60
STEPS_PER_EPOCH = 4
NOTICED_WITHIN_SECONDS = 15.0
WAIT_SECONDS = 1800.0  # for machines that do much else
RECIPE = """\
model: {{name_or_path: {folder}/model, precision: fp32}}
method: lora
max_seq_len: 64
data: {{path: {folder}/train.jsonl}}
optim: {{global_batch_size: 8, max_steps: {steps}, warmup_ratio: 0.0, save_steps: 5}}
strategy: {{zero_stage: {stage}}}
cluster:
  {{hostfile: {folder}/hosts, num_nodes: 2, pass_env: ["ZEROFIT_*"]}}
recovery: {{min_nodes: 1}}
"""


def start(cluster: VirtualCluster, folder: Path, stage: int, **env: str) -> HostProcess:
    """Start training on node1 and node2, with node3 to spare."""
    make_model(folder / "model")
    write_chats(folder / "train.jsonl", NUM_EXAMPLES)
    (folder / "hosts").write_text("node[1-3] slots=1\n")
    recipe = RECIPE.format(folder=folder, steps=NUM_STEPS, stage=stage)
    (folder / "recipe.yaml").write_text(recipe)
    argv = [sys.executable, "-m", "launcher.cli", "train", "recipe.yaml", "--output-dir", "run"]
    variables = {"PYTHONPATH": str(ROOT), "ZEROFIT_RECORD_BATCHES": "1", **env}
    return cluster.start("head", argv, cwd=folder, env=variables)


def until_step(process: HostProcess, run: Path, step: int) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    log = run / rd.TRAINER_LOG
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        assert process.entering.poll() is None, process.output
        assert time.monotonic() < deadline, process.output
        time.sleep(0.1)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_goes_on_on_a_spare_host_and_then_on_the_last_one(
    cluster: VirtualCluster, shared_folder: Path, stage: int
) -> None:
    run = shared_folder / "run"
    fault = "kill:forward:step=2:rank=1"
    process = start(cluster, shared_folder, stage, ZEROFIT_FAULT=fault)
    struck_at = []
    until_step(process, run, 7)
    struck_at.append((run / ".faults" / "0-1").stat().st_mtime)
    cluster.cut("node2")
    struck_at.append(time.time())
    until_step(process, run, 17)
    cluster.crash("node1")
    struck_at.append(time.time())
    assert process.wait(timeout=WAIT_SECONDS) == 0, process.output
    assert rd.read_status(run).state == "finished"
    found = list(failed_attempts(run, struck_at))
    assert [attempt.kind for attempt, _ in found] == ["killed", "lost_host", "lost_host"]
    assert [str(attempt.host) for attempt, _ in found[:1]]
    assert "node2 was lost: it has not answered" in found[1][0].problem
    assert "node1 was lost" in found[2][0].problem
    places = [
        [peaks["host"] for peaks in ranks]
        for ranks in (_ranks(run / "attempts" / str(number)) for number in (1, 2, 3))
    ]
    assert places == [["node1", "node2"], ["node1", "node2"], ["node1", "node3"]]
    assert [peaks["host"] for peaks in _ranks(run)] == ["node3"]
    _assert_each_example_was_seen_once_an_epoch(run)
    names = [
        ("a rank is killed (SIGKILL)", "resumed on the same hosts"),
        ("a host's cable is cut", "resumed on a spare host"),
        ("a host crashes", "resumed on the one host that was left, same global batch"),
    ]
    for (attempt, seconds), (name, result) in zip(found, names, strict=True):
        assert seconds < NOTICED_WITHIN_SECONDS + 10  # ending what is left takes up to 10 s more
        add_row(
            fault=name,
            backend="hostfile",
            zero_stage=stage,
            noticed_seconds=seconds,
            steps_lost=steps_lost(attempt),
            result=result,
        )


def _ranks(folder: Path) -> list[dict[str, object]]:
    return [json.loads(p.read_text()) for p in sorted((folder / rd.RANKS).glob("[0-9]*.json"))]


def _assert_each_example_was_seen_once_an_epoch(run: Path) -> None:
    taken = rows_of_steps(run)
    assert sorted(taken) == list(range(1, NUM_STEPS + 1))
    for first in range(1, NUM_STEPS, STEPS_PER_EPOCH):
        rows = [row for step in range(first, first + STEPS_PER_EPOCH) for row in taken[step]]
        assert sorted(rows) == list(range(NUM_EXAMPLES))
