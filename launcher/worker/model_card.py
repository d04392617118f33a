"""The model card (README.md) of an exported model: where it comes from, as far as is known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.recipe import Recipe, render_recipe
from launcher.strategy import Method


def render_model_card(recipe: Recipe, export: Mapping[str, Any]) -> str:
    """Return the Markdown text of a model card.

    Args:
        recipe: what the run was asked to do.
        export: the content of export.json.
    """
    base = recipe.model.name_or_path
    is_adapter = recipe.method is not Method.full
    # A local folder is no model id that the hub could link to.
    front = [] if Path(base).is_absolute() else [f"base_model: {json.dumps(base)}"]
    front += [f"library_name: {'peft' if is_adapter else 'transformers'}"]
    front += ["pipeline_tag: text-generation", "tags: [zerofit, deepspeed]"]
    method = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}[recipe.method.value]
    checks = "\n".join(f"| {item['name']} | {item['result']} |" for item in export["checks"])
    versions = "\n".join(
        f"| {name} | {version or 'not installed'} |" for name, version in export["versions"].items()
    )
    files = "\n".join(
        f"| `{name}` | {item['bytes']:,} | `{item['sha256']}` |"
        for name, item in export["files"].items()
    )
    return f"""---
{chr(10).join(front)}
---

# {Path(base).name}, {method}

{"A LoRA adapter of" if is_adapter else "A full fine-tune of"} `{base}`\
{f" (revision `{recipe.model.revision}`)" if recipe.model.revision else ""}, written by zerofit.

```python
{_usage(base, is_adapter=is_adapter)}
```

## Data

{_data_line(export["data"])}

## Recipe

```yaml
{render_recipe(recipe).rstrip()}
```

## Verified on export

| Check | Result |
|---|---|
{checks}

## Versions at training time

| Package | Version |
|---|---|
{versions}

## Files

| File | Bytes | SHA-256 |
|---|---|---|
{files}
"""


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
    if data["sha256"] is None:
        return (
            f"`{Path(data['path']).name}`; it was not there any more when the model was exported."
        )
    return f"`{Path(data['path']).name}`, SHA-256 `{data['sha256']}` when the model was exported."
