"""Sources of records as examples: formats found, columns renamed, weights applied."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

from launcher.data_cache import SourceSummary
from launcher.errors import DataError
from launcher.worker.chat_templates import no_template_error
from launcher.worker.data_sources import OpenSource
from launcher.worker.records import (
    SHAPES,
    Conversation,
    Example,
    Format,
    alpaca_text,
    detect_format,
    rename_columns,
    to_example,
    unused_columns,
)
from launcher.worker.tokenization import Placed, prompt_ids

SAMPLE_NEW_TOKENS = 64
"""Room that a sample prompt leaves below ``max_seq_len`` for the answer."""


class ExampleReader:
    """Iterates over the examples of sources, once; afterwards it knows what they were."""

    def __init__(
        self,
        sources: Sequence[OpenSource],
        tokenizer: Any,
        max_seq_len: int,
        *,
        takes_sample: bool = False,
    ) -> None:
        self._sources = sources
        self._tokenizer = tokenizer
        self._longest_sample = max(1, max_seq_len - SAMPLE_NEW_TOKENS)
        self._takes_sample = takes_sample
        self.sources: tuple[SourceSummary, ...] = ()
        self.notes: list[str] = []
        self.sample: tuple[str, list[int]] | None = None
        """The first prompt that leaves room for an answer, as text and as tokens."""

    def __iter__(self) -> Iterator[Placed]:
        for opened in self._sources:
            weight = Fraction(str(opened.source.weight))
            records = itertools.islice(opened.records(), opened.source.max_samples)
            found: Format | None = None
            number = 0
            for number, (where, raw) in enumerate(records, start=1):
                record = rename_columns(raw, opened.source.columns, where=where)
                if found is None:
                    found = _chosen_format(record, opened, where)
                    self._note_format(record, found, opened)
                example = self._usable(to_example(record, found, where=where), found, where)
                if self._takes_sample and self.sample is None:
                    self.sample = self._prompt(example, where)
                # As often as the weight says, spread evenly: 0.5 takes every second record.
                times = int(number * weight) - int((number - 1) * weight)
                yield from itertools.repeat((where, example), times)
            assert found is not None
            summary = SourceSummary(path=opened.source.path, format=found, num_records=number)
            self.sources += (summary,)

    def _usable(self, example: Example, record_format: Format, where: str) -> Example:
        template = self._tokenizer.chat_template
        if not isinstance(example, Conversation):
            return example
        if not template:
            if record_format != "alpaca":
                raise no_template_error(record_format, where=where)
            return alpaca_text(example, where=where)
        if example.tools and "tools" not in str(template):
            raise DataError(
                "the record has tools, and the chat template has no place for them",
                where=where,
                fix="use a model whose template has, set data.chat_template, or remove 'tools'",
            )
        return example

    def _note_format(self, record: Any, record_format: Format, opened: OpenSource) -> None:
        name = opened.source.path.rpartition("/")[2]
        if unused := unused_columns(record, record_format):
            self.notes.append(f"{name}: not used: {', '.join(unused)}")
        if record_format == "alpaca" and not self._tokenizer.chat_template:
            self.notes.append(
                "the model has no chat template: alpaca records use the published prompt"
            )

    def _prompt(self, example: Example, where: str) -> tuple[str, list[int]] | None:
        tokens = prompt_ids(example, self._tokenizer, where=where)
        if not tokens or len(tokens) > self._longest_sample:
            return None
        if isinstance(example, Conversation):
            users = [turn["content"] for turn in example.messages if turn["role"] == "user"]
            return (users[-1] if users else ""), tokens
        return example.prompt or self._tokenizer.decode(tokens), tokens


def _chosen_format(record: Any, opened: OpenSource, where: str) -> Format:
    for name in SHAPES:
        if name == opened.source.format:
            return name
    try:
        return detect_format(record)
    except DataError as error:
        fix = f"map the columns (data.columns), or {error.fix}"
        raise DataError(error.problem, where=where, fix=fix) from None
