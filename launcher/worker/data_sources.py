"""Where records come from: files, folders of files, and hub data sets, one after another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import DataError, LauncherError
from launcher.recipe_paths import DATA_ENDINGS, is_hub_id
from launcher.recipe_sections import DataSection, DataSource
from launcher.worker.data_files import read_records, without_nested_nulls
from launcher.worker.unreadable import access_fix

_ROWS = 256
_SAVED_SPLITS, _SAVED_STATE = "dataset_dict.json", "state.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSource:
    """A source that was found: its files, or the hub data set that was loaded."""

    source: DataSource
    key: str
    """The recipe's key that names it."""
    files: tuple[Path, ...] = ()
    dataset: Any = None

    @property
    def digest(self) -> str:
        """A hash of the contents."""
        if self.dataset is not None:
            # datasets' own hash of the repository's commit, the configuration and the split.
            return f"{self.source.path} {self.dataset._fingerprint}"
        digest = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def records(self) -> Iterator[tuple[str, Any]]:
        """Yield the records with their places.

        Raises:
            DataError: a file or a split is empty, or a file is broken.
        """
        if self.dataset is None:
            for path in self.files:
                yield from read_records(path)
            return
        number = 0
        for table in self.dataset.with_format("arrow").iter(batch_size=_ROWS):
            for row in table.to_pylist():
                number += 1
                yield f"{self.source.path} row {number}", without_nested_nulls(row)
        if number == 0:
            raise DataError(
                f"the split {self.source.split!r} holds no records",
                where=self.source.path,
                fix=f"choose another split or configuration, or correct {self.key}",
            )


def training_sources(data: DataSection) -> list[tuple[str, DataSource]]:
    """Return the recipe's training sources, each with the key that names it."""
    if data.path is None:
        return [(f"data.sources[{i}].path", source) for i, source in enumerate(data.sources)]
    source = DataSource(
        path=data.path,
        format=data.format,
        columns=data.columns,
        subset=data.subset,
        split=data.split,
        max_samples=data.max_train_samples,
    )
    return [("data.path", source)]


def held_out_source(data: DataSection) -> tuple[str, DataSource] | None:
    """Return the recipe's held-out source and its key, if one is named."""
    if data.eval_path is None:
        return None
    source = DataSource(
        path=data.eval_path,
        format=data.format,
        columns=data.columns,
        subset=data.subset,
        split=data.eval_split,
        max_samples=data.max_eval_samples,
    )
    return "data.eval_path", source


def open_source(key: str, source: DataSource) -> OpenSource:
    """Find a source; of a hub data set, load it (``HF_HUB_OFFLINE`` takes it from the cache).

    Raises:
        DataError: there is no such file, folder or hub data set, or no such split in it.
    """
    path = Path(source.path).expanduser()
    if path.is_file():
        return OpenSource(source=source, key=key, files=(path,))
    if path.is_dir():
        return OpenSource(source=source, key=key, files=_files_in(path, source, key))
    if is_hub_id(source.path):
        return OpenSource(source=source, key=key, dataset=_load_from_hub(source, key))
    raise DataError("no such file", where=source.path, fix=f"correct {key}")


def _files_in(folder: Path, source: DataSource, key: str) -> tuple[Path, ...]:
    """Return the files of a split, as ``datasets`` finds them by their names or a README."""
    if (folder / _SAVED_SPLITS).is_file():
        if not (folder / source.split / _SAVED_STATE).is_file():
            splits = sorted(path.parent.name for path in folder.glob(f"*/{_SAVED_STATE}"))
            raise _no_split(source, splits, key)
        folder = folder / source.split
    if (folder / _SAVED_STATE).is_file():
        return _saved_files(folder)
    readable = {
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in DATA_ENDINGS
        and not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    }
    if not readable:
        raise DataError(
            "no data file in this folder",
            where=source.path,
            fix=f"name a folder with files that end in one of {', '.join(DATA_ENDINGS)}",
        )
    kinds = sorted({path.suffix.lower() for path in readable})
    if len(kinds) > 1:
        raise DataError(
            f"the folder holds files of several kinds: {', '.join(kinds)}",
            where=source.path,
            fix="name each file in data.sources, or keep one kind in a folder",
        )
    by_split = _split_files(folder, source)
    if source.split not in by_split:
        # Files whose names say nothing of a split are the training data; held-out data that
        # has a folder of its own is all of that folder.
        if len(by_split) > 1 or key != "data.eval_path":
            raise _no_split(source, sorted(by_split), key)
        (found,) = by_split.values()
    else:
        found = by_split[source.split]
    return tuple(sorted(found))


def _saved_files(folder: Path) -> tuple[Path, ...]:
    """Return the files of what ``datasets``' ``save_to_disk`` wrote."""
    state = folder / _SAVED_STATE
    try:
        entries = json.loads(state.read_text(encoding="utf-8"))["_data_files"]
        files = tuple(folder / entry["filename"] for entry in entries)
    except (ValueError, KeyError, TypeError):
        files = ()
    missing = [path.name for path in files if not path.is_file()]
    if missing or not files:
        raise DataError(
            f"{missing[0]} is missing" if missing else "it names no data files",
            where=str(state),
            fix="write the data set anew with save_to_disk, or name its files in data.sources",
        )
    return files


def _split_files(folder: Path, source: DataSource) -> dict[str, list[Path]]:
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(str(folder), name=source.subset)
    except (OSError, ValueError) as error:
        raise _refused(source, error) from None
    files = builder.config.data_files or {}
    return {str(split): [Path(name) for name in names] for split, names in files.items()}


def _load_from_hub(source: DataSource, key: str) -> Any:
    from datasets import load_dataset
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return load_dataset(source.path, name=source.subset, split=source.split)
    except (OSError, ValueError, RuntimeError, HfHubHTTPError) as error:
        if isinstance(error, ValueError) and "split" in str(error).lower():
            raise _refused(source, error, fix="correct data.split") from None
        fix = access_fix(f"datasets/{source.path}", error) or (
            f"correct {key}; without a network, copy the data here and name the file or folder"
        )
        raise _refused(source, error, fix=fix) from None


def _refused(source: DataSource, error: Exception, *, fix: str | None = None) -> LauncherError:
    text = " ".join(str(error).split())
    return DataError(
        f"cannot be loaded: {type(error).__name__}: {text[:300]}",
        where=source.path,
        fix=fix or "name its configuration in data.subset, or its files in data.sources",
    )


def _no_split(source: DataSource, splits: Sequence[str], key: str) -> DataError:
    name = "data.eval_split" if key == "data.eval_path" else "data.split"
    return DataError(
        f"there is no split {source.split!r}, found {', '.join(splits) or 'none'}",
        where=source.path,
        fix=f"set {name} to one of those",
    )
