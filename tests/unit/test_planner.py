"""What the planner chooses, and what it must never choose."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from planning_inputs import cluster, model, processors, workload

from launcher.errors import RecipeError
from launcher.planning.planner import can_fit, choose_strategy, make_plan
from launcher.planning.rules import why_impossible
from launcher.planning.safety import SAFETY_FRACTION
from launcher.planning.search import Packages, divisors
from launcher.recipe_sections import StrategySection
from launcher.strategy import (
    Attention,
    Checkpointing,
    Loss,
    Method,
    Offload,
    Optimizer,
    Precision,
    ZeroKnobs,
)
from launcher.workload import LoraSpec

GRID = [
    (gpu, name, method, tokens)
    for gpu in ("V100-32GB", "A100-80GB", "RTX-4090")
    for name in ("llama3.2-1b", "llama2-13b")
    for method in Method
    for tokens in (512, 4096)
]


def test_the_studys_default_is_chosen_for_lora_of_7b_on_a_node_of_a100() -> None:
    # arXiv:2406.02290, section 5: ZeRO-2 with LoRA, unless full fine-tuning is wanted.
    best = choose_strategy(workload(tokens=1024), cluster()).best
    assert best.strategy.zero_stage == 2
    assert best.strategy.offload_optimizer is Offload.none


def test_the_demo_on_two_processor_ranks_is_planned_as_zero_2() -> None:
    place = processors(2)
    work = workload("smollm2-135m", place=place, tokens=128, batch=8)
    choice = choose_strategy(work, place, packages=Packages(has_liger=False))
    assert choice.fits
    assert choice.best.strategy.zero_stage == 2
    assert choice.best.strategy.attention is Attention.sdpa


@pytest.mark.parametrize(("wanted", "has"), [(None, True), (True, True), (False, False)])
def test_segments_of_the_allocator_can_grow_unless_the_recipe_says_no(
    wanted: bool | None, has: bool
) -> None:
    fixed = StrategySection(zero_stage=2, expandable_segments=wanted)
    best = choose_strategy(workload(), cluster(), fixed=fixed).best
    assert best.strategy.expandable_segments is has


@pytest.mark.parametrize(("gpu", "name", "method", "tokens"), GRID)
def test_no_plan_breaks_a_rule_or_its_limits(
    gpu: str, name: str, method: Method, tokens: int
) -> None:
    place = cluster(gpu, gpus=8)
    work = workload(name, place=place, method=method, tokens=tokens)
    choice = choose_strategy(work, place)
    assert why_impossible(choice.best.strategy, work, place) is None
    assert choice.fits == can_fit(work, place)
    if choice.fits:
        memory = choice.best.memory
        assert memory.device_used_bytes <= (1 - SAFETY_FRACTION) * place.gpu.memory_bytes + 1
        assert memory.host_bytes_per_node <= place.host_memory_bytes


@pytest.mark.parametrize("name", ["llama3.2-1b", "llama2-7b", "llama2-13b"])
@pytest.mark.parametrize("gpu", ["V100-32GB", "A100-40GB", "A100-80GB"])
def test_lora_that_fits_without_zero_3_is_not_given_it(gpu: str, name: str) -> None:
    place = cluster(gpu)
    work = workload(name, place=place)
    fixed = [StrategySection(zero_stage=stage) for stage in (1, 2)]
    without = any(choose_strategy(work, place, fixed=section).fits for section in fixed)
    chosen = choose_strategy(work, place).best.strategy.zero_stage
    assert without
    assert chosen < 3


def test_lora_that_fits_in_no_other_way_is_given_zero_3() -> None:
    # 2 bytes for each of 69e9 frozen parameters exceed one GPU of 80 GB.
    choice = choose_strategy(workload("llama2-70b", tokens=1024), cluster())
    assert choice.fits
    assert choice.best.strategy.zero_stage == 3


@pytest.mark.parametrize("gpus", [1, 2])
def test_an_offload_that_is_chosen_saves_gpu_memory(gpus: int) -> None:
    # 16 bytes for each of 6.7e9 parameters are 108 GB: these GPUs cannot hold them.
    place = cluster("A100-40GB" if gpus > 1 else "A100-80GB", gpus=gpus)
    choice = choose_strategy(workload(place=place, method=Method.full, batch=8), place)
    best = choice.best
    assert choice.fits
    assert best.strategy.offload_optimizer is Offload.cpu
    kept = replace(best.strategy, offload_optimizer=Offload.none, offload_param=Offload.none)
    there = choice.space.weigh(kept, kept.micro_batch_size_per_gpu)
    assert best.memory.device_used_bytes < there.memory.device_used_bytes


def test_buckets_are_sized_to_the_trained_parameters() -> None:
    # Rank 8 on q and v of Llama-2-7B: 8 x (4096 + 4096) x 2 x 32 = 4,194,304 parameters.
    lora = LoraSpec(r=8, target_modules=("q_proj", "v_proj"))
    best = choose_strategy(workload(lora=lora), cluster()).best
    assert best.strategy.zero.reduce_bucket_size == 4_194_304


def test_buckets_of_full_fine_tuning_stay_below_deepspeeds_default() -> None:
    best = choose_strategy(workload(method=Method.full), cluster()).best
    assert best.strategy.zero.reduce_bucket_size < ZeroKnobs().reduce_bucket_size / 9


def test_raw_deepspeed_keys_are_followed() -> None:
    raw = {"zero_optimization": {"reduce_bucket_size": 500_000_000, "overlap_comm": True}}
    plain = choose_strategy(workload(), cluster()).best
    wasteful = choose_strategy(workload(), cluster(), raw_deepspeed=raw).best
    assert wasteful.strategy.zero.reduce_bucket_size == 500_000_000
    # Two buckets of 5e8 bf16 numbers in place of one of 4e7: more than 1 GB.
    more = wasteful.memory.device_used_bytes - plain.memory.device_used_bytes
    assert more > 10**9


def test_fixed_fields_are_kept() -> None:
    fixed = StrategySection(
        zero_stage=3,
        offload_optimizer=Offload.cpu,
        offload_param=Offload.none,
        gradient_checkpointing=Checkpointing.full,
        attention=Attention.eager,
        loss=Loss.full,
        optimizer=Optimizer.adamw_foreach,
        micro_batch_size_per_gpu=2,
    )
    strategy = choose_strategy(workload(batch=32), cluster(), fixed=fixed).best.strategy
    assert strategy.zero_stage == 3
    assert strategy.offload_optimizer is Offload.cpu
    assert strategy.gradient_checkpointing is Checkpointing.full
    assert strategy.attention is Attention.eager
    assert strategy.loss is Loss.full
    assert strategy.optimizer is Optimizer.adamw_foreach
    assert strategy.micro_batch_size_per_gpu == 2
    assert strategy.gradient_accumulation_steps == 2  # 2 x 2 x 8 GPUs = 32


def test_zero_1_is_chosen_when_the_recipe_wants_fp32_accumulation_and_offload_only() -> None:
    fixed = StrategySection(zero_stage=1, grad_accum_dtype=Precision.fp32)
    best = choose_strategy(workload(method=Method.full), cluster(), fixed=fixed).best
    # Without offload DeepSpeed would run BF16_Optimizer: the rule leaves offload alone.
    assert best.strategy.offload_optimizer is Offload.cpu


def test_fields_that_cannot_work_together_are_an_error_with_the_reason() -> None:
    fixed = StrategySection(zero_stage=2, offload_param=Offload.cpu)
    with pytest.raises(RecipeError, match="ZeRO-3 only"):
        choose_strategy(workload(), cluster(), fixed=fixed)


def test_a_batch_that_the_gpus_cannot_share_is_an_error_that_names_one_they_can() -> None:
    with pytest.raises(RecipeError, match="use a multiple of 8, for example 8"):
        choose_strategy(workload(batch=9), cluster())


def test_a_micro_batch_that_does_not_divide_is_an_error_that_names_those_that_do() -> None:
    fixed = StrategySection(micro_batch_size_per_gpu=3)
    with pytest.raises(RecipeError, match="use one of 1, 2, 4"):
        choose_strategy(workload(batch=32), cluster(), fixed=fixed)


def test_gpus_that_share_sequences_share_the_batch_as_one() -> None:
    place = cluster(gpus=8)
    fixed = StrategySection(sequence_parallel_size=4, micro_batch_size_per_gpu=1)
    work = replace(workload(place=place), global_batch_size=6)
    strategy = make_plan(work, place, fixed=fixed).strategy
    # Two groups of four GPUs: three samples each.
    assert (strategy.sequence_parallel_size, strategy.gradient_accumulation_steps) == (4, 3)
    with pytest.raises(RecipeError, match="7 samples per step cannot be shared by 2 groups of 4"):
        make_plan(replace(work, global_batch_size=7), place, fixed=fixed)
    with pytest.raises(RecipeError, match="8 GPUs cannot be divided into groups of 3"):
        make_plan(work, place, fixed=replace(fixed, sequence_parallel_size=3))


def test_long_sequences_are_shared_where_that_saves_computing_layers_twice() -> None:
    work = workload("llama3.1-8b", method=Method.full, tokens=32768)
    whole = choose_strategy(work, cluster(), fixed=StrategySection(sequence_parallel_size=1)).best
    assert whole.strategy.gradient_checkpointing is not Checkpointing.none
    made = make_plan(work, cluster())
    assert made.strategy.sequence_parallel_size > 1
    assert made.strategy.gradient_checkpointing is Checkpointing.none
    assert made.time.step_seconds <= 0.9 * whole.time.step_seconds
    decision = next(d for d in made.decisions if d.field == "sequence_parallel_size")
    assert "GPUs share each sequence" in decision.reason
    assert "Keeping sequences whole" in decision.reason
    assert any(item.strategy.sequence_parallel_size == 1 for item in made.rejected)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": 2048},  # parts would be too short to be worth sending
        {"has_padding": True},  # packed examples
        {"name": "gemma2-9b", "tokens": 8192},  # eager attention
        {"place": cluster(gpus=1)},
    ],
)
def test_sequences_are_not_shared_where_that_gains_nothing_or_cannot_be(
    changes: dict[str, Any],
) -> None:
    values = {"name": "llama3.1-8b", "method": Method.full, "tokens": 32768, **changes}
    best = choose_strategy(workload(**values), changes.get("place", cluster())).best
    assert best.strategy.sequence_parallel_size == 1


def test_sequences_that_fit_on_no_gpu_alone_are_shared() -> None:
    work = workload("llama3.1-70b", method=Method.full, tokens=131072)
    assert not can_fit(work, cluster(), fixed=StrategySection(sequence_parallel_size=1))
    assert can_fit(work, cluster())
    best = choose_strategy(work, cluster()).best
    assert best.fits
    assert best.strategy.sequence_parallel_size > 1


def test_divisors_of_a_huge_batch_are_found_at_once() -> None:
    assert divisors(12) == (1, 2, 3, 4, 6, 12)
    assert len(divisors(2**30)) == 31
    assert divisors(1) == (1,)


def test_the_largest_micro_batch_that_fits_is_found() -> None:
    # 2,048 tokens keep 8 GiB of activations a sample: several fit in 80 GB, 64 do not.
    place = cluster(gpus=1)
    work = workload(place=place, batch=64)
    fixed = StrategySection(zero_stage=2, gradient_checkpointing=Checkpointing.none)
    choice = choose_strategy(work, place, fixed=fixed)
    sizes = [size for size in divisors(64) if choice.space.weigh(choice.best.strategy, size).fits]
    assert choice.best.strategy.micro_batch_size_per_gpu <= max(sizes) < 64
    # Nothing that fits is faster by more than a tie.
    times = [choice.space.weigh(choice.best.strategy, size).time.step_seconds for size in sizes]
    assert choice.best.time.step_seconds <= 1.02 * min(times)


def test_time_never_grows_with_the_micro_batch() -> None:
    # The search relies on it: the largest micro-batch that fits is the fastest.
    for method, stage in itertools.product(Method, (1, 2, 3)):
        choice = choose_strategy(
            workload(method=method, batch=128),
            cluster(),
            fixed=StrategySection(zero_stage=stage),  # type: ignore[arg-type]
        )
        space, strategy = choice.space, choice.best.strategy
        times = [space.weigh(strategy, size).time.step_seconds for size in divisors(16)]
        assert times == sorted(times, reverse=True)


def test_memory_grows_with_the_micro_batch_while_gradients_accumulate() -> None:
    # The search relies on it: it bisects over the sizes below the last.
    for method, stage in itertools.product(Method, (1, 2, 3)):
        choice = choose_strategy(
            workload(method=method, batch=128),
            cluster(),
            fixed=StrategySection(zero_stage=stage),  # type: ignore[arg-type]
        )
        space, strategy = choice.space, choice.best.strategy
        used = [space.weigh(strategy, size).memory.device_used_bytes for size in divisors(16)[:-1]]
        assert used == sorted(used)


def test_the_ladder_goes_down_in_memory_and_up_in_time() -> None:
    plan = make_plan(workload(batch=64), cluster("A100-40GB"))
    used = [plan.memory.device_used_bytes] + [r.memory.device_used_bytes for r in plan.ladder]
    seconds = [rung.time.step_seconds for rung in plan.ladder]
    assert len(plan.ladder) >= 2
    assert all(low <= 0.95 * high for high, low in itertools.pairwise(used))
    assert seconds == sorted(seconds)


def test_8_bit_states_are_never_chosen_unasked() -> None:
    place = cluster("RTX-4090", gpus=1)
    choice = choose_strategy(workload("llama2-7b", place=place, method=Method.full), place)
    assert choice.best.strategy.optimizer is Optimizer.adamw


def test_nvme_is_weighed_once_there_is_a_drive() -> None:
    place = cluster("V100-32GB")
    work = workload("llama2-70b", place=place, method=Method.full)
    fixed = StrategySection(nvme_path="/nvme")
    assert not choose_strategy(work, place).fits
    choice = choose_strategy(work, place, fixed=fixed)
    assert choice.fits
    assert choice.best.strategy.offload_optimizer is Offload.nvme


def test_routers_and_fused_experts_carry_no_adapter_and_stay_16_bit() -> None:
    # Mixtral-8x7B, 32 layers: q and o 4096 x 4096, k and v 4096 x 1024 are its linear layers.
    linear = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024)
    rank_sums = 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024))
    work = workload("mixtral-8x7b", method=Method.qlora, lora=LoraSpec(r=16))
    assert work.num_quantized_params == linear
    assert work.num_trainable_params == 16 * rank_sums


def test_ten_thousand_gpus_are_planned() -> None:
    place = cluster("H100-80GB", nodes=1250)
    work = workload("llama2-70b", place=place, method=Method.full, tokens=4096)
    choice = choose_strategy(work, place)
    assert choice.fits
    assert choice.best.strategy.zero_stage >= 1
    assert model("llama2-70b").num_params > 68e9
