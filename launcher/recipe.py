"""Reading a recipe: strictly parsed, nothing guessed; its keys are in recipe_sections."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, get_origin

from launcher.errors import RecipeError, did_you_mean, list_problems
from launcher.recipe_sections import SEARCHED, DataSource, Recipe, StrategySection
from launcher.recipe_text import describe, one_line, parse_override, read_yaml, type_hints
from launcher.recipe_values import impossible_values


def parse_recipe(
    text: str,
    *,
    source: str,
    options: Mapping[str, str] | None = None,
    overrides: Sequence[str] = (),
) -> Recipe:
    """Parse a recipe's YAML text, options and overrides into a checked recipe.

    Args:
        text: YAML; may be empty when the rest says everything.
        source: what to call the text in errors, usually the file's path.
        options: values by dotted key, taken as they are, applied after the file.
        overrides: ``section.key=value`` strings whose values are YAML, applied last.

    Raises:
        RecipeError: the YAML is broken, a key is unknown, a value has the wrong type or is
            impossible; all problems found are listed at once, each with its key.
    """
    # Imported here: it costs 60 ms, and `zerofit version` or a finished plan needs none of it.
    from omegaconf import OmegaConf

    parts = [(source, read_yaml(text, source, kind=Recipe))]
    if options:
        parts.append(("command line", _parse_options(options)))
    parts += [parse_override(item, kind=Recipe) for item in overrides]
    _move_lists([part for _, part in parts])
    tree = merge_strictly(Recipe, parts, source=source)
    if OmegaConf.is_missing(tree.model, "name_or_path") or not tree.model.name_or_path:
        raise RecipeError(
            "no model is named",
            where=f"{source}: model.name_or_path",
            fix="give a catalogue name (llama2-7b), a folder, or a hub id",
        )
    recipe = OmegaConf.to_object(tree)
    assert isinstance(recipe, Recipe)
    recipe = _with_typed_lists(_with_typed_sources(recipe, source), source)
    if wrong := list(_not_text(recipe)) or list(impossible_values(recipe)):
        raise RecipeError(list_problems(wrong), where=source, fix="correct the values named above")
    return recipe


def _with_typed_sources(recipe: Recipe, source: str) -> Recipe:
    """Return the recipe with its data sources checked: OmegaConf leaves tuples as they come."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    typed: list[Any] = []
    problems = []
    for index, given in enumerate(recipe.data.sources):
        try:
            tree = OmegaConf.merge(OmegaConf.structured(DataSource), given)
            typed.append(OmegaConf.to_object(tree))
        except OmegaConfBaseException as error:
            problems.append(f"data.sources[{index}].{describe(error, source)}")
    if problems:
        raise RecipeError(
            list_problems(problems), where=source, fix="correct the values named above"
        )
    return replace(recipe, data=replace(recipe.data, sources=tuple(typed)))


def _move_lists(parts: Sequence[Any]) -> None:
    """Move lists of allowed values to ``strategy.allowed``; what comes later replaces them."""
    from omegaconf import OmegaConf

    sections = [part._get_node("strategy") for part in parts]
    sections = [section for section in sections if OmegaConf.is_dict(section)]
    for position, section in enumerate(sections):
        for key in [key for key in section if key in SEARCHED]:
            for earlier in sections[:position]:
                if OmegaConf.is_dict(lists := earlier._get_node("allowed")):
                    lists.pop(key, None)
            values = section._get_node(key)
            if OmegaConf.is_list(values):
                OmegaConf.update(section, f"allowed.{key}", values, force_add=True)
                section[key] = None


def _with_typed_lists(recipe: Recipe, source: str) -> Recipe:
    """Return the recipe with each allowed value as its key takes it; a list of one sets the key."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    section = recipe.strategy
    typed: dict[str, tuple[Any, ...]] = {}
    problems = []
    for key, values in section.allowed.items():
        if key not in SEARCHED or not isinstance(values, list) or not values:
            problems.append(f"strategy.{key} takes a value, or a list of those that may be chosen")
            continue
        found = []
        for value in values:
            try:
                tree = OmegaConf.merge(_empty_tree(StrategySection), {key: value})
                found.append(getattr(OmegaConf.to_object(tree), key))
            except OmegaConfBaseException as error:
                problems.append(f"strategy.{describe(error, source)}")
        if None in found:
            problems.append(f"strategy.{key} holds null: leave it out, and the planner chooses")
        typed[key] = tuple(dict.fromkeys(found))
    if problems:
        raise RecipeError(
            list_problems(problems), where=source, fix="correct the values named above"
        )
    alone = {key: values[0] for key, values in typed.items() if len(values) == 1}
    lists = {key: values for key, values in typed.items() if key not in alone}
    given = {key: value for key, value in alone.items() if getattr(section, key) is None}
    return replace(recipe, strategy=replace(section, allowed=lists, **given))


@functools.cache
def _empty_tree(kind: type) -> Any:
    """Return the tree with all defaults, which takes longest to build; to be copied."""
    from omegaconf import OmegaConf

    return OmegaConf.structured(kind, flags={"readonly": False})


def merge_strictly(kind: type, parts: Sequence[tuple[str, Any]], *, source: str) -> Any:
    """Merge parsed parts, later ones over earlier ones, into OmegaConf's tree of a dataclass.

    Args:
        kind: the dataclass that says which keys there are.
        parts: what to call each part in errors, and the part.
        source: what to call the whole.

    Raises:
        RecipeError: a key is unknown or a value has the wrong type; all are listed.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    tree = copy.deepcopy(_empty_tree(kind))
    problems = [line for where, part in parts for line in _unknown_keys(part, kind, where)]
    if not problems:
        for where, part in parts:
            try:
                # Without another copy of the tree, which takes longer than the merge.
                tree = OmegaConf.unsafe_merge(tree, part)
                OmegaConf.to_container(part, resolve=True)
            except OmegaConfBaseException as error:
                problems.append(describe(error, where))
    if problems:
        raise RecipeError(list_problems(problems), where=source, fix="correct the keys named above")
    return tree


def render_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML that parses back to the same recipe; defaults are left out."""
    import yaml

    content = {"model": {}} | _differences(recipe, Recipe())
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _differences(value: Any, default: Any) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for item in fields(value):
        mine, theirs = getattr(value, item.name), getattr(default, item.name)
        if mine == theirs:
            continue
        changed[item.name] = _differences(mine, theirs) if is_dataclass(mine) else _plain(mine)
    if isinstance(value, StrategySection) and value.allowed:
        # As they were written; a key that a recovery has set keeps its list aside.
        lists = changed.pop("allowed")
        changed |= {key: lists.pop(key) for key in value.allowed if key not in changed}
        changed |= {"allowed": lists} if lists else {}
    return changed


def _plain(value: Any) -> Any:
    """Return a value as YAML writes it."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, DataSource):
        return _differences(value, DataSource())
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


def _parse_options(options: Mapping[str, str]) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    given = OmegaConf.create({})
    for key, value in options.items():
        try:
            OmegaConf.update(given, key, value)
        except OmegaConfBaseException as error:
            raise RecipeError(
                f"{key}: {one_line(error)}", where="command line", fix="correct the value"
            ) from None
    return given


def _unknown_keys(part: Any, kind: type, where: str) -> Iterator[str]:
    """Yield a line for each key that no field reads: a typo must not become a default."""
    from omegaconf import OmegaConf

    def walk(node: Any, section: type, prefix: str) -> Iterator[str]:
        hints = type_hints(section)
        for key in node:
            name = f"{prefix}{key}"
            if str(key) not in hints:
                elsewhere = [f"{part}.{key}" for part in _sections_with(str(key), kind)]
                meant = did_you_mean(elsewhere[0] if elsewhere else str(key), elsewhere or hints)
                yield f"unknown key {name!r} ({where}): {meant}"
                continue
            child, hint = node._get_node(key), hints[str(key)]
            if hint == tuple[DataSource, ...] and OmegaConf.is_list(child):
                for index in range(len(child)):
                    element = child._get_node(index)
                    if not hasattr(element, "keys"):
                        yield f"{name}[{index}] is not a source such as {{path: FILE}} ({where})"
                    else:
                        yield from walk(element, DataSource, f"{name}[{index}].")
            elif is_dataclass(hint) or get_origin(hint) is dict:
                if not hasattr(child, "keys"):
                    yield f"{name!r} is a section, not the value {node[key]!r} ({where})"
                elif isinstance(hint, type) and is_dataclass(hint):
                    yield from walk(child, hint, f"{name}.")
            elif hasattr(child, "keys"):
                yield f"{name!r} is a value or a list, not a section ({where})"

    yield from walk(part, kind, "")


def _sections_with(key: str, kind: type) -> list[str]:
    return [
        name
        for name, hint in type_hints(kind).items()
        if is_dataclass(hint) and key in type_hints(hint)
    ]


def _not_text(recipe: Recipe) -> Iterator[str]:
    """Yield a line per element that is no text: OmegaConf leaves tuples as they come."""
    for part in fields(recipe):
        section = getattr(recipe, part.name)
        hints = type_hints(type(section)) if is_dataclass(section) else {}
        for key in (key for key, hint in hints.items() if hint == tuple[str, ...]):
            for item in getattr(section, key):
                if not isinstance(item, str):
                    yield f"{part.name}.{key} holds {item!r}, which is no text: quote it"
