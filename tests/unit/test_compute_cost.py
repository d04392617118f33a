"""The work of a micro-step against hand calculation."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planning_inputs import cluster, model

from launcher.predict.compute_cost import MicroStepWork, micro_step_work
from launcher.predict.time_calibration import TimeCalibration
from launcher.strategy import Attention, Checkpointing, Loss, Method, Strategy
from launcher.workload import LoraSpec, QuantizationSpec, Workload

LINEAR_R16 = LoraSpec(r=16)


def job(name: str, method: Method, seq_len: int, lora: LoraSpec = LINEAR_R16) -> Workload:
    return Workload(
        model=model(name), method=method, max_seq_len=seq_len, global_batch_size=8, lora=lora
    )


def work_of(workload: Workload, strategy: Strategy) -> MicroStepWork:
    """On an H100."""
    return micro_step_work(workload, strategy, TimeCalibration(), gpu=cluster("H100").gpu)


def test_full_fine_tuning_does_six_flops_per_parameter_and_token() -> None:
    workload = job("llama2-7b", Method.full, 2048)
    work = work_of(workload, Strategy(zero_stage=2))
    # Every matrix but the input embedding: 6,738,415,616 - 131,072,000 - norms (65 x 4096).
    assert work.matmul_flops == 6 * (6_738_415_616 - 131_072_000 - 65 * 4096) * 2048
    # Causal: 4 x tokens x 1024 keys x 4096 x 32 layers, forward and 2.5 times that backward.
    assert work.attention_flops == 3.5 * 4 * 2048 * 1024 * 4096 * 32


def test_lora_saves_the_weight_gradients_of_frozen_matrices() -> None:
    frozen = job("llama2-7b", Method.lora, 2048, LoraSpec(r=1, target_modules=("q_proj",)))
    full = job("llama2-7b", Method.full, 2048)
    ratio = (
        work_of(frozen, Strategy(zero_stage=2)).matmul_flops
        / work_of(full, Strategy(zero_stage=2)).matmul_flops
    )
    assert ratio == pytest.approx(2 / 3, rel=1e-3)


def test_checkpointing_adds_one_forward_of_the_layers() -> None:
    workload = job("llama2-7b", Method.full, 2048)
    on, off = (
        work_of(workload, Strategy(zero_stage=2, gradient_checkpointing=mode))
        for mode in (Checkpointing.full, Checkpointing.none)
    )
    # 7 matrices a layer: 4 x 4096^2 + 3 x 4096 x 11008; the head is not recomputed.
    assert on.matmul_flops - off.matmul_flops == 2 * 32 * 202_375_168 * 2048
    assert on.model_flops == off.model_flops


def test_mixture_of_experts_computes_only_the_active_experts() -> None:
    work = work_of(job("mixtral-8x7b", Method.full, 1024), Strategy(zero_stage=2))
    # Mixtral's paper (arXiv:2401.04088) gives 12.9 billion active parameters; less the
    # embedding of 131 million and the norms.
    assert work.matmul_flops / 6 / 1024 == pytest.approx(12.75e9, rel=0.01)


def test_sliding_layers_see_at_most_their_window_with_flash_attention() -> None:
    workload = job("gemma3-1b", Method.full, 32768)
    strategy = Strategy(zero_stage=2, attention=Attention.flash_attention_2)
    windowed = work_of(workload, strategy)
    # 22 of 26 layers see 512 keys (508 on average), 4 see 16,384 on average.
    keys = 22 * (512 - 512**2 / 65536) + 4 * 16384
    assert windowed.attention_flops == pytest.approx(3.5 * 4 * 32768 * keys * 4 * 256)
    masked = work_of(workload, replace(strategy, attention=Attention.sdpa))
    assert masked.attention_flops > 5 * windowed.attention_flops
    assert masked.masked_attention_flops > 0


def test_chunked_loss_computes_the_logits_once_more() -> None:
    workload = job("llama3-8b", Method.lora, 2048)
    full, chunked = (
        work_of(workload, Strategy(zero_stage=2, loss=loss)) for loss in (Loss.full, Loss.chunked)
    )
    assert chunked.matmul_flops - full.matmul_flops == 2 * 128256 * 4096 * 2048


def test_chunked_losses_read_the_output_layer_for_every_chunk() -> None:
    workload = job("llama3-8b", Method.lora, 4096)
    full, chunked, liger = (
        work_of(workload, Strategy(zero_stage=2, loss=loss)).weight_bytes
        for loss in (Loss.full, Loss.chunked, Loss.liger)
    )
    head = 2 * 128256 * 4096
    # 4096 tokens x 128,256 logits in chunks of 2^25: 16 chunks, three reads; full: one, two reads.
    assert chunked - full == (3 * 16 - 2) * head
    # Liger: 128256 / 4096 rounds up to 32 parts of 128 tokens, two reads.
    assert liger - full == (2 * 32 - 2) * head


def test_int8_and_dropout_are_counted() -> None:
    nf4 = job("llama2-7b", Method.qlora, 2048)
    int8 = replace(nf4, quantization=QuantizationSpec(kind="int8"))
    dropped = replace(nf4, lora=LoraSpec(r=16, dropout=0.05))
    strategy = Strategy(zero_stage=2)
    base = work_of(nf4, strategy)
    # 0.48 bytes more per quantized parameter and pass.
    more = work_of(int8, strategy).weight_bytes - base.weight_bytes
    assert more == pytest.approx(2 * 0.48 * 32 * 202_375_168)
    assert work_of(dropped, strategy).elementwise_bytes > base.elementwise_bytes


def test_the_multi_query_falcon_computes_all_scores_in_fp32() -> None:
    # Its mask and single key head leave SDPA the plain products (attention_kernel.py): 1792
    # tokens meet 1792 keys in 71 heads of 64 and 32 layers, forward and twice that backward.
    strategy = Strategy(zero_stage=2)
    work = work_of(job("falcon-7b", Method.lora, 1792), strategy)
    assert work.fp32_attention_flops == 3 * 4 * 1792**2 * 71 * 64 * 32
    assert work.flash_attention_flops == work.masked_attention_flops == 0
    # transformers/attention.cpp: 38 bytes a score forward and 44 backward, counted by hand there.
    unmasked = work_of(job("llama2-7b", Method.lora, 1792), strategy)
    assert unmasked.fp32_attention_flops == 0
    more = replace(job("falcon-7b", Method.lora, 1792), max_seq_len=2 * 1792)
    doubled = work_of(more, strategy).elementwise_bytes - 2 * work.elementwise_bytes
    assert doubled == pytest.approx(2 * 82 * 1792**2 * 71 * 32)


def test_only_layers_with_a_sliding_window_need_its_mask() -> None:
    # Gemma-3-1B: 22 of 26 layers slide over 512 tokens; transformers makes a mask for them alone.
    work = work_of(job("gemma3-1b", Method.lora, 2048), Strategy(zero_stage=2))
    per_layer = 4 * 2048 * 2048 * 4 * 256 * 3.5
    assert work.masked_attention_flops == 22 * per_layer
    assert work.flash_attention_flops == 4 * per_layer / 2
