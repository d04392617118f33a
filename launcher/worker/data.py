"""Tokenised data: made once by the launcher's process, only loaded by the ranks.

Run it as ``python -m launcher.worker.data --run-dir DIR``; it prints one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher import run_dir
from launcher.errors import DataError, LauncherError, RunDirError
from launcher.recipe import parse_recipe
from launcher.recipe_sections import Recipe
from launcher.worker.program import begin_program
from launcher.worker.records import (
    SHAPES,
    Conversation,
    Example,
    Format,
    alpaca_text,
    detect_format,
    read_records,
    to_example,
)
from launcher.worker.tokenization import prompt_ids, tokenize

__all__ = [
    "DataSummary",
    "SplitSummary",
    "detect_format",
    "load_summary",
    "main",
    "prepare_data",
    "read_records",
]

# Not __name__, which is "__main__" when this module is run.
logger = logging.getLogger("launcher.worker.data")

DATA = "data"
"""Folder in the run directory with the tokenised data: ``train``, ``eval``, ``summary.json``."""
SUMMARY = "summary.json"
CACHE_VERSION = 1
"""Part of every cache key: raised whenever the same input would give other tokens."""
SAMPLE_NEW_TOKENS = 64
"""Room that a sample prompt leaves below ``max_seq_len`` for the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSummary:
    """What became of one file's records; lengths are in tokens, after truncation."""

    path: str
    num_records: int
    num_examples: int
    num_truncated: int
    num_dropped: int
    """Records without a token that counts, mostly because truncation cut the answer off."""
    num_tokens: int
    num_loss_tokens: int
    length_percentiles: dict[str, int]
    """Keys 50, 95, 99 and 100."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSummary:
    """What the ranks need to know about the tokenised data."""

    format: Format
    pad_token_id: int
    train: SplitSummary
    eval: SplitSummary | None
    sample_prompt: str | None
    """What the model is asked before and after training: the first held-out prompt."""
    sample_prompt_ids: list[int] | None
    notes: tuple[str, ...]
    """What was decided for the user, one sentence each."""


def prepare_data(recipe: Recipe, tokenizer: Any, cache_dir: Path) -> Path:
    """Tokenise a recipe's data, unless the cache has it, and return the folder.

    The folder holds ``train`` and ``eval`` (datasets on disk) and ``summary.json``. Its name is
    a hash of the files' contents, the tokenizer, its template and the recipe's data settings.

    Raises:
        DataError: a file is missing, empty, broken, or of the wrong shape.
    """
    assert recipe.data.path is not None
    paths = [Path(p).expanduser() for p in (recipe.data.path, recipe.data.eval_path) if p]
    for path in paths:
        if not path.is_file():
            key = "data.path" if path is paths[0] else "data.eval_path"
            raise DataError("no such file", where=str(path), fix=f"correct {key}")
    target = cache_dir / _cache_key(recipe, tokenizer, paths)
    if (target / SUMMARY).is_file():
        logger.info("tokenised data: from the cache, %s", target)
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".new-") as temporary:
        folder = Path(temporary) / "data"
        folder.mkdir()
        summary = _write_data(recipe, tokenizer, folder)
        run_dir.write_json(folder / SUMMARY, asdict(summary))
        try:
            folder.rename(target)
        except OSError:
            # Another process may have finished the same work in the meantime.
            if not (target / SUMMARY).is_file():
                raise
    return target


def load_summary(folder: Path) -> DataSummary:
    """Read the ``summary.json`` that :func:`prepare_data` wrote.

    Raises:
        DataError: there is none.
    """
    try:
        content = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            "the data is not tokenised",
            where=str(folder),
            fix=f"run `python -m launcher.worker.data --run-dir {folder.parent}` first",
        ) from None
    held_out = content["eval"]
    return DataSummary(
        **{
            **content,
            "train": SplitSummary(**content["train"]),
            "eval": SplitSummary(**held_out) if held_out else None,
            "notes": tuple(content["notes"]),
        }
    )


def _write_data(recipe: Recipe, tokenizer: Any, folder: Path) -> DataSummary:
    data, notes = recipe.data, []
    assert data.path is not None
    pad_token_id = tokenizer.pad_token_id
    if pad_token_id is None:
        pad_token_id = tokenizer.eos_token_id or 0
        notes.append("the tokenizer has no padding token: its end-of-sequence token pads")
    examples, record_format = _read_examples(
        Path(data.path).expanduser(), data.format, tokenizer, limit=data.max_train_samples
    )
    if record_format == "alpaca" and not tokenizer.chat_template:
        notes.append("the model has no chat template: alpaca records use the published prompt")
    train = _write_split(examples, recipe, tokenizer, Path(data.path), folder / "train")
    held_out, sample = None, None
    if data.eval_path is not None:
        path = Path(data.eval_path).expanduser()
        examples, _ = _read_examples(path, data.format, tokenizer, limit=data.max_eval_samples)
        held_out = _write_split(examples, recipe, tokenizer, path, folder / "eval")
        sample = _sample(examples, tokenizer, recipe.max_seq_len)
    return DataSummary(
        format=record_format,
        pad_token_id=pad_token_id,
        train=train,
        eval=held_out,
        sample_prompt=sample[0] if sample else None,
        sample_prompt_ids=sample[1] if sample else None,
        notes=tuple(notes),
    )


def _read_examples(
    path: Path, record_format: str, tokenizer: Any, *, limit: int | None
) -> tuple[list[tuple[str, Example]], Format]:
    """Return the file's examples with their places, every record checked."""
    examples: list[tuple[str, Example]] = []
    found: Format | None = None
    for where, record in read_records(path):
        if limit is not None and len(examples) == limit:
            break
        if found is None:
            found = _chosen_format(record, record_format, where)
        example = to_example(record, found, where=where)
        if isinstance(example, Conversation) and not tokenizer.chat_template:
            if found != "alpaca":
                raise DataError(
                    f"the model's tokenizer has no chat template, which {found} records need",
                    where=str(path),
                    fix="use the model's chat version (often named Instruct), or records of "
                    f"the shape {SHAPES['prompt_completion']}",
                )
            example = alpaca_text(example)
        examples.append((where, example))
    assert found is not None
    return examples, found


def _chosen_format(record: Any, record_format: str, where: str) -> Format:
    for name in SHAPES:
        if name == record_format:
            return name
    try:
        return detect_format(record)
    except DataError as error:
        raise DataError(error.problem, where=where, fix=error.fix) from None


def _write_split(
    examples: Sequence[tuple[str, Example]],
    recipe: Recipe,
    tokenizer: Any,
    path: Path,
    target: Path,
) -> SplitSummary:
    from datasets import Dataset, Features, List, Value

    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "length": []}
    num_truncated = num_dropped = num_loss_tokens = 0
    for where, example in examples:
        whole = tokenize(
            example, tokenizer, train_on_prompt=recipe.data.train_on_prompt, where=where
        )
        tokens = whole.truncated(recipe.max_seq_len)
        num_truncated += len(whole.input_ids) > recipe.max_seq_len
        if tokens.num_loss_tokens == 0:
            num_dropped += 1
            continue
        num_loss_tokens += tokens.num_loss_tokens
        columns["input_ids"].append(tokens.input_ids)
        columns["labels"].append(tokens.labels)
        columns["length"].append(len(tokens.input_ids))
    if not columns["length"]:
        raise DataError(
            f"none of the {len(examples)} records has a token to learn from within "
            f"{recipe.max_seq_len} tokens",
            where=str(path),
            fix="raise max_seq_len, or shorten the prompts",
        )
    features = Features(
        {
            "input_ids": List(Value("int32")),
            "labels": List(Value("int32")),
            "length": Value("int32"),
        }
    )
    Dataset.from_dict(columns, features=features).save_to_disk(target)
    return SplitSummary(
        path=str(path),
        num_records=len(examples),
        num_examples=len(columns["length"]),
        num_truncated=num_truncated,
        num_dropped=num_dropped,
        num_tokens=sum(columns["length"]),
        num_loss_tokens=num_loss_tokens,
        length_percentiles=percentiles(columns["length"]),
    )


def percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """Return the nearest-rank percentiles 50, 95, 99 and 100."""
    ordered = sorted(lengths)
    return {
        str(p): ordered[max(1, math.ceil(p / 100 * len(ordered))) - 1] for p in (50, 95, 99, 100)
    }


def _sample(
    examples: Sequence[tuple[str, Example]], tokenizer: Any, max_seq_len: int
) -> tuple[str, list[int]] | None:
    """Return the first prompt that leaves room for an answer, as text and as tokens."""
    for where, example in examples:
        tokens = prompt_ids(example, tokenizer, where=where)
        if not tokens or len(tokens) > max(1, max_seq_len - SAMPLE_NEW_TOKENS):
            continue
        if isinstance(example, Conversation):
            users = [turn["content"] for turn in example.messages if turn["role"] == "user"]
            return (users[-1] if users else ""), tokens
        return example.prompt or tokenizer.decode(tokens), tokens
    return None


def _cache_key(recipe: Recipe, tokenizer: Any, paths: Sequence[Path]) -> str:
    data = recipe.data
    digest = hashlib.sha256()
    settings = [
        CACHE_VERSION,
        recipe.max_seq_len,
        data.format,
        data.train_on_prompt,
        data.max_train_samples,
        data.max_eval_samples,
        [str(path) for path in paths],
        tokenizer.chat_template,
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
    ]
    digest.update(json.dumps(settings).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for path in paths:
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:32]


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def load_tokenizer(recipe: Recipe) -> Any:
    """Return the model's tokenizer.

    Raises:
        DataError: there is none, or it cannot say which characters a token covers.
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
        first_line = str(error).strip().partition("\n")[0]
        raise DataError(
            f"the tokenizer cannot be loaded: {first_line}",
            where=name,
            fix="put tokenizer.json beside the model's config.json",
        ) from error
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} cannot say which characters a token covers",
            where=name,
            fix="convert it to tokenizer.json (save it with a current transformers)",
        )
    return tokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    """Tokenise a run's data, print the summary as one line of JSON, return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m launcher.worker.data")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="folder to keep tokenised data in")
    options = parser.parse_args(arguments)
    begin_program()
    path = options.run_dir / run_dir.RECIPE
    try:
        recipe = parse_recipe(run_dir.read_text(path), source=str(path))
        if recipe.data.path is None:
            sys.stdout.write("null\n")
            return 0
        target = options.run_dir / DATA
        # DeepSpeed, which transformers imports where it is installed, logs to stdout.
        with contextlib.redirect_stdout(sys.stderr):
            names = [Path(p).name for p in (recipe.data.path, recipe.data.eval_path) if p]
            logger.info("tokenising %s", " and ".join(names))
            tokenizer = load_tokenizer(recipe)
            folder = prepare_data(recipe, tokenizer, options.cache or target / "cache")
        shutil.copytree(folder, target, copy_function=_link_or_copy, dirs_exist_ok=True)
        summary = load_summary(target)
    except LauncherError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except OSError as error:
        reason, where = error.strerror or error, error.filename or options.run_dir
        sys.stderr.write(f"error: {where}: cannot write the tokenised data: {reason}\n")
        return RunDirError.exit_code
    sys.stdout.write(json.dumps(asdict(summary)) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
