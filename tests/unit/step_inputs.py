"""Workloads whose steps are timed, and steps that were measured."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.hardware import ClusterSpec, default_cluster, find_gpu
from launcher.model_source import load_catalogue_entry
from launcher.model_spec import ModelSpec, spec_from_config
from launcher.strategy import (
    Checkpointing,
    Loss,
    Method,
    Offload,
    Strategy,
)
from launcher.workload import LoraSpec, Workload

ATTENTION_R64 = LoraSpec(r=64, target_modules=("attention",))
LINEAR_R16 = LoraSpec(r=16)


def model(name: str) -> ModelSpec:
    return spec_from_config(load_catalogue_entry(name).config, name=name)


def job(name: str, method: Method, seq_len: int, lora: LoraSpec = LINEAR_R16) -> Workload:
    return Workload(
        model=model(name), method=method, max_seq_len=seq_len, global_batch_size=8, lora=lora
    )


@dataclass(frozen=True, kw_only=True)
class Run:
    """A measured run: seconds of one micro-step (accumulation 1)."""

    name: str
    seconds: float
    model: str = "llama2-7b"
    method: Method = Method.lora
    seq_len: int = 2048
    micro_batch: int = 1
    zero_stage: int = 2
    checkpointing: bool = True
    lora: LoraSpec = ATTENTION_R64
    liger: bool = False
    offload: bool = False
    gpu: str = "H100"
    num_gpus: int = 1

    def inputs(self) -> tuple[Workload, Strategy, ClusterSpec]:
        offload = Offload.cpu if self.offload else Offload.none
        strategy = Strategy(
            zero_stage=self.zero_stage,  # type: ignore[arg-type]
            offload_optimizer=offload,
            offload_param=offload,
            gradient_checkpointing=Checkpointing.full if self.checkpointing else Checkpointing.none,
            loss=Loss.liger if self.liger else Loss.full,
            liger_kernels=self.liger,
            micro_batch_size_per_gpu=self.micro_batch,
        )
        workload = job(self.model, self.method, self.seq_len, self.lora)
        return workload, strategy, default_cluster(find_gpu(self.gpu), gpus_per_node=self.num_gpus)


# Plain DeepSpeed 0.19, transformers 5 and PEFT, bf16, random weights, five steps, on one
# H100-80GB or two H200 (rented hosts of 16 cores per GPU); r64 on q, k, v, o, and below r16 on
# every linear layer of the Llama-3-8B shape, where the readings were tokens per second.
MEASURED = (
    Run(name="256 tokens", seconds=0.196, seq_len=256, checkpointing=False),
    Run(name="2048 tokens", seconds=0.213, checkpointing=False),
    Run(name="checkpointing", seconds=0.445),
    Run(name="QLoRA", seconds=0.523, method=Method.qlora),
    Run(name="ZeRO-3, all offloaded", seconds=2.090, zero_stage=3, offload=True),
    Run(name="2 x 8192 tokens", seconds=1.901, seq_len=8192, micro_batch=2),
    Run(name="8B, 4096", seconds=0.503, model="llama3-8b", seq_len=4096),
    Run(name="8B, 4096, Liger", seconds=0.419, model="llama3-8b", seq_len=4096, liger=True),
    *(
        Run(
            name=f"full, ZeRO-{stage}, 2 x H200",
            seconds=seconds,
            method=Method.full,
            seq_len=256,
            zero_stage=stage,
            checkpointing=False,
            gpu="H200",
            num_gpus=2,
        )
        for stage, seconds in ((1, 0.245), (3, 0.612))
    ),
    Run(name="ZeRO-3 LoRA, 2 x H200", seconds=1.377, zero_stage=3, gpu="H200", num_gpus=2),
    *(
        Run(
            name=f"8B r16 all-linear: {name}",
            seconds=batch * 4096 / tokens_per_second,
            model="llama3-8b",
            method=method,
            seq_len=4096,
            micro_batch=batch,
            checkpointing=checkpointing,
            lora=LINEAR_R16,
            liger=liger,
        )
        for name, tokens_per_second, method, batch, checkpointing, liger in (
            ("checkpointing", 6618, Method.lora, 1, True, False),
            ("checkpointing, Liger", 7785, Method.lora, 1, True, True),
            ("Liger", 11057, Method.lora, 1, False, True),
            ("Liger, batch 2", 12489, Method.lora, 2, False, True),
            ("checkpointing, Liger, batch 4", 9592, Method.lora, 4, True, True),
            ("QLoRA, batch 4", 9345, Method.qlora, 4, True, True),
        )
    ),
    Run(
        name="65,536 tokens",
        seconds=65536 / 4351,
        model="llama3-8b",
        seq_len=65536,
        lora=LINEAR_R16,
        liger=True,
    ),
)
