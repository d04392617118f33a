"""The options that several commands share, and what they mean in a recipe."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from launcher.strategy import Method

Command = Callable[..., Any]

# The flags that describe a run without a recipe, by the recipe key that each one sets.
_FLAGS: dict[str, tuple[str, dict[str, Any]]] = {
    "model.name_or_path": ("--model", {"help": "Catalogue name, local folder or hub id."}),
    "data.path": ("--data", {"help": "Training data: a file, a folder or a hub id."}),
    "method": ("--method", {"type": click.Choice([*Method]), "help": "What to train."}),
    "max_seq_len": ("--max-seq-len", {"metavar": "TOKENS", "help": "Longest sequence."}),
    "optim.global_batch_size": (
        "--global-batch-size",
        {"metavar": "N", "help": "Samples per optimizer step, all GPUs together."},
    ),
    "cluster.gpu": ("--gpu", {"help": "V100-32GB, A100-80GB, H100 …; default: this machine's."}),
    "cluster.num_nodes": ("--nodes", {"metavar": "N", "help": "Nodes."}),
    "cluster.gpus_per_node": ("--gpus-per-node", {"metavar": "N", "help": "GPUs on each."}),
    "cluster.measured": (
        "--measured",
        {
            "metavar": "FILE",
            "help": "Rates of the cluster: what zerofit doctor --output FILE wrote.",
        },
    ),
    "cluster.price_per_gpu_hour": (
        "--price",
        {"metavar": "X", "help": "Price of one GPU for an hour, in any currency."},
    ),
}

existing_or_new = click.Path(path_type=Path)

recipe_args = click.argument("args", nargs=-1, metavar="[RECIPE] [KEY=VALUE]…")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")
run_arg = click.argument("run", metavar="RUN", type=existing_or_new)
output_dir_option = click.option(
    "--output-dir", type=existing_or_new, help="Run directory to create."
)


def flags_of(options: Mapping[str, str | None]) -> list[str]:
    """Return the flags, with their values, that give a command these options."""
    given = [(_FLAGS[key][0], value) for key, value in options.items() if value is not None]
    return [word for flag_and_value in given for word in flag_and_value]


def recipe_flags(command: Command) -> Command:
    """Give a command the flags that describe a run; it gets them as ``options`` by recipe key."""

    def variable(key: str) -> str:
        return key.replace(".", "_")

    @functools.wraps(command)
    def gathered(**given: Any) -> Any:
        options = {key: given.pop(variable(key)) for key in _FLAGS}
        return command(options=options, **given)

    decorated: Command = gathered
    for key, (flag, settings) in reversed(_FLAGS.items()):
        decorated = click.option(flag, variable(key), **settings)(decorated)
    return decorated
