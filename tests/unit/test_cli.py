from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher import cli, run_dir
from launcher.commands import plan
from launcher.dispatch import worker_command

Zerofit = Callable[..., "Outcome"]

# One layer of a Llama with short sequences: plans in milliseconds.
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
COMMANDS = ["plan", "init", "render", "train", "report", "export", "doctor", "demo", "version"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    status: int
    stdout: str
    stderr: str


@pytest.fixture
def zerofit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Zerofit:
    """Return a function that runs the command line in an empty folder on a machine without GPUs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*args: str) -> Outcome:
        monkeypatch.setattr("sys.argv", ["zerofit", *args])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        seen = capfd.readouterr()
        assert isinstance(left.value.code, int)
        return Outcome(status=left.value.code, stdout=seen.out, stderr=seen.err)

    return run


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """Write a model folder, data and a recipe; return the recipe's name."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "train.jsonl").write_text('{"text": "Hello."}\n')
    (tmp_path / "recipe.yaml").write_text(
        "model: {name_or_path: tiny}\nmax_seq_len: 128\ndata: {path: train.jsonl}\n"
    )
    return "recipe.yaml"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(zerofit: Zerofit, command: str) -> None:
    outcome = zerofit(command, "--help")
    assert outcome.status == 0
    assert f"Usage: zerofit {command}" in outcome.stdout


def test_the_version_is_printed_in_three_ways(zerofit: Zerofit) -> None:
    from launcher import __version__

    assert zerofit("version").stdout == f"zerofit {__version__}\n"
    assert zerofit("--version").stdout == f"zerofit {__version__}\n"
    assert json.loads(zerofit("version", "--json").stdout) == {"zerofit": __version__}


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["bogus"], ["No such command 'bogus'"]),
        (["plan", "--modle", "x"], ["--modle"]),
        (["plan", "--num_gpus", "8"], ["Did you mean '--gpus-per-node'?"]),
        (["train", "--num-nodes", "2"], ["Did you mean '--nodes'?"]),
        (["report", "--num-nodes", "2"], ["No such option '--num-nodes'."]),
        (["plan", "recipe.yaml", "zero_stage=3"], ["did you mean 'strategy.zero_stage'?"]),
        (["train", "--model", "tiny", "--max-seq-len", "64"], ["no training data is named"]),
        (["train", "--model", "tiny", "--max-seq-len", "64", "--data", "x.jsonl"], ["x.jsonl"]),
        (["plan"], ["no model is named", "llama2-7b"]),
        (["plan", "nothere.yaml"], ["nothere.yaml", "no such recipe"]),
        (["plan", "x" * 300], ["this is not a file: File name too long"]),
        (["plan", "recipe.yaml", "recipe.yaml"], ["2 recipe files are named"]),
        (["plan", "recipe.yaml", "=3"], ["cannot read the override '=3'"]),
        (["plan", "recipe.yaml", "strategy.zero_stge=2"], ["zero_stge", "mean 'zero_stage'"]),
        (["plan", "recipe.yaml", "optm.seed=2"], ["'optm'", "did you mean 'optim'"]),
        (["plan", "recipe.yaml", "model=3"], ["'model' is a section"]),
        (["plan", "recipe.yaml", "max_seq_len=0"], ["max_seq_len is 0"]),
        (["plan", "recipe.yaml", "max_seq_len=-1"], ["max_seq_len is -1"]),
        (["plan", "--model", "tiny", "--max-seq-len", "-1"], ["max_seq_len is -1"]),
        (["plan", "--model", "tiny", "--max-seq-len", "4k"], ["'4k' is not a whole number"]),
        (["plan", "recipe.yaml", "max_seq_len=4k"], ["'4k' is not a whole number"]),
        (
            ["plan", "recipe.yaml", "data.path=[a,b]"],
            ["data.path: it takes one text, not ['a', 'b']"],
        ),
        (["plan", "recipe.yaml", "lora.target_modules=7"], ["target_modules: it takes a list"]),
        (["plan", "recipe.yaml", "max_seq_len="], ["max_seq_len", "cannot be left empty"]),
        (["plan", "recipe.yaml", "max_seq_len=513"], ["513", "512", "max_position_embeddings"]),
        (["plan", "recipe.yaml", "optim.learning_rate=inf"], ["learning_rate is inf"]),
        (["plan", "recipe.yaml", "optim.adam_beta2=1.0"], ["adam_beta2 is 1.0"]),
        (["plan", "recipe.yaml", "method=foo"], ["'foo'", "full, lora, qlora"]),
        (["plan", "--model", "llama2-7"], ["'llama2-7'", "did you mean 'llama2-7b'"]),
        (["plan", "--model", "./nothere"], ["nothere", "no folder"]),
        (["plan", "--model", "./empty"], ["no config.json"]),
        (["plan", "--model", ""], ["no model is named"]),
        (["plan", "recipe.yaml", "--measured", "no.json"], ["no.json: there is no such file"]),
        (["plan", "recipe.yaml", "--measured", "empty"], ["empty: it cannot be read: Is a dir"]),
        (["train", "nothere.yaml"], ["nothere.yaml", "no such recipe", "`zerofit init` writes"]),
        (["hostfile", "--machine-file", "no.txt"], ["no.txt: there is no such file"]),
        (["bench", "no.yaml"], ["no.yaml: there is no such file"]),
        (["plan", "--model", "llama2-7b", "--gpu", "A100-81GB"], ["did you mean 'A100-80GB'"]),
        (["plan", "--model", "llama2-7b", "--gpu", "V100"], ["V100-16GB", "V100-32GB"]),
        (["plan", "recipe.yaml", "cluster.hostfile=none"], ["cannot read the hostfile", "none"]),
        (["plan", "recipe.yaml", "cluster.hostfile=empty.txt"], ["names no hosts"]),
        (["init"], ["no model is named"]),
        (
            ["init", "new.yaml", "--model", "tiny", "--max-seq-len", "64", "--data", "no.jsonl"],
            ["no.jsonl: there is no such data file", "correct data.path"],
        ),
        (["init", "recipe.yaml", "--model", "tiny", "--max-seq-len", "64"], ["exists already"]),
        (["render", "recipe.yaml", "--output-dir", "train.jsonl"], ["this is a file"]),
        (["render", "recipe.yaml", "--output-dir", "tiny"], ["exists and is not empty"]),
        (["render", "recipe.yaml", "data.path="], ["no training data is named"]),
        (["render", "recipe.yaml", "cluster.num_nodes=2"], ["2 nodes", "one machine"]),
        (["submit", "recipe.yaml", "--dry-run", "slurm.time=soon"], ["slurm.time", "'soon'"]),
        (["status", "nothere"], ["no such run directory"]),
        (["list", "nothere"], ["no such folder"]),
        (["logs", "nothere"], ["no such run directory"]),
        (["cancel", "nothere"], ["no such run"]),
        (["report", "nothere"], ["no such run directory"]),
        (["report", "empty"], ["not a run directory"]),
        (["report", "recipe.yaml"], ["not a folder"]),
        (["export", "nothere"], ["no such run directory"]),
        (["export", "empty"], ["not a run directory"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
@pytest.mark.usefixtures("recipe")
def test_bad_input_leaves_with_2_and_says_what_and_where(
    zerofit: Zerofit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    parts: list[str],
) -> None:
    # `train` looks for it before it looks for data.
    monkeypatch.setattr(worker_command, "_TRAIN_EXTRA", ())
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    outcome = zerofit(*args)
    assert outcome.status == 2
    assert outcome.stdout == ""
    said = " ".join(outcome.stderr.split())
    assert [part for part in parts if part not in said] == []
    assert "Traceback" not in said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.path=missing.jsonl", ["missing.jsonl", "no such data file", "data.path"]),
        ("data.eval_path=missing.jsonl", ["missing.jsonl", "data.eval_path"]),
        ("data.path=empty", ["no file in this folder"]),
        ("cluster.gpu=A100-80GB", ["1 x A100-80GB", "no GPU", "zerofit render"]),
    ],
)
@pytest.mark.usefixtures("recipe")
def test_training_that_cannot_start_leaves_with_2_and_no_run_directory(
    zerofit: Zerofit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    override: str,
    parts: list[str],
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(worker_command, "_TRAIN_EXTRA", ())
    outcome = zerofit("train", "recipe.yaml", override, "--output-dir", "run")
    assert outcome.status == 2
    assert [part for part in parts if part not in outcome.stderr] == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [["train", "recipe.yaml"], ["export", "run"], ["demo"]])
@pytest.mark.usefixtures("recipe")
def test_without_the_training_stack_the_extra_is_named(
    zerofit: Zerofit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setattr(worker_command, "_TRAIN_EXTRA", ("no_such_package",))
    (tmp_path / "run" / run_dir.RANKS).mkdir(parents=True)
    outcome = zerofit(*command)
    assert outcome.status == 2
    assert "not installed: no_such_package" in outcome.stderr
    assert "pip install 'zerofit[train]'" in outcome.stderr
    assert not (tmp_path / "runs").exists()


def test_what_does_not_fit_leaves_with_3_and_its_json_says_so(zerofit: Zerofit) -> None:
    # 70B parameters at 2 bytes are 140 GB, and the host has less than their optimizer states.
    hardware = ["--gpu", "V100-16GB", "--gpus-per-node", "1", "strategy.zero_stage=3"]
    outcome = zerofit("plan", "--model", "llama2-70b", "--method", "full", *hardware, "--json")
    assert outcome.status == 3
    assert json.loads(outcome.stdout)["fits"] is False


def test_a_run_that_does_not_fit_is_not_made(zerofit: Zerofit, recipe: str, tmp_path: Path) -> None:
    too_much = ["model.name_or_path=llama2-70b", "method=full", "cluster.gpu=V100-16GB"]
    one_strategy = ["strategy.zero_stage=3", "strategy.offload_optimizer=none"]
    outcome = zerofit("train", recipe, *too_much, *one_strategy)
    assert outcome.status == 3
    assert not (tmp_path / "runs").exists()


def test_the_plan_as_json_is_all_that_stdout_holds(zerofit: Zerofit, recipe: str) -> None:
    outcome = zerofit("plan", recipe, "--json")
    assert outcome.status == 0
    assert outcome.stderr == ""
    plan = json.loads(outcome.stdout)
    assert plan["fits"] is True
    assert set(plan) >= {"strategy", "memory", "time", "decisions", "rejected"}
    assert set(plan["strategy"]) >= {
        "zero_stage",
        "offload_optimizer",
        "offload_param",
        "gradient_checkpointing",
        "attention",
        "micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
    }
    assert set(plan["memory"]) >= {
        "peak_allocated_bytes",
        "peak_reserved_bytes",
        "device_used_bytes",
        "host_bytes_per_node",
        "phases",
    }
    assert set(plan["time"]) >= {"step_seconds", "tokens_per_second_per_gpu"}


def test_flags_and_overrides_describe_the_same_plan(zerofit: Zerofit, recipe: str) -> None:
    hardware = ["--gpu", "V100-32GB", "--nodes", "1", "--gpus-per-node", "8"]
    flags = zerofit("plan", "--model", "tiny", "--max-seq-len", "128", *hardware, "--json")
    keys = ["cluster.gpu=V100-32GB", "cluster.num_nodes=1", "cluster.gpus_per_node=8"]
    assert flags.stdout == zerofit("plan", recipe, *keys, "--json").stdout


@pytest.mark.parametrize(
    ("args", "next_command"),
    [
        (["plan", "recipe.yaml", "optim.seed=7"], "Next: zerofit train recipe.yaml optim.seed=7\n"),
        (["plan", "--model", "tiny", "--max-seq-len", "128", "optim.seed=7"],
         "Next: zerofit train optim.seed=7 --model tiny --max-seq-len 128 --data FILE\n"),
        (["plan", "--model", "tiny", "--max-seq-len", "128", "--data", "train.jsonl"],
         "Next: zerofit train --model tiny --data train.jsonl --max-seq-len 128\n"),
        (["init", "a $(b);c.yaml", "--model", "tiny", "--max-seq-len", "128"],
         "next: zerofit plan 'a $(b);c.yaml'\n"),
        (["render", "recipe.yaml", "--output-dir", "r $(id)"], "r $(id)/job.sh'\n"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("recipe")
def test_the_next_command_is_one_that_works_when_it_is_pasted(
    zerofit: Zerofit, args: list[str], next_command: str
) -> None:
    outcome = zerofit(*args)
    assert outcome.status == 0
    assert next_command in outcome.stdout


def test_a_folder_without_runs_and_a_run_without_a_log_say_so(
    zerofit: Zerofit, recipe: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    assert zerofit("list", "empty").stderr == "no run in empty\n"
    assert json.loads(zerofit("list", "empty", "--json").stdout) == []
    assert zerofit("render", recipe, "--output-dir", "run").status == 0
    assert zerofit("logs", "run").stderr == "nothing was printed\n"
    assert zerofit("logs", "run", "--rank", "9").stderr == (
        "nothing was printed by rank 9: the run's ranks are 0 to 1\n"
    )


def test_a_new_recipe_plans_as_it_is(zerofit: Zerofit, recipe: str, tmp_path: Path) -> None:
    options = ["--model", "tiny", "--method", "full", "--max-seq-len", "64"]
    assert zerofit("init", "new.yaml", *options).status == 0
    assert "method: full" in (tmp_path / "new.yaml").read_text()
    made = json.loads(zerofit("plan", "new.yaml", "--json").stdout)
    assert (made["method"], made["max_seq_len"]) == ("full", 64)


def test_rendered_files_hold_all_that_the_job_needs(
    zerofit: Zerofit, recipe: str, tmp_path: Path
) -> None:
    outcome = zerofit("render", recipe, "--output-dir", "run", "--json")
    assert outcome.status == 0
    assert json.loads(outcome.stdout)["run_dir"] == str(tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"recipe.yaml", "plan.json", "ds_config.json", "job.sh", "status.json"} <= names
    script = (tmp_path / "run" / "job.sh").read_text()
    assert "-m launcher.worker.data --run-dir" in script
    assert zerofit("render", recipe, "--output-dir", "run").status == 2


def test_a_dry_run_writes_nothing(zerofit: Zerofit, recipe: str, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    outcome = zerofit("train", recipe, "--dry-run")
    assert outcome.status == 0
    assert "exec deepspeed" in outcome.stdout
    # A name that remote shells take, as the run itself would have.
    assert re.search(r"would write \d+ files into \S+/runs/[\w.-]+:\n", outcome.stdout)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_was_only_rendered_has_a_report(zerofit: Zerofit, recipe: str) -> None:
    assert zerofit("render", recipe, "--output-dir", "run").status == 0
    outcome = zerofit("report", "run")
    assert outcome.status == 0
    assert "The run was prepared and has not started." in outcome.stdout


def test_ctrl_c_outside_of_a_run_leaves_with_130(
    zerofit: Zerofit, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "prepare_from", interrupted)
    outcome = zerofit("plan", recipe)
    assert (outcome.status, outcome.stdout, outcome.stderr) == (130, "", "\ninterrupted\n")


def test_a_dry_run_as_json_holds_the_files_and_the_command(zerofit: Zerofit, recipe: str) -> None:
    outcome = zerofit("train", recipe, "--dry-run", "--json", "--output-dir", "run")
    job = json.loads(outcome.stdout)
    assert job["argv"] == ["bash", "job.sh"]
    assert job["files"]["job.sh"].startswith("#!/usr/bin/env bash")
    submitted = json.loads(zerofit("submit", recipe, "--dry-run", "--json").stdout)
    assert submitted["argv"][0] == "sbatch"


def test_a_dry_run_of_an_array_is_refused_before_anything_is_planned(zerofit: Zerofit) -> None:
    outcome = zerofit("submit", "--array", "nosuch.yaml", "--dry-run")
    assert outcome.status == 2
    assert "--dry-run shows one run" in outcome.stderr


def test_a_dry_sweep_with_a_refused_case_leaves_with_2(zerofit: Zerofit, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(
        "defaults: {model: {name_or_path: smollm2-135m}, max_seq_len: 64}\n"
        "cases: [{name: good}, {name: long, max_seq_len: 100000}]\n"
    )
    outcome = zerofit("bench", "sweep.yaml", "--dry-run")
    assert outcome.status == 2
    assert "1 of 2 cases are refused: long" in outcome.stderr


@pytest.mark.parametrize("name", ["a b", "x;rm -rf y", "$(id)", "node1\nnode2", "nöde", "-oX=y"])
def test_a_hostile_name_is_no_host(zerofit: Zerofit, name: str) -> None:
    outcome = zerofit("hostfile", "--slots", "1", "--", name)
    assert outcome.status == 2
    assert "is not a host name" in outcome.stderr
