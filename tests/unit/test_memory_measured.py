"""Predicted bytes beside those of plain DeepSpeed runs on GPUs.

DeepSpeed 0.19.8, transformers 5.17 and PEFT 0.21 without any zerofit code: random weights, bf16,
AdamW, 5 steps, expandable segments, on one H100-80GB or two H200. DeepSpeed's default buckets
of 5e8, two of them under ZeRO-2 (overlap_comm); LoRA r 64 on q, k, v, o. GB = 1e9.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from launcher.hardware import default_cluster, find_gpu
from launcher.model_source import load_catalogue_entry
from launcher.model_spec import spec_from_config
from launcher.predict.memory import MemoryEstimate, estimate_memory
from launcher.strategy import Checkpointing, Loss, Method, Offload, Strategy, ZeroKnobs, ZeroStage
from launcher.units import GB
from launcher.workload import LoraSpec, Workload

ATTENTION = LoraSpec(r=64, target_modules=("q_proj", "k_proj", "v_proj", "o_proj"))


@dataclass(frozen=True, kw_only=True)
class Run:
    """One measured run."""

    model: str
    stage: ZeroStage
    method: Method
    tokens: int
    allocated_gb: float
    reserved_gb: float
    after_step_gb: float
    nvidia_smi_gb: float
    micro_batch: int = 1
    is_recomputed: bool = True
    is_offloaded: bool = False
    has_liger: bool = False
    num_gpus: int = 1

    def __str__(self) -> str:
        return f"{self.model}-zero{self.stage}-{self.method}-{self.tokens}x{self.micro_batch}"

    def estimate(self) -> MemoryEstimate:
        offload = Offload.cpu if self.is_offloaded else Offload.none
        strategy = Strategy(
            zero_stage=self.stage,
            offload_optimizer=offload,
            offload_param=offload,
            gradient_checkpointing=(
                Checkpointing.full if self.is_recomputed else Checkpointing.none
            ),
            micro_batch_size_per_gpu=self.micro_batch,
            loss=Loss.liger if self.has_liger else Loss.full,
            liger_kernels=self.has_liger,
            zero=ZeroKnobs(overlap_comm=True if self.stage == 2 else None),
        )
        workload = Workload(
            model=spec_from_config(load_catalogue_entry(self.model).config, name=self.model),
            method=self.method,
            max_seq_len=self.tokens,
            global_batch_size=self.micro_batch * self.num_gpus,
            lora=ATTENTION,
        )
        gpu = find_gpu("H100-80GB" if self.num_gpus == 1 else "H200")
        return estimate_memory(
            workload, strategy, default_cluster(gpu, gpus_per_node=self.num_gpus)
        )


LLAMA_2, LLAMA_3 = "llama2-7b", "llama3-8b"
RUNS = (
    Run(
        model=LLAMA_2, stage=2, method=Method.lora, tokens=256, is_recomputed=False,
        allocated_gb=17.62, reserved_gb=17.79, after_step_gb=14.48, nvidia_smi_gb=19.60,
    ),
    Run(
        model=LLAMA_2, stage=2, method=Method.lora, tokens=2048, is_recomputed=False,
        allocated_gb=25.60, reserved_gb=25.80, after_step_gb=14.48, nvidia_smi_gb=27.61,
    ),
    Run(
        model=LLAMA_2, stage=2, method=Method.lora, tokens=2048,
        allocated_gb=17.44, reserved_gb=17.69, after_step_gb=14.52, nvidia_smi_gb=19.49,
    ),
    Run(
        model=LLAMA_2, stage=2, method=Method.qlora, tokens=2048,
        allocated_gb=7.87, reserved_gb=8.23, after_step_gb=4.91, nvidia_smi_gb=10.04,
    ),
    Run(
        model=LLAMA_2, stage=3, method=Method.lora, tokens=2048, is_offloaded=True,
        allocated_gb=4.47, reserved_gb=5.38, after_step_gb=1.10, nvidia_smi_gb=6.81,
    ),
    Run(
        model=LLAMA_2, stage=2, method=Method.lora, tokens=8192, micro_batch=2,
        allocated_gb=25.34, reserved_gb=27.22, after_step_gb=14.75, nvidia_smi_gb=29.03,
    ),
    Run(
        model=LLAMA_3, stage=2, method=Method.lora, tokens=4096,
        allocated_gb=24.34, reserved_gb=25.74, after_step_gb=16.96, nvidia_smi_gb=27.55,
    ),
    Run(
        model=LLAMA_3, stage=2, method=Method.lora, tokens=4096, has_liger=True,
        allocated_gb=20.51, reserved_gb=20.73, after_step_gb=16.96, nvidia_smi_gb=22.54,
    ),
    Run(
        model=LLAMA_2, stage=1, method=Method.full, tokens=256, is_recomputed=False, num_gpus=2,
        allocated_gb=80.96, reserved_gb=83.72, after_step_gb=53.97, nvidia_smi_gb=85.01,
    ),
    Run(
        model=LLAMA_2, stage=3, method=Method.full, tokens=256, is_recomputed=False, num_gpus=2,
        allocated_gb=61.00, reserved_gb=69.19, after_step_gb=54.98, nvidia_smi_gb=70.99,
    ),
    Run(
        model=LLAMA_2, stage=3, method=Method.lora, tokens=2048, num_gpus=2,
        allocated_gb=11.74, reserved_gb=13.09, after_step_gb=8.38, nvidia_smi_gb=14.97,
    ),
)  # fmt: skip


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_peak_allocated_is_within_2_percent_of_the_gpu(run: Run) -> None:
    # The runs reset torch's counters after initialization: forward to step only.
    phases = [run.estimate().phase(name) for name in ("forward", "loss", "backward", "step")]
    peak = max(phase.allocated_bytes for phase in phases)
    assert peak / GB == pytest.approx(run.allocated_gb, rel=0.02)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_peak_reserved_and_nvidia_smi_are_6_percent_too_low_or_9_too_high_at_most(
    run: Run,
) -> None:
    # DeepSpeed's default bucket of 1 GB leaves a smaller hole than zerofit's buckets do, and
    # these runs had 0.5 to 1 GB less beside torch than zerofit's worker has.
    estimate = run.estimate()
    assert 0.94 <= estimate.peak_reserved_bytes / GB / run.reserved_gb <= 1.08
    assert 0.94 <= estimate.device_used_bytes / GB / run.nvidia_smi_gb <= 1.09


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_bytes_between_steps_are_within_1_percent_of_the_gpu(run: Run) -> None:
    estimate = run.estimate()
    step = estimate.phase("step").components
    kept = dict(estimate.phase("save").components)
    for passing in (
        "gathered parameters (ZeRO-3)",
        "batch, positions and attention mask",
        "adapters cloned to be saved",
    ):
        kept.pop(passing, None)
    leaf = step.get("input embeddings and their gradient", 0)
    assert (sum(kept.values()) + leaf) / GB == pytest.approx(run.after_step_gb, rel=0.01)
