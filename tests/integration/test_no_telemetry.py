"""Nobody outside the job learns of it: every connection of every process is written down."""

from __future__ import annotations

import importlib.util
import ipaddress
import json
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from worker_runs import environment, make_model, write_chats

from launcher import run_dir as rd

pytestmark = pytest.mark.integration

TRACKERS = [name for name in ("tensorboard", "wandb", "mlflow") if importlib.util.find_spec(name)]


@pytest.fixture(scope="module")
def watched_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Train on two ranks through the whole command line; return the run and its connections."""
    root = tmp_path_factory.mktemp("watched")
    library, log = root / "no_outside.so", root / "sockets.log"
    source = Path(__file__).with_name("no_outside.c")
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True
    )
    make_model(root / "model")
    write_chats(root / "train.jsonl", 16)
    (root / "recipe.yaml").write_text(
        f"model: {{name_or_path: {root / 'model'}}}\nmax_seq_len: 64\n"
        "data: {path: train.jsonl, eval_path: train.jsonl}\ncluster: {gpus_per_node: 2}\n"
        f"tracking: {{report_to: [{', '.join(TRACKERS)}], project: quiet}}\n"
        "optim: {max_steps: 2, global_batch_size: 4, save_steps: 1}\n"
    )
    # Not offline: nothing must be asked even where it could be.
    env = {key: value for key, value in environment().items() if key != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli", "train", "recipe.yaml", "--output-dir", "run"],
        cwd=root,
        env={**env, "LD_PRELOAD": str(library), "SOCKET_LOG": str(log)},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return root / "run", log.read_text().splitlines()


def test_no_process_of_a_run_connects_to_another_machine(
    watched_run: tuple[Path, list[str]],
) -> None:
    _, lines = watched_run
    own = {
        address.address.partition("%")[0]
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6)
    }
    addresses = {line.split()[1] for line in lines if line.startswith("address ")}
    names = {line.split()[1] for line in lines if line.startswith("name ")}
    assert addresses, "the ranks talk to each other, so something must have been seen"
    outside = {
        address
        for address in addresses - own
        if not (ip := ipaddress.ip_address(address)).is_loopback
        and not (ip.version == 6 and ip.ipv4_mapped and ip.ipv4_mapped.is_loopback)
        and not ip.is_unspecified
    }
    assert outside == set()
    assert names <= {"localhost", socket.gethostname(), *addresses, *own, "::"}


@pytest.mark.skipif(not TRACKERS, reason="no tracker is installed")
def test_each_tracker_writes_one_run_below_the_run_directory(
    watched_run: tuple[Path, list[str]],
) -> None:
    run, _ = watched_run
    folder = run / "tracking"
    # The last held-out loss comes after the training, and belongs to the same run.
    wanted = {"tensorboard": "tensorboard/events.*", "wandb": "wandb/offline-run-*/run-*.wandb",
              "mlflow": "mlruns/*/*/metrics/eval_loss"}  # fmt: skip
    found = {name: list(folder.glob(wanted[name])) for name in TRACKERS}
    assert {name: len(paths) for name, paths in found.items()} == dict.fromkeys(TRACKERS, 1)
    if "mlflow" in found:
        steps = [line.split()[2] for line in found["mlflow"][0].read_text().splitlines()]
        assert steps == ["0", "2"]
        assert found["mlflow"][0].with_name("tokens_per_s").is_file()
    entry = json.loads((run / rd.TRAINER_LOG).read_text().splitlines()[-1])
    assert {"step", "total_steps", "seconds", "remaining_seconds"} <= set(entry)
