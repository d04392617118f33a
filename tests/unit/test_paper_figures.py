"""Figures 2 and 4 of arXiv:2406.02290 (P) from first principles: what holds and what does not.

Setting of figure 2: Llama-2-7B, 8 x A100-80GB, 256 tokens, optimizer on the CPU unless said,
eager attention unless said; buckets as in test_paper_tables.py. P prints orderings, no numbers.
"""

from __future__ import annotations

from functools import cache

import pytest
from generators import ROOT, script
from planning_inputs import cluster, workload

from launcher.planning.planner import choose_strategy
from launcher.predict.memory import estimate_memory
from launcher.predict.step_time import estimate_time
from launcher.strategy import (
    Attention,
    Checkpointing,
    Method,
    Offload,
    Strategy,
    ZeroKnobs,
    ZeroStage,
)
from launcher.workload import LoraSpec

STAGES: tuple[ZeroStage, ...] = (1, 2, 3)
BUCKETS = ZeroKnobs(
    reduce_bucket_size=200_000_000,
    stage3_prefetch_bucket_size=int(0.9 * 4096**2),
    stage3_param_persistence_threshold=40960,
)


@cache
def run(panel: str, stage: ZeroStage) -> tuple[float, float]:
    """Peak allocated GB while training, and seconds per step, of one bar of figure 2."""
    full = workload(
        tokens=256,
        method=Method.lora if panel == "c" else Method.full,
        lora=LoraSpec(r=64, target_modules=("q_proj", "v_proj")),
    )
    strategy = Strategy(
        zero_stage=stage,
        offload_optimizer=Offload.none if panel == "e" else Offload.cpu,
        gradient_checkpointing=Checkpointing.full if panel == "b" else Checkpointing.none,
        attention=Attention.flash_attention_2 if panel == "d" else Attention.eager,
        zero=BUCKETS,
    )
    memory = estimate_memory(full, strategy, cluster())
    phases = [memory.phase(name) for name in ("forward", "loss", "backward", "step")]
    seconds = estimate_time(full, strategy, cluster()).step_seconds
    return max(phase.allocated_bytes for phase in phases) / 1e9, seconds


def gigabytes(panel: str) -> list[float]:
    return [run(panel, stage)[0] for stage in STAGES]


def seconds(panel: str) -> list[float]:
    return [run(panel, stage)[1] for stage in STAGES]


@pytest.mark.parametrize("panel", ["a", "b", "d", "e"])
def test_memory_falls_from_zero_1_to_zero_3(panel: str) -> None:
    assert gigabytes(panel) == sorted(gigabytes(panel), reverse=True)


@pytest.mark.parametrize("panel", ["a", "b", "d", "e"])
def test_zero_3_is_the_slowest_stage(panel: str) -> None:
    # P says of (a) and (d) that time rises 1 -> 2 -> 3. Of ours only 2 -> 3 does: stages 1 and 2
    # are within 3 percent of each other, with ZeRO-1 the slower, as P itself says of (b), (e).
    first, second, third = seconds(panel)
    assert third == max(first, second, third)


@pytest.mark.parametrize("panel", ["b", "e"])
def test_zero_1_is_marginally_slower_than_zero_2_with_checkpointing_or_without_offload(
    panel: str,
) -> None:
    first, second, _ = seconds(panel)
    assert 1.0 < first / second < 1.15


def test_with_lora_zero_1_and_2_are_alike_in_both() -> None:
    assert gigabytes("c")[0] == pytest.approx(gigabytes("c")[1], rel=0.02)
    assert seconds("c")[0] == pytest.approx(seconds("c")[1], rel=0.02)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("panel", ["a", "b", "d", "e"])
def test_lora_is_best_in_memory_and_time_at_zero_1_and_2(panel: str, stage: int) -> None:
    # At ZeRO-2 checkpointing alone (b) comes within 2 percent of LoRA's memory.
    assert gigabytes("c")[stage] < 1.02 * gigabytes(panel)[stage]
    assert seconds("c")[stage] < seconds(panel)[stage]


def test_without_offload_is_the_fastest_full_fine_tuning() -> None:
    for panel in ("a", "b", "d"):
        assert all(e < other for e, other in zip(seconds("e"), seconds(panel), strict=True))


def test_without_offload_costs_up_to_4_times_the_memory() -> None:
    # P says 2 to 4 times. Its own table 1 says 1.31, 1.75 and 3.75 for ZeRO-1, 2 and 3, so that
    # only ZeRO-3 is in that range; ours must have the same order and end in it.
    ratios = [e / a for e, a in zip(gigabytes("e"), gigabytes("a"), strict=True)]
    assert ratios == sorted(ratios)
    assert 2 < ratios[2] < 4


def test_the_default_is_zero_2() -> None:
    assert choose_strategy(workload(tokens=256), cluster()).best.strategy.zero_stage == 2


def test_figure_4_is_reproduced_but_for_two_cells_whose_numbers_the_page_shows() -> None:
    cells = script("make_figure4").cells()
    assert len(cells) == 20
    differ = {(c.model, c.tokens) for c in cells if not c.agrees and not c.is_tied}
    # docs/figure4.md has both candidates' numbers: a matter of 1 percent of time, and of how often
    # DeepSpeed gathers frozen layers that are recomputed.
    assert differ <= {("llama2-7b", 4096), ("falcon-180b", 256)}


def test_the_page_about_figure_4_is_up_to_date() -> None:
    # After a change of the planner or the prediction: python benchmarks/make_figure4.py
    written = (ROOT / "docs" / "figure4.md").read_text(encoding="utf-8")
    assert written == script("make_figure4").page()


def test_figure_4s_only_cell_that_does_not_fit_does_not_fit() -> None:
    cells = {(c.model, c.tokens): c.ours.fits for c in script("make_figure4").cells()}
    assert [key for key, fits in cells.items() if not fits] == [("falcon-180b", 4096)]


def test_in_figure_4_only_zero_3_holds_70b_and_180b() -> None:
    for cell in script("make_figure4").cells():
        if cell.model in ("llama2-70b", "falcon-180b") and cell.ours.fits:
            assert cell.ours.strategy.zero_stage == 3


def test_in_figure_4_longer_contexts_never_need_less_saving() -> None:
    rank = {(1, False): 0, (2, False): 0, (1, True): 1, (2, True): 1, (3, False): 2, (3, True): 3}
    found: dict[str, list[int]] = {}
    module = script("make_figure4")
    for cell in module.cells():
        if cell.ours.fits:
            order = rank[module.stage_and_checkpointing(cell.ours)]
            found.setdefault(cell.model, []).append(order)
    assert all(row == sorted(row) for row in found.values())


def test_todays_software_reaches_at_least_10_times_the_context_on_the_same_machines() -> None:
    # Not for Llama-2-70B: its heads share keys, for which torch has no fused kernel on V100.
    module = script("make_figure4")
    for name in ("llama2-7b", "llama2-13b"):
        assert module.longest(name, today=True) >= 10 * module.longest(name, today=False)
