"""Tiny models, run directories and real multi-process runs for the worker's tests."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil

from launcher import run_dir
from launcher.ds_config import build_ds_config
from launcher.peaks import RankPeaks, peaks_from_json
from launcher.planning.plan import strategy_to_json
from launcher.recipe import parse_recipe
from launcher.strategy import Strategy, ZeroKnobs

VOCAB_SIZE = 300
SMALL_CONFIG: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
    }
)
"""Of a model of a few kB, whatever its architecture."""
WAIT_SECONDS = 900.0
"""For what ends by itself in a minute, on machines that do much else."""
NUM_STEPS = 8
"""Optimizer steps of the runs that modules share; their 30 examples make epochs of 4."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def make_tokenizer(folder: Path | None = None, *, chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """Return a byte-level tokenizer without merges: 256 bytes and a few special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special[0])
    tokenizer.chat_template = chat_template
    if folder is not None:
        tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(folder: Path, **changes: Any) -> Path:
    """Write a Llama folder with random weights: 2 layers, hidden size 64."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "eos_token_id": 256,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_model_with_nan(folder: Path, letter: str) -> Path:
    """Write the same model, with an embedding of one letter that is NaN."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_model(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    token = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(letter)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = math.nan
    model.save_pretrained(folder)
    return folder


def write_chats(path: Path, count: int) -> Path:
    """Write conversations of varying length that a tiny model can learn by heart."""
    with path.open("w", encoding="utf-8") as stream:
        for index in range(count):
            user = {"role": "user", "content": f"count to {index % 5 + 1}"}
            numbers = " ".join(str(number + 1) for number in range(index % 5 + 1))
            assistant = {"role": "assistant", "content": numbers}
            stream.write(json.dumps({"messages": [user, assistant]}) + "\n")
    return path


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run printed and left behind."""

    returncode: int
    stderr: str
    stdout: str
    folder: Path
    statuses: tuple[int, ...] = ()
    """Of each rank, where they are known."""

    @property
    def peaks(self) -> list[RankPeaks]:
        """The ranks' files, in order."""
        files = sorted((self.folder / run_dir.RANKS).glob("*.json"))
        return [peaks_from_json(json.loads(path.read_text())) for path in files]

    @property
    def losses(self) -> list[float]:
        """Training losses, one a step."""
        log = (self.folder / run_dir.TRAINER_LOG).read_text().splitlines()
        return [entry["loss"] for line in log if "loss" in (entry := json.loads(line))]

    def read(self, name: str) -> Any:
        """Return a JSON file of the run directory."""
        return json.loads((self.folder / name).read_text())


def write_run(folder: Path, recipe_text: str, strategy: Strategy, *, world_size: int) -> Path:
    """Write what the launcher would write into a run directory."""
    folder.mkdir(parents=True)
    recipe = parse_recipe(recipe_text, source="test")
    precision = recipe.model.precision
    assert precision is not None
    (folder / run_dir.RECIPE).write_text(recipe_text)
    plan = {"strategy": strategy_to_json(strategy), "precision": precision.value}
    run_dir.write_json(folder / run_dir.PLAN, plan)
    config = build_ds_config(
        recipe,
        _Precise(precision),  # type: ignore[arg-type]
        strategy,
        world_size=world_size,
    )
    run_dir.write_json(folder / run_dir.DS_CONFIG, config)
    return folder


@dataclass(frozen=True)
class _Precise:
    """The one field of a workload that the DeepSpeed configuration needs."""

    precision: Any


def small_buckets(**fields: Any) -> Strategy:
    """Return a strategy whose buckets suit a model of 100 kB."""
    knobs = ZeroKnobs(
        reduce_bucket_size=50_000,
        allgather_bucket_size=50_000,
        stage3_prefetch_bucket_size=10_000,
        stage3_param_persistence_threshold=100,
        pin_memory=False,
    )
    return Strategy(**{"zero": knobs, **fields})


def environment() -> dict[str, str]:
    """Return the environment of a CPU run."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a program that still runs, and all that it has started."""
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.kill()
        process.wait()


def free_port() -> int:
    """Return a port that nobody listens on now, and that nobody else will take.

    Each process of pytest-xdist has ports of its own, below Linux's range for outgoing connections
    and those of the launcher.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 10_000 + worker % 4 * 2_500
    for port in random.sample(range(first, first + 2_500), 100):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port
    raise AssertionError("a hundred ports are taken")


def train_argv(folder: Path, *, world_size: int) -> list[str]:
    """Return the command that starts the ranks through DeepSpeed's launcher."""
    launch = ["deepspeed", "--num_gpus", str(world_size), "--master_port", str(free_port())]
    return [*launch, "--module", "launcher.worker.train", "--run-dir", str(folder)]


def tokenize_data(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the data step as the launcher does."""
    return subprocess.run(
        [sys.executable, "-m", "launcher.worker.data", "--run-dir", str(folder)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_SECONDS,
    )


def train(folder: Path, *, world_size: int = 2) -> Outcome:
    """Run all ranks to their end."""
    done = subprocess.run(
        train_argv(folder, world_size=world_size),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_SECONDS,
    )
    return Outcome(
        returncode=done.returncode, stderr=done.stderr, stdout=done.stdout, folder=folder
    )


class Nursery:
    """Runs whose ranks are forked from one program that has imported the training stack.

    For tests of what ranks compute. What starts, watches or ends them is tested with the real
    launcher, :func:`train`.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("rank_nursery.py"))],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == {"ready": True}

    def tokenize(self, folder: Path) -> None:
        """Run the data step of a run."""
        outcome = self._run(folder, world_size=1, module="launcher.worker.data")
        assert outcome.returncode == 0, outcome.stderr

    def train(self, folder: Path, *, world_size: int = 2, **variables: str) -> Outcome:
        """Run all ranks to their end, with these variables in their environment."""
        return self._run(
            folder, world_size=world_size, module="launcher.worker.train", environment=variables
        )

    def run(self, folder: Path, module: str, *, world_size: int) -> Outcome:
        """Run the ranks of another module than the worker's."""
        return self._run(folder, world_size=world_size, module=module)

    def close(self) -> None:
        """End the program."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=WAIT_SECONDS)
        self._process.stdout.close()

    def _run(
        self,
        folder: Path,
        *,
        world_size: int,
        module: str,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> Outcome:
        assert self._process.stdin is not None
        request = {
            "folder": str(folder),
            "world_size": world_size,
            "module": module,
            "environment": dict(environment),
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        statuses = self._answer()["statuses"]
        texts = {
            suffix: "".join(
                (folder / f"rank-{rank}.{suffix}").read_text(errors="replace")
                for rank in range(world_size)
            )
            for suffix in ("out", "err")
        }
        return Outcome(
            returncode=next((status for status in statuses if status), 0),
            stderr=texts["err"],
            stdout=texts["out"],
            folder=folder,
            statuses=tuple(statuses),
        )

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


def train_alone(folder: Path) -> Outcome:
    """Run one rank without a launcher."""
    done = subprocess.run(
        [sys.executable, "-m", "launcher.worker.train", "--run-dir", str(folder)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_SECONDS,
    )
    return Outcome(
        returncode=done.returncode, stderr=done.stderr, stdout=done.stdout, folder=folder
    )
