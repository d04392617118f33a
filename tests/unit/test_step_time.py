"""The parts of a step's time against hand calculation."""

from __future__ import annotations

from dataclasses import replace

import pytest
from step_inputs import job

from launcher.hardware import cpu_spec, default_cluster, find_gpu
from launcher.predict.run_cost import run_estimate
from launcher.predict.step_time import estimate_time
from launcher.predict.time_calibration import KernelEfficiency, TimeCalibration
from launcher.strategy import (
    Attention,
    Checkpointing,
    Method,
    Offload,
    Optimizer,
    Precision,
    Strategy,
    ZeroKnobs,
    ZeroStage,
)
from launcher.units import GIB
from launcher.workload import LoraSpec

NOTHING_KEPT = ZeroKnobs(stage3_max_live_parameters=0, stage3_max_reuse_distance=0)


def test_zero3_gathers_twice_and_scatters_once() -> None:
    cluster = default_cluster(find_gpu("A100-80GB"))
    calibration = TimeCalibration(collective_latency_seconds=0.0)
    workload = job("llama2-7b", Method.full, 2048)
    strategy = Strategy(zero_stage=3, zero=NOTHING_KEPT)
    seconds = estimate_time(workload, strategy, cluster, calibration=calibration)
    # 6 bytes a parameter, 7/8 of them from other ranks, at 230 GB/s; the norms stay gathered.
    expected = (6 * 6_738_415_616 - 4 * 65 * 4096) * 7 / 8 / 230e9
    assert seconds.components["communication"] == pytest.approx(expected)


@pytest.mark.parametrize("steps", [1, 4])
def test_hpz_gathers_from_the_own_node_what_the_step_has_not_changed(steps: int) -> None:
    # ZeRO++, arXiv:2306.10209, section 3.2: backward reads the copies that forward left in the
    # node. So do all later micro-steps; each reduces its gradients over all ranks.
    cluster = default_cluster(find_gpu("A100-80GB"), num_nodes=2)
    calibration = TimeCalibration(collective_latency_seconds=0.0)
    knobs = replace(NOTHING_KEPT, zero_hpz_partition_size=8)
    strategy = Strategy(zero_stage=3, zero=knobs, gradient_accumulation_steps=steps)
    found = estimate_time(
        job("llama2-7b", Method.full, 2048), strategy, cluster, calibration=calibration
    )
    count = 6_738_415_616
    gathered = count - 65 * 4096  # the norms stay
    across = (2 * gathered + 2 * steps * count) * 15 / 16
    inside = (4 * steps - 2) * gathered * 7 / 8
    expected = across / min(230e9, cluster.inter_node_bytes_per_s) + inside / 230e9
    assert found.components["communication"] == pytest.approx(expected)


@pytest.mark.parametrize(("zero_stage", "bytes_per_param"), [(0, 8), (1, 10), (2, 10), (3, 8)])
def test_gradients_that_are_reduced_in_fp32_are_sent_twice_as_wide(
    zero_stage: ZeroStage, bytes_per_param: int
) -> None:
    cluster = default_cluster(find_gpu("A100-80GB"))
    knobs = replace(NOTHING_KEPT, communication_data_type="fp32")
    found = estimate_time(
        job("llama2-7b", Method.full, 2048),
        Strategy(zero_stage=zero_stage, zero=knobs),
        cluster,
        calibration=TimeCalibration(collective_latency_seconds=0.0),
    )
    expected = bytes_per_param * 6_738_415_616 * 7 / 8 / 230e9
    assert found.components["communication"] == pytest.approx(expected, rel=1e-3)


def test_checkpointing_under_zero3_gathers_frozen_layers_a_third_time() -> None:
    # They are given back after they were recomputed (parameter_offload.py), each a moment before
    # its own backward; a layer's last matrix is there for its backward before that starts. So of
    # 32 layers 4 x 4096^2 + 2 x 4096 x 11008 each.
    cluster = default_cluster(find_gpu("A100-80GB"))
    workload = job("llama2-7b", Method.lora, 2048, LoraSpec(r=1, target_modules=("q_proj",)))
    seconds = [
        estimate_time(
            workload,
            Strategy(zero_stage=3, gradient_checkpointing=mode, zero=NOTHING_KEPT),
            cluster,
        ).components["communication"]
        for mode in (Checkpointing.none, Checkpointing.full)
    ]
    layers = 2 * 32 * 157_286_400 * 7 / 8 / 230e9
    assert seconds[1] - seconds[0] == pytest.approx(layers, rel=0.02)


@pytest.mark.parametrize(("zero_stage", "bytes_per_param"), [(0, 4), (1, 6), (2, 18)])
def test_lower_stages_reduce_gradients_and_gather_weights(
    zero_stage: int, bytes_per_param: int
) -> None:
    # Over 4 micro-steps: stage 0 and 1 reduce once (4 bytes), stage 2 every time (16); 1 and 2
    # gather the updated weights (2).
    cluster = default_cluster(find_gpu("A100-80GB"))
    calibration = TimeCalibration(collective_latency_seconds=0.0)
    strategy = Strategy(zero_stage=zero_stage, gradient_accumulation_steps=4)  # type: ignore[arg-type]
    estimate = estimate_time(
        job("llama2-7b", Method.full, 2048), strategy, cluster, calibration=calibration
    )
    seconds = bytes_per_param * 6_738_415_616 * 7 / 8 / 230e9
    assert estimate.components["communication"] == pytest.approx(seconds)


def test_one_gpu_communicates_nothing() -> None:
    cluster = default_cluster(find_gpu("H100"), gpus_per_node=1)
    estimate = estimate_time(job("llama2-7b", Method.lora, 512), Strategy(zero_stage=2), cluster)
    assert estimate.components["communication"] == 0


def test_cpu_optimizer_is_bound_by_host_memory() -> None:
    cluster = default_cluster(find_gpu("A100-80GB"))
    strategy = Strategy(zero_stage=2, offload_optimizer=Offload.cpu)
    estimate = estimate_time(job("llama2-7b", Method.full, 2048), strategy, cluster)
    # Clip 8, Adam 28 and 12 to fill the caches, 16-bit copy 8: 56 bytes a parameter, at 120 GB/s
    # for the whole node.
    expected = 56 * 6_738_415_616 / 120e9
    assert estimate.components["cpu_optimizer"] == pytest.approx(expected)


def test_nvme_optimizer_is_slower_than_host_memory() -> None:
    cluster = default_cluster(find_gpu("A100-80GB"))
    workload = job("llama2-7b", Method.full, 2048)
    cpu, nvme = (
        estimate_time(workload, Strategy(zero_stage=3, offload_optimizer=where), cluster)
        for where in (Offload.cpu, Offload.nvme)
    )
    added = nvme.components["cpu_optimizer"] - cpu.components["cpu_optimizer"]
    assert added == pytest.approx(28 * 6_738_415_616 / 6e9)


def test_parameter_offload_to_nvme_is_slower_than_to_host_memory() -> None:
    cluster = default_cluster(find_gpu("A100-80GB"))
    workload = job("llama2-7b", Method.lora, 2048)
    cpu, nvme = (
        estimate_time(workload, Strategy(zero_stage=3, offload_param=where), cluster).step_seconds
        for where in (Offload.cpu, Offload.nvme)
    )
    assert nvme > cpu


def test_saved_inputs_on_the_host_cost_two_copies() -> None:
    cluster = default_cluster(find_gpu("A100-80GB"), gpus_per_node=1)
    strategy = Strategy(zero_stage=2, gradient_checkpointing=Checkpointing.cpu_offload)
    estimate = estimate_time(job("llama2-7b", Method.lora, 2048), strategy, cluster)
    # 2 bytes x 2048 tokens x 4096 x 32 layers down and up, at 24 GB/s
    expected = 2 * 2 * 2048 * 4096 * 32 / 24e9
    assert estimate.components["offload_copies"] == pytest.approx(expected)


@pytest.mark.parametrize("method", [Method.full, Method.lora])
def test_zero3_on_two_nodes_over_10_gigabit_ethernet_is_bound_by_the_network(
    method: Method,
) -> None:
    cluster = default_cluster(find_gpu("A100-80GB"), num_nodes=2)
    ethernet = replace(cluster, inter_node_bytes_per_s=1.25e9)
    workload, strategy = job("llama2-7b", method, 2048), Strategy(zero_stage=3)
    estimate = estimate_time(workload, strategy, ethernet)
    # 16-bit weights gathered twice, 15 of 16 parts from other ranks; 1e9 stay at the turn.
    assert estimate.step_seconds > 2 * (2 * 6_738_415_616 - 1e9) * 15 / 16 / 1.25e9
    assert "the network between nodes: use fewer nodes" in estimate.bound_by


def test_sequence_parallelism_splits_the_work_of_a_sample() -> None:
    cluster = default_cluster(find_gpu("H100"))
    workload = job("llama3-8b", Method.lora, 131072)
    base = Strategy(zero_stage=3, gradient_checkpointing=Checkpointing.full)
    alone = estimate_time(workload, base, cluster)
    split = estimate_time(workload, replace(base, sequence_parallel_size=8), cluster)
    assert split.components["attention"] == pytest.approx(alone.components["attention"] / 8)
    assert split.components["communication"] > 0
    far = replace(cluster, num_nodes=2)
    wide = estimate_time(workload, replace(base, sequence_parallel_size=16), far)
    assert wide.components["communication"] > split.components["communication"]


def test_the_bottleneck_is_of_the_slower_of_host_and_device() -> None:
    # The host's one part is larger than any of the device's, which together take longer.
    estimate = estimate_time(
        job("phi-2", Method.lora, 2048),
        Strategy(zero_stage=2, micro_batch_size_per_gpu=3),
        default_cluster(find_gpu("H100"), gpus_per_node=1),
    )
    parts = estimate.components
    device = [parts[name] for name in ("matmul", "attention", "memory_traffic")]
    assert max(device) < parts["host"] < sum(device)
    assert "launch overhead" not in estimate.bound_by


def test_fp32_runs_outside_the_tensor_cores() -> None:
    cluster = default_cluster(find_gpu("A100-80GB"), gpus_per_node=1)
    workload = job("llama2-7b", Method.lora, 2048)
    half = estimate_time(workload, Strategy(zero_stage=2), cluster)
    whole = estimate_time(
        replace(workload, precision=Precision.fp32), Strategy(zero_stage=2), cluster
    )
    assert whole.components["matmul"] > 10 * half.components["matmul"]


def test_eager_attention_pays_for_its_scores() -> None:
    cluster = default_cluster(find_gpu("V100-32GB"))
    workload = replace(job("llama2-7b", Method.lora, 4096), precision=Precision.fp16)
    eager, efficient = (
        estimate_time(workload, Strategy(zero_stage=2, attention=kind), cluster)
        for kind in (Attention.eager, Attention.sdpa)
    )
    assert eager.components["memory_traffic"] > 2 * efficient.components["memory_traffic"]


def test_padding_mask_keeps_sdpa_off_the_flash_kernel() -> None:
    cluster = default_cluster(find_gpu("H100"), gpus_per_node=1)
    workload = job("llama3-8b", Method.lora, 8192)
    packed = estimate_time(workload, Strategy(zero_stage=2), cluster)
    padded = estimate_time(replace(workload, has_padding=True), Strategy(zero_stage=2), cluster)
    assert padded.components["attention"] > 2 * packed.components["attention"]


def optimizer_seconds(optimizer: Optimizer) -> float:
    cluster = default_cluster(find_gpu("H100"), gpus_per_node=1)
    strategy = Strategy(zero_stage=2, optimizer=optimizer)
    found = estimate_time(job("llama3.2-1b", Method.full, 512), strategy, cluster)
    return found.components["optimizer"]


@pytest.mark.parametrize("optimizer", [Optimizer.adamw_foreach, Optimizer.adamw_single])
def test_unfused_adam_is_slower_than_fused(optimizer: Optimizer) -> None:
    assert optimizer_seconds(optimizer) > optimizer_seconds(Optimizer.adamw)


def test_every_trainable_tensor_costs_the_host_a_hook() -> None:
    cluster = default_cluster(find_gpu("H100"), gpus_per_node=1)
    workload = job("llama3-8b", Method.lora, 512)
    free, paid = (
        estimate_time(
            workload,
            Strategy(zero_stage=2),
            cluster,
            calibration=TimeCalibration(gradient_hook_seconds=seconds),
        ).components["host"]
        for seconds in (0.0, 1e-3)
    )
    # A and B of seven linear layers in each of 32 layers.
    assert paid - free == pytest.approx(2 * 7 * 32 * 1e-3)


def test_without_zero_gradients_are_gone_over_once_a_step_and_no_backward_hides_it() -> None:
    cluster = default_cluster(find_gpu("H100"), gpus_per_node=1)
    strategy = Strategy(zero_stage=0, micro_batch_size_per_gpu=2, gradient_accumulation_steps=4)
    free, paid = (
        estimate_time(
            job("llama3-8b", Method.lora, 4096),
            strategy,
            cluster,
            calibration=TimeCalibration(gradient_hook_seconds=seconds),
        )
        for seconds in (0.0, 1e-3)
    )
    # A and B of seven linear layers in each of 32 layers.
    assert paid.step_seconds - free.step_seconds == pytest.approx(2 * 7 * 32 * 1e-3)


def test_optimizer_on_the_gpu_is_bound_by_its_memory() -> None:
    cluster = default_cluster(find_gpu("H100"), gpus_per_node=1)
    calibration = TimeCalibration(step_fixed_seconds=0.0, trainer_step_seconds=0.0)
    estimate = estimate_time(
        job("llama2-7b", Method.full, 512), Strategy(zero_stage=2), cluster, calibration=calibration
    )
    # 70 bytes a parameter at 0.72 of 3.35 TB/s (NVIDIA H100 datasheet).
    expected = 70 * 6_738_415_616 / (0.72 * 3.35e12)
    assert estimate.components["optimizer"] == pytest.approx(expected)


def test_offloaded_gradients_are_waited_for_once_a_step_and_nothing_hides_it() -> None:
    cluster = default_cluster(find_gpu("H100"), gpus_per_node=1)
    strategy = Strategy(
        zero_stage=2,
        offload_optimizer=Offload.cpu,
        micro_batch_size_per_gpu=4,
        gradient_accumulation_steps=2,
    )
    # 32,768 tokens a micro-step keep the GPU so busy that it hides all else of the host's.
    hidden, alone = (
        estimate_time(
            job("llama3-8b", Method.lora, 8192),
            strategy,
            cluster,
            calibration=TimeCalibration(gradient_check_fraction=fraction),
        ).step_seconds
        for fraction in (0.0, 0.5)
    )
    # Half of 0.3 ms for A and B of seven linear layers in each of 32 layers, once.
    assert alone - hidden == pytest.approx(0.5 * 0.3e-3 * 2 * 7 * 32, rel=0.05)


@pytest.mark.parametrize("optimizer", [Optimizer.adamw_8bit, Optimizer.paged_adamw_8bit])
def test_eight_bit_adam_takes_as_long_as_it_was_measured_to(optimizer: Optimizer) -> None:
    # benchmarks/step_parts_h100.jsonl: 33.2 ms (paged 37.6) for 1.24e9 parameters on an H100, of
    # which torch's fused kernel moves 28 bytes each: at 0.72 of 3.35 TB/s 14.4 ms.
    slower = optimizer_seconds(optimizer) - optimizer_seconds(Optimizer.adamw)
    assert slower == pytest.approx(0.0332 - 0.0144, rel=0.05)


@pytest.mark.parametrize("name", ["phi-2", "falcon-7b", "gemma2-2b", "gpt-neox-20b", "qwen3-8b"])
@pytest.mark.parametrize("gpu", ["V100-32GB", "A10G", "RTX-4090", "L40S", "B200", "MI300X"])
def test_every_family_and_generation_gives_a_plausible_mfu(name: str, gpu: str) -> None:
    cluster = default_cluster(find_gpu(gpu), gpus_per_node=1)
    strategy = Strategy(zero_stage=2, micro_batch_size_per_gpu=8)
    estimate = estimate_time(job(name, Method.lora, 2048), strategy, cluster)
    assert 0.05 < estimate.mfu < 0.90


def test_processor_ranks_are_slower_than_any_gpu() -> None:
    workload = replace(job("smollm2-135m", Method.full, 256), precision=Precision.fp32)
    cpu = estimate_time(
        workload, Strategy(zero_stage=2), default_cluster(cpu_spec(8 * GIB, num_cores=2))
    )
    t4 = estimate_time(
        workload, Strategy(zero_stage=2), default_cluster(find_gpu("T4"), gpus_per_node=1)
    )
    assert cpu.step_seconds > t4.step_seconds


def test_processor_both_starts_and_runs_its_operations() -> None:
    workload = replace(job("smollm2-135m", Method.full, 256), precision=Precision.fp32)
    cluster = default_cluster(cpu_spec(8 * GIB, num_cores=2), gpus_per_node=1)
    estimate = estimate_time(workload, Strategy(zero_stage=2), cluster)
    # Nothing overlaps: the step is the sum of its parts.
    assert estimate.step_seconds == pytest.approx(sum(estimate.components.values()))
    assert "GPU" not in estimate.bound_by


def test_advice_never_asks_for_kernels_that_are_already_in_use() -> None:
    cluster = default_cluster(find_gpu("A100-80GB"), gpus_per_node=1)
    # Eager attention at 8192 tokens moves far more bytes for its scores than anything else.
    eager = Strategy(zero_stage=2, attention=Attention.eager)
    workload = job("llama2-7b", Method.lora, 8192)
    plain = estimate_time(workload, eager, cluster).bound_by
    fused = estimate_time(workload, replace(eager, liger_kernels=True), cluster).bound_by
    assert "enable Liger kernels" in plain
    assert "memory traffic" in fused
    assert "Liger" not in fused


def test_a_larger_micro_batch_is_advised_alone_where_the_batch_has_room_for_it() -> None:
    cluster = default_cluster(find_gpu("H100"), gpus_per_node=1)
    advice = estimate_time(
        job("llama2-7b", Method.lora, 256),
        Strategy(zero_stage=2, gradient_accumulation_steps=8),
        cluster,
    ).bound_by
    assert "launch overhead: raise the micro-batch or pack sequences" in advice


def test_flash_attention_is_advised_only_where_it_is_not_in_use() -> None:
    cluster = default_cluster(find_gpu("RTX-4090"), gpus_per_node=1)
    long, strategy = job("llama3.1-8b", Method.lora, 65_536), Strategy(zero_stage=2)
    flash = estimate_time(long, strategy, cluster).bound_by
    masked = estimate_time(replace(long, has_padding=True), strategy, cluster).bound_by
    assert flash == "attention over long sequences: its work grows with the square of their length"
    assert "strategy.attention=flash_attention_2" in masked


# Falcon: not in liger_kernel 0.8.5's MODEL_TYPE_TO_APPLY_LIGER_FN. V100: Triton needs 8.0.
@pytest.mark.parametrize(("name", "gpu"), [("falcon-7b", "A100-80GB"), ("llama2-7b", "V100-32GB")])
def test_liger_is_advised_only_where_it_has_kernels(name: str, gpu: str) -> None:
    eager = Strategy(zero_stage=2, attention=Attention.eager)
    workload = replace(job(name, Method.full, 8192), precision=Precision.fp16)
    cluster = default_cluster(find_gpu(gpu), gpus_per_node=1)
    advice = estimate_time(workload, eager, cluster).bound_by
    assert advice == "memory traffic of small kernels: faster memory helps"


def test_calibration_can_be_replaced_by_gpu_name() -> None:
    cluster = default_cluster(find_gpu("H100"), gpus_per_node=1)
    workload = job("llama3-8b", Method.lora, 8192)
    slow = TimeCalibration(
        efficiency={
            "H100-80GB": KernelEfficiency(
                matmul_fraction=0.355,
                flash_fraction=0.59,
                masked_fraction=0.15,
                memory_fraction=0.72,
            )
        }
    )
    base = estimate_time(workload, Strategy(zero_stage=2), cluster)
    slower = estimate_time(workload, Strategy(zero_stage=2), cluster, calibration=slow)
    assert slower.components["matmul"] > 1.9 * base.components["matmul"]


def test_a_run_has_hours_of_all_gpus_and_a_cost_where_there_is_a_price() -> None:
    cluster = default_cluster(find_gpu("H100"), num_nodes=2)
    run = run_estimate(126, 450.0, cluster, price_per_gpu_hour=3.0)
    assert run.gpu_hours == pytest.approx(2.0)  # 16 GPUs for an eighth of an hour
    assert run.cost == pytest.approx(6.0)
    assert run_estimate(1, 1.0, cluster).cost is None
