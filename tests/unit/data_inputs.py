"""Summaries of tokenised data for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from launcher.data_cache import DataSummary, SourceSummary, SplitSummary


def split_summary(**changes: Any) -> SplitSummary:
    """Return what became of 1,515 records of up to 200 tokens, cut at 128."""
    made = SplitSummary(
        path="train.jsonl",
        sources=(SourceSummary(path="train.jsonl", format="messages", num_records=1515),),
        num_records=1515,
        num_examples=1500,
        num_sequences=1500,
        num_truncated=12,
        num_dropped=15,
        num_tokens=30_000,
        num_loss_tokens=7_500,
        length_percentiles={"50": 18, "95": 60, "99": 100, "100": 128},
        whole_length_percentiles={"50": 18, "95": 62, "99": 140, "100": 200},
        length_bins=[[1, 100, 1500], [101, 200, 15]],
        longest_sequence_tokens=128,
        mean_sequence_tokens=20.0,
    )
    return replace(made, **changes)


def data_summary(*, train: SplitSummary | None = None, **changes: Any) -> DataSummary:
    """Return the summary of data without a held-out part."""
    made = DataSummary(
        format="messages",
        pad_token_id=0,
        max_token_id=255,
        max_seq_len=128,
        packing=False,
        train=train or split_summary(),
        eval=None,
        sample_prompt=None,
        sample_prompt_ids=None,
        notes=(),
    )
    return replace(made, **changes)
