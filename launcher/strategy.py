"""The choices that a plan makes, as types: what to train and with which memory savings."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

ZeroStage = Literal[0, 1, 2, 3]
CommunicationType = Literal["fp16", "bf16", "fp32"]


class Method(StrEnum):
    """What is trained."""

    full = "full"
    lora = "lora"
    qlora = "qlora"


class Precision(StrEnum):
    """Number format of weights, activations and gradients."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"

    @property
    def bytes_per_element(self) -> int:
        """Bytes of one number."""
        return 4 if self is Precision.fp32 else 2


class Offload(StrEnum):
    """Where a model state lives between uses."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class Checkpointing(StrEnum):
    """Whether activations are recomputed, and where each layer's saved input lives."""

    none = "none"
    full = "full"
    cpu_offload = "cpu_offload"


class Attention(StrEnum):
    """Attention kernel.

    ``eager`` materialises the scores (s x s per head); the others never do:
    ``sdpa`` is torch's dispatch (FlashAttention-2 kernel on compute capability >= 8.0,
    else memory-efficient), ``flash_attention_2`` is the flash-attn package.
    """

    eager = "eager"
    sdpa = "sdpa"
    flash_attention_2 = "flash_attention_2"


class Loss(StrEnum):
    """How logits and cross-entropy are computed: all at once, in chunks, or fused by Liger."""

    full = "full"
    chunked = "chunked"
    liger = "liger"


LOSS_CHUNK_ELEMENTS = 2**25
"""Logits (tokens x vocabulary) that the chunked loss makes at a time: 128 MiB in fp32.

Smaller chunks leave a GPU idle in the output layer: 256 rows remain at a vocabulary of 131,072.
"""


class Optimizer(StrEnum):
    """AdamW variants; they differ in state bytes and in temporaries at the step.

    ``adamw`` has no temporaries (DeepSpeed FusedAdam, torch fused, DeepSpeedCPUAdam).
    """

    adamw = "adamw"
    adamw_foreach = "adamw_foreach"
    adamw_single = "adamw_single"
    adamw_8bit = "adamw_8bit"
    paged_adamw_8bit = "paged_adamw_8bit"

    @property
    def is_8bit(self) -> bool:
        """Whether it is bitsandbytes', with its states in 8 bits."""
        return self.endswith("8bit")


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroKnobs:
    """DeepSpeed ``zero_optimization`` keys that move memory; counts are elements, not bytes.

    Defaults are DeepSpeed's own (0.19.8 ``runtime/zero/config.py``). ``None`` for
    ``overlap_comm`` means DeepSpeed's rule: on for stage 3, off for the others.
    """

    reduce_bucket_size: int = 500_000_000
    allgather_bucket_size: int = 500_000_000
    overlap_comm: bool | None = None
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    sub_group_size: int = 1_000_000_000
    stage3_max_live_parameters: int = 1_000_000_000
    stage3_max_reuse_distance: int = 1_000_000_000
    stage3_prefetch_bucket_size: int = 50_000_000
    stage3_param_persistence_threshold: int = 100_000
    zero_hpz_partition_size: int = 1
    """Ranks, not elements: ZeRO++'s hpZ keeps a second copy of the parameters in each group."""
    communication_data_type: CommunicationType | None = None
    """Of gradients while they are reduced, a key outside ``zero_optimization``; ``None`` is the
    model's own precision."""
    pin_memory: bool = True

    def overlaps(self, zero_stage: ZeroStage) -> bool:
        """Return whether reductions overlap backward at this stage."""
        return zero_stage == 3 if self.overlap_comm is None else self.overlap_comm

    def copy_ranks(self, world_size: int) -> int:
        """Return among how many ranks hpZ's second copies are divided; 1: there are none."""
        return min(self.zero_hpz_partition_size, world_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """Everything a plan decides; with the workload and the cluster it fixes memory and time."""

    zero_stage: ZeroStage
    offload_optimizer: Offload = Offload.none
    offload_param: Offload = Offload.none
    gradient_checkpointing: Checkpointing = Checkpointing.none
    attention: Attention = Attention.sdpa
    loss: Loss = Loss.full
    optimizer: Optimizer = Optimizer.adamw
    micro_batch_size_per_gpu: int = 1
    gradient_accumulation_steps: int = 1
    sequence_parallel_size: int = 1
    grad_accum_dtype: Precision | None = None
    """``None`` is DeepSpeed's default: the model's own precision."""
    liger_kernels: bool = False
    """Liger RMSNorm, RoPE and SwiGLU in place of the eager modules."""
    expandable_segments: bool = True
    zero: ZeroKnobs = field(default_factory=ZeroKnobs)


def needs_bitsandbytes(method: Method, strategy: Strategy) -> bool:
    """Return whether weights or the optimizer's states are kept in 4 or 8 bits."""
    return method is Method.qlora or strategy.optimizer.is_8bit
