"""The real DeepSpeed engine on this CPU as one of N ranks, its tensor bytes counted per phase."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import version
from typing import Any
from unittest.mock import patch

import torch

from launcher.errors import RecipeError, SetupError, list_problems
from launcher.strategy import Loss, Method, Offload, Strategy
from launcher.worker.model_facts import decoder_of
from launcher.worker.storage_tracker import LiveTensors, StorageTracker
from launcher.worker.trace_config import deepspeed_config, make_optimizer
from launcher.worker.trace_devices import AcceleratorName, DeviceBoundary
from launcher.worker.trace_model import (
    add_adapters,
    build_model,
    enable_checkpointing,
    scale_config,
    token_ids,
    use_loss,
)
from launcher.workload import Workload

PHASES = ("load", "init", "forward", "loss", "backward", "step")
_LISTED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTrace:
    """Peak bytes of one rank, scaled back to the full model.

    ``phases`` maps each name of :data:`PHASES` to the highest bytes alive in it over all
    steps; ``live_at_peak`` lists the largest groups alive at the highest of them, in bytes of
    the full model but with the shapes of the scaled one.
    """

    phases: Mapping[str, int]
    resident_bytes: int
    """Device bytes between two optimizer steps."""
    host_bytes: int
    """Highest host bytes of the rank, before any rounding by the pinned allocator."""
    peak_phase: str
    live_at_peak: tuple[LiveTensors, ...]
    num_params: int
    num_trainable_params: int
    optimizer_class: str
    versions: Mapping[str, str]

    @property
    def peak_bytes(self) -> int:
        """Highest bytes of the phases of a training step."""
        return max(self.phases[name] for name in PHASES[2:])


def trace_engine(
    workload: Workload,
    strategy: Strategy,
    *,
    hf_config: Mapping[str, Any],
    world_size: int,
    rank: int = 0,
    scale: int = 16,
    num_steps: int = 2,
    raw_deepspeed: Mapping[str, Any] | None = None,
) -> EngineTrace:
    """Run a few steps of DeepSpeed as one rank of a fake process group and count bytes.

    Call it once in a fresh process: it sets the process's distributed state and environment.
    CUDA streams do not exist here, so buffers that a GPU frees late are not seen, nor are
    scratch buffers inside kernels.

    Args:
        workload: the model, method and sequence length to trace.
        strategy: every choice of a plan.
        hf_config: the model's config.json, of which ``workload.model`` was made.
        world_size: ranks of the pretended job.
        rank: which of them this process is; ZeRO-3 works for rank 0 alone.
        scale: divisor of widths and sequence length; bytes shrink by its square.
        num_steps: optimizer steps; ZeRO-3 prefetches from the second one on.
        raw_deepspeed: the recipe's raw keys; those of the strategy are taken from there.

    Returns:
        Bytes of the full model on that rank.

    Raises:
        RecipeError: the strategy cannot be traced on a CPU; all reasons at once.
        ModelError: a width is not divisible by ``scale``.
        SetupError: the process already takes part in a distributed job.
    """
    # DeepSpeed imports it in mid-flight, and it cannot be imported under a function mode.
    import_module("torch._dynamo")
    _check(workload, strategy, world_size=world_size, rank=rank, scale=scale)
    config = scale_config(hf_config, scale=scale)
    tracker = StorageTracker()
    boundary = DeviceBoundary(tracker)
    run = _Run(workload, strategy, scale=scale, tracker=tracker, raw_deepspeed=raw_deepspeed or {})
    with ExitStack() as stack:
        stack.enter_context(fake_rank(rank, world_size))
        stack.enter_context(_two_memories(tracker))
        stack.enter_context(_scaled_constants(strategy, scale=scale))
        stack.enter_context(tracker)
        stack.enter_context(boundary)
        run.load(config)
        boundary.default_side = "host"
        run.initialize()
        boundary.default_side = "device"
        for _ in range(num_steps * strategy.gradient_accumulation_steps):
            run.micro_step(vocab_size=int(config["vocab_size"]))
        return run.result()


class _Run:
    """One traced training run; holds the engine between phases."""

    def __init__(
        self,
        workload: Workload,
        strategy: Strategy,
        *,
        scale: int,
        tracker: StorageTracker,
        raw_deepspeed: Mapping[str, Any],
    ) -> None:
        self._workload, self._strategy, self._scale = workload, strategy, scale
        self._tracker = tracker
        self._ds_config = deepspeed_config(
            workload, strategy, scale=scale, raw_deepspeed=raw_deepspeed
        )
        self._phases: dict[str, int] = {}
        self._highest = 0
        self._live: tuple[LiveTensors, ...] = ()
        self._peak_phase = "load"
        self._model: Any = None
        self._decoder: Any = None
        self._engine: Any = None

    def load(self, config: Mapping[str, Any]) -> None:
        """Build the model, partitioned at birth under ZeRO-3."""
        import deepspeed

        self._begin("load")
        workload = self._workload
        is_partitioned = self._strategy.zero_stage == 3
        birth = deepspeed.zero.Init(config_dict_or_path=self._ds_config) if is_partitioned else None
        with birth or nullcontext():
            base: Any = build_model(
                config, self._strategy, precision=workload.precision, scale=self._scale
            )
        self._decoder = decoder_of(base)
        tokens = self._strategy.micro_batch_size_per_gpu * workload.max_seq_len // self._scale
        use_loss(base, self._strategy.loss, max_tokens=tokens, scale=self._scale)
        is_lora = workload.method is Method.lora
        self._model = add_adapters(base, workload.lora, scale=self._scale) if is_lora else base
        enable_checkpointing(base, self._strategy.gradient_checkpointing)
        self._end("load")

    def initialize(self) -> None:
        """Hand the model to DeepSpeed and register the phase borders."""
        import deepspeed

        self._begin("init")
        trainable = [p for p in self._model.parameters() if p.requires_grad]
        self._engine, *_ = deepspeed.initialize(
            model=self._model,
            optimizer=make_optimizer(trainable, self._strategy),
            config=self._ds_config,
        )
        self._end("init")
        self._decoder.register_forward_hook(self._after_decoder)

    def micro_step(self, *, vocab_size: int) -> None:
        """Run forward, loss, backward and step on one micro-batch."""
        batch = self._strategy.micro_batch_size_per_gpu
        ids = token_ids(vocab_size, batch=batch, tokens=self._workload.max_seq_len // self._scale)
        mask = torch.ones_like(ids) if self._workload.has_padding else None
        if mask is not None:
            mask[0, -1] = 0
        self._begin("forward")
        loss = self._engine(input_ids=ids, labels=ids, attention_mask=mask).loss
        self._engine.backward(loss)
        del loss
        self._end(self._tracker.tag)
        self._begin("step")
        self._engine.step()
        self._end("step")

    def result(self) -> EngineTrace:
        """Return the peaks, multiplied back to the full model."""
        if self._engine.skipped_steps:
            raise RuntimeError("DeepSpeed skipped a step: no optimizer states were made")
        factor = self._scale**2
        params = list(self._model.parameters())
        trainable = [p for p in params if p.requires_grad]
        return EngineTrace(
            phases={name: num_bytes * factor for name, num_bytes in self._phases.items()},
            resident_bytes=self._tracker.current_bytes * factor,
            host_bytes=self._tracker.peak_host_bytes * factor,
            peak_phase=self._peak_phase,
            live_at_peak=tuple(
                replace(group, num_bytes=group.num_bytes * factor) for group in self._live
            ),
            num_params=sum(full_size(p, scale=self._scale) for p in params),
            num_trainable_params=sum(full_size(p, scale=self._scale) for p in trainable),
            optimizer_class=type(self._engine.optimizer).__name__,
            versions={name: version(name) for name in ("deepspeed", "torch", "transformers")},
        )

    def _begin(self, phase: str) -> None:
        self._tracker.tag = phase
        self._tracker.reset_peak()

    def _end(self, phase: str) -> None:
        peak = self._tracker.peak_bytes
        self._phases[phase] = max(self._phases.get(phase, 0), peak)
        if phase in PHASES[2:] and peak > self._highest:
            self._highest, self._peak_phase = peak, phase
            self._live = self._tracker.live_at_peak()[:_LISTED]

    def _after_decoder(self, _module: torch.nn.Module, _args: Any, output: Any) -> None:
        hidden = output[0]
        self._end("forward")
        self._begin("loss")
        hidden.register_hook(self._after_head)

    def _after_head(self, _gradient: torch.Tensor) -> None:
        self._end("loss")
        self._begin("backward")


def full_size(param: Any, *, scale: int) -> int:
    """Return a scaled parameter's number of elements in the full model."""
    shape: tuple[int, ...] = tuple(getattr(param, "ds_shape", param.shape))
    return math.prod(shape) * scale ** (1 if len(shape) == 1 else 2)


def _check(
    workload: Workload, strategy: Strategy, *, world_size: int, rank: int, scale: int
) -> None:
    lora = workload.method is Method.lora
    problems = [
        text
        for is_wrong, text in (
            (workload.method is Method.qlora, "QLoRA needs bitsandbytes' CUDA kernels"),
            (
                workload.model.num_experts > 0 and scale != 1,
                "experts do not scale with the widths: use --scale 1",
            ),
            (strategy.offload_optimizer is Offload.nvme, "NVMe offload is not traced"),
            (strategy.offload_param is Offload.nvme, "NVMe offload is not traced"),
            (strategy.sequence_parallel_size > 1, "sequence parallelism is not traced"),
            (strategy.liger_kernels, "Liger's kernels need a GPU"),
            (strategy.loss is Loss.liger, "Liger's fused loss needs a GPU"),
            (
                strategy.optimizer.is_8bit,
                f"{strategy.optimizer} needs bitsandbytes' CUDA kernels",
            ),
            (strategy.zero_stage == 3 and rank != 0, "ZeRO-3 can be traced for rank 0 alone"),
            (not 0 <= rank < world_size, f"rank {rank} is outside 0..{world_size - 1}"),
            (
                workload.max_seq_len % scale != 0,
                f"max_seq_len {workload.max_seq_len} is no multiple of the scale {scale}",
            ),
            (
                lora and workload.lora.r % scale != 0,
                f"lora.r {workload.lora.r} is no multiple of the scale {scale}",
            ),
        )
        if is_wrong
    ]
    if problems:
        raise RecipeError(
            list_problems(problems),
            where="trace",
            fix="trace another strategy, rank or --scale, or use the plan's closed form",
        )
    if torch.distributed.is_initialized():
        raise SetupError(
            "this process already takes part in a distributed job",
            where="trace",
            fix="run `python -m launcher.worker.trace` in a process of its own",
        )


@contextmanager
def fake_rank(rank: int, world_size: int) -> Iterator[None]:
    """Make this process one rank of a process group that communicates with nobody."""
    os.environ.update(
        DS_ACCELERATOR="cpu",
        RANK=str(rank),
        LOCAL_RANK="0",
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        CROSS_RANK="0",
        CROSS_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29500",  # named in the environment, never opened
    )
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=rank, world_size=world_size
    )
    # Shared-memory collectives wait for the other ranks, which do not exist.
    no_op = patch.object(import_module("deepspeed.comm.torch"), "build_shm_op", lambda: None)
    try:
        with no_op:
            yield
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def _two_memories(tracker: StorageTracker) -> Iterator[None]:
    """Give DeepSpeed's CPU accelerator a name of its own, so that "cpu" means the host."""
    from deepspeed.accelerator import get_accelerator

    accelerator = type(get_accelerator())
    with (
        patch.object(accelerator, "device_name", lambda *_: AcceleratorName("cpu")),
        patch.object(accelerator, "current_device_name", lambda _: AcceleratorName("cpu")),
        patch.object(accelerator, "on_accelerator", lambda _, t: not tracker.is_on_host(t)),
        patch.object(accelerator, "is_fp16_supported", lambda _: True),
    ):
        yield


@contextmanager
def _scaled_constants(strategy: Strategy, *, scale: int) -> Iterator[None]:
    """Scale the sizes that DeepSpeed has no key for, and keep the right tensors persistent."""
    from deepspeed.runtime.engine import MEMORY_OPT_ALLREDUCE_SIZE, DeepSpeedEngine
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    threshold = strategy.zero.stage3_param_persistence_threshold

    def mark_persistent(offload: Any, *_: Any) -> list[Any]:
        # Norms shrink by the scale, matrices by its square: compare sizes of the full model.
        small = [p for p in offload.module.parameters() if full_size(p, scale=scale) <= threshold]
        for param in small:
            param.ds_persist = True
        return small

    reduce_all, bucket = DeepSpeedEngine.allreduce_gradients, MEMORY_OPT_ALLREDUCE_SIZE // scale**2
    with (
        patch.object(DeepSpeedEngine, "allreduce_gradients", lambda e: reduce_all(e, bucket)),
        patch.object(DeepSpeedZeRoOffload, "mark_persistent_parameters", mark_persistent),
    ):
        yield
