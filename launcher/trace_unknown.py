"""A model whose architecture has no closed form: built and traced by the worker, then planned."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.dispatch.worker_command import run_worker
from launcher.errors import ModelError
from launcher.hardware import GpuSpec
from launcher.model_spec import ModelSpec, spec_from_facts
from launcher.recipe_sections import Recipe
from launcher.resolve import default_precision, lora_of
from launcher.strategy import Attention, Method
from launcher.traced_layer import traced_from_json


def trace_model(
    config: Mapping[str, object], recipe: Recipe, gpu: GpuSpec, *, name: str
) -> ModelSpec:
    """Return the model with exact weights and with its layer's activations as measured.

    The worker builds it on the meta device, so neither memory nor weights are needed; it takes
    about ten seconds. The trace holds for this recipe's method, adapters, precision and length.

    Raises:
        ModelError: int8 weights, which cannot be traced without a GPU.
        SetupError: the training stack is not installed.
        WorkerError: the architecture cannot be traced; the worker has said why.
    """
    if recipe.method is Method.qlora and recipe.quantization.kind == "int8":
        raise ModelError(
            f"int8 layers of model_type {config['model_type']!r} cannot be traced",
            where=name,
            fix="set quantization.kind=nf4",
        )
    is_full = recipe.method is Method.full
    is_eager = recipe.strategy.attention is Attention.eager
    request = {
        "hf_config": dict(config),
        "max_seq_len": recipe.max_seq_len,
        "precision": (recipe.model.precision or default_precision(gpu)).value,
        "lora": None if is_full else asdict(lora_of(recipe)),
        "attentions": ["eager"] if is_eager else ["fused", "eager"],
        "is_frozen_and_plain": recipe.method is Method.lora,
    }
    answer = _trace(json.dumps(request))
    return spec_from_facts(answer["facts"], name=name, traced=traced_from_json(answer))


@functools.cache
def _trace(request: str) -> dict[str, Any]:
    """Return the worker's answer; one command may plan the same thing several times."""
    with tempfile.TemporaryDirectory(prefix="zerofit-trace-") as folder:
        path = Path(folder) / "request.json"
        path.write_text(request, encoding="utf-8")
        return run_worker("launcher.worker.trace_architecture", [str(path)])
