"""Write examples as tokens, in bounded memory: one Arrow file for each split."""

from __future__ import annotations

import itertools
import logging
import math
import os
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.worker.packing import pack
from launcher.worker.tokenization import Placed, Tokens, tokenize

logger = logging.getLogger(__name__)

_EXAMPLES = 512
"""Examples that are tokenised, and rows that are written, at a time."""
_REPORT_SECONDS = 20.0
_NUM_BINS = 40


@dataclass(slots=True, kw_only=True)
class Counts:
    """What was written so far; lengths in tokens."""

    num_records: int = 0
    num_truncated: int = 0
    num_dropped: int = 0
    num_loss_tokens: int = 0
    num_without_system: int = 0
    """Conversations whose system text the chat template left out."""
    max_token_id: int = 0
    lengths: array[int] = field(default_factory=lambda: array("i"))
    """Of the kept examples, after truncation."""
    whole_lengths: array[int] = field(default_factory=lambda: array("i"))
    """Of all records, before truncation."""
    sequence_lengths: Sequence[int] = ()
    """Of what a batch is made of: the kept examples, or packed sequences."""


def write_split(
    examples: Iterator[Placed],
    tokenizer: Any,
    target: Path,
    *,
    max_seq_len: int,
    train_on_prompt: bool,
    packing: bool,
) -> Counts:
    """Tokenise examples into one file of rows ``input_ids``, ``labels`` and ``length``.

    Packed rows hold ``example_lengths`` too: where one example ends and the next begins.

    Raises:
        DataError: a record is broken, or the chat template refuses it.
    """
    counts = Counts()
    plain = target.with_suffix(".unpacked") if packing else target
    with _RowFile(plain) as rows:
        reported = time.monotonic()
        while batch := list(itertools.islice(examples, _EXAMPLES)):
            found = tokenize(batch, tokenizer, train_on_prompt=train_on_prompt)
            rows.write(list(_kept(found, counts, max_seq_len)))
            if time.monotonic() - reported > _REPORT_SECONDS:
                reported = time.monotonic()
                logger.info("tokenised %s records", f"{counts.num_records:,}")
    counts.sequence_lengths = counts.lengths
    if packing:
        counts.sequence_lengths = _write_packed(plain, target, counts.lengths, max_seq_len)
        plain.unlink()
    return counts


def _kept(found: Sequence[Tokens], counts: Counts, max_seq_len: int) -> Iterator[dict[str, Any]]:
    for whole in found:
        tokens = whole.truncated(max_seq_len)
        counts.num_records += 1
        counts.whole_lengths.append(len(whole.input_ids))
        counts.num_truncated += len(whole.input_ids) > max_seq_len
        num_loss_tokens = tokens.num_loss_tokens
        if not num_loss_tokens:
            counts.num_dropped += 1
            continue
        counts.num_loss_tokens += num_loss_tokens
        counts.num_without_system += whole.lacks_system_text
        counts.max_token_id = max(counts.max_token_id, *tokens.input_ids)
        counts.lengths.append(len(tokens.input_ids))
        yield {
            "input_ids": tokens.input_ids,
            "labels": tokens.labels,
            "length": len(tokens.input_ids),
        }


def _write_packed(plain: Path, target: Path, lengths: Sequence[int], max_seq_len: int) -> list[int]:
    """Write rows of several examples each, and return their lengths."""
    packs = pack(lengths, max_seq_len)
    stored = read_rows(plain)
    sequence_lengths = []
    with _RowFile(target, is_packed=True) as rows:
        for start in range(0, len(packs), _EXAMPLES):
            batch = []
            for members in packs[start : start + _EXAMPLES]:
                examples = [stored[index] for index in members]
                ids = [token for example in examples for token in example["input_ids"]]
                batch.append(
                    {
                        "input_ids": ids,
                        "labels": [label for example in examples for label in example["labels"]],
                        "length": len(ids),
                        "example_lengths": [example["length"] for example in examples],
                    }
                )
                sequence_lengths.append(len(ids))
            rows.write(batch)
    return sequence_lengths


def read_rows(path: Path) -> Any:
    """Return a file of rows as a memory-mapped dataset: nothing is read until it is used."""
    from datasets import Dataset

    return Dataset.from_file(str(path))


class _RowFile:
    """An Arrow stream that rows are appended to; complete when it is left without an error."""

    def __init__(self, path: Path, *, is_packed: bool = False) -> None:
        import pyarrow as pa

        tokens = pa.list_(pa.int32())
        columns = {"input_ids": tokens, "labels": tokens, "length": pa.int32()}
        if is_packed:
            columns["example_lengths"] = tokens
        self._schema = pa.schema(columns)
        self._stream = path.open("wb")
        self._writer = pa.ipc.new_stream(self._stream, self._schema)

    def __enter__(self) -> _RowFile:
        return self

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append rows."""
        import pyarrow as pa

        if rows:
            self._writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=self._schema))

    def __exit__(self, *_: object) -> None:
        self._writer.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()


def percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """Return the nearest-rank percentiles 50, 95, 99 and 100."""
    ordered = sorted(lengths)
    return {
        str(p): ordered[max(1, math.ceil(p / 100 * len(ordered))) - 1] for p in (50, 95, 99, 100)
    }


def length_bins(lengths: Sequence[int]) -> list[list[int]]:
    """Return a histogram: first length, last length and count of each of up to 40 equal bins."""
    width = max(1, math.ceil(max(lengths) / _NUM_BINS))
    counts = [0] * math.ceil(max(lengths) / width)
    for length in lengths:
        counts[max(0, length - 1) // width] += 1
    return [[i * width + 1, (i + 1) * width, count] for i, count in enumerate(counts)]
