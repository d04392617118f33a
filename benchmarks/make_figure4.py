"""Write docs/figure4.md: figure 4 of arXiv:2406.02290 from first principles, beside it today's.

    python benchmarks/make_figure4.py

Each cell is planned anew in the study's setting; its answers are used for comparison alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from launcher.hardware import ClusterSpec, default_cluster, find_gpu
from launcher.model_source import load_catalogue_entry
from launcher.model_spec import ModelSpec, spec_from_config
from launcher.planning.plan import Candidate
from launcher.planning.planner import Choice, can_fit, choose_strategy
from launcher.planning.search import Packages, SearchSpace
from launcher.planning.wording import plain_part
from launcher.recipe_sections import StrategySection
from launcher.strategy import (
    Attention,
    Checkpointing,
    Loss,
    Method,
    Offload,
    Precision,
    Strategy,
    ZeroStage,
)
from launcher.units import GIB, format_seconds
from launcher.workload import LoraSpec, Workload

TARGET = Path(__file__).resolve().parents[1] / "docs" / "figure4.md"
CONTEXTS = (256, 512, 1024, 2048, 4096)
NODES = {"llama2-7b": 1, "llama2-13b": 1, "llama2-70b": 1, "falcon-180b": 2}

# What the figure prints: stage, and whether gradient checkpointing is on; None is "NA".
PUBLISHED: dict[str, tuple[tuple[ZeroStage, bool] | None, ...]] = {
    "llama2-7b": ((1, False), (1, False), (1, False), (2, True), (3, True)),
    "llama2-13b": ((1, False), (2, True), (2, True), (2, True), (3, True)),
    "llama2-70b": ((3, False), (3, True), (3, True), (3, True), (3, True)),
    "falcon-180b": ((3, True), (3, True), (3, True), (3, True), None),
}
# fp16, eager attention, full logits, optimizer on the CPU, micro-batch 1, LoRA of rank 64 on the
# attention's input projections, 8 samples a step (16 on 16 GPUs). Whether parameters may go to
# the host is not said; table 2 has 15.54 GB for the 70B on 8 GPUs, less than an eighth of its fp16
# weights (17.25), so they may.
STUDY = StrategySection(
    offload_optimizer=Offload.cpu,
    attention=Attention.eager,
    loss=Loss.full,
    micro_batch_size_per_gpu=1,
)
NO_LIGER = Packages(has_liger=False)
TARGETS = {"falcon-180b": ("query_key_value",)}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of the figure: our choice, the study's, and today's optimum."""

    model: str
    tokens: int
    ours: Candidate
    published: tuple[ZeroStage, bool] | None
    theirs: Candidate | None
    """The study's strategy with our numbers."""
    limit_bytes: int

    @property
    def agrees(self) -> bool:
        """Same stage and checkpointing; stages 1 and 2 differ by less than anyone can measure."""
        if self.published is None or not self.ours.fits:
            return self.published is None and not self.ours.fits
        return stage_and_checkpointing(self.ours) == self.published

    @property
    def is_tied(self) -> bool:
        """Whether only the order of ZeRO-1 and 2 differs, at equal time and memory."""
        if self.agrees or self.theirs is None:
            return False
        stages = {self.ours.strategy.zero_stage, self.theirs.strategy.zero_stage}
        ratio = self.theirs.time.step_seconds / self.ours.time.step_seconds
        return (
            stages == {1, 2}
            and abs(ratio - 1) < 0.02
            and self.ours.strategy.gradient_checkpointing
            is self.theirs.strategy.gradient_checkpointing
        )


@cache
def model(name: str) -> ModelSpec:
    """Return a model with its length limit lifted: the study pads beyond it."""
    spec = spec_from_config(load_catalogue_entry(name).config, name=name)
    return replace(spec, max_position_embeddings=max(CONTEXTS[-1], spec.max_position_embeddings))


def cluster(name: str) -> ClusterSpec:
    """Return the study's machines: Azure ND40rs_v2."""
    return default_cluster(find_gpu("V100-32GB"), num_nodes=NODES[name], gpus_per_node=8)


def workload(name: str, tokens: int) -> Workload:
    """Return the study's LoRA of one model at one length."""
    return Workload(
        model=model(name),
        method=Method.lora,
        max_seq_len=tokens,
        global_batch_size=8 * NODES[name],
        precision=Precision.fp16,
        lora=LoraSpec(r=64, target_modules=TARGETS.get(name, ("q_proj", "v_proj"))),
    )


def study_choice(name: str, tokens: int) -> Choice:
    """Choose in the study's setting, without a safety margin: it ran what it reports."""
    candidates = []
    for checkpointing in (Checkpointing.none, Checkpointing.full):
        fixed = replace(STUDY, gradient_checkpointing=checkpointing)
        candidates.append(
            choose_strategy(workload(name, tokens), cluster(name), fixed=fixed, safety_fraction=0.0)
        )
    fitting = [choice for choice in candidates if choice.fits]
    if not fitting:
        return min(candidates, key=lambda choice: choice.best.memory.device_used_bytes)
    # As the planner: the fastest; without ZeRO-3 while ZeRO-2 fits.
    plain = [choice for choice in fitting if choice.best.strategy.zero_stage < 3]
    return min(plain or fitting, key=lambda choice: choice.best.time.step_seconds)


def todays_choice(name: str, tokens: int) -> Choice:
    """Choose with everything that zerofit may use on the same machines today."""
    return choose_strategy(workload(name, tokens), cluster(name), packages=NO_LIGER)


@cache
def cells() -> tuple[Cell, ...]:
    """Plan all twenty cells."""
    return tuple(_cells())


def _cells() -> Iterator[Cell]:
    for name, row in PUBLISHED.items():
        for tokens, published in zip(CONTEXTS, row, strict=True):
            choice = study_choice(name, tokens)
            yield Cell(
                model=name,
                tokens=tokens,
                ours=choice.best,
                published=published,
                theirs=None if published is None else _at(choice.space, published),
                limit_bytes=choice.space.limit_bytes,
            )


def _at(space: SearchSpace, published: tuple[ZeroStage, bool]) -> Candidate:
    """Return the study's strategy under our prediction, with our buckets at that stage."""
    stage, checkpointing = published
    fixed = replace(
        space.fixed,
        zero_stage=stage,
        gradient_checkpointing=Checkpointing.full if checkpointing else Checkpointing.none,
    )
    return choose_strategy(space.workload, space.cluster, fixed=fixed, safety_fraction=0.0).best


def stage_and_checkpointing(candidate: Candidate) -> tuple[ZeroStage, bool]:
    """Return the two things that the figure prints."""
    strategy = candidate.strategy
    return strategy.zero_stage, strategy.gradient_checkpointing is not Checkpointing.none


@cache
def longest(name: str, *, today: bool) -> int:
    """Return the longest length in steps of 256 tokens that fits, the model's limit aside."""
    # One model for all lengths: what is known of its weights need not be found again.
    spec = replace(model(name), max_position_embeddings=2**40)

    def fits(tokens: int) -> bool:
        work = replace(workload(name, 256), model=spec, max_seq_len=tokens)
        if today:
            return can_fit(work, cluster(name), packages=NO_LIGER)
        fixed = replace(STUDY, gradient_checkpointing=Checkpointing.full)
        return can_fit(work, cluster(name), fixed=fixed, safety_fraction=0.0)

    low, high = 0, 1
    while fits(256 * high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(256 * middle) else (low, middle)
    return 256 * low


def _name(stage: ZeroStage, checkpointing: object) -> str:
    return f"ZeRO-{stage}{' GC' if checkpointing else ''}"


def _strategy(strategy: Strategy) -> str:
    words = _name(strategy.zero_stage, strategy.gradient_checkpointing is not Checkpointing.none)
    if strategy.gradient_checkpointing is Checkpointing.cpu_offload:
        words += " (inputs on host)"
    if strategy.offload_param is not Offload.none:
        return f"{words}, all on host"
    return words if strategy.offload_optimizer is Offload.none else f"{words}, optimizer on host"


def _numbers(candidate: Candidate) -> str:
    used = candidate.memory.device_used_bytes / GIB
    verdict = "" if candidate.fits else ", does not fit"
    return f"{used:.1f} GiB, {format_seconds(candidate.time.step_seconds)}{verdict}"


def _why(cell: Cell) -> str:
    if cell.published is None or cell.theirs is None:
        if cell.ours.fits:
            return (
                "it fits by our prediction; Falcon-180B itself was made for 2,048 tokens, which "
                "is reason enough for NA"
            )
        return "does not fit, as published"
    if cell.is_tied:
        return "a tie: with LoRA the two stages share out almost nothing, as the study says too"
    if not cell.theirs.fits:
        memory = cell.theirs.memory
        largest = sorted(memory.fullest.components.items(), key=lambda item: -item[1])[:3]
        parts = ", ".join(f"{plain_part(name)} {size / GIB:.1f}" for name, size in largest)
        return f"theirs would need {memory.device_used_bytes / GIB:.1f} GiB ({parts})"
    ratio = cell.theirs.time.step_seconds / cell.ours.time.step_seconds
    why = "zerofit keeps LoRA off ZeRO-3 while ZeRO-2 fits"
    if cell.ours.strategy.zero_stage == 3:
        why = (
            "with checkpointing DeepSpeed 0.19.8 gathers frozen layers three times over the "
            "network, not two; what the study's did in 2024 is not known"
        )
    return f"both fit by our prediction and theirs takes {ratio:.2f} times as long; {why}"


def page() -> str:
    """Return the whole page."""
    found = cells()
    same = sum(cell.agrees for cell in found)
    tied = sum(cell.is_tied for cell in found)
    different = [cell for cell in found if not cell.agrees]
    rest = len(found) - same - tied
    verdict = (
        f"**{same} of {len(found)} cells agree, {tied} more differ only in ZeRO-1 against "
        f"ZeRO-2 at equal time, {rest} differ{'s' if rest == 1 else ''}.**"
    )
    limit = found[0].limit_bytes / GIB
    lines = [
        "# Figure 4 of the study, from first principles",
        "",
        "Written by `benchmarks/make_figure4.py`; a test keeps it up to date.",
        "",
        'The figure: "A Study of Optimizations for Fine-tuning Large Language Models"',
        "(arXiv:2406.02290), the fastest configuration that fits V100-32GB, 8 GPUs (Falcon: 16).",
        "Our side plans every cell anew in the study's setting: fp16, eager attention, full",
        "logits, optimizer states on the CPU, LoRA of rank 64 on q and v, micro-batch 1, and no",
        "safety margin. Frozen weights may go to the host as well: table 2 of the study has 15.54",
        "GB for the 70B on 8 GPUs, less than an eighth of its fp16 weights (17.25 GB). GC is",
        "gradient checkpointing; * marks weights on the host.",
        "",
        verdict,
        "",
        "## Ours (the study's where it differs)",
        "",
        "| | " + " | ".join(f"{tokens:,}" for tokens in CONTEXTS) + " |",
        "|---" * (len(CONTEXTS) + 1) + "|",
    ]
    for name in PUBLISHED:
        row = [cell for cell in found if cell.model == name]
        lines.append(f"| {name} | " + " | ".join(_cell(cell) for cell in row) + " |")
    lines += [
        "",
        "## Where they differ",
        "",
        f"Predicted memory per GPU (as nvidia-smi shows it, of {limit:.1f} GiB) and time per step.",
        "",
        "| model | tokens | ours | | the study's | | why |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in different:
        theirs = "NA" if cell.published is None else _name(*cell.published)
        numbers = "" if cell.theirs is None else _numbers(cell.theirs)
        lines.append(
            f"| {cell.model} | {cell.tokens:,} | {_strategy_name(cell.ours)} | "
            f"{_numbers(cell.ours)} | {theirs} | {numbers} | {_why(cell)} |"
        )
    return "\n".join([*lines, *_today(found)]) + "\n"


def _today(found: Sequence[Cell]) -> list[str]:
    """Return the part about what the same machines do with today's software."""
    lines = [
        "",
        "## The same machines today",
        "",
        "zerofit's own choice: memory-efficient SDPA in place of eager attention, the loss in",
        "chunks, buckets of the adapters' size, states where they cost least, and the safety",
        "margin kept free. In brackets: how much faster than the study's configuration. The heads",
        "of Llama-2-70B share keys, for which torch has no fused attention kernel on V100: it",
        "stores all scores today as well.",
        "",
        "| | " + " | ".join(f"{tokens:,}" for tokens in CONTEXTS) + " |",
        "|---" * (len(CONTEXTS) + 1) + "|",
    ]
    for name in PUBLISHED:
        texts = []
        for cell in (cell for cell in found if cell.model == name):
            best = todays_choice(name, cell.tokens).best
            reference = cell.theirs if cell.theirs is not None else cell.ours
            ratio = reference.time.step_seconds / best.time.step_seconds
            texts.append(f"{_strategy(best.strategy)}: {_numbers(best)} ({ratio:.1f}x)")
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    lines += [
        "",
        "Longest samples that fit by memory alone (the models' own limits set aside):",
        "",
        "| | the study's setting | today | gain |",
        "|---|---|---|---|",
    ]
    for name in PUBLISHED:
        before, now = longest(name, today=False), longest(name, today=True)
        gain = now / before
        shown = f"{gain:.1f}" if gain < 10 else f"{gain:.0f}"
        lines.append(f"| {name} | {before:,} | {now:,} | {shown}x |")
    return lines


def _cell(cell: Cell) -> str:
    ours = _strategy_name(cell.ours)
    if cell.agrees:
        return ours
    theirs = "NA" if cell.published is None else _name(*cell.published)
    return f"{ours} ({theirs})"


def _strategy_name(candidate: Candidate) -> str:
    if not candidate.fits:
        return "NA"
    is_moved = candidate.strategy.offload_param is not Offload.none
    return _name(*stage_and_checkpointing(candidate)) + ("*" if is_moved else "")


def main() -> None:
    """Write the page."""
    TARGET.write_text(page(), encoding="utf-8")
    print(f"wrote {TARGET.name}")


if __name__ == "__main__":
    main()
