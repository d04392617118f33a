"""Load, init, optimizer step, checkpoint and evaluation: their fullest moments."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.predict.activations import ActivationTimeline
from launcher.predict.components import (
    ADAPTERS,
    BUCKETS,
    COPIES,
    DEQUANTIZED,
    FLAT_GRADIENTS,
    FP32_GRADIENTS,
    GATHERED,
    GRADIENTS,
    INPUTS,
    INT8_INPUTS,
    LOGITS,
    MASTER,
    NORM,
    OPTIMIZER,
    OVERFLOW,
    OWNED,
    PASSING,
    TEMPORARIES,
    Candidate,
    Components,
)
from launcher.predict.zero_runtime import ZeroRuntime
from launcher.strategy import Checkpointing, Optimizer, Precision


class RunPhases:
    """Candidate moments of the phases around the micro-steps, on one rank.

    Args:
        zero: the rank's ZeRO bookkeeping.
        acts: activations of a micro-batch, for evaluation.
        resident: what is alive all the time once training runs.
    """

    def __init__(self, zero: ZeroRuntime, acts: ActivationTimeline, resident: Components) -> None:
        self.zero = zero
        self.acts = acts
        self.resident = resident

    def load(self) -> Iterator[Candidate]:
        """Yield: the weights as loaded with the largest one on its way, then the adapters."""
        zero, counts = self.zero, self.zero.counts
        found = zero.model_bytes()
        found.pop(ADAPTERS, None)
        found[COPIES] = zero.copies_bytes(of_trained=zero.is_full, of_frozen=True)
        if counts.quantized:
            whole = {"weight before quantization": float(zero.width * counts.largest_in_layers)}
            if zero.stage == 3:
                whole["whole tensor before it is partitioned"] = counts.largest_in_bytes
            yield "output matrix on the device", {**found, **self._untied_head()}
        elif zero.stage == 3:
            whole = {"whole tensor before it is partitioned": counts.largest_in_bytes}
            whole |= self._untied_head()
            if zero.has_offloaded_params:
                cut = counts.largest_in_bytes / zero.world_size
                whole["partition on its way to the host"] = cut
        else:
            whole = self._untied_head()
        yield "weights on the device", {**found, **whole}
        if not zero.is_full:
            yield "adapters made", {**found, ADAPTERS: self._whole_adapter_bytes()}

    def _untied_head(self) -> Components:
        """Return the output matrix that was made before it was tied to the embedding.

        Pretrained weights are tied before they exist, except under ZeRO-3: zero.Init's
        parameters hold functions that hold them, so they wait for the garbage collector, which
        comes between init and the first step (H100, Llama-3.2-1B: 525 MB).
        """
        zero, counts = self.zero, self.zero.counts
        if not counts.is_head_tied or zero.has_offloaded_params:
            return {}
        is_born_tied = zero.stage != 3 or counts.quantized
        if is_born_tied and not zero.has_random_weights:
            return {}
        ranks = zero.world_size if zero.stage == 3 else 1
        return {"output matrix before it was tied": zero.width * counts.output / ranks}

    def _whole_adapter_bytes(self) -> float:
        """Return the adapters as PEFT makes them: of the base weight's type if it is a float's.

        Source: PEFT 0.21 ``tuners_utils.py:_move_adapter_to_device_of_base_layer``; the worker
        turns ``autocast_adapter_dtype`` off. int8 weights leave them fp32.
        """
        width = 4 if self.zero.is_int8 else self.zero.width
        return float(width * self.zero.counts.trainable)

    def init(self) -> Iterator[Candidate]:
        """Yield: what ``deepspeed.initialize`` allocates while it builds its partitions."""
        zero, part = self.zero, self.zero.partition
        model, offloaded = zero.model_bytes(), zero.has_offloaded_optimizer
        # hpZ's copies are made with the partitions, adapters' by the engine.
        model[COPIES] = zero.copies_bytes(of_trained=True, of_frozen=True)
        trained = float(zero.trained_width * zero.counts.trainable)
        if not zero.is_full:
            # Whole on every rank until the engine takes them.
            start = {**model, ADAPTERS: self._whole_adapter_bytes()}
            yield "engine start", start
        if zero.stage == 0:
            yield from self._stage_0_init(model, trained)
        elif zero.stage == 3:
            yield from self._stage_3_init(model)
        else:
            yield "flattening", {**model, "flat copy of the trained parameters": trained}
            if zero.has_fp32_stage_1:
                gradients = 4.0 * zero.counts.trainable
                yield "optimizer creation", {**model, MASTER: 4 * part, GRADIENTS: gradients}
            elif not offloaded:
                # fp32 master, then zeros of its size for the first gradient.
                yield (
                    "optimizer creation",
                    {**model, MASTER: 4 * part, "fp32 gradient partition": 4 * part},
                )
        yield "engine ready", model

    def _stage_3_init(self, model: Components) -> Iterator[Candidate]:
        zero, part = self.zero, self.zero.partition
        if zero.is_full:
            # Adapters are added in between, and the head is tied by then.
            model = {**model, **self._untied_head()}
        # Each trained tensor is brought together once, to link it with its master weights.
        is_linked = zero.is_full and zero.gathers
        whole = zero.counts.largest_in_bytes if is_linked else 0.0
        found = {**model, BUCKETS: float(zero.reduced_width * zero.bucket)}
        found["gathered tensor"] = whole
        if zero.has_offloaded_optimizer:
            # The rank's own part comes from the host first.
            parts = 1 / zero.world_size if zero.has_offloaded_params else 0.0
            yield "buckets", {**found, "gathered tensor": (1 + parts) * whole}
            return
        group = min(part, zero.strategy.zero.sub_group_size)
        yield (
            "optimizer creation",
            {**model, MASTER: 4 * part, "fp32 copy of a sub-group": 4 * group},
        )
        partitions = zero.accumulation_width * part
        yield "buckets", {**found, MASTER: 4 * part, "gradient partitions": partitions}

    def _stage_0_init(self, model: Components, trained: float) -> Iterator[Candidate]:
        zero, count = self.zero, self.zero.counts.trainable
        if zero.precision is Precision.fp32:
            return
        # FP16_UnfusedOptimizer runs one step on zeros, so the moments exist from the start. It
        # wraps every optimizer but DeepSpeed's own FusedAdam (engine.py), which is not used.
        found = {**model, OPTIMIZER: zero.optimizer_bytes(), GRADIENTS: trained}
        found[FP32_GRADIENTS] = 4.0 * count
        yield "optimizer creation", found

    def step(self) -> Iterator[Candidate]:
        """Yield: gradients made fp32, and the optimizer's own temporaries."""
        zero = self.zero
        found = dict(self.resident)
        found[COPIES] = zero.copies_bytes(of_trained=True, of_frozen=True)
        found[INPUTS] = self.acts.batch_bytes
        if not zero.is_full and zero.strategy.gradient_checkpointing is not Checkpointing.none:
            # Embeddings made to require a gradient are a leaf: both stay until the next forward.
            found["input embeddings and their gradient"] = 2 * self.acts.hidden_bytes
        found[INT8_INPUTS] = self.acts.int8_inputs_bytes
        if zero.has_offloaded_optimizer and zero.stage >= 1:
            yield "copy of updated parameters", found
        elif zero.stage == 0:
            yield from self._stage_0_step(found)
        elif zero.stage == 3:
            if zero.precision is Precision.fp16:
                # stage3.py:has_overflow: isinf is an absolute copy and its comparison.
                checked = (zero.accumulation_width + 1) * zero.partition
                yield "overflow check", {**found, OVERFLOW: checked}
            # stage3.py:get_grad_norm_direct makes a whole gradient fp64.
            norm = 8 * zero.counts.largest_trainable / zero.world_size
            yield "gradient norm", {**found, NORM: norm}
            group = min(zero.partition, zero.strategy.zero.sub_group_size)
            yield from self._partition_step(found, group)
        elif zero.has_fp32_stage_1:
            found[GRADIENTS] = float(zero.trained_width * zero.counts.trainable)
            yield "optimizer update", {**found, **self._temporaries(zero.partition)}
        else:
            yield from self._stage_1_2_step(found)

    def _stage_1_2_step(self, found: Components) -> Iterator[Candidate]:
        zero, part = self.zero, self.zero.partition
        norm = zero.norm_bytes(zero.counts.largest_trainable)
        if zero.has_compact_gradients:
            found[FP32_GRADIENTS] = 4 * part
            yield "gradient norm", {**found, NORM: norm}
            yield "optimizer update", {**found, **self._temporaries(part)}
            return
        owned = {**found, OWNED: zero.trained_width * zero.owned}
        yield "gradient norm", {**owned, NORM: norm}
        yield from self._partition_step(owned, part)

    def _partition_step(self, found: Components, elements: float) -> Iterator[Candidate]:
        """Yield: flat gradients and their fp32 cast, then the update with the cast alone."""
        width = self.zero.accumulation_width
        flat = {FP32_GRADIENTS if width == 4 else FLAT_GRADIENTS: float(width * elements)}
        cast = {FP32_GRADIENTS: 4 * elements}
        yield "gradients made fp32", {**found, **flat, **cast}
        yield "optimizer update", {**found, **cast, **self._temporaries(elements)}

    def _temporaries(self, elements: float) -> Components:
        return {TEMPORARIES: self._optimizer_temporaries(elements)}

    def _stage_0_step(self, found: Components) -> Iterator[Candidate]:
        zero, count = self.zero, self.zero.counts.trainable
        found[GRADIENTS] = float(zero.trained_width * count)
        if zero.precision is not Precision.fp32:
            found[FP32_GRADIENTS] = 4.0 * count
        yield "optimizer update", {**found, **self._temporaries(zero.counts.largest_trainable)}

    def _optimizer_temporaries(self, elements: float) -> float:
        """Return AdamW's temporaries; under ZeRO its one tensor is the whole partition.

        Source: torch 2.13 ``optim/adamw.py``: foreach keeps one list of square roots, the
        single-tensor loop two tensors of the parameter's size.
        """
        copies = {Optimizer.adamw_foreach: 1, Optimizer.adamw_single: 2}
        optimizer = self.zero.strategy.optimizer
        if optimizer is Optimizer.adamw_foreach and self.zero.stage == 0:
            elements = self.zero.counts.trainable
        return 4.0 * elements * copies.get(optimizer, 0)

    def save(self) -> Iterator[Candidate]:
        """Yield: what a checkpoint adds.

        ZeRO-3 gathers one trained tensor at a time (``worker/weight_files.py``), into a copy even
        on a single rank. ZeRO-1/2 keep all trained tensors in one storage, of which PEFT's
        ``save_pretrained`` clones every tensor.
        """
        zero, found = self.zero, dict(self.resident)
        found[INPUTS] = self.acts.batch_bytes
        if zero.stage == 3:
            # From the host, the rank's own part comes first.
            parts = 1 / zero.world_size if zero.has_offloaded_params else 0.0
            found[GATHERED] = (1 + parts) * zero.trained_width * zero.counts.largest_trainable
        elif zero.stage > 0 and not zero.is_full:
            found["adapters cloned to be saved"] = float(zero.width * zero.counts.trainable)
        yield "checkpoint", found

    def evaluate(self) -> Iterator[Candidate]:
        """Yield: forward without a graph, and the logits."""
        acts, found = self.acts, dict(self.resident)
        gathered = self.zero.gathered
        yield (
            "a layer's forward",
            {
                **found,
                GATHERED: max(gathered.forward),
                PASSING: acts.inference.passing_bytes + acts.hidden_bytes,
                DEQUANTIZED: acts.inference.weight_bytes,
            },
        )
        yield (
            "logits",
            {
                **found,
                GATHERED: gathered.loss,
                PASSING: acts.hidden_bytes,
                LOGITS: acts.evaluation_loss_bytes,
            },
        )
