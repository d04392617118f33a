"""Tokenised data in words and as a picture; pure."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.data_cache import DataSummary, SplitSummary

_BAR_CHARACTERS = 40
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def describe_data(summary: DataSummary) -> Iterator[str]:
    """Yield lines that tell a person what became of the records."""
    yield f"data: {summary.format} records"
    for title, split in (("train", summary.train), ("held-out", summary.eval)):
        if split is None:
            continue
        learnt = 100 * split.num_loss_tokens / split.num_tokens
        lengths = split.length_percentiles
        if len(split.sources) > 1:
            for source in split.sources:
                yield f"  {source.path}: {source.num_records:,} {source.format} records"
        yield (
            f"  {title}: {split.num_examples:,} examples of {split.num_tokens:,} tokens "
            f"({learnt:.0f} % count in the loss), {split.num_truncated:,} truncated, "
            f"{split.num_dropped:,} dropped"
        )
        yield (
            f"    tokens each: half have at most {lengths['50']:,}, 95 % {lengths['95']:,}, "
            f"99 % {lengths['99']:,}, the longest {lengths['100']:,}"
        )
        if split.num_sequences < split.num_examples:
            full = 100 * split.num_tokens / (split.num_sequences * summary.max_seq_len)
            yield (
                f"    packed into {split.num_sequences:,} sequences, {full:.1f} % full of "
                f"{summary.max_seq_len:,} tokens"
            )
    yield from (f"  note: {note}" for note in summary.notes)


def draw_histogram(split: SplitSummary, *, max_seq_len: int) -> Iterator[str]:
    """Yield lines of a histogram of lengths before truncation; at most 20 bars."""
    bins = split.length_bins
    if len(bins) > 20:
        bins = [
            [pair[0][0], pair[-1][1], sum(item[2] for item in pair)]
            for pair in (bins[i : i + 2] for i in range(0, len(bins), 2))
        ]
    most = max(count for _, _, count in bins)
    width = max(len(f"{first:,}-{last:,}") for first, last, _ in bins)
    for first, last, count in bins:
        eighths = -(-count * 8 * _BAR_CHARACTERS // most)  # rounded up: one record shows
        bar = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
        cut = "  cut off" if first > max_seq_len and count else ""
        yield f"  {f'{first:,}-{last:,}':>{width}} {bar} {count:,}{cut}".rstrip()
