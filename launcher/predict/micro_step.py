"""Forward, loss and backward: the moments of one micro-step that can be its fullest."""

from __future__ import annotations

import math
from collections.abc import Iterator

from launcher.predict.activations import ActivationTimeline, LayerMoment
from launcher.predict.components import (
    BUCKETS,
    CARRIED,
    DEQUANTIZED,
    GATHERED,
    GRADIENTS,
    INT8_INPUTS,
    LEAVING,
    LOGITS,
    NORM,
    OPTIMIZER,
    OWNED,
    PASSING,
    PENDING,
    RECOMPUTED,
    REDUCTION,
    SAVED,
    WORKSPACE,
    Candidate,
    Components,
)
from launcher.predict.output_layer import LossMoment
from launcher.predict.zero_runtime import ZeroRuntime
from launcher.strategy import Loss


class MicroStep:
    """Candidate moments of one micro-step on one rank.

    Args:
        zero: the rank's ZeRO bookkeeping.
        acts: activations of the micro-batch.
        resident: what is alive all the time, carried gradients included.
    """

    def __init__(self, zero: ZeroRuntime, acts: ActivationTimeline, resident: Components) -> None:
        self.zero = zero
        self.acts = acts
        self.resident = resident
        self.buckets = zero.bucket_bytes()
        self.reduces = zero.reduces_in_backward
        self.width, self.bucket = zero.trained_width, zero.bucket
        self.carries = CARRIED in resident
        tied = zero.counts.embedding if zero.counts.is_head_tied else 0
        self.tied_head_bytes = float(zero.trained_width * tied)

    def _base(self) -> Components:
        found = dict(self.resident)
        if self.acts.is_recomputed:
            found[INT8_INPUTS] = self.acts.int8_inputs_bytes
        return found

    def forward(self) -> Iterator[Candidate]:
        """Yield: the last layer's forward, the one with most gathered, and the norm after them."""
        acts, found = self.acts, self._base()
        # The embeddings are named to the end; checkpointing saves them, as the first input.
        is_saved = acts.is_recomputed and not acts.is_on_host
        named = 0.0 if is_saved else acts.hidden_bytes
        own = acts.hidden_bytes if acts.is_on_host else 0.0
        found[PASSING] = acts.forward.passing_bytes + named + own
        found[DEQUANTIZED] = acts.forward.weight_bytes
        gathered = self.zero.gathered.forward
        # Where most is gathered need not be where most is saved.
        for index in {gathered.index(max(gathered)), acts.num_layers - 1}:
            others = index + 1 if acts.is_recomputed else index
            saved = max(0.0, acts.layer_saved_bytes * others - acts.first_layer_discount_bytes)
            found = {**found, SAVED: saved + acts.forward.saved_bytes}
            found[GATHERED] = gathered[index if self.zero.gathers else 0]
            yield f"layer {index + 1}, {acts.forward.name}", found
        norm = acts.final_norm_forward
        found = {**found, DEQUANTIZED: 0.0, SAVED: acts.saved_bytes + norm.saved_bytes}
        found[GATHERED] = gathered[-1]
        found[PASSING] = acts.hidden_bytes + norm.passing_bytes + named
        yield f"final norm, {norm.name}", found

    def loss(self) -> Iterator[Candidate]:
        """Yield: logits, cross-entropy and the output layer's backward."""
        for moment in self.acts.loss:
            yield moment.name, self._loss_components(moment)
        yield from self._first_fused_loss()

    def _first_fused_loss(self) -> Iterator[Candidate]:
        """Yield: the output matrix that one rank's first step brings together beside its own.

        The fused loss reads it outside its module; from the second step on it is fetched with the
        whole model, and of one rank's fetch nothing is copied. Adam's moments, and the handle of
        autograd's thread, do not exist yet (H100, Qwen3-0.6B: 0.28 GB above later steps).

        Source: DeepSpeed 0.19.8 ``parameter_offload.py:ZeROOrderedDict.__getitem__``,
        ``partition_parameters.py:_allgather_params_sequential``.
        """
        zero = self.zero
        if zero.strategy.loss is not Loss.liger or zero.stage != 3 or zero.world_size > 1:
            return
        if zero.has_offloaded_params:
            return  # gathered from the host in every step
        found = self._loss_components(self.acts.loss[0])
        found[GATHERED] = float(zero.width * zero.counts.output)
        found[WORKSPACE] = found.get(WORKSPACE, 0.0) / 2
        if not zero.has_offloaded_optimizer:
            found[OPTIMIZER] -= zero.moment_bytes() * zero.partition
        yield "fused cross-entropy of the first step", found

    def _loss_components(self, moment: LossMoment) -> Components:
        acts, zero = self.acts, self.zero
        found = self._base()
        found[SAVED] = acts.saved_bytes + acts.norm_saved_bytes + acts.kept_embeddings_bytes
        found[LOGITS] = moment.logits_bytes
        found[PASSING] = moment.hidden_bytes
        found[GATHERED] = zero.gathered.loss
        if moment.head_gradients:
            size = zero.counts.head or zero.counts.embedding
            found[PENDING] = float(zero.trained_width * size * moment.head_gradients)
            if moment.is_head_done and zero.counts.head:
                found[BUCKETS] = max(found.get(BUCKETS, 0.0), self.buckets)
        return found

    def backward(self) -> Iterator[Candidate]:
        """Yield: first and second layer of backward, reductions, the last layer, the ends."""
        acts, zero = self.acts, self.zero
        layers, counts = acts.num_layers, zero.counts
        per_layer = counts.trainable - counts.head - counts.embedding
        per_layer = per_layer // layers
        yield from self._head_reduction()
        yield from self._final_norm()
        kept = acts.layer_saved_bytes
        own_input = 1 if acts.is_recomputed else 0
        crossing = self._layers_to_first_crossing(per_layer)
        places = [("first layer of backward", 0, counts.head, crossing == 0)]
        if layers > 1:
            done = counts.head + per_layer
            places.append(("second layer of backward", 1, done, crossing in {0, 1}))
        if crossing is not None and 1 < crossing < layers:
            done = counts.head + crossing * per_layer
            places.append((f"layer {crossing + 1} of backward", crossing, done, True))
        filling = self._layers_to_first_full_bucket(per_layer)
        if filling is not None and 1 < filling < layers - 1:
            done = counts.head + filling * per_layer
            places.append((f"layer {filling + 1} of backward", filling, done, False))
        if layers > 2:
            done = counts.trainable - counts.embedding - per_layer
            places.append(("last layer of backward", layers - 1, done, True))
        for place, index, done, crosses in places:
            others = max(0, layers - 1 - index) + own_input
            saved = max(0.0, kept * others - acts.first_layer_discount_bytes)
            if acts.is_recomputed and kept == 0.0:
                # Fetched back from the host.
                saved = acts.hidden_bytes + acts.kept_embeddings_bytes
            moment, gradients = self._fullest_moment(
                done=done, is_first=index == 0, crosses=crosses
            )
            found = {**self._base(), SAVED: saved, **gradients}
            name = RECOMPUTED if acts.is_recomputed else SAVED
            found[name] = found.get(name, 0.0) + moment.saved_bytes
            found[PASSING] = moment.passing_bytes
            found[DEQUANTIZED] = moment.weight_bytes
            found[GATHERED] = zero.gathered.backward[index if zero.gathers else 0]
            yield f"{place}, {moment.name}", found
        yield from self._ends()

    def _final_norm(self) -> Iterator[Candidate]:
        """Yield: the backward of the norm after the last layer; every layer is still saved."""
        acts, zero, moment = self.acts, self.zero, self.acts.final_norm_backward
        found = self._base()
        found[SAVED] = acts.saved_bytes + moment.saved_bytes + acts.kept_embeddings_bytes
        found[PASSING] = moment.passing_bytes
        found[GATHERED] = zero.gathered.turn
        found |= self._gradients(moment, done=zero.counts.head, is_first=True, crosses=False)
        yield f"final norm, {moment.name}", found

    def _layers_to_first_crossing(self, per_layer: int) -> int | None:
        """Return after how many layers a bucket first holds gradients of two owners."""
        zero = self.zero
        if not self.reduces or per_layer == 0:
            return None
        if zero.stage == 3:
            distance = float(zero.bucket)
        elif zero.world_size == 1:
            return None
        else:
            distance = math.ceil(zero.partition / zero.bucket) * zero.bucket
        if zero.counts.trainable <= max(zero.bucket, zero.counts.head):
            return None
        return int(max(0.0, distance - zero.counts.head) // per_layer)

    def _layers_to_first_full_bucket(self, per_layer: int) -> int | None:
        """Return after how many layers ZeRO-1/2 first reduce, and make the own partition."""
        zero = self.zero
        if not self.reduces or zero.stage > 2 or per_layer == 0 or zero.has_offloaded_optimizer:
            return None
        return int(max(0.0, zero.bucket - zero.counts.head) // per_layer)

    def _fullest_moment(
        self, *, done: int, is_first: bool, crosses: bool
    ) -> tuple[LayerMoment, Components]:
        """Return a layer's fullest moment, with what parameter gradients occupy in it."""
        best: tuple[float, LayerMoment, Components] | None = None
        for moment in self.acts.backward:
            gradients = self._gradients(moment, done=done, is_first=is_first, crosses=crosses)
            total = moment.total_bytes + sum(gradients.values())
            if best is None or total > best[0]:
                best = total, moment, gradients
        assert best is not None
        return best[1], best[2]

    def _gradients(
        self, moment: LayerMoment, *, done: int, is_first: bool, crosses: bool
    ) -> Components:
        """Return what parameter gradients occupy at a layer's moment.

        Args:
            moment: the instant, with the gradients that its own layer has made.
            done: elements whose gradients came before this layer.
            is_first: nothing but the output layer has run backward yet.
            crosses: a bucket may hold gradients of two owners here.
        """
        found: Components = {}
        new, last = moment.new_gradient_elements, moment.last_gradient_elements
        so_far = done + moment.earlier_gradient_elements
        if self.buckets and (not is_first or so_far > 0 or moment.is_parameter_done):
            found[BUCKETS] = self.buckets
        if self.tied_head_bytes:
            found[PENDING] = self.tied_head_bytes
        if not self.reduces:
            # Gradients carried from an earlier micro-step are added to in place.
            alive = new if self.carries else so_far + new
            found[GRADIENTS] = float(self.width * alive)
            return found
        # Single tensors that are outside any bucket: too large for one, or not yet copied.
        pending = self.width * (new + last if last > self.bucket else new)
        if pending:
            found[PENDING] = found.get(PENDING, 0.0) + pending
        if self.zero.stage <= 2:
            self._add_partition(found, so_far)
        if moment.is_parameter_done and (so_far + new) // self.bucket != so_far // self.bucket:
            self._add_reduction(found, last=last, new=new, so_far=so_far, crosses=crosses)
        return found

    def _add_reduction(
        self, found: Components, *, new: int, last: int, so_far: int, crosses: bool
    ) -> None:
        """Add the copy and the norms of a bucket that this gradient no longer fits into."""
        zero = self.zero
        copy = norm = 0.0
        reduced = last if last > zero.bucket else min(zero.bucket, so_far)
        if crosses or zero.partition < zero.bucket:
            copy = zero.reduction_bytes(reduced)
        elif zero.stage < 3:
            copy = zero.cast_bytes(reduced)
        if zero.has_offloaded_optimizer:
            norm = zero.norm_bytes(max(last, min(new, zero.bucket)))
        if zero.stage == 3:
            # The shares of which norms are taken are views of the copy.
            found[REDUCTION], found[NORM] = copy, norm
        else:
            found[NORM if norm > copy else REDUCTION] = max(norm, copy)

    def _add_partition(self, found: Components, so_far: float, *, is_last: bool = False) -> None:
        """Add gradients that reductions before this moment left on this rank."""
        zero = self.zero
        if zero.has_offloaded_optimizer or (so_far <= zero.bucket and not is_last):
            return
        if zero.stage == 1:
            # A gradient larger than a bucket stays its parameter's, whoever owns it.
            others = zero.counts.larger_than(zero.bucket) * (1 - 1 / zero.world_size)
            found[GRADIENTS] = zero.trained_width * others * so_far / zero.counts.trainable
        if zero.has_compact_gradients:
            if not self.carries:  # later micro-steps add to the same buffer
                found[OWNED] = 4 * zero.partition
            # Gradients that bypass the bucket stay their owner's until backward ends.
            large = zero.counts.larger_than(zero.bucket) / zero.world_size
            found[GRADIENTS] = zero.trained_width * large * min(1.0, so_far / zero.partition)
        else:
            found[OWNED] = zero.trained_width * zero.owned

    def _head_reduction(self) -> Iterator[Candidate]:
        """Yield: the reduction of the output matrix, the largest gradient of many models."""
        zero, acts, head = self.zero, self.acts, self.zero.counts.head
        if not head or not self.reduces:
            return
        found = self._base()
        found[SAVED] = acts.saved_bytes + acts.norm_saved_bytes
        found[PASSING] = acts.hidden_bytes
        found[GATHERED] = zero.gathered.turn
        if self.buckets:
            found[BUCKETS] = self.buckets
        if head <= zero.bucket:
            return
        found[PENDING] = float(zero.trained_width * head)
        if zero.has_offloaded_optimizer:
            found[NORM] = zero.norm_bytes(head)
        elif zero.stage < 3:
            self._add_partition(found, head)
            is_cut = zero.partition < head
            found[REDUCTION] = zero.reduction_bytes(head) if is_cut else zero.cast_bytes(head)
        yield "reduction of the output matrix", found

    def _ends(self) -> Iterator[Candidate]:
        """Yield: the embedding's gradient, and the last reduction."""
        zero, acts, counts = self.zero, self.acts, self.zero.counts
        found = self._base()
        if self.buckets:
            found[BUCKETS] = self.buckets
        found[PASSING] = acts.hidden_bytes if counts.embedding else 2 * acts.hidden_bytes
        found[GATHERED] = zero.gathered.end
        embedding = zero.trained_width * counts.embedding
        if not self.reduces:
            found.pop(CARRIED, None)
            found[GRADIENTS] = float(zero.trained_width * counts.trainable)
            if embedding and self.carries:
                yield "embedding backward", {**found, PENDING: float(embedding)}
            if embedding and counts.is_head_tied:
                yield "embedding backward", {**found, PENDING: float(embedding)}
                # Both gradients of the tied matrix and their sum; the layers' are done with.
                summed = {**found, PASSING: 0.0, PENDING: 2.0 * embedding}
                yield "sum of the tied gradients", summed
            yield from self._boundary(found)
            return
        if zero.stage <= 2:
            self._add_partition(found, counts.trainable, is_last=True)
        if embedding:
            tied = 2 if counts.is_head_tied else 1
            yield "embedding backward", {**found, PENDING: float(embedding * tied)}
        del found[PASSING]
        if embedding and counts.is_head_tied and zero.stage <= 2:
            # H100: three whole tensors at once; ZeRO-3, whose linear layer is DeepSpeed's, two.
            yield "sum of the tied gradients", {**found, PENDING: 3.0 * embedding}
        found[PENDING] = float(embedding if counts.embedding > zero.bucket else 0)
        if zero.has_offloaded_optimizer:
            if counts.embedding > zero.bucket and zero.stage <= 2:
                # Independent storage for a gradient outside the buckets: a clone.
                yield "embedding gradient copy", {**found, PENDING: 2.0 * embedding}
            found[NORM] = zero.norm_bytes(
                max(
                    counts.embedding,
                    counts.largest_in_layers if zero.is_full else counts.largest_trainable,
                )
            )
            if zero.stage == 3:
                found[LEAVING] = zero.trained_width * counts.embedding / zero.world_size
        crosses = zero.stage == 3 or counts.embedding == 0 or zero.partition < counts.embedding
        rest = counts.embedding if counts.embedding > zero.bucket else counts.trainable
        reduced = min(rest, max(zero.bucket, counts.embedding))
        copy = zero.reduction_bytes(reduced) if crosses else zero.cast_bytes(reduced)
        if zero.stage <= 2:
            # The cast is gone when the norm is taken.
            copy -= min(zero.cast_bytes(reduced), found.get(NORM, 0.0))
        found[REDUCTION] = copy
        yield "last reduction", found

    def _boundary(self, found: Components) -> Iterator[Candidate]:
        """Yield: gradients kept to the accumulation boundary, and their reduction."""
        zero, counts = self.zero, self.zero.counts
        found.pop(PASSING, None)
        if zero.stage == 0:
            yield "gradient all-reduce", {**found, REDUCTION: zero.stage_0_reduction_bytes()}
            return
        if zero.has_fp32_stage_1:
            found[REDUCTION] = zero.fp32_stage_1_reduction_bytes()
            yield "gradient all-reduce", found
            return
        yield "gradients before their reduction", dict(found)
        # What already moved into the bucket has left its own tensor.
        if counts.embedding <= zero.bucket:
            moved = min(zero.bucket, counts.trainable)
            found[GRADIENTS] -= zero.trained_width * moved
        if zero.has_offloaded_optimizer:
            found[NORM] = zero.norm_bytes(counts.largest_trainable)
        elif zero.strategy.zero.contiguous_gradients:
            found[OWNED] = zero.trained_width * zero.owned
            found[REDUCTION] = zero.cast_bytes(min(zero.bucket, counts.trainable))
        else:
            found[GRADIENTS] = float(zero.trained_width * counts.trainable)
            largest = max(counts.largest_trainable, min(zero.bucket, counts.trainable))
            found[REDUCTION] = zero.reduction_bytes(largest)
        yield "gradient reduction", found
