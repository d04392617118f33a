"""The sweep file: which runs to compare, written out one by one or as a matrix. Pure."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from launcher.ds_config import merge
from launcher.errors import RecipeError, did_you_mean, list_problems
from launcher.recipe import parse_recipe, render_recipe
from launcher.recipe_sections import Recipe
from launcher.recipe_text import read_yaml

_FILE_KEYS = ("defaults", "cases", "matrix")
_MATRIX_KEYS = ("defaults", "models", "contexts", "zero_stages", "strategies")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# libyaml's parser is ten times as fast as the one in Python; a matrix has hundreds of cases.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, kw_only=True)
class _ListedCase(Recipe):
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class _Matrix:
    models: tuple[str, ...]
    strategies: dict[str, Recipe]
    defaults: Recipe


@dataclass(frozen=True, kw_only=True)
class _SweepFile:
    """What is text in a sweep file, and so stays as it was typed."""

    defaults: Recipe
    cases: tuple[_ListedCase, ...]
    matrix: tuple[_Matrix, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run of a sweep."""

    name: str
    """Unique in the sweep; also the name of its run directory."""
    recipe: Recipe
    strategy_label: str | None = None
    """The matrix's name for its settings; ``None`` for a case that was written out."""

    @property
    def content(self) -> dict[str, Any]:
        """The recipe as JSON values, defaults left out."""
        content: dict[str, Any] = yaml.load(render_recipe(self.recipe), _LOADER)  # noqa: S506
        return content


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    name: str
    content: Mapping[str, Any]
    strategy_label: str | None = None


def parse_sweep(text: str, *, source: str, overrides: Sequence[str] = ()) -> tuple[Case, ...]:
    """Return the cases of a sweep file, the matrix's first, in the file's order.

    Args:
        text: YAML with ``defaults`` (recipe keys of all cases), ``cases`` (recipes with a
            ``name`` each) and ``matrix`` (one mapping, or several in a list, of ``models``,
            ``contexts``, ``strategies`` and, where wanted, ``zero_stages`` and ``defaults``).
        source: what to call the file in errors.
        overrides: ``section.key=value``, applied to every case.

    Raises:
        RecipeError: the YAML is broken, a key is unknown, a matrix or the whole is empty, two
            cases have one name, or a case is no valid recipe.
    """
    content = _read_mapping(text, source)
    _check_keys(content, _FILE_KEYS, source)
    defaults = _mapping(content.get("defaults"), f"{source}: defaults")
    drafts = [*_matrix_drafts(content, source), *_listed_drafts(content, source)]
    if not drafts:
        raise RecipeError(
            "there is no case in it",
            where=source,
            fix="write cases: or matrix:, see benchmarks/ for examples",
        )
    _check_names(drafts, source)
    cases: list[Case] = []
    named: dict[str, list[str]] = {}
    for draft in drafts:
        where = f"{source}: case {draft.name}"
        recipe_text = yaml.safe_dump(merge(defaults, draft.content), sort_keys=False)
        try:
            recipe = parse_recipe(recipe_text, source=where, overrides=overrides)
        except RecipeError as error:
            named.setdefault(error.problem, []).append(draft.name)
            continue
        cases.append(Case(name=draft.name, recipe=recipe, strategy_label=draft.strategy_label))
    if named:
        # An override that no recipe knows is the same problem in each case.
        problems = [f"{_which(names)}: {problem}" for problem, names in named.items()]
        raise RecipeError(
            list_problems(problems), where=source, fix="correct the cases named above"
        )
    return tuple(cases)


def _read_mapping(text: str, source: str) -> dict[str, Any]:
    from omegaconf import OmegaConf

    content: Any = OmegaConf.to_container(read_yaml(text, source, kind=_SweepFile))
    return _mapping(content, source)


def _listed_drafts(content: Mapping[str, Any], source: str) -> Iterator[_Draft]:
    for position, item in enumerate(_list(content.get("cases"), f"{source}: cases"), start=1):
        where = f"{source}: case {position}"
        case = dict(_mapping(item, where))
        name = case.pop("name", None)
        if name is None:
            raise RecipeError("it has no name", where=where, fix="add a line like: name: my-case")
        yield _Draft(name=str(name), content=case)


def _matrix_drafts(content: Mapping[str, Any], source: str) -> Iterator[_Draft]:
    """Yield models x contexts x ZeRO stages x strategies of each matrix, models outermost."""
    given = content.get("matrix")
    matrices = given if isinstance(given, list) else [given] if given is not None else []
    for position, item in enumerate(matrices, start=1):
        where = f"{source}: matrix" + (f" {position}" if len(matrices) > 1 else "")
        matrix = _mapping(item, where)
        _check_keys(matrix, _MATRIX_KEYS, where)
        models = _filled_list(matrix.get("models"), f"{where}: models")
        contexts = _filled_list(matrix.get("contexts"), f"{where}: contexts")
        strategies = _mapping(matrix.get("strategies"), f"{where}: strategies")
        if not strategies:
            raise _empty(f"{where}: strategies")
        stages: list[Any] = [None]
        if "zero_stages" in matrix:
            stages = _filled_list(matrix["zero_stages"], f"{where}: zero_stages")
        defaults = _mapping(matrix.get("defaults"), f"{where}: defaults")
        for model, context, stage, (label, settings) in itertools.product(
            models, contexts, stages, strategies.items()
        ):
            keys: dict[str, Any] = {"model": {"name_or_path": model}, "max_seq_len": context}
            if not isinstance(label, str):
                raise RecipeError(
                    f"the name {label!r} is no text",
                    where=f"{where}: strategies",
                    fix="put it into quotes",
                )
            parts = [str(model).rstrip("/").rpartition("/")[2], str(context)]
            if stage is not None:
                keys["strategy"] = {"zero_stage": stage}
                parts.append(f"z{stage}")
            below = _mapping(settings, f"{where}: strategies: {label}")
            yield _Draft(
                name="-".join([*parts, label]),
                content=merge(merge(defaults, below), keys),
                strategy_label=label,
            )


def _which(names: Sequence[str]) -> str:
    return f"case {names[0]}" + (f" and {len(names) - 1:,} others" if len(names) > 1 else "")


def _check_names(drafts: Sequence[_Draft], source: str) -> None:
    names = [draft.name for draft in drafts]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(
            f"several cases have the name {', '.join(twice[:5])}",
            where=source,
            fix="give each case a name of its own: results are found by it",
        )
    for name in names:
        if not _NAME.fullmatch(name):
            raise RecipeError(
                f"{name!r} cannot be a case's name: it also names a folder",
                where=source,
                fix="use up to 100 letters, digits, dots, dashes and underscores",
            )


def _check_keys(content: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    unknown = [str(key) for key in content if key not in known]
    if unknown:
        raise RecipeError(
            f"unknown key {unknown[0]!r}", where=where, fix=did_you_mean(unknown[0], known)
        )


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RecipeError(
            f"this is a mapping of keys to values, not {str(value)[:40]!r}",
            where=where,
            fix="see benchmarks/ for examples",
        )
    return value


def _list(value: Any, where: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise RecipeError(
            f"this is a list, not {str(value)[:40]!r}", where=where, fix="write [a, b, c]"
        )
    return value


def _filled_list(value: Any, where: str) -> list[Any]:
    items = _list(value, where)
    if not items:
        raise _empty(where)
    return items


def _empty(where: str) -> RecipeError:
    return RecipeError("it is empty", where=where, fix="name at least one, or leave matrix: out")
