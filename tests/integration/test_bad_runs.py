"""Runs that end badly, through the whole command line and the real deepspeed launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from worker_runs import (
    Nursery,
    environment,
    make_model,
    small_buckets,
    write_chats,
    write_run,
)

from launcher import run_dir as rd
from launcher.job_script import RUN_ID_VARIABLE

pytestmark = pytest.mark.integration

ZEROFIT = [sys.executable, "-m", "launcher.cli"]
# A model whose own code fails in the middle of training, on every rank at once.
FAILING_CODE = """
from transformers import LlamaForCausalLM

class FailingForCausalLM(LlamaForCausalLM):
    def forward(self, *arguments, **options):
        if self.training:
            raise RuntimeError("the dog ate the batch")
        return super().forward(*arguments, **options)
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model folder that no test changes."""
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def folder(tmp_path: Path, tiny: Path) -> Path:
    """Return a folder with data and a recipe for ``tiny``."""
    write_chats(tmp_path / "train.jsonl", 32)
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{name_or_path: {tiny}}}\nmax_seq_len: 64\ndata: {{path: train.jsonl}}\n"
        "optim: {max_steps: 2, global_batch_size: 4}\n"
    )
    return tmp_path


def zerofit(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*ZEROFIT, *args],
        cwd=folder,
        env={**environment(), "HF_MODULES_CACHE": str(folder / "modules")},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def changed_copy(tiny: Path, folder: Path) -> Path:
    """Return a new model folder with links to the files of ``tiny``."""
    folder.mkdir()
    for path in tiny.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def processes_of(run_id: str) -> list[int]:
    """Return the processes that inherited a run's marker."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(RUN_ID_VARIABLE) == run_id:
                found.append(process.pid)
        except (psutil.Error, OSError):
            continue
    return found


def test_ctrl_c_in_mid_run_ends_all_ranks_soon_and_says_how_to_go_on(
    folder: Path,
) -> None:
    more = ["optim.max_steps=5000", "optim.save_steps=2"]
    started = subprocess.Popen(
        [*ZEROFIT, "train", "recipe.yaml", *more, "--output-dir", "run"],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As a terminal has it: the command and what it starts in the foreground are one group.
        start_new_session=True,
    )
    run = folder / "run"
    deadline = time.monotonic() + 600
    while not list(run.glob("checkpoints/checkpoint-*/adapter_model.safetensors")):
        assert started.poll() is None, started.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    run_id = json.loads((run / rd.JOB).read_text())["run_id"]
    assert len(processes_of(run_id)) >= 2
    during = zerofit(folder, "report", "run")
    assert during.returncode == 0
    assert "The run is going on; the numbers are so far." in during.stdout
    os.killpg(started.pid, signal.SIGINT)
    pressed = time.monotonic()
    _, stderr = started.communicate(timeout=600)
    assert time.monotonic() - pressed < 40  # within 10 s, and what a busy machine adds
    assert started.returncode == 4
    assert processes_of(run_id) == []
    assert rd.read_status(run).state == "interrupted"
    assert f"zerofit resume {run}" in stderr
    assert "Traceback" not in stderr
    report = zerofit(folder, "report", "run")
    assert report.returncode == 0
    assert "The run was INTERRUPTED." in report.stdout


def test_what_all_ranks_run_into_is_shown_once_with_the_rank(folder: Path, tiny: Path) -> None:
    failing = changed_copy(tiny, folder / "failing")
    (failing / "failing.py").write_text(FAILING_CODE)
    config = json.loads((tiny / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "failing.FailingForCausalLM"}
    (failing / "config.json").unlink()
    (failing / "config.json").write_text(json.dumps(config))
    changes = [f"model.name_or_path={failing}", "model.trust_remote_code=true"]
    done = zerofit(folder, "train", "recipe.yaml", *changes, "--output-dir", "run")
    assert done.returncode == 4
    printed = done.stdout + done.stderr
    assert printed.count("Traceback (most recent call last)") == 1
    assert "[rank 0] Traceback" in printed or "[rank 1] Traceback" in printed
    assert "RuntimeError: the dog ate the batch" in done.stderr
    assert rd.read_status(folder / "run").state == "failed"


def test_weights_that_lack_a_tensor_are_an_error_and_never_random(
    nursery: Nursery, folder: Path, tiny: Path
) -> None:
    from safetensors.torch import load_file, save_file

    lacking = changed_copy(tiny, folder / "lacking")
    tensors = load_file(tiny / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    del tensors[name]
    (lacking / "model.safetensors").unlink()
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    recipe = f"""
model: {{name_or_path: {lacking}, precision: fp32}}
max_seq_len: 64
data: {{path: {folder / "train.jsonl"}}}
optim: {{max_steps: 2, global_batch_size: 4}}
"""
    strategy = small_buckets(zero_stage=2, micro_batch_size_per_gpu=4)
    run = write_run(folder / "run", recipe, strategy, world_size=1)
    nursery.tokenize(run)
    done = nursery.train(run, world_size=1)
    assert done.returncode == 1
    assert f"1 of the model's tensors are missing or of another shape, such as {name}" in (
        done.stderr
    )
    assert "Traceback" not in done.stdout + done.stderr


def test_broken_data_is_named_by_its_line_and_leaves_no_run_directory(folder: Path) -> None:
    lines = (folder / "train.jsonl").read_text().splitlines()
    lines[6] = '{"messages": [{'
    (folder / "train.jsonl").write_text("\n".join(lines))
    done = zerofit(folder, "train", "recipe.yaml")
    assert done.returncode == 2
    assert "train.jsonl line 7: not JSON" in done.stderr
    assert done.stderr.count("error:") == 1
    assert not (folder / "runs").exists()


def test_of_two_scripts_by_hand_one_runs_and_the_other_names_it_and_nothing_runs_twice(
    folder: Path,
) -> None:
    """``render``, ``bash job.sh`` twice at once, then every command again, and ``export``."""
    assert zerofit(folder, "render", "recipe.yaml", "--output-dir", "run").returncode == 0
    both = [
        subprocess.Popen(
            ["bash", "run/job.sh"],
            cwd=folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    printed = {started.pid: started.communicate(timeout=900) for started in both}
    assert sorted(started.returncode for started in both) == [0, 2], printed
    winner, loser = sorted(both, key=lambda started: started.returncode)
    assert f"this run is held by process {winner.pid} on " in printed[loser.pid][1]
    assert printed[loser.pid][1].count("error:") == 1
    assert rd.read_status(folder / "run").state == "finished"
    again = subprocess.run(
        ["bash", "run/job.sh"],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert (again.returncode, again.stderr) == (0, "")
    assert "this run has finished" in again.stdout
    same = zerofit(folder, "train", "recipe.yaml", "--output-dir", "run")
    assert same.returncode == 0
    assert "this run has finished already" in same.stdout
    other = zerofit(folder, "train", "recipe.yaml", "optim.seed=7", "--output-dir", "run")
    assert other.returncode == 2
    assert "optim.seed is 42 there and 7 here" in other.stderr
    exported = zerofit(folder, "export", "run", "--json")
    assert exported.returncode == 0
    assert exported.stderr == ""
    assert Path(json.loads(exported.stdout)["out"]) == folder / "run/export/adapter"
    again_exported = zerofit(folder, "export", "run")
    assert again_exported.returncode == 2
    assert again_exported.stderr.count("error:") == 1
