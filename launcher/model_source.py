"""Find a model's config: in the catalogue, in a folder, or on the Hugging Face hub."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from launcher.errors import ModelError, did_you_mean
from launcher.model_spec import ModelSpec, spec_from_config

_MODELS = "launcher.catalog.models"


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """A model that needs no download to be planned.

    ``config`` holds the keys of the model's config.json that fix its tensors and attention
    spans; weights, tokenizer and everything else come from ``hub_id``.
    """

    name: str
    hub_id: str
    aliases: tuple[str, ...]
    """Other hub ids of the same shape (chat tunes, mirrors)."""
    source: str
    published_num_params: int | None
    """Exact count published for exactly these tensors; a test compares it with ours."""
    published_source: str
    config: Mapping[str, object]


@cache
def catalogue_names() -> tuple[str, ...]:
    """Return the short names of all catalogue models, sorted."""
    folder = resources.files(_MODELS)
    return tuple(sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".json")))


@cache
def load_catalogue_entry(name: str) -> CatalogueEntry:
    """Return a catalogue model by its short name, hub id or alias; case does not matter.

    Raises:
        ModelError: no such model; the fix names the nearest one.
    """
    wanted = name.lower()
    if wanted in catalogue_names():
        return _read_entry(wanted)
    known = _names_by_hub_id()
    if wanted in known:
        return _read_entry(known[wanted])
    raise ModelError(
        f"no model {name!r} in the catalogue",
        where="model.name_or_path",
        fix=f"{did_you_mean(name, catalogue_names())}; or give a folder, or a hub id (owner/name)",
    )


def resolve_model(
    name_or_path: str, *, revision: str | None = None
) -> tuple[ModelSpec, Mapping[str, object]]:
    """Return a model's facts and its config mapping, as :func:`find_config` finds it.

    Raises:
        ModelError: as :func:`find_config`, or an architecture without a closed form.
    """
    name, config = find_config(name_or_path, revision=revision)
    return spec_from_config(config, name=name), config


def find_config(
    name_or_path: str, *, revision: str | None = None
) -> tuple[str, Mapping[str, object]]:
    """Return what to call a model, and its config mapping; weights are never fetched.

    Looked up in this order: a local folder, the catalogue (short name or hub id; skipped
    when ``revision`` is given), the hub's config.json, which huggingface_hub caches.

    Args:
        name_or_path: ``llama2-7b``, ``./my-model`` or ``owner/name``.
        revision: branch, tag or commit on the hub.

    Raises:
        ModelError: unknown name, missing or broken config.json, no access, no network.
    """
    # A ~ before a name that no user has stays as it is, and no such folder is found.
    folder = Path(os.path.expanduser(name_or_path))  # noqa: PTH111
    if folder.is_dir() or _looks_like_path(name_or_path):
        return str(name_or_path), _read_folder(folder)
    entry = _find_entry(name_or_path)
    if entry is not None and revision is None:
        return entry.name, entry.config
    if entry is None and "/" not in name_or_path:
        load_catalogue_entry(name_or_path)  # raises, with the nearest name
    hub_id = entry.hub_id if entry is not None and "/" not in name_or_path else name_or_path
    return entry.name if entry else hub_id, _download_config(hub_id, revision)


def weights_source(name_or_path: str) -> str:
    """Return where a model's weights and tokenizer are: a folder or a hub id.

    A catalogue name becomes its hub id; anything else is returned as it is.
    """
    if Path(name_or_path).expanduser().is_dir() or "/" in name_or_path:
        return name_or_path
    entry = _find_entry(name_or_path)
    return entry.hub_id if entry else name_or_path


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or os.sep * 2 in name


def _find_entry(name: str) -> CatalogueEntry | None:
    try:
        return load_catalogue_entry(name)
    except ModelError:
        return None


@cache
def _names_by_hub_id() -> Mapping[str, str]:
    found: dict[str, str] = {}
    for name in catalogue_names():
        entry = _read_entry(name)
        # Llama 3 and 3.1 share shapes but not ids, so no id can name two entries.
        for hub_id in (entry.hub_id, *entry.aliases):
            assert hub_id.lower() not in found, f"{hub_id} names two catalogue entries"
            found[hub_id.lower()] = name
    return found


@cache
def _read_entry(name: str) -> CatalogueEntry:
    text = resources.files(_MODELS).joinpath(f"{name}.json").read_text(encoding="utf-8")
    value = json.loads(text)
    return CatalogueEntry(**{**value, "aliases": tuple(value["aliases"])})


def _read_folder(folder: Path) -> Mapping[str, object]:
    if not folder.is_dir():
        raise ModelError(
            f"there is no folder {str(folder)!r}",
            where="model.name_or_path",
            fix="correct the path, or give a catalogue name or a hub id (owner/name)",
        )
    path = folder / "config.json"
    if not path.is_file():
        fix = "point at the folder that holds config.json and the weights"
        if (folder / "adapter_config.json").is_file():
            fix = "this holds a LoRA adapter; name the base model instead"
        raise ModelError("the folder has no config.json", where=str(folder), fix=fix)
    return _read_config(path)


def _read_config(path: Path) -> Mapping[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot read it as JSON: {error}", where=str(path), fix="copy or download it again"
        ) from None
    if not isinstance(value, dict):
        raise ModelError(
            f"it holds a {type(value).__name__}, not a mapping",
            where=str(path),
            fix="this is not a model's config.json; copy or download it again",
        )
    return value


def _download_config(hub_id: str, revision: str | None) -> Mapping[str, object]:
    """Fetch config.json alone, through huggingface_hub's cache; never any code.

    Honours HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE, as huggingface_hub does.
    """
    # Imported here: it costs 0.1 s, and catalogue models need none of it.
    from huggingface_hub import errors, hf_hub_download

    where = f"hub model {hub_id}" + (f" at revision {revision}" if revision else "")
    try:
        return _read_config(Path(hf_hub_download(hub_id, "config.json", revision=revision)))
    except errors.GatedRepoError:
        problem = "its owner must grant you access"
        fix = (
            f"accept the licence at https://huggingface.co/{hub_id}, then run `hf auth login`"
            " or set HF_TOKEN"
        )
    except errors.RevisionNotFoundError:
        problem, fix = "no such revision", "give a branch, tag or commit of that repository"
    except errors.RepositoryNotFoundError:
        problem = "no such model, or it is private"
        fix = "check the spelling; for a private one run `hf auth login` or set HF_TOKEN"
    except errors.LocalEntryNotFoundError as error:
        problem = "its config.json is not in the local cache and the hub was not reached"
        problem += f" ({_one_line(error.__cause__)})" if error.__cause__ else ""
        fix = "connect (and unset HF_HUB_OFFLINE), or download it elsewhere and give the folder"
        tail = hub_id.rpartition("/")[2].lower()
        similar = difflib.get_close_matches(tail, catalogue_names(), n=1)
        fix += f"; the catalogue has {similar[0]!r}" if similar else ""
    except errors.EntryNotFoundError:
        problem = "the repository has no config.json"
        fix = "choose a repository in transformers' format (not GGUF or an adapter)"
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        problem = f"the hub refused: {_one_line(error)}"
        fix = "check the id and the network, or give a local folder"
    raise ModelError(problem, where=where, fix=fix)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
