"""Lists in a recipe's strategy: what the planner may choose among."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from planning_inputs import cluster, workload

from launcher.bench.sweep import parse_sweep
from launcher.errors import RecipeError
from launcher.failure_kind import FailureKind
from launcher.planning.planner import choose_strategy, make_plan
from launcher.planning.search import Packages
from launcher.planning.wording import label
from launcher.prepare import packages, prepare
from launcher.recipe import parse_recipe, render_recipe
from launcher.recipe_sections import StrategySection
from launcher.recovery.next_rung import next_rung, what_may_change
from launcher.strategy import Attention, Loss, Method, Offload, Optimizer, Precision

MODEL = "model: {name_or_path: llama2-7b}\n"
ADAMW, EIGHT_BIT = Optimizer.adamw, Optimizer.adamw_8bit
V100 = cluster("V100-32GB")
SDPA, FLASH = Attention.sdpa, Attention.flash_attention_2


def section(text: str, *overrides: str) -> StrategySection:
    return parse_recipe(MODEL + f"strategy: {text}", source="r.yaml", overrides=overrides).strategy


def test_a_list_is_what_may_be_chosen_and_a_list_of_one_is_set() -> None:
    found = section("{optimizer: [adamw, adamw_8bit], zero_stage: [2], loss: [full, full]}")
    assert found.allowed == {"optimizer": (ADAMW, EIGHT_BIT)}
    assert (found.optimizer, found.zero_stage, found.loss) == (None, 2, Loss.full)


def test_what_the_command_line_says_replaces_the_files_list_or_value() -> None:
    assert section("{zero_stage: [1, 2]}", "strategy.zero_stage=3").given() == {"zero_stage": 3}
    assert section("{zero_stage: [1, 2]}", "strategy.zero_stage=null").given() == {}
    assert section("{zero_stage: 3}", "strategy.zero_stage=[1,2]").given() == {"zero_stage": (1, 2)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{optimizer: [adamw, adamw_9bit]}", "strategy.optimizer: Invalid value 'adamw_9bit'"),
        ("{zero_stage: []}", "strategy.zero_stage takes a value, or a list"),
        ("{attention: [null, sdpa]}", "strategy.attention holds null"),
        ("{grad_accum_dtype: [bf16, fp32]}", "it takes one value, not the list ['bf16', 'fp32']"),
        ("{micro_batch_size_per_gpu: [0, 1]}", "micro_batch_size_per_gpu is 0"),
        ("{offload_optimizer: [cpu, nvme]}", "strategy.nvme_path is missing"),
    ],
)
def test_a_list_that_cannot_be_used_is_an_error_that_names_its_key(text: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        section(text)
    assert said in str(caught.value)


def test_lists_are_written_as_they_were_given() -> None:
    text = MODEL + "strategy:\n  offload_optimizer:\n  - none\n  - cpu\n"
    recipe = parse_recipe(text, source="r.yaml")
    assert "  offload_optimizer:\n  - none\n  - cpu\n" in render_recipe(recipe)
    assert parse_recipe(render_recipe(recipe), source="again") == recipe


def test_a_case_of_a_sweep_replaces_a_list_of_its_defaults() -> None:
    text = (
        "defaults: {model: {name_or_path: llama2-7b}, strategy: {zero_stage: [1, 2]}}\n"
        "cases: [{name: a}, {name: b, strategy: {zero_stage: 3}}]"
    )
    free, fixed = (case.recipe.strategy for case in parse_sweep(text, source="s.yaml"))
    assert free.given() == {"zero_stage": (1, 2)}
    assert fixed.given() == {"zero_stage": 3}


def test_8_bit_states_are_chosen_where_they_are_allowed_and_nothing_else_fits_on_the_gpu() -> None:
    # 6.7e9 parameters: 16 bytes each are 108 GB; 2 + 2 + 4 + 2 with states of a byte are 67.
    place = cluster(gpus=1)
    work = workload(place=place, method=Method.full, batch=8)
    fixed = StrategySection(allowed={"optimizer": (ADAMW, EIGHT_BIT)})
    plan = make_plan(work, place, fixed=fixed)
    assert plan.strategy.optimizer is EIGHT_BIT
    assert plan.strategy.offload_optimizer is Offload.none
    reason = next(item.reason for item in plan.decisions if item.field == "optimizer")
    assert "rounded" in reason
    assert "Choosing adamw needs" in reason
    assert reason.endswith("The recipe allows adamw, adamw_8bit.")
    # On the host states are never 8-bit: the next rung is plain AdamW there.
    assert any(item.strategy.optimizer is ADAMW for item in plan.ladder)
    assert any(item.strategy.optimizer is ADAMW for item in plan.rejected)


def test_an_offload_that_8_bit_states_would_spare_says_so_unless_the_recipe_has_an_optimizer() -> (
    None
):
    place = cluster(gpus=1)
    work = workload(place=place, method=Method.full, batch=8)

    def why_offload(fixed: StrategySection) -> str:
        plan = make_plan(work, place, fixed=fixed)
        assert plan.strategy.offload_optimizer is Offload.cpu
        return next(item.reason for item in plan.decisions if item.field == "offload_optimizer")

    said = re.search(
        r"adamw_8bit\) would fit there and be (\d+)% faster", why_offload(StrategySection())
    )
    assert said
    plain, rounded = (
        choose_strategy(
            work, place, fixed=StrategySection(optimizer=optimizer)
        ).best.time.step_seconds
        for optimizer in (ADAMW, EIGHT_BIT)
    )
    assert int(said[1]) == round(100 * (1 - rounded / plain))
    assert "adamw_8bit" not in why_offload(StrategySection(optimizer=ADAMW))


@pytest.mark.parametrize("order", [(ADAMW, EIGHT_BIT), (EIGHT_BIT, ADAMW)])
def test_of_equally_fast_optimizers_the_one_named_first_is_chosen(
    order: tuple[Optimizer, ...],
) -> None:
    # 40M trained parameters of 6.7e9: the optimizer's step is nothing.
    fixed = StrategySection(allowed={"optimizer": order})
    choice = choose_strategy(workload(), cluster(), fixed=fixed)
    assert choice.best.strategy.optimizer is order[0]


def test_stages_and_micro_batches_are_those_that_the_recipe_allows() -> None:
    allowed = {"zero_stage": (0, 1), "micro_batch_size_per_gpu": (2, 3, 4)}
    fixed = StrategySection(allowed=allowed)
    choice = choose_strategy(workload(batch=64), cluster(), fixed=fixed, every_kind=True)
    assert {item.strategy.zero_stage for item in choice.weighed} == {0, 1}
    # 3 does not divide the 8 samples of each GPU.
    assert choice.space.micro_batch_sizes == (2, 4)


def test_zero_3_is_too_much_for_adapters_also_where_a_list_allows_it() -> None:
    fixed = StrategySection(allowed={"zero_stage": (2, 3)})
    assert choose_strategy(workload(), cluster(), fixed=fixed).best.strategy.zero_stage == 2


def test_groups_that_share_sequences_are_those_that_the_recipe_allows() -> None:
    fixed = StrategySection(allowed={"sequence_parallel_size": (2, 4)})
    choice = choose_strategy(workload(batch=8, tokens=4096), cluster(), fixed=fixed)
    sizes = {item.strategy.sequence_parallel_size for item in choice.weighed}
    assert 2 in sizes
    assert sizes <= {2, 4}


def test_the_flash_attn_package_is_chosen_where_it_is_faster_and_may_be() -> None:
    # Packed rows need a mask, with which torch has no FlashAttention kernel.
    packed = replace(workload(tokens=4096), has_padding=True)
    allowed = StrategySection(allowed={"attention": (SDPA, FLASH)})
    installed = Packages(has_flash_attn=True)
    chosen = [
        choose_strategy(packed, cluster(), fixed=allowed),
        choose_strategy(packed, cluster(), packages=installed),
        choose_strategy(packed, cluster()),
        # Without a mask torch's own kernel is the same.
        choose_strategy(workload(tokens=4096), cluster(), packages=installed),
        choose_strategy(replace(packed, precision=Precision.fp16), V100, packages=installed),
    ]
    attentions = [choice.best.strategy.attention for choice in chosen]
    assert attentions == [FLASH, FLASH, SDPA, SDPA, SDPA]


def test_the_flash_attn_package_is_explained_against_torchs_own_choice() -> None:
    packed = replace(workload(tokens=4096), has_padding=True)
    plan = make_plan(packed, cluster(), packages=Packages(has_flash_attn=True))
    reason = next(item.reason for item in plan.decisions if item.field == "attention")
    assert re.search(r"Torch's own choice \(sdpa\) takes \d+% longer", reason)
    assert "flash-attn package" in label(plan.strategy)


def test_no_package_is_looked_for_here_when_the_job_runs_elsewhere() -> None:
    recipe = parse_recipe(MODEL + "cluster: {gpu: A100-80GB}", source="r.yaml")
    assert packages(recipe) == Packages(has_liger=True, has_flash_attn=False)


def test_where_no_allowed_value_works_the_reason_is_said() -> None:
    fixed = StrategySection(offload_param=Offload.cpu, allowed={"zero_stage": (1, 2)})
    with pytest.raises(RecipeError, match="at ZeRO-3 only, not ZeRO-1"):
        choose_strategy(workload(), cluster(), fixed=fixed)


def test_a_list_holds_for_every_plan_after_memory_ran_out(tmp_path: Path) -> None:
    given = ["model.name_or_path=llama3.2-1b", "max_seq_len=1024", "optim.global_batch_size=16",
             "cluster.gpu=A100-40GB", "cluster.gpus_per_node=2", "strategy.zero_stage=[1,2]",
             "recovery.oom=within_recipe"]  # fmt: skip
    prepared = prepare(parse_recipe("", source="test", overrides=given), source="test")
    for earlier in range(2):
        rung = next_rung(
            tmp_path, prepared, kind=FailureKind.gpu_oom, phase="backward", num_earlier=earlier
        )
        assert rung.prepared.plan.fits
        assert rung.given_up == ()
        # As the run directory keeps it.
        recipe = parse_recipe(render_recipe(rung.prepared.recipe), source="recipe.yaml")
        assert recipe.strategy.zero_stage == rung.prepared.plan.strategy.zero_stage
        assert all(part.choices("zero_stage", ()) == (1, 2) for part in what_may_change(recipe))
        prepared = replace(rung.prepared, recipe=recipe)
    freed = replace(recipe, recovery=replace(recipe.recovery, oom="ladder"))
    assert what_may_change(freed)[-1].given() == {}


def test_every_key_that_takes_a_list_is_searched() -> None:
    allowed = {
        "zero_stage": (2, 3),
        "gradient_checkpointing": ("none", "full"),
        "attention": ("eager", "sdpa"),
        "loss": ("full", "chunked"),
        "liger_kernels": (False, True),
        "offload_optimizer": ("none", "cpu"),
        "offload_param": ("none", "cpu"),
    }
    text = ", ".join(f"{key}: [{', '.join(map(str, values))}]" for key, values in allowed.items())
    choice = choose_strategy(
        workload(method=Method.full), cluster(), fixed=section(f"{{{text}}}"), every_kind=True
    )
    weighed = [item.strategy for item in choice.weighed] + list(choice.impossible)
    for key, values in allowed.items():
        assert {str(getattr(item, key)) for item in weighed} >= {str(value) for value in values}
