"""Write the tables of docs/study.md and the pictures in benchmarks/study/.

    python benchmarks/make_study.py

Both come from results/study_h100.jsonl; the page's text is written by hand, around the tables.
What was predicted is what was recorded before each run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.bench.drawing import render
from launcher.bench.result import FINISHED, OUT_OF_MEMORY, Result, parse_results

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "results"
RESULTS, EARLIER = FOLDER / "study_h100.jsonl", FOLDER / "h100.jsonl"
PICTURES = ROOT / "benchmarks" / "study"
PAGE = ROOT / "docs" / "study.md"
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

# Okabe and Ito, "Color Universal Design" (2008): told apart with every kind of colour blindness.
_BLUE, _ORANGE, _GREEN, _PURPLE, _GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#777777"
_PREDICTED_ALPHA = 0.4
# The studies' own figures: KAITO's Phi-3-mini-128k on A100-80GB.
KAITO_WEIGHTS_GB = {"fp32": 15.73, "16 bit": 8.09, "int8": 4.64, "nf4": 3.00}
GPU_GB = 80


@dataclass(frozen=True, kw_only=True)
class Row:
    """One case of a table, and what it is called there."""

    case: str
    labels: tuple[str, ...]


def _rows(*items: tuple[str, ...]) -> tuple[Row, ...]:
    return tuple(Row(case=case, labels=tuple(labels)) for case, *labels in items)


LENGTHS = _rows(
    ("length-lora-eager-512", "LoRA, eager attention", "512"),
    ("length-lora-eager-1024", "LoRA, eager attention", "1,024"),
    ("length-lora-eager-2048", "LoRA, eager attention", "2,048"),
    ("length-lora-eager-2816", "LoRA, eager attention", "2,816"),
    ("length-lora-eager-3584-oom", "LoRA, eager attention", "3,584"),
    ("rank-8", "LoRA, SDPA", "1,024"),
    ("length-lora-3584", "LoRA, SDPA", "3,584"),
    ("precision-bf16", "LoRA, SDPA, checkpointing", "1,024"),
    ("length-lora-gc-3584", "LoRA, SDPA, checkpointing", "3,584"),
    ("length-qlora-gc-1024", "QLoRA (nf4), SDPA, checkpointing", "1,024"),
    ("length-qlora-gc-3584", "QLoRA (nf4), SDPA, checkpointing", "3,584"),
    ("length-qlora-gc-16384", "QLoRA (nf4), SDPA, checkpointing", "16,384"),
)
BATCHES = _rows(("batch-1", "1 x 4"), ("batch-2", "2 x 2"), ("batch-4", "4 x 1"))
RANKS = _rows(
    ("rank-8", "8", "attention"),
    ("rank-256", "256", "attention"),
    ("rank-2048", "2,048", "attention"),
    ("rank-16384-oom", "16,384", "attention"),
    ("rank-16384-qlora-o_proj", "16,384", "o_proj, QLoRA"),
)
TARGETS = _rows(
    ("targets-o_proj", "o_proj", "0.04 %"),
    ("targets-o_proj-down_proj", "o_proj, down_proj", "0.12 %"),
    ("rank-8", "attention: qkv_proj, o_proj", "0.12 %"),
    ("targets-all-linear", "all linear", "0.33 %"),
)
SEGMENTS = _rows(
    ("length-lora-eager-2048", "LoRA, eager, 2,048 tokens", "expandable"),
    ("fixed-segments-lora-eager-2048", "LoRA, eager, 2,048 tokens", "fixed"),
    ("length-lora-3584", "LoRA, SDPA, 3,584 tokens", "expandable"),
    ("fixed-segments-lora-3584", "LoRA, SDPA, 3,584 tokens", "fixed"),
    ("batch-4", "LoRA, SDPA, 4 x 512 tokens", "expandable"),
    ("fixed-segments-batch-4", "LoRA, SDPA, 4 x 512 tokens", "fixed"),
)
FIGURE_2 = _rows(
    ("figure2-a-3b-offload", "(a) full", "3B"),
    ("figure2-b-3b-gc-offload", "(b) full, checkpointing", "3B"),
    ("figure2-c-3b-lora-offload", "(c) LoRA", "3B"),
    ("figure2-d-3b-flash-offload", "(d) full, FlashAttention-2", "3B"),
    ("figure2-e-3b", "(e) full, optimizer on the GPU", "3B"),
    ("figure2-c-7b-lora-offload-z1", "(c) LoRA, ZeRO-1", "7B"),
    ("figure2-c-7b-lora-offload-z2", "(c) LoRA, ZeRO-2", "7B"),
    ("figure2-ce-7b-lora-z2", "(c) and (e): LoRA, optimizer on the GPU", "7B"),
)
NEAREST = _rows(
    ("7b-lora-qv-z2-2048", "(c) and (e): LoRA, ZeRO-2", "7B", "1 x 2,048"),
    ("7b-lora-qv-z1-1024x2", "(c) and (e): LoRA, ZeRO-1", "7B", "2 x 1,024"),
    ("7b-lora-qv-z2-2048-gc", "the same with checkpointing, ZeRO-2", "7B", "1 x 2,048"),
    ("1b-full-z2-1024", "(d) and (e): full, optimizer on the GPU, ZeRO-2", "1B", "1 x 1,024"),
    ("1b-full-z2-1024-off", "(d): full, optimizer on the host, ZeRO-2", "1B", "1 x 1,024"),
    ("1b-full-z1-1024-off", "(d): full, optimizer on the host, ZeRO-1", "1B", "1 x 1,024"),
)
"""Of the earlier sweep: the runs nearest to figure 2. All with SDPA, which runs FlashAttention."""
PRECISIONS = {
    "fp32": "precision-fp32",
    "16 bit": "precision-bf16",
    "int8": "precision-int8",
    "nf4": "length-qlora-gc-1024",
}

Results = Mapping[str, Result]


def read_results() -> Results:
    """Return what was measured, by case; of the earlier sweep, the cases that are shown."""
    found: dict[str, Result] = {}
    shown = {row.case for row in NEAREST}
    for path in (EARLIER, RESULTS):
        results = parse_results(path.read_text(encoding="utf-8"), source=str(path))
        found |= {r.case: r for r in results if path == RESULTS or r.case in shown}
    return found


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]], num_text: int) -> str:
    marks = ["---"] * num_text + ["---:"] * (len(header) - num_text)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, marks, *lines))


def _gb(result: Result, quantity: str) -> str:
    measured, error = result.measured(quantity), result.error_fraction(quantity)
    if measured is None or error is None:
        return "-"
    return f"{measured / 1e9:.2f} ({round(error, 3) + 0.0:+.1%})"


def _outcome(result: Result) -> list[str]:
    if result.state == OUT_OF_MEMORY:
        predicted = (result.predicted("peak_allocated_bytes") or 0) / 1e9
        phase = (result.content.get("failure") or {}).get("phase")
        return [f"out of memory in {phase}, as predicted ({predicted:.0f} GB)", "-", "-", "-"]
    recipe, seconds = result.recipe, result.measured("step_seconds")
    tokens = recipe.optim.global_batch_size * recipe.max_seq_len
    rate = "-" if not seconds else f"{tokens / seconds:,.0f}"
    return [
        _gb(result, "peak_allocated_bytes"),
        _gb(result, "device_used_bytes"),
        "-" if seconds is None else f"{seconds:.3f}",
        rate,
    ]


def case_table(results: Results, chosen: Sequence[Row], titles: Sequence[str]) -> str:
    """Return a table of cases; those that were not run are left out, so it may be empty."""
    lines = [[*row.labels, *_outcome(results[row.case])] for row in chosen if row.case in results]
    if not lines:
        return "Not run yet.\n"
    header = [*titles, "allocated, GB", "in use, GB", "s per step", "tokens/s"]
    return _markdown(header, lines, len(titles))


def precision_table(results: Results) -> str:
    """Return the weights alone, and what a context adds, beside the study's."""
    lines = []
    for name, case in PRECISIONS.items():
        if case not in results or results[case].state != FINISHED:
            continue
        loaded = weights_gb(results[case])
        lines.append([name, f"{loaded:.2f}", f"{KAITO_WEIGHTS_GB[name]:.2f}",
                      f"{KAITO_WEIGHTS_GB[name] - loaded:.2f}"])  # fmt: skip
    header = ["weights in", "allocated after loading, GB", "study, GB", "difference, GB"]
    return _markdown(header, lines, 1)


def weights_gb(result: Result) -> float:
    """Return what is allocated when the model has been loaded, before adapters."""
    return float(result.content["measured"][0]["phases"]["load"]) / 1e9


def segment_table(results: Results) -> str:
    """Return allocated, reserved and step time in both modes of the allocator."""
    lines = []
    for row in SEGMENTS:
        result = results.get(row.case)
        if result is None:
            continue
        allocated = result.measured("peak_allocated_bytes") or 0
        reserved, seconds = result.measured("peak_reserved_bytes"), result.measured("step_seconds")
        lines.append(
            [
                *row.labels,
                f"{allocated / 1e9:.2f}",
                "-" if reserved is None else f"{reserved / 1e9:.2f}",
                "-" if reserved is None else f"{(reserved - allocated) / 1e9:.2f}",
                "-" if seconds is None else f"{seconds:.3f}",
            ]
        )
    header = ["case", "segments", "allocated, GB", "reserved, GB", "unused, GB", "s per step"]
    return _markdown(header, lines, 2)


def tables(results: Results) -> dict[str, str]:
    """Return every table of the page by the name of its place."""
    return {
        "precisions": precision_table(results),
        "lengths": case_table(results, LENGTHS, ["method", "tokens"]),
        "batches": case_table(results, BATCHES, ["micro-batch x micro-steps"]),
        "ranks": case_table(results, RANKS, ["rank", "targets"]),
        "targets": case_table(results, TARGETS, ["targets", "of the parameters"]),
        "segments": segment_table(results),
        "nearest": case_table(results, NEAREST, ["configuration", "model", "samples x tokens"]),
        "figure2": case_table(results, FIGURE_2, ["configuration", "model"]),
    }


def page(results: Results) -> str:
    """Return the page with its tables made anew."""
    made = tables(results)
    return _BLOCK.sub(
        lambda found: found[1] + "\n" + made[found[2]] + "\n" + found[3],
        PAGE.read_text(encoding="utf-8"),
    )


def draw_lengths(results: Results) -> Callable[[Any], None]:
    """Return what draws memory over lengths: measured points on predicted lines."""
    series: dict[str, list[tuple[int, Result]]] = {}
    for row in LENGTHS:
        if row.case in results:
            item = (int(row.labels[1].replace(",", "")), results[row.case])
            series.setdefault(row.labels[0], []).append(item)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        styles = zip(series.items(), (_ORANGE, _BLUE, _GREEN, _PURPLE), "os^D", strict=False)
        for (name, points), color, marker in styles:
            predicted = [(n, (r.predicted("device_used_bytes") or 0) / 1e9) for n, r in points]
            axes.plot(*zip(*predicted, strict=True), color=color, alpha=0.6, linestyle="--")
            done = [(n, (r.measured("device_used_bytes") or 0) / 1e9) for n, r in points
                    if r.state == FINISHED]  # fmt: skip
            axes.plot(*zip(*done, strict=True), marker, color=color, label=name)
            for n, result in points:
                if result.state == OUT_OF_MEMORY:
                    there = (result.predicted("device_used_bytes") or 0) / 1e9
                    axes.plot([n], [there], "x", color=color, markersize=9)
                    axes.annotate("out of memory", (n, there), xytext=(8, -3),
                                  textcoords="offset points", color=color)  # fmt: skip
        axes.axhline(GPU_GB, color=_GREY, linewidth=1)
        axes.annotate("80 GB", (512, GPU_GB), xytext=(0, 4), textcoords="offset points",
                      color=_GREY)  # fmt: skip
        axes.set_xscale("log", base=2)
        ticks = sorted({n for points in series.values() for n, _ in points})
        axes.set_xticks(ticks, [f"{n:,}" for n in ticks], rotation=45)
        axes.minorticks_off()
        axes.set_ylim(0, 115)
        axes.set_xlabel("tokens of a sequence (micro-batch 1)")
        axes.set_ylabel("in use on the GPU, GB")
        axes.plot([], [], "--", color=_GREY, label="predicted before the run")
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.0, 0.62))
        _plain(axes)

    return draw


def draw_weights(results: Results) -> Callable[[Any], None]:
    """Return what draws the weights' size in each precision beside the study's."""
    known = [n for n, case in PRECISIONS.items() if case in results]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for place, name in enumerate(known):
            ours, theirs = weights_gb(results[PRECISIONS[name]]), KAITO_WEIGHTS_GB[name]
            axes.bar(place - 0.2, ours, 0.38, color=_BLUE)
            axes.bar(place + 0.2, theirs, 0.38, color=_ORANGE)
            for shift, value in ((-0.2, ours), (0.2, theirs)):
                axes.annotate(f"{value:.2f}", (place + shift, value), xytext=(0, 3),
                              textcoords="offset points", ha="center", fontsize=8)  # fmt: skip
        axes.bar([0], [0], color=_BLUE, label="allocated after loading, measured here")
        axes.bar([0], [0], color=_ORANGE, label="the study's figure")
        axes.set_xticks(range(len(known)), known)
        axes.set_ylabel("GB")
        axes.legend(frameon=False)
        _plain(axes)

    return draw


def draw_bars(
    results: Results, chosen: Sequence[Row], *, prefix: str = ""
) -> Callable[[Any], None]:
    """Return what draws memory left, time right, a pair of bars a case: predicted and measured."""
    found = [row for row in chosen if row.case in results]
    quantities = (("peak_allocated_bytes", 1e9, "peak allocated, GB"),
                  ("step_seconds", 1.0, "seconds per optimizer step"))  # fmt: skip

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (quantity, scale, label) in zip(panels, quantities, strict=True):
            for place, row in enumerate(found):
                result = results[row.case]
                _pair(axes, place, result, quantity, scale)
            axes.set_xlabel(label)
            axes.margins(x=0.22)
            axes.set_xlim(left=0)
            _plain(axes, grid="x")
        names = [f"{prefix}{', '.join(row.labels)}" for row in found]
        panels[0].set_yticks(range(len(found)), names)
        panels[0].set_ylim(len(found) - 0.4, -0.6)

    return draw


def _pair(axes: Any, place: int, result: Result, quantity: str, scale: float) -> None:
    predicted = (result.predicted(quantity) or 0) / scale
    measured = result.measured(quantity)
    if result.state == OUT_OF_MEMORY and quantity == "step_seconds":
        return
    axes.barh(place - 0.2, predicted, 0.38, color=_BLUE, alpha=_PREDICTED_ALPHA)
    note, furthest = "out of memory", predicted
    if measured is not None:
        axes.barh(place + 0.2, measured / scale, 0.38, color=_BLUE)
        error = result.error_fraction(quantity) or 0.0
        # Without the sum, an error of -0.001 would be -0%.
        shown = round(error, 2) + 0.0
        note, furthest = f"{measured / scale:.3g} ({shown:+.0%})", max(predicted, measured / scale)
    axes.annotate(note, (furthest, place), xytext=(4, 0), textcoords="offset points",
                  va="center", fontsize=7.5)  # fmt: skip


def _plain(axes: Any, *, grid: str = "y") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)


def pictures(results: Results) -> Iterator[tuple[str, bytes]]:
    """Yield the pictures' names and contents."""
    light = "(light: predicted before the run; full: measured)"
    yield "lengths.png", render(
        draw_lengths(results), width=8, height=5,
        title="Phi-3-mini on one H100: memory over sequence lengths",
    )  # fmt: skip
    yield (
        "weights.png",
        render(
            draw_weights(results), width=6, height=3.6, title="Phi-3-mini: weights, loaded and idle"
        ),
    )
    for name, chosen, prefix, title in (
        ("batches.png", BATCHES, "", "2,048 tokens a step, micro-batch x micro-steps"),
        ("ranks.png", RANKS, "rank ", "Adapter ranks"),
        ("targets.png", TARGETS, "", "Adapter targets, rank 8"),
        ("figure2.png", FIGURE_2, "", "The five configurations, 8 x 256 tokens"),
    ):
        height = 1.3 + 0.45 * len([row for row in chosen if row.case in results])
        if any(row.case in results for row in chosen):
            drawn = draw_bars(results, chosen, prefix=prefix)
            yield name, render(drawn, width=10, height=height, title=f"{title} {light}")


def main() -> None:
    results = read_results()
    PICTURES.mkdir(exist_ok=True)
    for name, content in pictures(results):
        (PICTURES / name).write_bytes(content)
        print(PICTURES / name)
    if PAGE.exists():
        PAGE.write_text(page(results), encoding="utf-8")
        print(PAGE)
    else:
        print("\n".join(f"## {name}\n{table}" for name, table in tables(results).items()))


if __name__ == "__main__":
    main()
