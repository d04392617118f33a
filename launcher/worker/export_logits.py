"""Does an exported model compute what the checkpoint computes? Measured on the CPU."""

from __future__ import annotations

import gc
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launcher.recipe_sections import Recipe
from launcher.strategy import Method
from launcher.worker.export_checks import ExportError
from launcher.worker.export_merge import write_merged
from launcher.worker.unreadable import unreadable

MERGED = "merged"
"""Folder inside the export with the adapter merged into the base model."""
PROMPT = "What does `textwrap.wrap` do in Python?"
COPY_TOLERANCE = 1e-5
"""Relative difference of logits between a checkpoint and its copy: same numbers, same code."""
MERGE_TOLERANCE = 0.05
"""Relative difference of logits after merging, which rounds W + BA to the base's 16 bits.

Measured: 0.009 for SmolLM2-135M in bf16 with a rank-16 adapter, whose own effect was 0.2.
"""
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "chat_template*", "spiece.model",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsDifference:
    """Largest relative differences of the logits on one prompt, all measured on the CPU."""

    prompt: str
    from_checkpoint: float
    """Exported against the run's checkpoint: max |a - b| / max |b|."""
    from_base: float
    """Exported against the model before training."""
    merged_from_adapter: float | None
    """The same for merged against base plus adapter; ``None`` when nothing was merged."""


def compare_logits(
    recipe: Recipe, checkpoint: Path, new: Path, model: Any, *, merge: bool
) -> LogitsDifference:
    """Run one prompt through base, checkpoint and export, and compare the logits.

    Memory holds no model: weights stay in their files, one module's at a time is widened to
    fp32, and merging makes one file at a time.

    Args:
        recipe: names the base model.
        checkpoint: what the trainer wrote.
        new: its copy; receives the folder ``merged`` when ``merge`` is true.
        model: the base model on the meta device.
        merge: whether to merge the exported adapter, and to compare that too.

    Raises:
        ExportError: the export computes something else than the checkpoint, or the same as
            the base model; or it lacks weights.
        ModelError: the base model or the tokenizer cannot be loaded.
    """
    tokens = _prompt_tokens(new, vocab_size=model.get_input_embeddings().weight.shape[0])
    base = _load(recipe.model.name_or_path, recipe)
    before = _logits(base, tokens)
    merged_from_adapter = None
    if recipe.method is Method.full:
        del base
        gc.collect()
        in_checkpoint = _logits(_load(str(checkpoint), recipe), tokens)
        exported = _logits(_load(str(new), recipe), tokens)
    else:
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(base, checkpoint, adapter_name="checkpoint")
        in_checkpoint = _logits(adapted, tokens)
        adapted.load_adapter(str(new), "exported")
        adapted.set_adapter("exported")
        adapted.delete_adapter("checkpoint")
        exported = _logits(adapted, tokens)
        if merge:
            _merge(adapted, new)
            del base, adapted
            gc.collect()
            merged = _logits(_load(str(new / MERGED), recipe), tokens)
            merged_from_adapter = _relative(merged, exported)
    difference = LogitsDifference(
        prompt=PROMPT,
        from_checkpoint=_relative(exported, in_checkpoint),
        from_base=_relative(exported, before),
        merged_from_adapter=merged_from_adapter,
    )
    _judge(difference, where=str(checkpoint))
    return difference


def _judge(difference: LogitsDifference, *, where: str) -> None:
    fix = "do not use the export; report this with export.json's versions"
    if not difference.from_checkpoint <= COPY_TOLERANCE:  # NaN fails too
        raise ExportError(
            f"the export's logits differ from the checkpoint's by {difference.from_checkpoint:.2g} "
            f"(relative; {COPY_TOLERANCE:g} allowed)",
            where=where,
            fix=fix,
        )
    if not difference.from_base > 0:
        raise ExportError(
            "the trained model computes exactly what the base model computes",
            where=where,
            fix="no step changed it; look at trainer_log.jsonl for skipped steps and the loss",
        )
    merged = difference.merged_from_adapter
    # Rounding must also stay below what training changed, or the merged model has lost it.
    allowed = min(MERGE_TOLERANCE, difference.from_base)
    if merged is not None and not merged <= allowed:
        raise ExportError(
            f"the merged model's logits differ from the adapter's by {merged:.2g} "
            f"(relative; {allowed:.2g} allowed)",
            where=where,
            fix="use --kind adapter, and serve the adapter beside its base model",
        )


def _merge(adapted: Any, new: Path) -> None:
    write_merged(adapted, new / MERGED, dtype=adapted.dtype)
    for pattern in TOKENIZER_FILES:
        for path in new.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, new / MERGED / path.name)


def _prompt_tokens(folder: Path, *, vocab_size: int) -> torch.Tensor:
    """Return the prompt as int64 [1, T]."""
    from transformers import AutoTokenizer

    try:
        tokens: list[int] = AutoTokenizer.from_pretrained(folder)(PROMPT)["input_ids"]
    except (OSError, ValueError, KeyError) as error:
        raise unreadable(folder.name, error, what="the tokenizer") from error
    if not tokens or max(tokens) >= vocab_size:
        raise ExportError(
            f"the tokenizer gives {tokens} for {PROMPT!r}, the model has {vocab_size} embeddings",
            where=str(folder.name),
            fix="copy the tokenizer files of the base model into the checkpoint",
        )
    return torch.tensor([tokens])


def _load(source: str, recipe: Recipe) -> Any:
    """Load a model on the CPU; what its files lack is an error, never a random weight.

    In the files' own type transformers maps the weights into memory: they are read when they
    are used, and the system drops them again when it needs room.
    """
    from transformers import AutoModelForCausalLM

    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            source,
            revision=recipe.model.revision if source == recipe.model.name_or_path else None,
            trust_remote_code=recipe.model.trust_remote_code,
            dtype="auto",
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise unreadable(source, error) from error
    lacking = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
    if lacking:
        raise ExportError(
            f"transformers finds no weights for {', '.join(lacking[:5])}",
            where=source,
            fix="do not use this folder; train again from an earlier checkpoint",
        )
    _compute_in_fp32(model)
    return model.eval()


def _compute_in_fp32(model: Any) -> None:
    """Have each module compute with an fp32 copy of its weights, which lives only meanwhile.

    In 16 bits, rounding would be as large as what some adapters change.
    """

    def widen(module: torch.nn.Module, _arguments: Any) -> None:
        kept[module] = dict(module._parameters)
        for name, value in kept[module].items():
            if value is not None and value.is_floating_point():
                module._parameters[name] = torch.nn.Parameter(value.float(), requires_grad=False)

    def put_back(module: torch.nn.Module, _arguments: Any, _output: Any) -> None:
        module._parameters.update(kept.pop(module))

    kept: dict[torch.nn.Module, dict[str, torch.nn.Parameter | None]] = {}
    for module in model.modules():
        if module._parameters:
            module.register_forward_pre_hook(widen)
            module.register_forward_hook(put_back)


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return float32 [T, V]."""
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits[0].float()


def _relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Return max |value - reference| / max |reference|; NaN when either holds one."""
    return float((value - reference).abs().max() / reference.abs().max())
