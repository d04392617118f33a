"""Model size against context length: the best strategy of every cell, as data."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.errors import RecipeError
from launcher.hardware import ClusterSpec
from launcher.model_spec import ModelSpec
from launcher.planning.plan import Candidate, strategy_to_json
from launcher.planning.planner import Choice
from launcher.strategy import Method

STUDY_MODELS = ("llama2-7b", "llama2-13b", "llama2-70b", "falcon-180b")
STUDY_CONTEXTS = (256, 512, 1024, 2048, 4096)
"""The grid of arXiv:2406.02290, figure 4."""

SCHEMA_VERSION = 1
_CSV_COLUMNS = (
    "model", "num_params", "max_seq_len", "fits", "zero_stage", "offload_optimizer",
    "offload_param", "gradient_checkpointing", "attention", "loss", "optimizer",
    "micro_batch_size_per_gpu", "gradient_accumulation_steps", "sequence_parallel_size",
    "device_used_bytes", "limit_bytes", "host_bytes_per_node", "step_seconds",
    "tokens_per_second_per_gpu", "note",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixCell:
    """One model at one length: what would run, or why nothing can."""

    model: ModelSpec
    max_seq_len: int
    best: Candidate | None
    """The fastest that fits, else what exceeds its limits least; ``None`` if none was sought."""
    note: str
    """Why nothing was sought: empty where something was."""

    @property
    def fits(self) -> bool:
        """Whether the model can be trained at this length."""
        return self.best is not None and self.best.fits


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """Cells row by row, one row per model, on one kind of cluster."""

    method: Method
    cluster: ClusterSpec
    limit_bytes: int
    """Device memory that a rank may use, safety margin taken off."""
    contexts: tuple[int, ...]
    """Lengths in tokens."""
    rows: tuple[tuple[MatrixCell, ...], ...]


def make_matrix(
    models: Iterable[ModelSpec],
    contexts: Sequence[int],
    *,
    method: Method,
    cluster: ClusterSpec,
    choose: Callable[[ModelSpec, int], Choice],
) -> Matrix:
    """Choose a strategy for every model and length.

    Args:
        models: one row each.
        contexts: lengths in tokens, one column each.
        method: what is trained, in every cell.
        cluster: where, in every cell.
        choose: plans a model at a length.

    Raises:
        RecipeError: there is no model or no length, or a cell cannot be planned for a reason
            other than the model's own limit.
    """
    if not contexts or any(tokens < 1 for tokens in contexts):
        raise RecipeError(
            f"the lengths are {list(contexts)}",
            where="--contexts",
            fix="name tokens above 0, for example --contexts 1024,4096",
        )
    limit_bytes = cluster.free_memory_bytes or cluster.gpu.memory_bytes
    rows = []
    for model in models:
        row = []
        for tokens in contexts:
            if tokens > model.max_position_embeddings:
                note = f"beyond the model's {model.max_position_embeddings:,} tokens"
                row.append(MatrixCell(model=model, max_seq_len=tokens, best=None, note=note))
                continue
            choice = choose(model, tokens)
            limit_bytes = choice.space.limit_bytes
            row.append(MatrixCell(model=model, max_seq_len=tokens, best=choice.best, note=""))
        rows.append(tuple(row))
    return Matrix(
        method=method,
        cluster=cluster,
        limit_bytes=limit_bytes,
        contexts=tuple(contexts),
        rows=tuple(rows),
    )


def matrix_to_json(matrix: Matrix) -> dict[str, Any]:
    """Return the matrix as JSON values; docs/plan-json.md describes the keys."""
    cluster = matrix.cluster
    return {
        "schema_version": SCHEMA_VERSION,
        "method": matrix.method.value,
        "gpu": cluster.gpu.name,
        "num_nodes": cluster.num_nodes,
        "gpus_per_node": cluster.gpus_per_node,
        "limit_bytes": matrix.limit_bytes,
        "cells": [_cell_to_json(cell) for row in matrix.rows for cell in row],
    }


def matrix_to_csv(matrix: Matrix) -> str:
    """Return one line per cell below a header; memory in bytes, time in seconds."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _CSV_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for cell in (cell for row in matrix.rows for cell in row):
        content = _cell_to_json(cell)
        strategy = content.pop("strategy") or {}
        chosen = {key: value for key, value in strategy.items() if key in _CSV_COLUMNS}
        writer.writerow({**content, **chosen, "limit_bytes": matrix.limit_bytes})
    return text.getvalue()


def _cell_to_json(cell: MatrixCell) -> dict[str, Any]:
    best = cell.best
    return {
        "model": cell.model.name,
        "num_params": cell.model.num_params,
        "max_seq_len": cell.max_seq_len,
        "fits": cell.fits,
        "strategy": strategy_to_json(best.strategy) if best else None,
        "device_used_bytes": best.memory.device_used_bytes if best else None,
        "host_bytes_per_node": best.memory.host_bytes_per_node if best else None,
        "step_seconds": best.time.step_seconds if best else None,
        "tokens_per_second_per_gpu": best.time.tokens_per_second_per_gpu if best else None,
        "note": cell.note,
    }
