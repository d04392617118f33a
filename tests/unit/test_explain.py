"""A plan's words: plain, grammatical, and true to the numbers beside them."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from functools import cache

import pytest
from planning_inputs import cluster, processors, workload
from rich.console import Console

from launcher.hardware import ClusterSpec
from launcher.planning.advice import suggest_changes
from launcher.planning.plan import Plan
from launcher.planning.planner import can_fit, make_plan
from launcher.planning.search import Packages
from launcher.planning.view import render_plan
from launcher.planning.wording import changes, label, plain_part, short_size
from launcher.predict import components
from launcher.recipe_sections import StrategySection
from launcher.strategy import (
    Checkpointing,
    Loss,
    Method,
    Offload,
    Precision,
    Strategy,
    ZeroKnobs,
)
from launcher.units import GIB, MIB, format_count
from launcher.workload import QuantizationSpec, Workload


@cache
def plan(gpu: str = "V100-32GB", method: Method = Method.lora, tokens: int = 2048) -> Plan:
    place = cluster(gpu)
    return make_plan(workload(place=place, method=method, tokens=tokens), place)


def shown(made: Plan, *, show_all: bool = False) -> str:
    text = io.StringIO()
    Console(width=80, file=text, color_system=None).print(render_plan(made, show_all=show_all))
    return text.getvalue()


PLANS = [
    ("V100-32GB", Method.lora, 2048),
    ("V100-32GB", Method.full, 4096),
    ("A100-80GB", Method.full, 1024),
    ("RTX-4090", Method.qlora, 4096),
    ("T4", Method.full, 4096),
]


@pytest.mark.parametrize(("gpu", "method", "tokens"), PLANS)
def test_the_page_is_80_columns_wide_and_has_no_absurd_lines(
    gpu: str, method: Method, tokens: int
) -> None:
    text = shown(plan(gpu, method, tokens), show_all=True)
    assert max(len(line) for line in text.splitlines()) <= 80
    absurd = r"\b0\.0+ GiB|\b0 MiB|\b1 samples|\b1 GPUs|\bNone\b|\.\.|\binf\b|\bnan\b| \."
    assert re.findall(absurd, text) == []


@pytest.mark.parametrize(("gpu", "method", "tokens"), PLANS)
def test_every_reason_is_a_sentence(gpu: str, method: Method, tokens: int) -> None:
    for decision in plan(gpu, method, tokens).decisions:
        assert re.fullmatch(r"[A-Z0-9].*\.", decision.reason, re.DOTALL), decision


def test_a_reason_that_no_rival_follows_ends_with_one_full_stop() -> None:
    place = processors(2)
    made = make_plan(workload("smollm2-135m", place=place, tokens=256), place)
    reasons = {decision.field: decision.reason for decision in made.decisions}
    assert reasons["offload_optimizer"] == "The optimizer states stay on the rank."


def test_every_setting_is_explained_once() -> None:
    fields = [decision.field for decision in plan().decisions]
    assert fields == [
        "precision", "zero_stage", "offload_optimizer", "gradient_checkpointing", "attention",
        "loss", "micro_batch_size_per_gpu", "reduce_bucket_size",
    ]  # fmt: skip


def test_a_gpu_without_bf16_and_flash_attention_is_told_why() -> None:
    reasons = {decision.field: decision.reason for decision in plan().decisions}
    assert "V100-32GB cannot compute in bf16" in reasons["precision"]
    assert "V100-32GB has no FlashAttention-2" in reasons["attention"]


def test_one_sample_is_singular() -> None:
    reasons = {decision.field: decision.reason for decision in plan().decisions}
    assert (
        "1 sample at a time (1 x 8 GPUs = 8 samples per step)"
        in (reasons["micro_batch_size_per_gpu"])
    )


def test_a_fixed_field_is_said_to_be_set_in_the_recipe() -> None:
    fixed = StrategySection(zero_stage=3)
    made = make_plan(workload(), cluster(), fixed=fixed)
    reason = next(item.reason for item in made.decisions if item.field == "zero_stage")
    assert reason.endswith("Set in the recipe.")


def test_what_differs_in_one_thing_is_told_first() -> None:
    made = plan("V100-32GB", Method.full, 4096)

    def differences(strategy: Strategy) -> int:
        names = ("zero_stage", "offload_optimizer", "offload_param", "gradient_checkpointing")
        return sum(getattr(strategy, n) != getattr(made.strategy, n) for n in names)

    found = [differences(item.strategy) for item in made.rejected if item.step_seconds is not None]
    assert found[0] == 1
    assert found[:3] == sorted(found[:3])


def test_what_does_not_fit_names_the_part_that_is_too_large() -> None:
    made = plan("V100-32GB", Method.full, 4096)
    too_large = [item for item in made.rejected if not item.fits and item.device_used_bytes]
    assert too_large
    for item in too_large:
        assert "largest part: " in item.reason
        assert "too much" in item.reason or "host memory" in item.reason


def test_rejected_numbers_are_true() -> None:
    made = plan("V100-32GB", Method.full, 4096)
    for item in made.rejected:
        if item.device_used_bytes is not None and item.step_seconds is not None:
            assert item.fits == ("too much" not in item.reason and "host mem" not in item.reason)


def test_near_duplicates_come_after_everything_else() -> None:
    made = plan()  # LoRA: ZeRO-1 and 2 hardly differ
    shown_first = made.rejected[:6]
    pairs = {(round(item.step_seconds or 0, 2), item.fits) for item in shown_first}
    assert len(pairs) >= len(shown_first) - 1


def test_one_gpu_has_nobody_to_share_with() -> None:
    place = cluster("RTX-4090", gpus=1)
    made = make_plan(workload("llama3.2-1b", place=place), place)
    reason = next(item.reason for item in made.decisions if item.field == "zero_stage")
    assert "one gpu has nobody to share its states with" in reason.lower()


def test_ranks_on_processors_are_not_offered_offload() -> None:
    place = processors(2)
    made = make_plan(
        workload("smollm2-135m", place=place, tokens=128), place, packages=Packages(has_liger=False)
    )
    assert all(item.strategy.offload_optimizer is Offload.none for item in made.rejected)
    assert "GPUs' peak" not in shown(made)


def test_labels() -> None:
    strategy = Strategy(
        zero_stage=3,
        offload_optimizer=Offload.cpu,
        gradient_checkpointing=Checkpointing.full,
        loss=Loss.liger,
        micro_batch_size_per_gpu=4,
    )
    assert label(strategy) == (
        "ZeRO-3, optimizer in host memory, checkpointing, Liger loss, micro-batch 4"
    )
    assert changes(Strategy(zero_stage=2), Strategy(zero_stage=2)) == "other buffer sizes"
    assert changes(strategy, Strategy(zero_stage=3)) == (
        "optimizer in host memory, checkpointing, Liger loss, micro-batch 4"
    )


def test_strategies_that_gather_more_or_less_ahead_are_told_apart() -> None:
    usual = Strategy(zero_stage=3)
    frugal = Strategy(zero_stage=3, zero=ZeroKnobs(stage3_max_live_parameters=100_000_000))
    assert changes(frugal, usual) == "fewer weights gathered ahead"
    assert changes(usual, frugal) == "more weights gathered ahead"


def test_the_rungs_of_a_ladder_have_different_names() -> None:
    # Two rungs of 7B on 8 V100 differ in how much ZeRO-3 gathers ahead alone.
    made = plan("V100-32GB", Method.full, 4096)
    names = [changes(rung.strategy, made.strategy) for rung in made.ladder]
    assert len(names) > 2
    assert len(set(names)) == len(names)


def test_a_rung_changes_the_stage_only_where_that_saves_memory() -> None:
    made = plan("A100-80GB", Method.lora, 4096)
    assert made.strategy.zero_stage == 2
    # LoRA: what ZeRO-1 does not share out are the adapters' gradients, of megabytes.
    assert made.ladder
    assert {rung.strategy.zero_stage for rung in made.ladder} == {2, 3}


def test_an_alternative_at_another_micro_batch_says_so() -> None:
    place = cluster(gpus=4)
    made = make_plan(workload("mixtral-8x7b", place=place, tokens=4096, batch=8), place)
    twice = next(
        item for item in made.rejected if item.strategy.gradient_checkpointing is Checkpointing.full
    )
    size = twice.strategy.micro_batch_size_per_gpu
    assert size > made.strategy.micro_batch_size_per_gpu
    reason = next(d.reason for d in made.decisions if d.field == "gradient_checkpointing")
    assert f"Computing layers twice (micro-batch {size}) saves" in reason


def test_what_is_compared_with_a_plan_that_does_not_fit_needs_more_host_memory() -> None:
    # 70e9 parameters x 18 bytes are 1,174 GiB: more than the 672 GiB of the node.
    place = cluster("V100-32GB")
    work = workload("llama3.1-70b", place=place, method=Method.full, tokens=8192)
    made = make_plan(work, place)
    assert not made.fits
    reason = next(d.reason for d in made.decisions if d.field == "offload_param")
    assert re.search(r"saves [\d.]+ GiB, .*with [\d.]+ GiB of host memory per node", reason)


def test_zero_3_on_one_gpu_is_explained() -> None:
    # States of 2.8e9 parameters at ZeRO-1 and 2 round up to 72 GiB of 64 in host memory.
    place = cluster("RTX-3090", gpus=1)
    made = make_plan(workload("phi-2", place=place, method=Method.full, batch=8), place)
    assert made.strategy.zero_stage == 3
    reason = next(item.reason for item in made.decisions if item.field == "zero_stage")
    assert "ZeRO-2 or ZeRO-1 needs" in reason


def test_packed_sequences_say_what_flash_attention_would_bring() -> None:
    # Their borders are a mask, which torch's own FlashAttention does not take.
    def reason(*, has_padding: bool, name: str = "qwen2.5-1.5b") -> str:
        made = make_plan(workload(name, tokens=8192, has_padding=has_padding), cluster())
        return next(item.reason for item in made.decisions if item.field == "attention")

    assert "flash-attn" not in reason(has_padding=False)
    packed = reason(has_padding=True)
    assert "with a mask" in packed
    assert re.search(r"flash-attn package \(strategy.+\) would be \d+% faster", packed)
    assert "flash-attn" not in reason(has_padding=True, name="gemma2-2b")


def test_raw_keys_that_no_number_follows_are_named_above_the_numbers() -> None:
    raw = {"zero_optimization": {"zero_quantized_weights": True}}
    made = make_plan(workload(), cluster(), raw_deepspeed=raw)
    assert made.unpredicted_keys == ("zero_optimization.zero_quantized_weights",)
    assert "zero_quantized_weights" in shown(made)


def test_sizes_are_short() -> None:
    assert short_size(7.44 * GIB) == "7.4 GiB"
    assert short_size(112.6 * MIB) == "113 MiB"


def test_small_costs_and_the_speed_of_each_gpu_are_shown() -> None:
    made = replace(plan("A100-80GB", Method.lora, 2048), price_per_gpu_hour=0.05)
    text = shown(made)
    each = made.time.tokens_per_second_per_gpu
    assert f"{8 * each:,.0f} tokens/s in all, {each:,.0f} per GPU" in " ".join(text.split())
    assert re.search(r"which cost 0\.0\d*[1-9]", text)


@pytest.mark.parametrize(
    ("count", "words"),
    [(999_885_952, "1B"), (999_400_000, "999M"), (6_738_415_616, "6.74B"), (999, "999")],
)
def test_counts_have_three_digits_and_no_exponent(count: int, words: str) -> None:
    assert format_count(count) == words


def test_every_memory_component_has_plain_words() -> None:
    names = [
        value
        for name, value in vars(components).items()
        if name.isupper() and isinstance(value, str)
    ]
    assert len(names) > 15
    for name in names:
        assert not re.search(r"\bZeRO|fp64|cross-entropy\b", plain_part(name))


def suggestions(
    work: Workload,
    fixed: StrategySection = StrategySection(),  # noqa: B008
    place: ClusterSpec | None = None,
) -> list[str]:
    place = place or cluster("V100-32GB")
    made = make_plan(work, place, fixed=fixed)
    assert not made.fits
    larger = tuple(cluster(gpu) for gpu in ("A100-80GB", "B200"))

    def fits(other: Workload, where: object, section: StrategySection) -> bool:
        return can_fit(other, where, fixed=section)  # type: ignore[arg-type]

    return list(suggest_changes(made, fixed, larger, fits))


def test_advice_for_full_fine_tuning_of_70b_on_8_v100() -> None:
    place = cluster("V100-32GB")
    found = suggestions(workload("llama2-70b", place=place, method=Method.full, tokens=2048))
    text = "\n".join(found)
    assert "method=lora fits" in text
    assert re.search(r"more GPUs: \d+ nodes of 8 V100-32GB fit", text)
    assert "offload_optimizer=nvme" in text
    # What fits on the nodes that there are is not offered with more of them.
    assert "with method=" not in text
    # 18 bytes for each of 69e9 parameters exceed 672 GiB of host memory at any length.
    assert "max_seq_len" not in text


def test_adapters_are_advised_on_fewer_nodes_than_full_fine_tuning_needs() -> None:
    place = cluster("RTX-4090", gpus=2)
    found = suggestions(workload("llama2-70b", place=place, method=Method.full), place=place)
    full, lora = (int(m[1]) for line in found if (m := re.match(r"more GPUs: (\d+) nodes", line)))
    assert lora < full
    assert found[-1].endswith(", with method=lora")


def test_a_mixture_of_experts_says_how_little_of_it_is_quantized() -> None:
    # Mixtral 8x7B, 32 layers: q and o of 4096 x 4096, k and v of 4096 x 1024; 46.7e9 in all.
    place = cluster(gpus=2)
    said = shown(make_plan(workload("mixtral-8x7b", place=place, method=Method.qlora), place))
    assert "only 1.34B of 46.7B parameters are quantized" in said
    dense = shown(make_plan(workload("llama2-7b", place=place, method=Method.qlora), place))
    assert "are quantized" not in dense


def test_advice_names_the_longest_length_that_fits() -> None:
    place = cluster("V100-32GB")
    long = workload("mistral-7b", place=place, tokens=32768)
    fixed = StrategySection(gradient_checkpointing=Checkpointing.none, sequence_parallel_size=1)
    found = suggestions(long, fixed)
    tokens = next(int(m[1]) for line in found if (m := re.search(r"max_seq_len=(\d+)", line)))
    assert can_fit(workload("mistral-7b", place=place, tokens=tokens), place, fixed=fixed)
    longer = workload("mistral-7b", place=place, tokens=tokens + 128)
    assert not can_fit(longer, place, fixed=fixed)


def test_advice_names_the_fixed_field_that_stands_in_the_way() -> None:
    place = cluster("V100-32GB")
    fixed = StrategySection(zero_stage=1)
    found = suggestions(workload("llama2-70b", place=place, tokens=512), fixed)
    assert found[0] == "leave strategy.zero_stage to the planner: without 1 it fits"


def test_where_no_single_change_is_enough_several_are_named_together() -> None:
    # 18 bytes for each of 406e9 parameters: 7.3 TB, which 64 single L40S have neither on the
    # GPUs nor, at 96 GiB each, in host memory beside it.
    place = cluster("L40S", gpus=1)
    work = workload("llama3.1-405b", place=place, method=Method.full, tokens=8192)
    first, *others = suggestions(work, place=place)
    found = re.match(r"more and larger GPUs: (\d+) nodes of 8 (\S+) fit", first)
    assert found
    there = cluster(found[2], nodes=int(found[1]))
    batch = int(re.search(r"global_batch_size=(\d+)", first)[1])  # type: ignore[index]
    assert can_fit(replace(work, global_batch_size=batch), there)
    # 2 bytes for each of them, and the host's memory beside the GPUs': a node is enough.
    (lighter,) = others
    assert "1 node of 8 A100-80GB fits" in lighter
    assert lighter.endswith("with method=lora")


def test_4_bits_are_advised_where_int8_keeps_zero_3_from_sharing_weights() -> None:
    # rules: int8 weights cannot be sharded; 180 GB of them exceed one H200, six share 90 GB.
    place = cluster("H200", gpus=6)
    int8 = QuantizationSpec(kind="int8")
    work = workload("falcon-180b", place=place, method=Method.qlora, quantization=int8)
    assert "4 bits instead of 8: quantization.kind=nf4 fits" in suggestions(work, place=place)


def test_4_bit_weights_are_moved_to_the_host_only_when_that_is_asked_for() -> None:
    place = cluster("RTX-4090", gpus=1)
    work = workload("llama2-70b", place=place, method=Method.qlora, tokens=1024)
    assert not can_fit(work, place)
    (said,) = (line for line in suggestions(work, place=place) if "4-bit weights in" in line)
    assert "strategy.zero_stage=3 strategy.offload_param=cpu fits" in said
    fixed = StrategySection(zero_stage=3, offload_param=Offload.cpu)
    asked = make_plan(work, place, fixed=fixed)
    assert asked.fits
    assert ".." not in "".join(decision.reason for decision in asked.decisions)


def test_16_bits_are_advised_for_what_is_computed_in_32() -> None:
    place = cluster("A100-80GB", gpus=1)
    work = workload("llama3.1-8b", place=place, precision=Precision.fp32, tokens=8192)
    fixed = StrategySection(gradient_checkpointing=Checkpointing.none, zero_stage=2)
    found = suggestions(work, fixed, place)
    assert "16 bits a number: model.precision=bf16 fits" in found
