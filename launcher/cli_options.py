"""The options of the command line that several commands share, and what they mean in a recipe."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from launcher.strategy import Method

RecipeArgs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE | KEY=VALUE",
        help="One recipe file, and values that override it: strategy.zero_stage=2",
        show_default=False,
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Catalogue name, local folder or hub id.", show_default=False),
]
MethodOption = Annotated[
    Method | None, typer.Option("--method", help="What to train.", show_default=False)
]
LengthOption = Annotated[
    str | None,
    typer.Option("--max-seq-len", metavar="TOKENS", help="Longest sequence.", show_default=False),
]
BatchOption = Annotated[
    str | None,
    typer.Option(
        "--global-batch-size",
        metavar="N",
        help="Samples per optimizer step, all GPUs together.",
        show_default=False,
    ),
]
GpuOption = Annotated[
    str | None,
    typer.Option("--gpu", help="V100-32GB, A100-80GB, H100 …; default: this machine's."),
]
NodesOption = Annotated[
    str | None, typer.Option("--nodes", metavar="N", help="Nodes.", show_default=False)
]
GpusPerNodeOption = Annotated[
    str | None,
    typer.Option("--gpus-per-node", metavar="N", help="GPUs on each.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
OutputDirOption = Annotated[
    Path | None,
    typer.Option("--output-dir", help="Run directory to create.", show_default=False),
]
MatrixOption = Annotated[
    bool, typer.Option("--matrix", help="Plan every model at every length instead.")
]
MatrixModelsOption = Annotated[
    str | None, typer.Option(help="Of the matrix, separated by commas.", show_default=False)
]
MatrixContextsOption = Annotated[
    str | None,
    typer.Option(
        metavar="TOKENS,…", help="Of the matrix, separated by commas.", show_default=False
    ),
]
MatrixCsvOption = Annotated[
    Path | None, typer.Option(help="Write the matrix to this file.", show_default=False)
]
MatrixPngOption = Annotated[
    Path | None, typer.Option(help="Draw the matrix into this file.", show_default=False)
]
RunArg = Annotated[Path, typer.Argument(help="A run directory.", show_default=False)]


class ExportKind(StrEnum):
    """What ``zerofit export`` writes."""

    adapter = "adapter"
    merged = "merged"


def recipe_options(  # noqa: PLR0917
    model: str | None,
    method: Method | None,
    max_seq_len: str | None,
    global_batch_size: str | None,
    gpu: str | None,
    nodes: str | None,
    gpus_per_node: str | None,
) -> dict[str, str | None]:
    """Return the options by the recipe keys that they set."""
    return {
        "model.name_or_path": model,
        "method": method.value if method else None,
        "max_seq_len": max_seq_len,
        "optim.global_batch_size": global_batch_size,
        "cluster.gpu": gpu,
        "cluster.num_nodes": nodes,
        "cluster.gpus_per_node": gpus_per_node,
    }
