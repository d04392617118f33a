"""The chat template that conversations are written with, and the tokenizer that has it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from launcher.errors import DataError, did_you_mean
from launcher.recipe_sections import Recipe
from launcher.worker.unreadable import unreadable

_ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content']"
    " + eos_token + '\\n' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role']"
    " + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{% endif %}"
)
KNOWN_TEMPLATES: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType(
    {
        "zephyr": (_ZEPHYR, ()),
        "chatml": (_CHATML, ("<|im_start|>", "<|im_end|>")),
        "llama-3": (_LLAMA_3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    }
)
"""Templates by name, and the tokens that the tokenizer must have for each.

Source: the model cards of HuggingFaceH4/zephyr-7b-beta and Meta-Llama-3-8B-Instruct, and
OpenAI's ChatML; zephyr's marks its turns with plain text and ends them as the model ends texts.
"""


def load_tokenizer(recipe: Recipe) -> Any:
    """Return the model's tokenizer, with the recipe's chat template if it names one.

    Raises:
        DataError: there is none, it cannot say which characters a token covers, or it lacks
            what the template needs.
    """
    from transformers import AutoTokenizer

    name = recipe.model.name_or_path
    folder = Path(name)
    if folder.is_dir() and not any(
        any(folder.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "*.model")
    ):
        raise DataError(
            "the model's folder has no tokenizer",
            where=name,
            fix="put tokenizer.json and tokenizer_config.json beside config.json",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name,
            revision=recipe.model.revision,
            trust_remote_code=recipe.model.trust_remote_code,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = unreadable(name, error, what="the tokenizer")
        fix = "put tokenizer.json beside the model's config.json" if folder.is_dir() else reason.fix
        raise DataError(reason.problem, where=name, fix=fix) from error
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} cannot say which characters a token covers",
            where=name,
            fix="convert it to tokenizer.json (save it with a current transformers)",
        )
    if recipe.data.chat_template is not None:
        tokenizer.chat_template = _chat_template(recipe.data.chat_template, tokenizer)
    return tokenizer


def no_template_error(record_format: str, *, where: str) -> DataError:
    """Return the error about conversations for a tokenizer without a chat template."""
    return DataError(
        f"the model's tokenizer has no chat template, which {record_format} records need",
        where=where,
        fix=f"set data.chat_template to a file or one of {', '.join(KNOWN_TEMPLATES)} (zephyr "
        "suits any base model), or use the model's chat version (often named Instruct)",
    )


def _chat_template(name_or_path: str, tokenizer: Any) -> str:
    where = "data.chat_template"
    path = Path(name_or_path).expanduser()
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot be read: {error}", where=str(path), fix=where) from None
        _check_template(text, str(path))
        return text
    if name_or_path not in KNOWN_TEMPLATES:
        raise DataError(
            f"no file and no known template {name_or_path!r}",
            where=where,
            fix=f"{did_you_mean(name_or_path, KNOWN_TEMPLATES)}; or give a file",
        )
    template, tokens = KNOWN_TEMPLATES[name_or_path]
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in tokens if token not in vocabulary]
    if missing:
        raise DataError(
            f"the template {name_or_path!r} needs tokens that the tokenizer lacks: "
            f"{', '.join(missing)}",
            where=where,
            fix="use zephyr, which needs none",
        )
    return template


def _check_template(text: str, where: str) -> None:
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        _compile_jinja_template(text)
    except TemplateSyntaxError as error:
        raise DataError(
            f"not a Jinja template: line {error.lineno}: {error.message}",
            where=where,
            fix="mend that line",
        ) from None
