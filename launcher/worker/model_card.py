"""The model card (README.md) of an exported model: where it comes from, as far as is known."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.recipe import render_recipe
from launcher.recipe_sections import Recipe
from launcher.strategy import Method


def render_model_card(recipe: Recipe, export: Mapping[str, Any]) -> str:
    """Return the Markdown text of a model card.

    Args:
        recipe: what the run was asked to do.
        export: the content of export.json.
    """
    base = recipe.model.name_or_path
    is_adapter = recipe.method is not Method.full
    method = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}[recipe.method.value]
    kind = "A LoRA adapter of" if is_adapter else "A full fine-tune of"
    revision = f" (revision `{recipe.model.revision}`)" if recipe.model.revision else ""
    sections = [
        _front_matter(base, is_adapter=is_adapter),
        f"# {Path(base).name}, {method}",
        f"{kind} `{base}`{revision}, written by zerofit.",
        f"```python\n{_usage(base, is_adapter=is_adapter)}\n```",
        "## Data",
        _data_line(export["data"]),
        "## Recipe",
        f"```yaml\n{render_recipe(recipe).rstrip()}\n```",
        *_tables(export),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(base: str, *, is_adapter: bool) -> str:
    # A local folder is no model id that the hub could link to.
    lines = [] if Path(base).is_absolute() else [f"base_model: {json.dumps(base)}"]
    lines += [f"library_name: {'peft' if is_adapter else 'transformers'}"]
    lines += ["pipeline_tag: text-generation", "tags: [zerofit, deepspeed]"]
    return "\n".join(["---", *lines, "---"])


def _tables(export: Mapping[str, Any]) -> Iterator[str]:
    checks = [(item["name"], item["result"]) for item in export["checks"]]
    versions = [(name, found or "not installed") for name, found in export["versions"].items()]
    files = [
        (f"`{name}`", f"{item['bytes']:,}", f"`{item['sha256']}`")
        for name, item in export["files"].items()
    ]
    yield "## Verified on export"
    yield _table(("Check", "Result"), checks)
    yield "## Versions at training time"
    yield _table(("Package", "Version"), versions)
    yield "## Files"
    yield _table(("File", "Bytes", "SHA-256"), files)


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _usage(base: str, *, is_adapter: bool) -> str:
    if not is_adapter:
        return (
            "from transformers import AutoModelForCausalLM\n\n"
            'model = AutoModelForCausalLM.from_pretrained("this folder")'
        )
    return (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base)})\n"
        'model = PeftModel.from_pretrained(base, "this folder")'
    )


def _data_line(data: Mapping[str, Any]) -> str:
    if data["path"] is None:
        return "Made-up tokens: a benchmark, not a training on data."
    names = ", ".join(Path(path).name for path in data["path"].split(", "))
    if data["sha256"] is None:
        return (
            f"`{names}`; not hashed: no file, or not there any more, when the model was exported."
        )
    return f"`{names}`, SHA-256 `{data['sha256']}` when the model was exported."
