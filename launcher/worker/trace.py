"""``python -m launcher.worker.trace``: trace requests in, one JSON line of peaks out for each."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from launcher.config_facts import is_unknown
from launcher.errors import LauncherError, RecipeError
from launcher.model_spec import ModelSpec, spec_from_config, spec_from_facts
from launcher.planning.plan import strategy_from_json, strategy_to_json
from launcher.strategy import Method, Precision, Strategy
from launcher.worker.program import collect_garbage_from_now_on, run_program
from launcher.workload import LoraSpec, Workload

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One case: a workload, a strategy and a rank of a pretended job."""

    hf_config: Mapping[str, Any]
    """The model's config.json."""
    workload: Workload
    strategy: Strategy
    world_size: int
    rank: int = 0
    scale: int = 16
    raw_deepspeed: Mapping[str, Any] = field(default_factory=dict)
    """The recipe's raw keys; stored requests of before have none."""


def request_to_json(request: TraceRequest) -> dict[str, Any]:
    """Return a request as JSON values that :func:`request_from_json` reads back."""
    workload = request.workload
    return {
        "schema_version": SCHEMA_VERSION,
        "hf_config": dict(request.hf_config),
        "workload": {
            "model_name": workload.model.name,
            "method": workload.method.value,
            "precision": workload.precision.value,
            "max_seq_len": workload.max_seq_len,
            "global_batch_size": workload.global_batch_size,
            "has_padding": workload.has_padding,
            "lora": asdict(workload.lora),
        },
        "strategy": strategy_to_json(request.strategy),
        "world_size": request.world_size,
        "rank": request.rank,
        "scale": request.scale,
        "raw_deepspeed": dict(request.raw_deepspeed),
    }


def request_from_json(value: Mapping[str, Any]) -> TraceRequest:
    """Read back :func:`request_to_json`.

    Raises:
        RecipeError: a key is missing or unknown, or the schema version is another.
    """
    if value.get("schema_version") != SCHEMA_VERSION:
        raise _unreadable(f"schema_version is {value.get('schema_version')!r}")
    try:
        content = dict(value["workload"])
        lora = dict(content.pop("lora"))
        lora["target_modules"] = tuple(lora["target_modules"])
        workload = Workload(
            model=_model(value["hf_config"], name=content.pop("model_name")),
            method=Method(content.pop("method")),
            precision=Precision(content.pop("precision")),
            lora=LoraSpec(**lora),
            **content,
        )
        return TraceRequest(
            hf_config=value["hf_config"],
            workload=workload,
            strategy=strategy_from_json(value["strategy"]),
            world_size=value["world_size"],
            rank=value["rank"],
            scale=value["scale"],
            raw_deepspeed=value.get("raw_deepspeed", {}),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(f"{type(error).__name__}: {error}") from None


def _model(hf_config: Mapping[str, Any], *, name: str) -> ModelSpec:
    """Return the model; one without formulas is read off transformers' own."""
    if not is_unknown(hf_config):
        return spec_from_config(hf_config, name=name)
    from launcher.worker.model_facts import facts_of, whole_model

    return spec_from_facts(facts_of(whole_model(hf_config)), name=name)


def run_request(request: TraceRequest) -> dict[str, Any]:
    """Trace one request in this process and return its result as JSON values.

    What DeepSpeed prints on stdout goes to stderr.
    """
    from launcher.worker.trace_engine import trace_engine

    with redirect_stdout(sys.stderr):
        trace = trace_engine(
            request.workload,
            request.strategy,
            hf_config=request.hf_config,
            world_size=request.world_size,
            rank=request.rank,
            scale=request.scale,
            raw_deepspeed=request.raw_deepspeed,
        )
    return {**asdict(trace), "peak_bytes": trace.peak_bytes}


def preload() -> None:
    """Import the training stack once, so that forked children need not; no thread starts."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    gc.disable()
    for name in ("launcher.worker.trace_engine", "deepspeed", "peft", "transformers.integrations"):
        import_module(name)
    import_module("torch._dynamo")
    collect_garbage_from_now_on()


def run_in_child(value: Mapping[str, Any]) -> dict[str, Any]:
    """Trace one request in a forked child, so that no state passes to the next one.

    Returns:
        The result, or ``{"error": ...}`` with the launcher's own message.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with os.fdopen(writer, "w", encoding="utf-8") as stream:
            try:
                answer = run_request(request_from_json(value))
            except LauncherError as error:
                answer = {"error": str(error), "exit_code": error.exit_code}
            except BaseException as error:  # noqa: BLE001  (a child must never return)
                import traceback

                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}", "exit_code": 1}
            json.dump(answer, stream)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as stream:
        text = stream.read()
    os.waitpid(child, 0)
    return dict(json.loads(text)) if text else {"error": "the trace was killed", "exit_code": 1}


def main(argv: list[str] | None = None) -> int:
    """Read requests, one JSON object a line, and print one result line for each."""
    parser = argparse.ArgumentParser(prog="python -m launcher.worker.trace", description=__doc__)
    parser.add_argument("requests", help="file with one JSON request a line; - is stdin")
    path = parser.parse_args(argv).requests
    lines = sys.stdin if path == "-" else Path(path).read_text(encoding="utf-8").splitlines()
    exit_code = 0
    # DeepSpeed logs to stdout from its import on; the results alone belong there.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as results, redirect_stdout(sys.stderr):
        preload()
        for line in lines:
            if not line.strip():
                continue
            answer = run_in_child(json.loads(line))
            if "error" in answer:
                sys.stderr.write(f"error: {answer['error']}\n")
            results.write(json.dumps(answer) + "\n")
            results.flush()
            exit_code = max(exit_code, int(answer.get("exit_code", 0)))
    return exit_code


def _unreadable(problem: str) -> RecipeError:
    return RecipeError(
        f"the trace request cannot be read: {problem}",
        where="trace request",
        fix="write it with request_to_json of the same version",
    )


if __name__ == "__main__":
    run_program(main)
