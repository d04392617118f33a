"""What a saved adapter or model must contain, and whether its files do.

The expected names and shapes come from the model's configuration alone, on torch's meta
device, so that a fault of the trainer or of PEFT cannot hide itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from launcher.errors import LauncherError, list_problems

Shapes = Mapping[str, tuple[int, ...]]

_MAX_PROBLEMS_SHOWN = 8
_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "layer_replication": (None, []),
}
"""Keys of adapter_config.json with the values for which the tensors are known here."""


class ExportError(LauncherError):
    """What the run saved is not what it should be, and was not exported."""

    exit_code = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """Tensors that a folder must hold, and others that it may hold."""

    required: Shapes
    optional: Shapes = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorReport:
    """What :func:`check_tensors` found when all was well."""

    num_tensors: int
    num_params: int
    dtypes: tuple[str, ...]
    num_zero_lora_b: int
    """LoRA B matrices that are all zero, as every one is before the first step."""


def meta_model(config: Any, *, trust_remote_code: bool) -> Any:
    """Return the model of a configuration without storage: names and shapes only."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def expected_model(model: Any) -> Expected:
    """Return the tensors of a full model; a tied one may be saved or left out.

    Args:
        model: any transformers model; the meta device is enough.
    """
    saved = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    first_names = {name for name, _ in model.named_parameters()}
    first_names |= {name for name, _ in model.named_buffers()}
    return Expected(
        required={name: shape for name, shape in saved.items() if name in first_names},
        optional={name: shape for name, shape in saved.items() if name not in first_names},
    )


def expected_adapter(model: Any, adapter_config: Mapping[str, Any], *, where: str) -> Expected:
    """Return the tensors of a LoRA adapter of ``model``.

    Args:
        model: the base model; the meta device is enough.
        adapter_config: content of adapter_config.json.
        where: that file, for errors.

    Raises:
        ExportError: no module matches, or the adapter has parts that are not known here.

    Source:
        Hu et al., "LoRA", arXiv:2106.09685, section 4.1 (A is r x in, B is out x r); names as
        PEFT 0.18-0.21 saves them (``peft/utils/save_and_load.py``).
    """
    for key, known in _UNSUPPORTED.items():
        if adapter_config.get(key, known[0]) not in known:
            raise ExportError(
                f"{key} is {adapter_config[key]!r}: zerofit cannot tell which tensors belong to it",
                where=where,
                fix="use the checkpoint itself, in checkpoints/final, unverified",
            )
    required: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if not _is_target(name, module, model, adapter_config):
            continue
        prefix = f"base_model.model.{name}"
        rank = _rank(name, adapter_config)
        if isinstance(module, torch.nn.Embedding):
            required[f"{prefix}.lora_embedding_A"] = (rank, module.num_embeddings)
            required[f"{prefix}.lora_embedding_B"] = (module.embedding_dim, rank)
            continue
        in_features, out_features = _features(module)
        required[f"{prefix}.lora_A.weight"] = (rank, in_features)
        required[f"{prefix}.lora_B.weight"] = (out_features, rank)
        if adapter_config.get("use_dora"):
            required[f"{prefix}.lora_magnitude_vector"] = (out_features,)
    if not required:
        raise ExportError(
            f"no module of {model.config.model_type} matches "
            f"target_modules {adapter_config.get('target_modules')!r}",
            where=where,
            fix="check that model.name_or_path in recipe.yaml is the model that was trained",
        )
    # PEFT adds the whole embedding when a target is the embedding or the output layer.
    optional: dict[str, tuple[int, ...]] = {}
    for name, value in model.state_dict().items():
        module_name, _, leaf = name.rpartition(".")
        for saved in (name, f"{module_name}.base_layer.{leaf}"):
            optional[f"base_model.model.{saved}"] = tuple(value.shape)
    return Expected(required=required, optional=optional)


def check_tensors(files: Sequence[Path], expected: Expected, *, where: str) -> TensorReport:
    """Read every tensor once, one at a time, and compare it with what is expected.

    Raises:
        ExportError: a file is damaged; a tensor is missing, empty, of another shape, not
            finite or unknown (all that are found are listed); or every LoRA B is zero.
    """
    problems: list[str] = []
    seen: set[str] = set()
    dtypes: set[str] = set()
    num_params = num_lora_b = num_zero_lora_b = 0
    for path in files:
        for name, tensor in _tensors(path):
            seen.add(name)
            problem = _shape_problem(name, tensor, expected) or _value_problem(name, tensor)
            if problem:
                problems.append(problem)
                continue
            num_params += tensor.numel()
            dtypes.add(str(tensor.dtype).removeprefix("torch."))
            if name.endswith(("lora_B.weight", "lora_embedding_B")):
                num_lora_b += 1
                num_zero_lora_b += not bool(tensor.any())
    missing = sorted(set(expected.required) - seen)
    problems += [f"{name} is missing" for name in missing]
    if problems:
        _raise_problems(problems, where=where)
    if num_lora_b and num_zero_lora_b == num_lora_b:
        raise ExportError(
            "the adapter is as it was initialised: all its lora_B tensors are zero",
            where=where,
            fix="no step changed it; look at trainer_log.jsonl for skipped steps and the loss",
        )
    return TensorReport(
        num_tensors=len(seen),
        num_params=num_params,
        dtypes=tuple(sorted(dtypes)),
        num_zero_lora_b=num_zero_lora_b,
    )


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ExportError(
            f"the file is damaged or cut short: {error}",
            where=str(path),
            fix="the disk was full or the save was interrupted; resume the run from an earlier "
            "checkpoint",
        ) from error


def _shape_problem(name: str, tensor: torch.Tensor, expected: Expected) -> str | None:
    known = expected.required if name in expected.required else expected.optional
    if name not in known:
        return f"{name} belongs to no module of the model"
    shape = known[name]
    if tensor.numel() == 0 and 0 not in shape:
        return f"{name} is empty: its partitions were not gathered when it was saved (ZeRO-3)"
    if tuple(tensor.shape) != shape:
        return f"{name} has shape {tuple(tensor.shape)}, expected {shape}"
    return None


def _value_problem(name: str, tensor: torch.Tensor) -> str | None:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        count = int((~torch.isfinite(tensor)).sum())
        return f"{name} has {count} values that are NaN or infinite"
    return None


def _raise_problems(problems: list[str], *, where: str) -> None:
    shown = problems[:_MAX_PROBLEMS_SHOWN]
    if more := len(problems) - len(shown):
        shown.append(f"and {more} more tensors")
    fix = "do not use this checkpoint; train again from an earlier one"
    if any("is empty" in problem for problem in problems):
        fix = "save again with the parameters gathered (stage3_gather_16bit_weights_on_model_save)"
    elif any("NaN" in problem for problem in problems):
        fix = "training diverged; lower the learning rate, or use bf16 instead of fp16"
    raise ExportError(list_problems(shown), where=where, fix=fix)


def _features(module: torch.nn.Module) -> tuple[int, int]:
    """Return (in, out) features of a linear layer; GPT-2's Conv1D stores them transposed."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    first, second = weight.shape
    return (first, second) if type(module).__name__ == "Conv1D" else (second, first)


def _is_target(name: str, module: Any, model: Any, adapter_config: Mapping[str, Any]) -> bool:
    is_linear = isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
    if not (is_linear or isinstance(module, torch.nn.Embedding)):
        return False
    excluded = adapter_config.get("exclude_modules")
    if excluded and _matches(name, excluded):
        return False
    targets = adapter_config.get("target_modules") or []
    if targets == "all-linear":
        is_hit = is_linear and module is not model.get_output_embeddings()
    else:
        is_hit = _matches(name, targets)
    layers = adapter_config.get("layers_to_transform")
    if is_hit and layers is not None:
        layer = re.match(r".*\.[^.]*\.(\d+)\.", name)
        wanted = [layers] if isinstance(layers, int) else layers
        return layer is not None and int(layer.group(1)) in wanted
    return is_hit


def _matches(name: str, targets: str | Sequence[str]) -> bool:
    """Return whether PEFT takes the module: a string is a pattern, a list has name endings."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _rank(name: str, adapter_config: Mapping[str, Any]) -> int:
    for pattern, rank in (adapter_config.get("rank_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return int(rank)
    return int(adapter_config["r"])
