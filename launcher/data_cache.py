"""Tokenised data between runs: where it is kept, what it is like, and how a plan finds it.

Below the cache's folder, ``<key>/`` holds one tokenised data set; its key is a hash of the
contents that it was made from. ``seen/<glance>.json`` names the key that belongs to a recipe
whose files have the sizes and times that they had then, so that a plan reads no contents.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.errors import DataError
from launcher.recipe_sections import Recipe
from launcher.run_dir import write_json

DATA = "data"
"""Folder in the run directory with the tokenised data."""
TRAIN, EVAL = "train.arrow", "eval.arrow"
"""Rows of ``input_ids``, ``labels`` and ``length``; memory-mapped by the ranks."""
CACHE_VERSION = 2
"""Part of every cache key: raised whenever the same input would give other tokens."""
SUMMARY = "summary.json"
"""Written last: a folder without it is not finished."""
SEEN = "seen"
CACHE_VARIABLE = "ZEROFIT_CACHE"
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "*.model", "special_tokens*", "added_*",
                    "chat_template*")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSummary:
    """One source of records."""

    path: str
    format: str
    num_records: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSummary:
    """What became of the training records, or of the held-out ones; lengths are in tokens."""

    path: str
    sources: tuple[SourceSummary, ...]
    num_records: int
    num_examples: int
    """Records that were kept."""
    num_sequences: int
    """What a batch is made of: as many as examples, or fewer that are packed."""
    num_truncated: int
    num_dropped: int
    """Records without a token that counts, mostly because truncation cut the answer off."""
    num_tokens: int
    num_loss_tokens: int
    length_percentiles: dict[str, int]
    """Of the kept examples after truncation; keys 50, 95, 99 and 100."""
    whole_length_percentiles: dict[str, int]
    """Of all records before truncation."""
    length_bins: list[list[int]]
    """Of all records before truncation: first length, last length, how many."""
    longest_sequence_tokens: int
    mean_sequence_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSummary:
    """What the ranks, and a plan, need to know about the tokenised data."""

    format: str
    pad_token_id: int
    max_token_id: int
    max_seq_len: int
    packing: bool
    train: SplitSummary
    eval: SplitSummary | None
    sample_prompt: str | None
    """What the model is asked before and after training: the first held-out prompt."""
    sample_prompt_ids: list[int] | None
    notes: tuple[str, ...]
    """What was decided for the user, one sentence each."""


def cache_dir(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of tokenised data: ``ZEROFIT_CACHE``, or below the user's cache."""
    if chosen := environment.get(CACHE_VARIABLE):
        return Path(chosen).expanduser() / "data"
    user_cache = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(user_cache).expanduser() / "zerofit" / "data"


def summary_to_json(summary: DataSummary) -> dict[str, Any]:
    """Return the content of ``summary.json``."""
    return asdict(summary)


def load_summary(folder: Path) -> DataSummary:
    """Read the ``summary.json`` of tokenised data.

    Raises:
        DataError: there is none, or another version of zerofit wrote it.
    """
    try:
        content = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            "the data is not tokenised",
            where=str(folder),
            fix=f"run `python -m launcher.worker.data --run-dir {folder.parent}` first",
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"cannot be read: {error}",
            where=str(folder / SUMMARY),
            fix=f"remove {folder}, and tokenise the data anew",
        ) from None
    try:
        return summary_from_json(content)
    except (TypeError, KeyError, AttributeError, ValueError):
        raise DataError(
            "another version of zerofit wrote this",
            where=str(folder / SUMMARY),
            fix=f"remove {folder}, and tokenise the data anew",
        ) from None


def summary_from_json(content: Mapping[str, Any]) -> DataSummary:
    """Return the summary that :func:`summary_to_json` wrote, or that the data program printed."""
    held_out = content["eval"]
    known = {name: value for name, value in content.items() if name != "folder"}
    return DataSummary(
        **{
            **known,
            "train": _split(content["train"]),
            "eval": _split(held_out) if held_out else None,
            "notes": tuple(content["notes"]),
        }
    )


def _split(content: Mapping[str, Any]) -> SplitSummary:
    sources = tuple(SourceSummary(**source) for source in content["sources"])
    return SplitSummary(**{**content, "sources": sources})


def find_prepared(recipe: Recipe, folder: Path) -> tuple[Path, DataSummary] | None:
    """Return what the cache holds for a recipe, if none of its files changed since.

    Args:
        recipe: with absolute paths.
        folder: the cache's folder.
    """
    if not recipe.data.has_training_data or not folder.is_dir():
        return None
    glance = glance_key(recipe)
    if glance is None:
        return None
    try:
        seen = json.loads((folder / SEEN / f"{glance}.json").read_text(encoding="utf-8"))
        entry = folder / seen["key"]
        return entry, load_summary(entry)
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return None  # nothing was prepared, or what was is not whole: then nothing is known


def fill_run_directory(entry: Path, target: Path) -> None:
    """Link or copy tokenised data into a run; its summary last, which says that it is whole.

    Raises:
        OSError: the entry is gone, or the disk is full.
    """
    target.mkdir(exist_ok=True)
    names = [name for name in (TRAIN, EVAL) if (entry / name).exists()]
    for name in (*names, SUMMARY):
        (target / name).unlink(missing_ok=True)
        partial = target / f".{name}"
        partial.unlink(missing_ok=True)
        try:
            os.link(entry / name, partial)
        except OSError:  # another file system, or one without links
            shutil.copy2(entry / name, partial)
        partial.rename(target / name)


def remember(recipe: Recipe, folder: Path, key: str) -> None:
    """Note which tokenised data belongs to a recipe as its files are now."""
    glance = glance_key(recipe)
    if glance is not None:
        (folder / SEEN).mkdir(exist_ok=True)
        write_json(folder / SEEN / f"{glance}.json", {"key": key})


def glance_key(recipe: Recipe) -> str | None:
    """Return a hash of a recipe's data settings and its files' names, sizes and times.

    ``None``: the tokenizer's files are not on this machine.
    """
    tokenizer = _tokenizer_folder(recipe.model.name_or_path, recipe.model.revision)
    if tokenizer is None:
        return None
    # Imported late, as its parsers of e-mail headers take 20 ms of every plan.
    from importlib.metadata import PackageNotFoundError, version

    data = recipe.data
    paths = [data.path, data.eval_path, data.chat_template, *(s.path for s in data.sources)]
    parts: list[Any] = [CACHE_VERSION, asdict(data), recipe.max_seq_len, str(tokenizer)]
    try:
        parts.append(version("tokenizers"))
        parts += [_stamp(path) for p in _TOKENIZER_FILES for path in sorted(tokenizer.glob(p))]
        parts += [_stamp(file) for path in paths if path for file in _files_below(Path(path))]
    except (OSError, PackageNotFoundError):
        return None  # a file vanished in between; or nothing can be tokenised here
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _stamp(path: Path) -> tuple[str, int, int, int]:
    # The time of the last change of the file itself too: programs that copy set the other one.
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _files_below(path: Path) -> Iterator[Path]:
    """Yield a file, or the files of a folder; nothing of a hub id or a template's name."""
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from sorted(file for file in path.rglob("*") if file.is_file())


def _tokenizer_folder(name_or_path: str, revision: str | None) -> Path | None:
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    if name_or_path.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name_or_path, "tokenizer_config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None
