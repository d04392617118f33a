"""Export what a run trained as an ordinary Hugging Face folder, after verifying it.

Run it as ``python -m launcher.worker.export --run-dir DIR --out OUT [--kind KIND]``. Nothing
appears at OUT unless every check passed; the checks run on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import SafetensorError

from launcher import __version__, run_dir
from launcher.errors import LauncherError, RunDirError
from launcher.recipe import parse_recipe
from launcher.recipe_sections import DataSection, Recipe
from launcher.strategy import Method
from launcher.units import MIB
from launcher.worker.data_sources import training_sources
from launcher.worker.export_checks import (
    ExportError,
    TensorReport,
    check_tensors,
    expected_adapter,
    expected_model,
    meta_model,
)
from launcher.worker.export_logits import (
    TOKENIZER_FILES,
    LogitsDifference,
    compare_logits,
)
from launcher.worker.model_card import render_model_card
from launcher.worker.program import begin_program
from launcher.worker.unreadable import unreadable

# Not __name__, which is "__main__" when this module is run.
logger = logging.getLogger("launcher.worker.export")

Kind = Literal["adapter", "merged", "full"]

SCHEMA_VERSION = 1
FINAL = f"{run_dir.CHECKPOINTS}/final"
EXPORT_JSON = "export.json"
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
_MODEL_FILES = ("config.json", "generation_config.json", "model*.safetensors", "model*.json")
"""What is copied; optimizer states, random states and logs of the trainer stay behind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was verified, and with what result."""

    name: str
    result: str


def export_run(directory: Path, out: Path, *, kind: Kind | None = None) -> dict[str, Any]:
    """Verify what the run trained, write it to ``out``, and return the content of export.json.

    Args:
        directory: a run directory whose training finished.
        out: must not exist; appears by one rename when all is done.
        kind: ``adapter``; ``merged`` for ``out/merged`` besides, the base model with the adapter
            merged into it; ``full`` for a model that was trained as a whole. ``None`` is what
            was trained.

    Raises:
        RunDirError: no finished checkpoint, ``out`` exists, or it cannot be written.
        ExportError: a tensor is missing, empty, misshaped, not finite or untrained, or the
            exported model does not compute what the checkpoint computes.
        ModelError: the base model cannot be read.
    """
    recipe = parse_recipe(
        run_dir.read_text(directory / run_dir.RECIPE), source=str(directory / run_dir.RECIPE)
    )
    checkpoint = directory / FINAL
    kind = kind or ("full" if recipe.method is Method.full else "adapter")
    merge = kind == "merged"
    _check_arguments(recipe, checkpoint, out, kind=kind)
    model = meta_model(
        _base_config(recipe, directory), trust_remote_code=recipe.model.trust_remote_code
    )
    tensors = _check_checkpoint(recipe, checkpoint, model)
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
            new = Path(temporary) / out.name
            new.mkdir()
            _copy(checkpoint, new, is_adapter=recipe.method is not Method.full)
            difference = None
            if not recipe.model.random_weights:
                difference = compare_logits(recipe, checkpoint, new, model, merge=merge)
            export = _describe(directory, recipe, new, tensors, difference)
            run_dir.write_json(new / EXPORT_JSON, export)
            run_dir.write_text(new / "README.md", render_model_card(recipe, export))
            new.rename(out)
    except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        raise RunDirError(
            f"cannot write the export: {getattr(error, 'strerror', None) or error}",
            where=str(out),
            fix="choose a folder that can be written and has room for the model",
        ) from error
    return export


def _check_arguments(recipe: Recipe, checkpoint: Path, out: Path, *, kind: Kind) -> None:
    if out.exists():
        raise RunDirError(
            "the export folder exists already",
            where=str(out),
            fix="choose another folder; nothing is overwritten",
        )
    marker = "config.json" if recipe.method is Method.full else "adapter_config.json"
    if not (checkpoint / marker).is_file():
        raise RunDirError(
            f"the run left no final checkpoint (no {marker})",
            where=str(checkpoint),
            fix="let the run finish first; `zerofit report` says how it ended",
        )
    if kind != "full" and recipe.method is Method.full:
        raise RunDirError(
            "a full fine-tune has no adapter: the whole model was trained",
            where=f"--kind {kind}",
            fix="use --kind full",
        )
    if kind == "full" and recipe.method is not Method.full:
        raise RunDirError(
            f"{recipe.method.value} trained an adapter, not the whole model",
            where="--kind full",
            fix="use --kind merged for the whole model with the adapter in it",
        )
    if kind == "merged" and recipe.model.random_weights:
        raise RunDirError(
            "the base model's weights were random and are gone, so nothing can be merged",
            where="--kind merged",
            fix="use --kind adapter",
        )
    if not any(checkpoint.glob("tokenizer*")):
        raise ExportError(
            "there is no tokenizer beside the weights",
            where=str(checkpoint),
            fix="copy the base model's tokenizer files into that folder",
        )


def _base_config(recipe: Recipe, directory: Path) -> Any:
    from transformers import AutoConfig

    copy = directory / run_dir.MODEL_CONFIG
    is_copied = (copy / "config.json").is_file()
    source = str(copy) if is_copied else recipe.model.name_or_path
    try:
        return AutoConfig.from_pretrained(
            source,
            revision=None if is_copied else recipe.model.revision,
            trust_remote_code=recipe.model.trust_remote_code,
        )
    except (OSError, ValueError, KeyError) as error:
        raise unreadable(source, error) from error


def _check_checkpoint(recipe: Recipe, checkpoint: Path, model: Any) -> TensorReport:
    """Check names, shapes and values of all tensors; nothing but one tensor is in memory."""
    if recipe.method is Method.full:
        files = sorted(checkpoint.glob("model*.safetensors"))
        return check_tensors(files, expected_model(model), where=str(checkpoint))
    path = checkpoint / "adapter_config.json"
    expected = expected_adapter(model, run_dir.read_json(path), where=str(path))
    weights = checkpoint / "adapter_model.safetensors"
    files = [weights] if weights.is_file() else []
    return check_tensors(files, expected, where=str(weights))


def _copy(checkpoint: Path, new: Path, *, is_adapter: bool) -> None:
    patterns = (_ADAPTER_FILES if is_adapter else _MODEL_FILES) + TOKENIZER_FILES
    for path in sorted({path for pattern in patterns for path in checkpoint.glob(pattern)}):
        if path.is_dir():  # chat_templates/
            shutil.copytree(path, new / path.name, copy_function=shutil.copyfile)
        else:
            shutil.copyfile(path, new / path.name)


def _describe(
    directory: Path,
    recipe: Recipe,
    new: Path,
    tensors: TensorReport,
    difference: LogitsDifference | None,
) -> dict[str, Any]:
    """Return the content of export.json."""
    versions: dict[str, str | None] = {}
    if (directory / run_dir.ENVIRONMENT).is_file():
        environment = run_dir.read_json(directory / run_dir.ENVIRONMENT)
        versions = {"python": environment.get("python"), **environment.get("packages", {})}
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "model" if recipe.method is Method.full else "adapter",
        "method": recipe.method.value,
        "base_model": recipe.model.name_or_path,
        "base_revision": recipe.model.revision,
        "run": directory.resolve().name,
        "tensors": {**asdict(tensors), "dtypes": list(tensors.dtypes)},
        "logits": asdict(difference) if difference else None,
        "checks": [asdict(check) for check in _checks(tensors, difference)],
        "data": _data(recipe.data),
        "versions": versions,
        "exported_with": {
            "zerofit": __version__,
            **{name: version(name) for name in ("torch", "transformers", "peft", "safetensors")},
        },
        "files": {
            str(path.relative_to(new)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted(new.rglob("*"))
            if path.is_file()
        },
    }


def _checks(tensors: TensorReport, difference: LogitsDifference | None) -> Iterable[Check]:
    yield Check(
        name="every expected tensor is there, has its shape, and is finite",
        result=f"{tensors.num_tensors} tensors, {tensors.num_params:,} parameters, "
        f"{', '.join(tensors.dtypes)}",
    )
    if tensors.num_zero_lora_b:
        yield Check(
            name="LoRA B matrices that no step changed", result=str(tensors.num_zero_lora_b)
        )
    if difference is None:
        yield Check(
            name="same logits as the checkpoint",
            result="not compared: the base model had random weights",
        )
        return
    yield Check(
        name="same logits as the checkpoint",
        result=f"relative difference {difference.from_checkpoint:.2g}",
    )
    yield Check(
        name="other logits than the base model",
        result=f"relative difference {difference.from_base:.2g}",
    )
    if difference.merged_from_adapter is not None:
        yield Check(
            name="merged model: same logits as base plus adapter",
            result=f"relative difference {difference.merged_from_adapter:.2g}",
        )


def _data(section: DataSection) -> dict[str, str | None]:
    """Return the training data's name and hash: of several files, a hash of their hashes."""
    paths = [source.path for _, source in training_sources(section)]
    hashes = [_sha256(Path(path)) for path in paths if Path(path).is_file()]
    sha256 = None
    if len(hashes) == len(paths) == 1:
        (sha256,) = hashes
    elif len(hashes) == len(paths) > 1:
        sha256 = hashlib.sha256("".join(hashes).encode()).hexdigest()
    return {"path": ", ".join(paths) or None, "sha256": sha256}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(MIB):
            digest.update(block)
    return digest.hexdigest()


def _summary(export: Mapping[str, Any], out: Path) -> dict[str, Any]:
    keys = ("kind", "method", "base_model", "tensors", "logits", "checks")
    return {"out": str(out.absolute()), **{key: export[key] for key in keys}}


def _hand_back_freed_memory() -> None:
    """Have glibc return freed tensors to the system at once.

    Each tensor that is freed raises its threshold for that, up to 32 MiB, and a layer's weights
    are smaller: merging SmolLM2-135M in fp32 peaked at 1.5 GiB above the imports, 0.9 with this.

    Source: mallopt(3), M_MMAP_THRESHOLD (-3), "dynamic mmap threshold".
    """
    with contextlib.suppress(OSError, AttributeError):  # a C library without it
        ctypes.CDLL(None).mallopt(-3, MIB)


def main(arguments: list[str] | None = None) -> int:
    """Export, print one line of JSON, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m launcher.worker.export")
    parser.add_argument("--run-dir", type=Path, required=True, help="run directory to export from")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the model")
    parser.add_argument(
        "--kind", choices=get_args(Kind), default=None, help="left out: what was trained"
    )
    options = parser.parse_args(arguments)
    begin_program()
    _hand_back_freed_memory()
    try:
        # DeepSpeed, which transformers imports where it is installed, logs to stdout.
        with contextlib.redirect_stdout(sys.stderr):
            export = export_run(options.run_dir, options.out, kind=options.kind)
    except LauncherError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    if export["logits"] is None:
        logger.warning("logits were not compared: the base model's weights were random")
    sys.stdout.write(json.dumps(_summary(export, options.out)) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
