"""Tokenised data in words and as a picture; pure."""

from __future__ import annotations

import io
from collections.abc import Iterator

from launcher.data_cache import DataSummary, SplitSummary

# Okabe and Ito, "Color Universal Design" (2008), as in the report's charts.
_KEPT_COLOR, _CUT_COLOR = "#0072B2", "#D55E00"
_PIXELS_PER_INCH = 200
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


def histogram_lines(split: SplitSummary, *, max_seq_len: int) -> Iterator[str]:
    """Yield lines of a histogram of lengths before truncation; at most 20 bars."""
    bins = _without_leading_gap(split)
    if len(bins) > 20:
        bins = [
            [pair[0][0], pair[-1][1], sum(item[2] for item in pair)]
            for pair in (bins[i : i + 2] for i in range(0, len(bins), 2))
        ]
    most = max(count for _, _, count in bins)
    labels = [f"{first:,}" if first == last else f"{first:,}-{last:,}" for first, last, _ in bins]
    width = max(len(label) for label in labels)
    for label, (first, last, count) in zip(labels, bins, strict=True):
        eighths = -(-count * 8 * _BAR_CHARACTERS // most)  # rounded up: one record shows
        bar = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
        cut = ""
        if count and last > max_seq_len:
            cut = "  cut off" if first > max_seq_len else "  some cut off"
        yield f"  {label:>{width}} {bar} {count:,}{cut}".rstrip()


def draw_lengths(split: SplitSummary, *, max_seq_len: int) -> bytes:
    """Return a PNG: how many records have which length before truncation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for first, last, count in split.length_bins:
        width = last - first + 1
        color = _CUT_COLOR if first > max_seq_len else _KEPT_COLOR
        axes.bar(first - 1, count, width=width, align="edge", color=color, edgecolor="white",
                 linewidth=0.5)  # fmt: skip
    end = split.length_bins[-1][1]
    if max_seq_len <= end:
        axes.axvline(max_seq_len, color="#333333", linewidth=1.2)
        axes.annotate(
            f"max_seq_len {max_seq_len:,}", (max_seq_len, 0.97), xycoords=("data", "axes fraction"),
            xytext=(5 if max_seq_len < end / 2 else -5, 0), textcoords="offset points",
            ha="left" if max_seq_len < end / 2 else "right", va="top",
        )  # fmt: skip
    whole = split.whole_length_percentiles
    title = (
        f"Half of {split.num_records:,} records have at most {whole['50']:,} tokens, "
        f"95 % {whole['95']:,}, the longest {whole['100']:,}"
    )
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    cut = f"; {split.num_truncated:,} are cut off" if split.num_truncated else ""
    axes.set_xlabel(f"tokens of a record, before truncation{cut}")
    axes.set_ylabel("records")
    axes.set_xlim(_without_leading_gap(split)[0][0] - 1, end)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.spines[["top", "right"]].set_visible(False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=_PIXELS_PER_INCH, metadata={"Software": None})
    return png.getvalue()


def _without_leading_gap(split: SplitSummary) -> list[list[int]]:
    """Return the bins from the first that holds a record on."""
    first = next(i for i, (_, _, count) in enumerate(split.length_bins) if count)
    return split.length_bins[first:]
