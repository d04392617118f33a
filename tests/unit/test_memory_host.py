"""Host memory, NVMe and checkpoint bytes."""

from __future__ import annotations

import pytest

from launcher.hardware import ClusterSpec, cpu_spec, default_cluster, find_gpu
from launcher.model_source import load_catalogue_entry
from launcher.model_spec import spec_from_config
from launcher.predict.calibration import CALIBRATION
from launcher.predict.host_memory import pinned_bytes
from launcher.predict.memory import MemoryEstimate, estimate_memory
from launcher.strategy import Checkpointing, Method, Offload, Strategy, ZeroKnobs, ZeroStage
from launcher.units import GB, GIB, MIB
from launcher.workload import LoraSpec, Workload

NUM_PARAMS = 6_738_415_616  # Llama-2-7B
UNPINNED = ZeroKnobs(reduce_bucket_size=4096**2, pin_memory=False)
PINNED = ZeroKnobs(reduce_bucket_size=4096**2)


def cluster() -> ClusterSpec:
    return default_cluster(find_gpu("A100-80GB"), gpus_per_node=8)


def estimate(
    stage: ZeroStage, *, optimizer: Offload, param: Offload = Offload.none, zero: ZeroKnobs
) -> MemoryEstimate:
    entry = load_catalogue_entry("llama2-7b")
    work = Workload(
        model=spec_from_config(entry.config, name="llama2-7b"),
        method=Method.full,
        max_seq_len=256,
        global_batch_size=8,
    )
    strategy = Strategy(
        zero_stage=stage, offload_optimizer=optimizer, offload_param=param, zero=zero
    )
    return estimate_memory(work, strategy, cluster())


def offloaded_per_rank_gb(found: MemoryEstimate) -> float:
    # The engine alone: without the processes, and without the weights that are saved.
    others = found.host_components["training processes"]
    others += found.host_components.get("trained weights to save", 0)
    return (found.host_bytes_per_node - others) / 8 / GB


@pytest.mark.parametrize(
    ("stage", "param", "engine_gb"),
    [(2, Offload.none, 15.43), (3, Offload.none, 15.17), (3, Offload.cpu, 18.54)],
)
def test_offloaded_bytes_before_rounding_match_the_engine(
    stage: ZeroStage, param: Offload, engine_gb: float
) -> None:
    # DeepSpeed's engine, Llama-2-7B on 8 ranks: 18 B per owned parameter, 22 with parameters.
    found = estimate(stage, optimizer=Offload.cpu, param=param, zero=UNPINNED)
    assert offloaded_per_rank_gb(found) == pytest.approx(engine_gb, rel=0.01)


@pytest.mark.parametrize(
    ("size", "expected"), [(1, 1), (3, 4), (4096, 4096), (3_370_000_000, 2**32)]
)
def test_pinned_buffers_take_the_next_power_of_two(size: int, expected: int) -> None:
    # torch's CachingHostAllocator: 3.37 GB becomes 4.29 GB.
    assert pinned_bytes(size) == expected


def test_pinning_the_offloaded_states_costs_its_rounding() -> None:
    # fp32 master and gradients 3.37 -> 4.29 GB each, bf16 parameters 1.68 -> 2.15 GB.
    pinned = estimate(2, optimizer=Offload.cpu, zero=PINNED)
    plain = estimate(2, optimizer=Offload.cpu, zero=UNPINNED)
    extra = offloaded_per_rank_gb(pinned) - offloaded_per_rank_gb(plain)
    assert extra == pytest.approx(2 * (4.295 - 3.369) + (2.147 - 1.685) + (0.268 - 0.262), rel=0.01)


def test_without_offload_each_rank_is_a_process_and_one_saves_file_by_file() -> None:
    found = estimate(2, optimizer=Offload.none, zero=PINNED)
    # Files of 2 GB (launcher/worker/weight_files.py).
    assert found.host_bytes_per_node == 8 * CALIBRATION.process_host_bytes + 2_000_000_000
    assert found.nvme_bytes_per_node == 0


def test_on_the_cpu_the_ranks_tensors_are_host_memory_too() -> None:
    # Measured, each of two ranks: 1,866 MiB resident with 981 MiB of tensors.
    entry = load_catalogue_entry("smollm2-135m")
    work = Workload(
        model=spec_from_config(entry.config, name="smollm2-135m"),
        method=Method.lora,
        max_seq_len=256,
        global_batch_size=2,
    )
    ranks = default_cluster(cpu_spec(64 * GIB), gpus_per_node=2)
    found = estimate_memory(work, Strategy(zero_stage=2), ranks)
    rest = found.host_bytes_per_node / 2 - found.peak_allocated_bytes
    assert rest / MIB == pytest.approx(1866 - 981, rel=0.01)


def test_nvme_holds_16_bytes_per_parameter_and_the_host_4_buffers_per_rank() -> None:
    # Sub-groups of 1e8 elements: 4 buffers x 4 B, each pinned buffer rounded to 2**29.
    zero = ZeroKnobs(sub_group_size=100_000_000)
    found = estimate(3, optimizer=Offload.nvme, zero=zero)
    assert found.nvme_bytes_per_node == pytest.approx(16 * NUM_PARAMS, rel=1e-6)
    assert found.host_components["NVMe optimizer buffers"] == 8 * 4 * 2**29


@pytest.mark.parametrize(("stage", "per_param"), [(2, 16), (3, 14)])
def test_a_checkpoint_holds_weights_master_and_both_moments(
    stage: ZeroStage, per_param: int
) -> None:
    # transformers' bf16 weights 2, DeepSpeed's fp32 master and moments 12, and below ZeRO-3
    # its own bf16 weights 2.
    found = estimate(stage, optimizer=Offload.none, zero=PINNED)
    assert found.checkpoint_bytes == per_param * NUM_PARAMS


def test_a_lora_checkpoint_leaves_out_the_frozen_base() -> None:
    # r 16 on q and v of Llama-2-7B: 2 x 32 x 16 x 8,192 parameters, 16 B each.
    entry = load_catalogue_entry("llama2-7b")
    work = Workload(
        model=spec_from_config(entry.config, name="llama2-7b"),
        method=Method.lora,
        max_seq_len=256,
        global_batch_size=8,
        lora=LoraSpec(r=16, target_modules=("q_proj", "v_proj")),
    )
    found = estimate_memory(work, Strategy(zero_stage=2), cluster())
    assert found.checkpoint_bytes == 16 * 2 * 32 * 16 * 8192


def test_checkpointed_inputs_move_to_pinned_host_memory() -> None:
    # 32 layers x 256 tokens x 4,096 x 2 B = 2**26 B a rank.
    entry = load_catalogue_entry("llama2-7b")
    work = Workload(
        model=spec_from_config(entry.config, name="llama2-7b"),
        method=Method.full,
        max_seq_len=256,
        global_batch_size=8,
    )
    strategy = Strategy(zero_stage=2, gradient_checkpointing=Checkpointing.cpu_offload)
    found = estimate_memory(work, strategy, cluster())
    assert found.host_components["checkpointed layer inputs"] == 8 * 2**26
    assert GIB > 8 * 2**26 / 8
