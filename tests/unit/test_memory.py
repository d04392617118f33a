"""Predicted bytes against papers, the real DeepSpeed engine and measured GPU runs."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest

from launcher.hardware import ClusterSpec, cpu_spec, default_cluster, find_gpu
from launcher.model_source import load_catalogue_entry
from launcher.model_spec import ModelSpec, WeightSpec, spec_from_config
from launcher.predict.components import OVERFLOW
from launcher.predict.memory import PHASES, MemoryEstimate, estimate_memory
from launcher.predict.zero_runtime import zero_runtime
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
from launcher.units import GB, GIB, MIB
from launcher.workload import LoraSpec, QuantizationSpec, Workload

TRAINING = ("forward", "loss", "backward", "step")
# What transformers' "auto" makes of hidden size 4096 (integrations/deepspeed.py).
AUTO = ZeroKnobs(
    reduce_bucket_size=4096**2,
    stage3_prefetch_bucket_size=int(0.9 * 4096**2),
    stage3_param_persistence_threshold=40960,
)
BIG_BUCKETS = replace(AUTO, reduce_bucket_size=500_000_000, stage3_prefetch_bucket_size=50_000_000)
QUERY_VALUE = LoraSpec(r=64, dropout=0.05, target_modules=("q_proj", "v_proj"))


@functools.cache
def model(name: str) -> ModelSpec:
    return spec_from_config(load_catalogue_entry(name).config, name=name)


def workload(
    name: str = "llama2-7b",
    method: Method = Method.full,
    *,
    tokens: int = 256,
    lora: LoraSpec = QUERY_VALUE,
    precision: Precision = Precision.bf16,
) -> Workload:
    return Workload(
        model=model(name),
        method=method,
        max_seq_len=tokens,
        global_batch_size=8,
        lora=lora,
        precision=precision,
    )


def processors(world_size: int) -> ClusterSpec:
    """Ranks without CUDA: no context, no cuBLAS, as the engine was traced."""
    return default_cluster(cpu_spec(64 * GIB), gpus_per_node=world_size)


def training_peak(estimate: MemoryEstimate) -> int:
    return max(estimate.phase(name).allocated_bytes for name in PHASES if name in TRAINING)


@pytest.mark.parametrize(("stage", "expected_gb"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_model_states_match_figure_1_of_the_zero_paper(
    stage: ZeroStage, expected_gb: float
) -> None:
    # arXiv:1910.02054: 7.5B parameters on 64 GPUs. One tensor each of 1,000 equal ones, so
    # that no tensor lies across a partition's border.
    weight = WeightSpec(
        name="x.weight", shape=(7500, 1000), count=1000, role="linear", in_layer=True
    )
    spec = replace(model("llama2-7b"), weights=(weight,))
    runtime = zero_runtime(
        replace(workload(), model=spec), Strategy(zero_stage=stage), world_size=64
    )
    gradients = runtime.width * (spec.num_params if stage < 2 else runtime.partition)
    states = sum(runtime.model_bytes().values()) + runtime.optimizer_bytes() + gradients
    assert states / GB == pytest.approx(expected_gb, abs=0.05)


# The real DeepSpeed 0.19.8 engine on one CPU process with a fake process group: Llama-2-7B
# with widths divided by 16, bytes multiplied back by 256; eager attention, 256 tokens, 8 ranks.
# GB = 1e9; the peak of forward, loss, backward and step.
ENGINE = [
    (161.78 - 2 * 13.48, 0, {}),  # 24 B/param with FusedAdam, 20 with any other optimizer
    (38.82, 1, {}),
    (33.25, 1, {"zero": replace(AUTO, overlap_comm=True)}),
    (30.40, 2, {}),
    (18.57, 3, {}),
    (15.97, 3, {"checkpointing": True, "zero": replace(AUTO, sub_group_size=100_000_000)}),
    (28.31, 1, {"offload": True}),
    (17.03, 2, {"offload": True}),
    (15.17, 2, {"offload": True, "checkpointing": True}),
    (17.44, 2, {"offload": True, "zero": BIG_BUCKETS}),
    (
        16.91,
        2,
        {
            "offload": True,
            "checkpointing": True,
            "zero": replace(BIG_BUCKETS, overlap_comm=True),
        },
    ),
    (4.21, 3, {"offload": True, "checkpointing": True}),
    (2.84, 3, {
        "offload": True,
        "checkpointing": True,
        "zero": replace(AUTO, stage3_max_live_parameters=0),
    }),
    (6.01, 3, {"offload": True}),
    (7.68, 3, {"offload": True, "zero": BIG_BUCKETS}),
    (15.85, 2, {"world_size": 64, "checkpointing": True}),
    (4.17, 3, {"world_size": 64, "checkpointing": True}),
    (13.77, 1, {"method": Method.lora, "checkpointing": True}),
    (13.77, 2, {"method": Method.lora, "checkpointing": True}),
    (4.14, 3, {"method": Method.lora, "checkpointing": True}),
    (4.09, 3, {"method": Method.lora, "checkpointing": True, "offload": True}),
    (
        5.13,
        3,
        {
            "method": Method.lora,
            "checkpointing": True,
            "offload": True,
            "zero": BIG_BUCKETS,
        },
    ),
    (5.90, 3, {"method": Method.lora, "offload": True}),  # adapters in the model's precision
    (5.76, 3, {"name": "llama2-13b", "method": Method.lora, "checkpointing": True,
               "offload": True}),
    (20.42, 3, {"name": "llama2-70b", "method": Method.lora, "checkpointing": True,
                "offload": True}),
]  # fmt: skip


@pytest.mark.parametrize(("engine_gb", "stage", "case"), ENGINE)
def test_the_peak_is_within_3_percent_of_the_real_engine(
    engine_gb: float, stage: ZeroStage, case: dict[str, object]
) -> None:
    strategy = Strategy(
        zero_stage=stage,
        attention=Attention.eager,
        offload_optimizer=Offload.cpu if case.get("offload") else Offload.none,
        gradient_checkpointing=(
            Checkpointing.full if case.get("checkpointing") else Checkpointing.none
        ),
        zero=case.get("zero", AUTO),
    )
    work = workload(case.get("name", "llama2-7b"), case.get("method", Method.full))
    estimate = estimate_memory(work, strategy, processors(case.get("world_size", 8)))
    assert training_peak(estimate) / GB == pytest.approx(engine_gb, rel=0.03)


def test_init_flattens_4_bytes_per_trainable_parameter_before_training_needs_less() -> None:
    # Engine: 26.9 GB at init against 15 to 17 GB in training, 7B, ZeRO-2 with offload.
    strategy = Strategy(zero_stage=2, offload_optimizer=Offload.cpu, zero=AUTO)
    estimate = estimate_memory(workload(), strategy, processors(8))
    assert estimate.phase("init").allocated_bytes / GB == pytest.approx(26.9, rel=0.005)


def gpus(count: int = 8, name: str = "A100-80GB") -> ClusterSpec:
    return default_cluster(find_gpu(name), gpus_per_node=count)


def peak(strategy: Strategy, work: Workload | None = None, count: int = 8) -> int:
    return training_peak(estimate_memory(work or workload(tokens=2048), strategy, gpus(count)))


def test_components_of_the_fullest_phase_add_up_to_the_peak() -> None:
    estimate = estimate_memory(workload(), Strategy(zero_stage=2), gpus())
    assert sum(estimate.fullest.components.values()) == estimate.peak_allocated_bytes
    assert tuple(phase.phase for phase in estimate.phases) == PHASES


@pytest.mark.parametrize("stage", [2, 3])
def test_recomputation_needs_less_than_saving_everything(stage: ZeroStage) -> None:
    work = workload(tokens=4096)
    everything = Strategy(zero_stage=stage, zero=AUTO)
    recomputed = replace(everything, gradient_checkpointing=Checkpointing.full)
    moved = replace(everything, gradient_checkpointing=Checkpointing.cpu_offload)
    backward = [
        estimate_memory(work, strategy, gpus()).phase("backward").allocated_bytes
        for strategy in (everything, recomputed, moved)
    ]
    assert backward[0] > backward[1] > backward[2]


def test_gradient_accumulation_keeps_one_more_partition_under_zero_2() -> None:
    # Engine, 8 ranks, 7B: 27.18 GB in the loss with 4 accumulation steps, 25.43 with one.
    once = Strategy(zero_stage=2, zero=AUTO)
    four = replace(once, gradient_accumulation_steps=4)
    work = workload(tokens=256)
    difference = (
        estimate_memory(work, four, gpus()).phase("loss").allocated_bytes
        - estimate_memory(work, once, gpus()).phase("loss").allocated_bytes
    )
    assert difference / GB == pytest.approx(27.18 - 25.43, rel=0.03)


def test_fp32_accumulation_is_cheaper_at_the_step_under_zero_2_and_ruinous_under_zero_1() -> None:
    # Engine, 7B, 8 ranks: the step 28.02 GB instead of 30.40; ZeRO-1 10 + 12/8 B per parameter.
    plain = Strategy(zero_stage=2, zero=AUTO)
    fp32 = replace(plain, grad_accum_dtype=Precision.fp32)
    step = estimate_memory(workload(), fp32, processors(8)).phase("step").allocated_bytes
    assert step / GB == pytest.approx(28.02, rel=0.005)
    ruinous = estimate_memory(workload(), replace(fp32, zero_stage=1), processors(8))
    assert training_peak(ruinous) == pytest.approx(11.5 * model("llama2-7b").num_params, rel=0.01)


def test_zero_3_in_fp16_copies_all_gradients_to_look_for_infinities() -> None:
    # torch.isinf: an absolute copy, 2 B, and its comparison, 1 B; bf16 looks at norms instead.
    strategy = Strategy(zero_stage=3, zero=replace(AUTO, sub_group_size=100_000_000))
    (half, brain) = (
        estimate_memory(workload(precision=kind), strategy, processors(8)).phase("step")
        for kind in (Precision.fp16, Precision.bf16)
    )
    assert half.moment == "overflow check"
    partition = model("llama2-7b").num_params / 8
    assert half.components[OVERFLOW] == pytest.approx(3 * partition)
    assert half.allocated_bytes > brain.allocated_bytes


@pytest.mark.parametrize(
    ("optimizer", "engine_gb"),
    [(Optimizer.adamw_foreach, 32.08), (Optimizer.adamw_single, 35.45)],
)
def test_torch_optimizers_temporaries_show_at_the_step(
    optimizer: Optimizer, engine_gb: float
) -> None:
    # The engine, 7B, ZeRO-2, 8 ranks, torch AdamW with foreach and as a plain loop.
    strategy = Strategy(zero_stage=2, zero=AUTO, optimizer=optimizer)
    step = estimate_memory(workload(), strategy, processors(8)).phase("step")
    assert step.allocated_bytes / GB == pytest.approx(engine_gb, rel=0.005)


def test_8_bit_adam_keeps_2_bytes_and_a_scale_instead_of_8_and_paged_keeps_none() -> None:
    sizes = {
        optimizer: estimate_memory(workload(), Strategy(zero_stage=1, optimizer=optimizer), gpus())
        for optimizer in (Optimizer.adamw, Optimizer.adamw_8bit, Optimizer.paged_adamw_8bit)
    }
    per_param = {
        optimizer: estimate.phase("save").components[
            "optimizer states (fp32 master, momentum, variance)"
        ]
        * 8
        / model("llama2-7b").num_params
        for optimizer, estimate in sizes.items()
    }
    assert per_param[Optimizer.adamw] == pytest.approx(12)
    assert per_param[Optimizer.adamw_8bit] == pytest.approx(4 + 2.03, abs=0.01)
    # The scales are ordinary tensors: 38.6 MB for Llama-3.2-1B on an H100.
    assert per_param[Optimizer.paged_adamw_8bit] == pytest.approx(4 + 2 * 4 / 256)


def test_buckets_far_larger_than_the_adapters_waste_their_whole_size() -> None:
    work = workload(method=Method.lora, tokens=256)
    big = Strategy(zero_stage=2)
    small = Strategy(zero_stage=2, zero=ZeroKnobs(reduce_bucket_size=33_554_432))
    backward = [
        estimate_memory(work, strategy, gpus()).phase("backward").allocated_bytes
        for strategy in (big, small)
    ]
    assert (backward[0] - backward[1]) == pytest.approx(2 * (500_000_000 - 33_554_432), rel=0.02)


def test_nf4_needs_half_a_byte_and_its_scales() -> None:
    # bitsandbytes: 0.5 + 1/64 + 4/(64 x 256) = 0.5159 B per parameter, 0.5625 without double
    # quantization; Llama-2-7B has 6,476,005,376 linear parameters.
    for double_quant, per_param in ((True, 0.5159), (False, 0.5625)):
        work = replace(
            workload(method=Method.qlora),
            quantization=QuantizationSpec(double_quant=double_quant),
        )
        estimate = estimate_memory(work, Strategy(zero_stage=2), gpus())
        size = estimate.phase("save").components["quantized parameters"]
        assert size / 6_476_005_376 == pytest.approx(per_param, abs=1e-4)


def test_volta_runs_the_memory_efficient_kernel_with_the_same_saved_bytes() -> None:
    work = workload(precision=Precision.fp16, tokens=2048)
    strategy = Strategy(zero_stage=2)
    saved = [
        estimate_memory(work, strategy, gpus(name=name))
        .phase("loss")
        .components["saved activations"]
        for name in ("V100-32GB", "A100-80GB")
    ]
    assert saved[0] == saved[1]


def test_a_processor_has_no_context_no_workspace_and_no_fragmentation() -> None:
    work = workload(precision=Precision.fp32)
    estimate = estimate_memory(work, Strategy(zero_stage=2), processors(2))
    assert estimate.device_used_bytes == estimate.peak_reserved_bytes
    assert estimate.peak_reserved_bytes == estimate.peak_allocated_bytes
    assert not any("cuBLAS" in part for phase in estimate.phases for part in phase.components)


def test_sequence_parallelism_divides_activations_by_its_degree() -> None:
    work = workload(method=Method.lora, tokens=32768)
    alone = estimate_memory(work, Strategy(zero_stage=2), gpus())
    split = estimate_memory(work, Strategy(zero_stage=2, sequence_parallel_size=8), gpus())
    part = "saved activations"
    assert alone.phase("loss").components[part] == pytest.approx(
        8 * split.phase("loss").components[part], rel=1e-6
    )


@pytest.mark.parametrize(
    ("size", "checkpointing", "measured_mib"),
    [
        (1, Checkpointing.none, 212.41),
        (2, Checkpointing.none, 148.18),
        (2, Checkpointing.full, 88.82),
    ],
)
def test_two_ranks_that_share_sequences_need_what_was_counted(
    size: int, checkpointing: Checkpointing, measured_mib: float
) -> None:
    # Storages that two ranks of the worker held on a processor, at the peak of two steps.
    config = {
        "model_type": "llama", "vocab_size": 300, "hidden_size": 256, "intermediate_size": 688,
        "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
    }  # fmt: skip
    work = Workload(
        model=spec_from_config(config, name="tiny"), method=Method.full, max_seq_len=2048,
        global_batch_size=2, precision=Precision.fp32, has_random_weights=True,
    )  # fmt: skip
    strategy = Strategy(
        zero_stage=2, gradient_checkpointing=checkpointing, loss=Loss.chunked,
        sequence_parallel_size=size, gradient_accumulation_steps=size,
        zero=ZeroKnobs(reduce_bucket_size=3_056_640, overlap_comm=size == 2 or None),
    )  # fmt: skip
    found = estimate_memory(work, strategy, processors(2)).peak_allocated_bytes
    assert found / MIB == pytest.approx(measured_mib, rel=0.005)


def test_more_ranks_never_need_more_memory_each() -> None:
    for stage in (1, 2, 3):
        peaks = [peak(Strategy(zero_stage=stage, zero=AUTO), count=count) for count in (2, 4, 8)]
        assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("checkpointing", list(Checkpointing))
def test_longer_sequences_never_need_less_memory(
    stage: ZeroStage, checkpointing: Checkpointing
) -> None:
    # Also reserved: a stream of ZeRO-3's keeps what it needed at a moment that is not the
    # fullest, as the fullest moment of short sequences is a reduction, of long ones is not.
    strategy = Strategy(zero_stage=stage, gradient_checkpointing=checkpointing, zero=AUTO)
    place = default_cluster(find_gpu("H200"), gpus_per_node=4)
    found = [
        estimate_memory(workload("gemma2-2b", tokens=tokens), strategy, place)
        for tokens in (128, 256, 512, 1024)
    ]
    for name in ("peak_allocated_bytes", "peak_reserved_bytes", "host_bytes_per_node"):
        sizes = [getattr(memory, name) for memory in found]
        assert sizes == sorted(sizes), name
