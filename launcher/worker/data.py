"""Tokenised data: made once, outside the job, and only loaded by the ranks.

Run it as ``python -m launcher.worker.data --run-dir DIR`` to fill a run directory, or with
``--recipe FILE`` to fill the cache alone; it prints one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher import run_dir
from launcher.data_cache import (
    CACHE_VERSION,
    DATA,
    EVAL,
    SUMMARY,
    TRAIN,
    DataSummary,
    SplitSummary,
    cache_dir,
    fill_run_directory,
    load_summary,
    remember,
    summary_to_json,
)
from launcher.errors import DataError, LauncherError, RunDirError
from launcher.recipe import parse_recipe
from launcher.recipe_sections import Recipe
from launcher.worker.chat_templates import load_tokenizer
from launcher.worker.data_sources import (
    OpenSource,
    held_out_source,
    open_source,
    training_sources,
)
from launcher.worker.data_writer import Counts, length_bins, percentiles, write_split
from launcher.worker.examples import ExampleReader
from launcher.worker.program import begin_program, collect_garbage_from_now_on, run_program
from launcher.worker.vocabulary import check_vocabulary, configured_rows

# Not __name__, which is "__main__" when this module is run.
logger = logging.getLogger("launcher.worker.data")

_BEGUN = ".new-"
MODEL_CONFIG = "model_config/config.json"
"""In the run directory, of a model that has no weights."""


def prepare_data(recipe: Recipe, tokenizer: Any, cache: Path) -> Path:
    """Tokenise a recipe's data, unless the cache has it, and return its folder there.

    The folder's name is a hash of the files' contents, the tokenizer, the chat template and
    the recipe's data settings. It appears complete or not at all; of several processes that
    want the same, one makes it and the others wait.

    Raises:
        DataError: a file is missing, empty, broken, or of the wrong shape.
    """
    from filelock import FileLock, Timeout

    opened = [open_source(key, source) for key, source in training_sources(recipe.data)]
    held_out = held_out_source(recipe.data)
    opened_eval = open_source(*held_out) if held_out else None
    every = [*opened, opened_eval] if opened_eval else opened
    stamps = _stamps(every)
    key = _cache_key(recipe, tokenizer, every)
    target = cache / key
    cache.mkdir(parents=True, exist_ok=True)
    lock = FileLock(cache / f"{key}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        logger.info("another process is tokenising the same data: waiting for it")
        lock.acquire()
    with contextlib.ExitStack() as stack:
        stack.callback(lock.release)
        if (target / SUMMARY).is_file():
            logger.info("tokenised data: from the cache, %s", target)
        else:
            temporary = cache / f"{_BEGUN}{key}"
            stack.callback(shutil.rmtree, temporary, ignore_errors=True)
            _make(recipe, tokenizer, opened, opened_eval, temporary)
            if _stamps(every) != stamps:
                raise DataError(
                    "a data file changed while it was read",
                    where=", ".join(source.source.path for source in every),
                    fix="run the same command again",
                )
            shutil.rmtree(target, ignore_errors=True)  # what was there lacked a summary
            temporary.rename(target)
    _remove_leftovers(cache)
    return target


def _remove_leftovers(cache: Path) -> None:
    """Remove what programs that were killed have begun; what others are making stays."""
    from filelock import FileLock, Timeout

    for begun in cache.glob(f"{_BEGUN}*"):
        with (
            contextlib.suppress(Timeout),
            FileLock(cache / f"{begun.name.removeprefix(_BEGUN)}.lock", blocking=False),
        ):
            shutil.rmtree(begun, ignore_errors=True)


def _make(
    recipe: Recipe,
    tokenizer: Any,
    train: Sequence[OpenSource],
    held_out: OpenSource | None,
    folder: Path,
) -> None:
    """Write a complete folder of tokenised data, in place of what a crash left there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    notes = []
    pad_token_id = tokenizer.pad_token_id
    if pad_token_id is None:
        pad_token_id = tokenizer.eos_token_id or 0
        pads = "token 0" if tokenizer.eos_token_id is None else "its end-of-sequence token"
        notes.append(f"the tokenizer has no padding token: {pads} pads")
    reader = ExampleReader(train, tokenizer, recipe.max_seq_len)
    train_counts, train_summary = _write(reader, recipe, tokenizer, folder / TRAIN)
    notes += reader.notes
    if count := train_counts.num_without_system:
        notes.append(
            f"the chat template leaves out the system text of {count:,} conversations: put it into "
            "their first user turn, or set data.chat_template"
        )
    eval_counts, eval_summary, sample = None, None, None
    if held_out is not None:
        reader = ExampleReader([held_out], tokenizer, recipe.max_seq_len, takes_sample=True)
        eval_counts, eval_summary = _write(reader, recipe, tokenizer, folder / EVAL)
        sample = reader.sample
    summary = DataSummary(
        format=", ".join(sorted({source.format for source in train_summary.sources})),
        pad_token_id=pad_token_id,
        max_token_id=max(
            pad_token_id, train_counts.max_token_id, eval_counts.max_token_id if eval_counts else 0
        ),
        max_seq_len=recipe.max_seq_len,
        packing=recipe.data.packing,
        train=train_summary,
        eval=eval_summary,
        sample_prompt=sample[0] if sample else None,
        sample_prompt_ids=sample[1] if sample else None,
        notes=tuple(notes),
    )
    run_dir.write_json(folder / SUMMARY, summary_to_json(summary))


def _write(
    reader: ExampleReader, recipe: Recipe, tokenizer: Any, target: Path
) -> tuple[Counts, SplitSummary]:
    counts = write_split(
        iter(reader),
        tokenizer,
        target,
        max_seq_len=recipe.max_seq_len,
        train_on_prompt=recipe.data.train_on_prompt,
        # Held-out examples stay apart, so that their loss compares with that of other runs.
        packing=recipe.data.packing and target.name == TRAIN,
    )
    where = ", ".join(source.path for source in reader.sources)
    if not counts.lengths:
        raise DataError(
            f"none of the {counts.num_records} records has a token to learn from within "
            f"{recipe.max_seq_len} tokens",
            where=where,
            fix="raise max_seq_len, or shorten the prompts",
        )
    return counts, SplitSummary(
        path=where,
        sources=reader.sources,
        num_records=counts.num_records,
        num_examples=len(counts.lengths),
        num_sequences=len(counts.sequence_lengths),
        num_truncated=counts.num_truncated,
        num_dropped=counts.num_dropped,
        num_tokens=sum(counts.lengths),
        num_loss_tokens=counts.num_loss_tokens,
        length_percentiles=percentiles(counts.lengths),
        whole_length_percentiles=percentiles(counts.whole_lengths),
        length_bins=length_bins(counts.whole_lengths),
        longest_sequence_tokens=max(counts.sequence_lengths),
        mean_sequence_tokens=sum(counts.sequence_lengths) / len(counts.sequence_lengths),
    )


def _stamps(sources: Sequence[OpenSource]) -> list[tuple[str, int, int]]:
    stamps = []
    for path in (path for source in sources for path in source.files):
        status = path.stat()
        stamps.append((str(path), status.st_size, status.st_mtime_ns))
    return stamps


def _cache_key(recipe: Recipe, tokenizer: Any, sources: Sequence[OpenSource]) -> str:
    import tokenizers

    digest = hashlib.sha256()
    settings = [
        CACHE_VERSION,
        tokenizers.__version__,
        recipe.max_seq_len,
        recipe.data.packing,
        recipe.data.train_on_prompt,
        [
            [repr(source.source), source.key == "data.eval_path", source.digest]
            for source in sources
        ],
        tokenizer.chat_template,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    ]
    digest.update(json.dumps(settings).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()[:32]


def main(arguments: Sequence[str] | None = None) -> int:
    """Tokenise a recipe's data, print the summary as one line of JSON, return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m launcher.worker.data")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--run-dir", type=Path, help="a run; its data folder is filled")
    where.add_argument("--recipe", type=Path, help="a recipe with absolute paths; fills the cache")
    parser.add_argument("--cache", type=Path, help="folder to keep tokenised data in")
    options = parser.parse_args(arguments)
    # The ranks do not tokenise; here all processors may.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    begin_program()
    path = options.recipe or options.run_dir / run_dir.RECIPE
    cache = options.cache or cache_dir()
    try:
        recipe = parse_recipe(run_dir.read_text(path), source=str(path))
        if not recipe.data.has_training_data:
            sys.stdout.write("null\n")
            return 0
        # DeepSpeed, which transformers imports where it is installed, logs to stdout.
        with contextlib.redirect_stdout(sys.stderr):
            tokenizer = load_tokenizer(recipe)
            collect_garbage_from_now_on()
            entry = prepare_data(recipe, tokenizer, cache)
            summary = load_summary(entry)
            config = options.run_dir / MODEL_CONFIG if options.run_dir else None
            if (rows := configured_rows(recipe, config)) is not None:
                check_vocabulary(summary.max_token_id, rows, source=recipe.model.name_or_path)
            # What a later run finds again needs no further look.
            remember(recipe, cache, entry.name)
        if options.run_dir:
            fill_run_directory(entry, options.run_dir / DATA)
    except LauncherError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except OSError as error:
        reason, place = error.strerror or error, error.filename or cache
        sys.stderr.write(f"error: {place}: cannot write the tokenised data: {reason}\n")
        return RunDirError.exit_code
    sys.stdout.write(json.dumps({**summary_to_json(summary), "folder": str(entry)}) + "\n")
    return 0


if __name__ == "__main__":
    run_program(main)
