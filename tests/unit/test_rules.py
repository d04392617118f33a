"""Each combination that cannot work is refused, with its reason; sources are in rules.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planning_inputs import cluster, model, processors, workload

from launcher.hardware import ClusterSpec
from launcher.planning.rules import (
    default_attention,
    losses_that_work,
    why_impossible,
    why_offload_gains_nothing,
    why_zero_3_is_too_much,
)
from launcher.strategy import (
    Attention,
    Checkpointing,
    Loss,
    Method,
    Offload,
    Optimizer,
    Precision,
    Strategy,
    ZeroKnobs,
    ZeroStage,
)
from launcher.workload import LoraSpec, QuantizationSpec, Workload

CPU, NVME = Offload.cpu, Offload.nvme


def reason(
    strategy: Strategy, work: Workload | None = None, place: ClusterSpec | None = None
) -> str:
    place = place or cluster()
    return why_impossible(strategy, work or workload(place=place), place) or ""


def test_a_plain_strategy_is_possible() -> None:
    assert reason(Strategy(zero_stage=2)) == ""


@pytest.mark.parametrize("gpu", ["V100-16GB", "V100-32GB", "T4"])
def test_bf16_is_refused_before_compute_capability_8(gpu: str) -> None:
    place = cluster(gpu)
    work = workload(place=place, precision=Precision.bf16)
    assert "has no bf16 units" in reason(Strategy(zero_stage=2), work, place)


@pytest.mark.parametrize("gpu", ["A100-40GB", "L4", "RTX-3090", "H200", "B200", "MI300X"])
def test_bf16_works_from_compute_capability_8(gpu: str) -> None:
    place = cluster(gpu)
    work = workload(place=place, precision=Precision.bf16)
    assert reason(Strategy(zero_stage=2), work, place) == ""


@pytest.mark.parametrize("gpu", ["V100-32GB", "T4"])
def test_flash_attention_2_is_refused_before_compute_capability_8(gpu: str) -> None:
    strategy = Strategy(zero_stage=2, attention=Attention.flash_attention_2)
    assert "FlashAttention-2 needs compute capability 8.0" in reason(strategy, place=cluster(gpu))


@pytest.mark.parametrize(("ranks", "is_possible"), [(2, True), (4, True), (8, True), (6, False)])
def test_hpz_needs_groups_of_equal_size(ranks: int, is_possible: bool) -> None:
    strategy = Strategy(zero_stage=3, zero=ZeroKnobs(zero_hpz_partition_size=4))
    found = reason(strategy, place=cluster(gpus=ranks))
    assert ("cannot be cut into groups of 4" not in found) is is_possible
    assert reason(replace(strategy, zero_stage=2), place=cluster(gpus=ranks)) == ""


def test_flash_attention_2_has_no_fp32_kernels() -> None:
    strategy = Strategy(zero_stage=2, attention=Attention.flash_attention_2)
    assert "fp16 and bf16" in reason(strategy, workload(precision=Precision.fp32))


def test_flash_attention_2_has_no_kernels_above_head_size_256() -> None:
    strategy = Strategy(zero_stage=2, attention=Attention.flash_attention_2)
    at_limit = replace(model("llama2-7b"), head_dim=256)
    beyond = replace(model("llama2-7b"), head_dim=288)
    assert reason(strategy, replace(workload(), model=at_limit)) == ""
    assert "up to head size 256" in reason(strategy, replace(workload(), model=beyond))


def test_fp16_is_refused_on_a_processor() -> None:
    place = processors(2)
    work = workload("smollm2-135m", place=place, precision=Precision.fp16)
    assert "refuses fp16" in reason(Strategy(zero_stage=2), work, place)


def test_capped_attention_scores_need_eager_attention() -> None:
    # Gemma 2 caps its scores at 50; Gemma 3 no longer does.
    assert default_attention(model("gemma2-9b")) is Attention.eager
    assert default_attention(model("gemma3-12b")) is Attention.sdpa
    assert "caps its attention scores" in reason(Strategy(zero_stage=2), workload("gemma2-9b"))


@pytest.mark.parametrize(
    ("name", "gpu", "has_liger", "expected"),
    [
        ("llama2-7b", "A100-80GB", True, Loss.liger),
        ("llama2-7b", "A100-80GB", False, Loss.chunked),
        ("falcon-7b", "A100-80GB", True, Loss.chunked),  # Liger has no kernels for Falcon
        ("llama2-7b", "V100-32GB", True, Loss.chunked),  # Triton needs compute capability 8.0
        ("llama2-7b", "T4", True, Loss.chunked),
        ("llama2-7b", "MI300X", True, Loss.liger),
    ],
)
def test_liger_is_considered_only_where_it_runs(
    name: str, gpu: str, has_liger: bool, expected: Loss
) -> None:
    found = losses_that_work(model(name), cluster(gpu).gpu, has_liger=has_liger)
    assert found == (Loss.full, expected)


def test_the_chunked_loss_is_considered_beside_ligers_where_that_makes_many_parts() -> None:
    # Vocabulary over hidden size: 151936 / 896 = 170, 32000 / 4096 = 8.
    place = cluster()
    assert losses_that_work(model("qwen2.5-0.5b"), place.gpu, has_liger=True) == tuple(Loss)
    assert Loss.chunked not in losses_that_work(model("llama2-7b"), place.gpu, has_liger=True)


def test_liger_is_refused_on_a_processor_on_v100_and_for_unknown_architectures() -> None:
    liger = Strategy(zero_stage=2, loss=Loss.liger, liger_kernels=True)
    place = processors(2)
    small = workload("smollm2-135m", place=place)
    assert "Triton" in reason(liger, small, place)
    assert "Triton" in reason(liger, place=cluster("V100-32GB"))
    assert "no kernels for falcon: use" in reason(liger, workload("falcon-7b"))
    modules_alone = Strategy(zero_stage=2, liger_kernels=True)
    assert "leave liger_kernels out" in reason(modules_alone, workload("falcon-7b"))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_parameters_are_offloaded_at_zero_3_only(stage: ZeroStage) -> None:
    strategy = Strategy(zero_stage=stage, offload_param=CPU, offload_optimizer=CPU)
    assert "ZeRO-3 only" in reason(strategy)


def test_optimizer_states_are_not_offloaded_without_zero() -> None:
    assert "not ZeRO-0" in reason(Strategy(zero_stage=0, offload_optimizer=CPU))


@pytest.mark.parametrize("stage", [1, 2])
def test_nvme_below_zero_3_is_refused_because_deepspeed_would_take_the_host(
    stage: ZeroStage,
) -> None:
    assert "NVMe at ZeRO-3 only" in reason(Strategy(zero_stage=stage, offload_optimizer=NVME))


def test_parameters_are_not_offloaded_while_their_optimizer_stays() -> None:
    assert "gains nothing" in reason(Strategy(zero_stage=3, offload_param=CPU))


@pytest.mark.parametrize(
    "strategy",
    [
        Strategy(zero_stage=2, offload_optimizer=CPU),
        Strategy(zero_stage=2, gradient_checkpointing=Checkpointing.cpu_offload),
    ],
)
def test_nothing_is_offloaded_from_a_processor(strategy: Strategy) -> None:
    place = processors(2)
    small = workload("smollm2-135m", place=place)
    assert "nothing to offload to" in reason(strategy, small, place)


def test_offloaded_states_are_not_8_bit() -> None:
    strategy = Strategy(zero_stage=2, optimizer=Optimizer.adamw_8bit, offload_optimizer=CPU)
    assert "always fp32" in reason(strategy)


def test_paged_states_need_a_gpu() -> None:
    place = processors(2)
    strategy = Strategy(zero_stage=2, optimizer=Optimizer.paged_adamw_8bit)
    assert "CUDA memory" in reason(strategy, workload("smollm2-135m", place=place), place)


@pytest.mark.parametrize(
    ("stage", "gpus", "is_refused"),
    # 3.2e9 parameters; an H100 with ZeRO-1 aborted.
    [(1, 1, True), (2, 1, True), (0, 2, True), (1, 2, False), (3, 1, False)],
)
def test_an_8_bit_optimizer_has_no_tensor_of_more_elements_than_bitsandbytes_counts(
    stage: ZeroStage, gpus: int, is_refused: bool
) -> None:
    place = cluster("H100-80GB", gpus=gpus)
    work = workload("llama3.2-3b", place=place, method=Method.full)
    strategy = Strategy(zero_stage=stage, optimizer=Optimizer.adamw_8bit)
    assert ("count to 2,147,483,647" in reason(strategy, work, place)) == is_refused


def test_zero_1_with_fp32_accumulation_is_refused() -> None:
    full = workload(method=Method.full)
    strategy = Strategy(zero_stage=1, grad_accum_dtype=Precision.fp32)
    assert "use ZeRO-2" in reason(strategy, full)


@pytest.mark.parametrize(
    "strategy",
    [
        Strategy(zero_stage=2, grad_accum_dtype=Precision.fp32),
        # With offload DeepSpeed takes DeepSpeedZeroOptimizer, which shards them.
        Strategy(zero_stage=1, grad_accum_dtype=Precision.fp32, offload_optimizer=CPU),
        Strategy(zero_stage=1, grad_accum_dtype=Precision.bf16),
    ],
)
def test_other_accumulation_is_possible(strategy: Strategy) -> None:
    assert reason(strategy, workload(method=Method.full)) == ""


def test_fp32_accumulation_in_fp16_is_sharded_at_zero_1() -> None:
    # engine.py: only a bf16 model gets BF16_Optimizer.
    full = workload(method=Method.full, precision=Precision.fp16)
    assert reason(Strategy(zero_stage=1, grad_accum_dtype=Precision.fp32), full) == ""


def test_deepspeed_cannot_mix_accumulation_types_without_zero() -> None:
    # engine.py: NotImplementedError("unsupported mix of ...").
    strategy = Strategy(zero_stage=0, grad_accum_dtype=Precision.fp32)
    assert "without ZeRO" in reason(strategy, workload(method=Method.full))


def test_int8_weights_are_not_sharded() -> None:
    work = workload(method=Method.qlora, quantization=QuantizationSpec(kind="int8"))
    assert "int8 weights cannot be sharded" in reason(Strategy(zero_stage=3), work)
    assert reason(Strategy(zero_stage=2), work) == ""


def test_4_bit_weights_are_sharded() -> None:
    # The worker stores them in the model's own dtype, as ZeRO-3 requires.
    assert reason(Strategy(zero_stage=3), workload(method=Method.qlora)) == ""


def test_dora_is_added_to_4_bit_weights_that_are_sharded() -> None:
    # tests/integration/test_methods.py trains it.
    work = replace(workload(method=Method.qlora), lora=LoraSpec(use_dora=True))
    assert reason(Strategy(zero_stage=3), work) == ""


@pytest.mark.parametrize("offload_param", [Offload.none, CPU])
def test_qlora_under_zero_3_may_be_offloaded(offload_param: Offload) -> None:
    # tests/integration/test_methods.py trains both.
    strategy = Strategy(zero_stage=3, offload_optimizer=CPU, offload_param=offload_param)
    assert reason(strategy, workload(method=Method.qlora)) == ""


@pytest.mark.parametrize("method", [Method.lora, Method.qlora])
def test_zero_3_is_too_much_for_adapters_that_fit_without(method: Method) -> None:
    work = workload(method=method)
    assert why_zero_3_is_too_much(Strategy(zero_stage=3), work, world_size=8) is not None
    assert why_zero_3_is_too_much(Strategy(zero_stage=2), work, world_size=8) is None


def test_zero_3_is_never_too_much_for_full_fine_tuning() -> None:
    full = workload(method=Method.full)
    assert why_zero_3_is_too_much(Strategy(zero_stage=3), full, world_size=8) is None


def test_offload_must_save_gpu_memory() -> None:
    assert why_offload_gains_nothing(9 * 2**30, 10 * 2**30) is None
    assert "1.00 GiB more" in (why_offload_gains_nothing(10 * 2**30, 9 * 2**30) or "")
    assert why_offload_gains_nothing(10 * 2**30, 10 * 2**30) is not None


@pytest.mark.parametrize(
    ("name", "size", "problem"),
    [
        ("llama2-7b", 8, ""),  # 32 heads, 32 key heads
        ("qwen2.5-0.5b", 2, ""),  # 14 heads, 2 key heads
        ("qwen2.5-0.5b", 4, "14 heads and 2 key heads"),
        ("llama3.1-8b", 16, ""),  # 32 heads; each of 8 key heads is copied once
        ("phi-4-mini", 2, "positions may depend on the length"),
        ("gemma2-2b", 2, "eager attention"),
    ],
)
def test_sequences_are_shared_where_heads_and_positions_allow_it(
    name: str, size: int, problem: str
) -> None:
    work = workload(name)
    shared = Strategy(
        zero_stage=2,
        sequence_parallel_size=size,
        attention=default_attention(work.model),
    )
    found = reason(shared, work)
    assert problem in found if problem else found == ""


def test_sequences_of_packed_examples_and_short_windows_are_not_shared() -> None:
    shared = Strategy(zero_stage=2, sequence_parallel_size=2)
    packed = replace(workload(), has_padding=True)
    assert "packed examples" in reason(shared, packed)
    narrow = replace(workload(tokens=8192), model=replace(model("llama2-7b"), sliding_window=4096))
    assert "sliding window" in reason(shared, narrow)
    flash = replace(shared, attention=Attention.flash_attention_2)
    assert reason(flash, narrow) == ""


def test_a_sequence_has_a_part_for_each_gpu_that_shares_it() -> None:
    shared = Strategy(zero_stage=2, sequence_parallel_size=4)
    assert "2 tokens have no part for each of 4 GPUs" in reason(shared, workload(tokens=2))
    assert reason(shared, workload(tokens=4)) == ""


def test_attention_that_is_not_known_to_be_shared_is_not() -> None:
    shared = Strategy(zero_stage=2, sequence_parallel_size=2)
    # Falcon 40B has 128 heads and 8 key heads.
    assert "whether falcon's attention can be shared" in reason(shared, workload("falcon-40b"))
