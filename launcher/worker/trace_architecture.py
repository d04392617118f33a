"""``python -m launcher.worker.trace_architecture``: facts and activations of any architecture.

Builds the model on the meta device, where nothing is allocated: the whole of it for its weight
tensors, and short ones of its real layers for what a layer keeps and needs. One JSON object comes
back, which ``launcher.trace_unknown`` makes a model of.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import LauncherError, ModelError
from launcher.worker.program import begin_program, collect_garbage_from_now_on, run_program

if TYPE_CHECKING:
    from launcher.worker.trace_one_layer import LayerRequest


def run_request(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts, the weights and the traced layers of one request.

    Raises:
        ModelError: transformers does not know the architecture, or it cannot run without numbers.
    """
    from launcher.worker.model_facts import facts_of, layer_kinds, whole_model
    from launcher.worker.trace_one_layer import trace_layer

    collect_garbage_from_now_on()
    value = {**value, "hf_config": _language_model(value["hf_config"])}
    try:
        model = whole_model(value["hf_config"])
        facts = facts_of(model)
        kinds = layer_kinds(model)
        layers = [trace_layer(request) for request in _layer_requests(value, kinds)]
    except (
        AttributeError,
        KeyError,
        NotImplementedError,
        RuntimeError,
        StopIteration,
        TypeError,
        ValueError,
    ) as error:
        # Whatever code of a model that nobody has tried here runs into.
        raise ModelError(
            f"the architecture cannot be traced: {type(error).__name__}: {_first_line(error)}",
            where=f"model_type {value['hf_config'].get('model_type')!r}",
            fix="zerofit traces decoders that transformers ships, and never runs a model's "
            "own code for a plan; update transformers, or use a model of the catalogue",
        ) from error
    return {"facts": facts, "layers": layers}


def _language_model(hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config of what transformers' AutoModelForCausalLM makes of a config.

    Raises:
        ModelError: it is a model of more than text.

    Source: transformers 5.23 ``auto_factory.py:_BaseAutoModelClass.from_config``.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from launcher.worker.model_facts import config_of

    if not isinstance(hf_config.get("text_config"), Mapping):
        return hf_config
    try:
        config = config_of(hf_config)
    except (KeyError, TypeError, ValueError):
        config = None  # what it names is not known
    part = getattr(config, "sub_configs", {}).get("text_config")
    made = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if part is None or getattr(made, "config_class", None) is not part:
        raise ModelError(
            f"model_type {hf_config['model_type']!r} is a model of more than text",
            where="config",
            fix="take its language model alone: a folder with the text_config as config.json",
        )
    text = config.get_text_config()
    return {**text.to_dict(), "model_type": text.model_type}


def _layer_requests(
    value: Mapping[str, Any], kinds: Mapping[bool, int | None]
) -> list[LayerRequest]:
    """Return the combinations that a planner may ask for."""
    from launcher.strategy import Precision
    from launcher.worker.trace_one_layer import LayerRequest
    from launcher.workload import LoraSpec

    lora = value["lora"]
    spec = None
    if lora is not None:
        spec = LoraSpec(**{**lora, "target_modules": tuple(lora["target_modules"])})
    return [
        LayerRequest(
            hf_config=value["hf_config"],
            max_seq_len=value["max_seq_len"],
            precision=Precision(value["precision"]),
            lora=spec,
            attention=attention,
            has_zero3_linear=has_zero3_linear,
            is_moe=is_moe,
            layer_index=index,
        )
        for is_moe, index in kinds.items()
        for attention in value["attentions"]
        for has_zero3_linear in ((False, True) if value["is_frozen_and_plain"] else (False,))
    ]


def _first_line(error: Exception) -> str:
    """Return what was wrong; transformers lists all 600 architectures behind it."""
    return textwrap.shorten(str(error).strip().partition("\n")[0], 200, placeholder=" …")


def main(argv: list[str] | None = None) -> int:
    """Read one request from a file and print its answer."""
    parser = argparse.ArgumentParser(
        prog="python -m launcher.worker.trace_architecture", allow_abbrev=False
    )
    parser.add_argument("request", type=Path)
    path = parser.parse_args(argv).request
    begin_program()
    try:
        answer = run_request(json.loads(path.read_text(encoding="utf-8")))
    except LauncherError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    run_program(main)
