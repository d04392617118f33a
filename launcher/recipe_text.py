"""The text of recipes and overrides: YAML in which text stays as it was typed."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from launcher.errors import RecipeError

_TEXT = (str, str | None)
# libyaml where PyYAML was built with it: a tenth of the time.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(text: str, source: str, *, kind: type) -> Any:
    """Return the mapping that a YAML text holds; what a field takes as text stays as typed.

    Without that, ``12.10`` would become 12.1, and a time of ``1:30:00`` 5400: YAML 1.1 reads
    numbers there.

    Args:
        text: YAML.
        source: what to call it in errors.
        kind: the dataclass that says what is text.

    Raises:
        RecipeError: it is not YAML, or not a mapping.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        raw = OmegaConf.create(text) if text.strip() else OmegaConf.create({})
    except yaml.YAMLError as error:
        raise RecipeError(
            f"this is not YAML: {one_line(error)}", where=source, fix="mend that line"
        ) from None
    except OmegaConfBaseException as error:
        raise RecipeError(
            describe(error, source), where=source, fix="correct the key named above"
        ) from None
    except AssertionError:
        raw = None  # OmegaConf 2.4's answer to a text that is a single number or true
    if not OmegaConf.is_dict(raw):
        raise RecipeError(
            f"a recipe is a mapping of keys to values, this is {text.strip()[:40]!r}",
            where=source,
            fix="start from `zerofit init`",
        )
    if text.strip():
        keep_typed_text(raw, yaml.compose(text, _LOADER), kind=kind)
    return raw


def parse_override(item: str, *, kind: type) -> tuple[str, Any]:
    """Return where an override ``section.key=value`` is from, and what it says, for merging.

    Raises:
        RecipeError: it cannot be read.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    key, equals, value = item.partition("=")
    if not equals or not key.strip():
        raise RecipeError(
            f"cannot read the override {item!r}",
            where="command line",
            fix="write key=value, for example strategy.zero_stage=2",
        )
    try:
        parsed = OmegaConf.from_dotlist([item])
        typed = _typed_text(yaml.compose(value, _LOADER)) if value else None
        if typed is not None and _is_text(kind, key.split(".")):
            OmegaConf.update(parsed, key, typed)
    except yaml.YAMLError as error:
        raise RecipeError(
            f"the value is not YAML: {one_line(error)}",
            where=f"command line: {item}",
            fix="quote the value",
        ) from None
    except OmegaConfBaseException as error:
        raise RecipeError(
            one_line(error).split(" full_key:")[0],
            where=f"command line: {item}",
            fix="correct the value",
        ) from None
    return f"command line: {item}", parsed


def keep_typed_text(values: Any, node: Any, *, kind: Any) -> None:
    """Put back, in parsed YAML, the text of values that a field of ``kind`` takes as text.

    Args:
        values: the parsed mapping or list, changed in place.
        node: the same as yaml.compose gives it.
        kind: a dataclass, or dict[str, …]; or what each element of a list is.
    """
    is_list = isinstance(node, yaml.SequenceNode)
    of_all = kind if is_list else get_args(kind)[-1] if get_origin(kind) is dict else None
    hints = type_hints(kind) if is_dataclass(kind) and not is_list else {}
    for key, child in enumerate(node.value) if is_list else _pairs(node):
        hint = of_all or hints.get(key)
        if get_origin(hint) is tuple:
            hint = get_args(hint)[0]
        if not is_list and key not in values:
            continue  # a key that YAML reads as something else than text
        if isinstance(child, yaml.CollectionNode):
            keep_typed_text(values[key], child, kind=hint)
        elif hint in _TEXT and (typed := _typed_text(child)) is not None:
            values[key] = typed


def type_hints(section: Any) -> Mapping[Any, Any]:
    """Return what a dataclass's fields take; Python would evaluate their texts anew each time."""
    return _evaluated(section)


_evaluated = functools.cache(get_type_hints)


def _pairs(node: Any) -> list[tuple[str, Any]]:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return [(key.value, child) for key, child in pairs if isinstance(key, yaml.ScalarNode)]


def _typed_text(node: Any) -> str | None:
    """Return what stands there without quotes; ``None`` for nothing, a list or a mapping.

    Also where YAML 1.1 sees text: OmegaConf reads the number 1e5 there, which begins revisions.
    """
    is_plain = isinstance(node, yaml.ScalarNode) and not node.style
    return str(node.value) if is_plain and node.tag != "tag:yaml.org,2002:null" else None


def _is_text(kind: Any, keys: Sequence[str]) -> bool:
    """Return whether a dotted key names a field that takes text."""
    for key in keys:
        kind = type_hints(kind).get(key) if is_dataclass(kind) else None
    return kind in _TEXT


# OmegaConf 2.4's words for a value of the wrong type, and what they mean to someone who typed it.
_PLAIN_WORDS = (
    (
        re.compile(r"Value (.*) of type '\w+' could not be converted to Integer"),
        r"\1 is not a whole number",
    ),
    (
        re.compile(r"Value (.*) of type '\w+' could not be converted to Float"),
        r"\1 is not a number",
    ),
    (re.compile(r"Value (.*) is not a valid bool \(type \w+\)"), r"\1 is not true or false"),
    (
        re.compile(r"Value (\[.*\]) \(ListConfig\) is not a valid input for .*"),
        r"it takes one value, not the list \1",
    ),
    (re.compile(r"Cannot convert '\w+' to string: '(.*)'"), r"it takes one text, not \1"),
    (re.compile(r"Invalid value assigned: \w+ is not a TupleConfig.*"), "it takes a list"),
    (re.compile(r"Incompatible value 'None' for field of type '(\w+)'"), "it cannot be left empty"),
)


def describe(error: Exception, where: str) -> str:
    """Return OmegaConf's error as one line: key, what is wrong, where."""
    key = getattr(error, "full_key", None)
    message = one_line(error).split(" full_key:")[0].strip()
    for pattern, plain in _PLAIN_WORDS:
        message = pattern.sub(plain, message)
    return f"{key or 'recipe'}: {message} ({where})"


def one_line(error: Exception) -> str:
    """Return an error's text on one line."""
    return " ".join(str(error).split())
