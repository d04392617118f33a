"""Real training on the hosts of a hostfile, through DeepSpeed's launchers."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from virtual_hosts import ROOT, VirtualCluster

from launcher import run_dir as rd
from launcher.worker.checkpoints import find_newest

sys.path.insert(0, str(ROOT / "tests" / "integration"))
from worker_runs import make_model, write_chats

pytestmark = pytest.mark.cluster

# mpirun refuses to run as root unless it is told twice.
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


FOUR = {rank: f"node{rank + 1}" for rank in range(4)}
slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, its data, and a recipe that trains it for four steps."""
    root = tmp_path_factory.mktemp("hosts")
    make_model(root / "model")
    write_chats(root / "train.jsonl", 32)
    (root / "recipe.yaml").write_text(
        f"model: {{name_or_path: {root / 'model'}, precision: fp32}}\n"
        "method: lora\n"
        "max_seq_len: 64\n"
        f"data: {{path: {root / 'train.jsonl'}}}\n"
        "optim: {global_batch_size: 8, max_steps: 3, warmup_ratio: 0.0}\n"
        "cluster: {hostfile: hosts}\n"
    )
    return root


def train(
    cluster: VirtualCluster, workplace: Path, hosts: str, run: str, *changes: str
) -> subprocess.CompletedProcess[str]:
    (workplace / "hosts").write_text(hosts)
    zerofit = [sys.executable, "-m", "launcher.cli", "train", "recipe.yaml"]
    return cluster.run(
        "head",
        [*zerofit, *changes, "--output-dir", run],
        cwd=workplace,
        env={**AS_ROOT, "HF_TOKEN": "hf_secret"},
        timeout=1200,
    )


def hosts_of(run: Path) -> dict[int, str]:
    """Return the host that each rank ran on and finished on."""
    peaks = [json.loads(path.read_text()) for path in sorted((run / "ranks").glob("[0-9]*.json"))]
    assert {item["state"] for item in peaks} == {"finished"}
    return {item["rank"]: item["host"] for item in peaks}


@pytest.mark.parametrize(
    ("launcher", "hosts", "zero_stage", "places"),
    [
        ("pdsh", "node[1-4] slots=1\n", 3, FOUR),
        ("openmpi", "node1 slots=1\nnode2 slots=1\n", 2, {0: "node1", 1: "node2"}),
        # What these show beyond the two above and the probes of other tests is little.
        slow("pdsh", "node[1-2] slots=1\n", 2, {0: "node1", 1: "node2"}),
        slow("pdsh", "node3 slots=1  # one host, and not this one\n", 1, {0: "node3"}),
        slow("openmpi", "node[1-4] slots=1\n", 3, FOUR),
    ],
    ids=lambda value: value if value in ("pdsh", "openmpi") else "",
)
def test_a_hostfile_s_hosts_train_together(  # noqa: PLR0917
    cluster: VirtualCluster,
    workplace: Path,
    launcher: str,
    hosts: str,
    zero_stage: int,
    places: dict[int, str],
) -> None:
    run = f"{launcher}-{len(places)}"
    changes = [f"cluster.launcher={launcher}", f"strategy.zero_stage={zero_stage}"]
    done = train(cluster, workplace, hosts, run, *changes)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = workplace / run
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert hosts_of(folder) == places
    results = json.loads((folder / "results.json").read_text())
    assert results["train_loss_last"] < results["train_loss_first"]
    log = (folder / "logs" / "launcher.log").read_text()
    assert (f"peaks of {len(places)} ranks came through MPI" in log) == (launcher == "openmpi")
    assert re.search(rf"fullest rank: \d of {len(places)}, ", log)
    assert cluster.leftovers() == {}
    # The secret reached the hosts by a file that is gone again.
    assert not (folder / "environment.sh").exists()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if b"hf_secret" in path.read_bytes()]


def test_sigterm_on_one_host_saves_on_all_of_them(cluster: VirtualCluster, workplace: Path) -> None:
    # The hosts' addresses, to start the ranks by and for these to meet at.
    (workplace / "hosts").write_text("fd77::1 slots=1\n[fd77::2] slots=1\n")
    zerofit = [sys.executable, "-m", "launcher.cli", "train", "recipe.yaml"]
    more = ["strategy.zero_stage=2", "optim.max_steps=5000", "--output-dir", "stopped"]
    started = cluster.start("head", [*zerofit, *more], cwd=workplace)
    deadline = time.monotonic() + 900
    while "step 3/5000" not in started.output:
        assert started.entering.poll() is None, started.output
        assert time.monotonic() < deadline, started.output
        time.sleep(0.2)
    started.signal(signal.SIGTERM)
    assert started.wait(timeout=600) == 4, started.output
    assert cluster.leftovers() == {}
    run = workplace / "stopped"
    assert "Traceback" not in started.output
    newest, skipped = find_newest(run / rd.CHECKPOINTS)
    assert newest is not None
    assert (newest.layout.world_size, skipped) == (2, [])
    assert rd.read_status(run).reason == f"SIGTERM: saved after step {newest.step}"
