"""Which parameters ZeRO-3 holds gathered at each place of a micro-step.

DeepSpeed's parameter coordinator replayed: it fetches a module's parameters before the module
runs, prefetches those of the next modules while few enough are there, and releases them unless
they are used again soon. Nothing here is fitted; a test compares it with the real coordinator.

Source:
    DeepSpeed 0.19.8 ``runtime/zero/partitioned_param_coordinator.py``;
    ``runtime/zero/partition_parameters.py:AllGatherCoalescedHandle``.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.model_spec import ModelSpec
from launcher.predict.module_calls import Call, CallSetting, ModuleCalls, module_calls
from launcher.strategy import ZeroKnobs

_AWAY, _IN_FLIGHT, _HERE = 0, 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class GatheredBytes:
    """The most that is gathered, its transport buffers included, place by place."""

    forward: tuple[int, ...]
    """While each decoder layer runs forward, the first first; the last norm is in the last."""
    loss: int
    turn: int
    """When the loss is done with, before the first layer of backward."""
    backward: tuple[int, ...]
    """While each layer runs backward, the last layer first."""
    end: int
    """In the embedding's backward."""
    num_gathers: int
    """Collectives of one micro-step that gather."""
    gathered_in_all: int
    """By all of them together."""
    gathered_in_groups: int = 0
    """Of that, from hpZ's copies, in the first micro-step of a step; in the others, everything."""


@functools.lru_cache(maxsize=512)
def gathered_bytes(
    setting: CallSetting,
    knobs: ZeroKnobs,
    *,
    element_bytes: int,
    world_size: int,
    has_offloaded_params: bool,
    copies_trained: bool = True,
) -> GatheredBytes:
    """Return what is gathered at each place once DeepSpeed knows the order of the modules.

    Args:
        setting: the model and what it is trained with.
        knobs: the ``stage3_`` keys are read.
        element_bytes: of the model's precision.
        world_size: of one rank, partitions come whole from the host, without buffers.
        has_offloaded_params: a rank's part comes from the host before the others' join it.
        copies_trained: hpZ's copies of trained parameters, made as they are released, count as
            gathered; else they wait since an earlier micro-step.
    """
    found = replay(setting, knobs, world_size=world_size)
    forward = found.forward_from_host if has_offloaded_params else found.forward
    backward = found.backward_from_host if has_offloaded_params else found.backward
    copied = copied_in_all = 0
    if copies_trained and not has_offloaded_params:
        forward = tuple(map(sum, zip(forward, found.copied, strict=True)))
        backward = tuple(map(sum, zip(backward, found.copied_backward, strict=True)))
        copied, copied_in_all = found.copied[-1], found.copied_in_all
    return GatheredBytes(
        forward=tuple(element_bytes * elements for elements in forward),
        loss=element_bytes * (found.loss + copied),
        turn=element_bytes * (found.turn + copied),
        backward=tuple(element_bytes * elements for elements in reversed(backward)),
        end=element_bytes * (found.end + copied_in_all),
        num_gathers=found.num_gathers,
        gathered_in_all=element_bytes * found.gathered_in_all,
        gathered_in_groups=element_bytes * found.gathered_in_groups,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Replayed:
    """Most gathered elements of each place; per layer in the model's order."""

    forward: tuple[int, ...]
    forward_from_host: tuple[int, ...]
    """The same with the rank's own part beside what it joins."""
    loss: int
    turn: int
    backward: tuple[int, ...]
    backward_from_host: tuple[int, ...]
    end: int
    num_gathers: int
    gathered_in_all: int
    gathered_in_groups: int
    copied: tuple[int, ...]
    """hpZ's copies of trained parameters on one rank, after each layer's forward."""
    copied_backward: tuple[int, ...]
    copied_in_all: int


@functools.lru_cache(maxsize=512)
def replay(setting: CallSetting, knobs: ZeroKnobs, *, world_size: int) -> _Replayed:
    """Replay the layers that differ; those between count as the one where they begin."""
    num_layers = setting.model.num_hidden_layers
    head, tail = _layers_to_replay(setting.model, knobs)
    replayed = min(num_layers, head + tail)
    coordinator = _Coordinator(
        module_calls(setting, num_layers=replayed), knobs, world_size=world_size
    )
    coordinator.run()
    alike = num_layers - replayed
    order = [index if index < head else max(head, index - alike) for index in range(num_layers)]

    def of_all(replayed_layers: Sequence[int]) -> tuple[int, ...]:
        return tuple(replayed_layers[index] for index in order)

    middle = min(head, replayed - 1)
    ranks = knobs.copy_ranks(world_size)
    # Each layer left out releases one layer's parameters for the first time.
    more = coordinator.copied_in[middle] * alike
    copied = itertools.accumulate(
        (coordinator.copied_in[index] for index in order), initial=coordinator.copied_at_start
    )
    in_groups = coordinator.grouped_in[middle]
    return _Replayed(
        forward=of_all(coordinator.forward),
        forward_from_host=of_all(coordinator.forward_from_host),
        loss=coordinator.loss,
        turn=coordinator.turn,
        backward=of_all(coordinator.backward),
        backward_from_host=of_all(coordinator.backward_from_host),
        end=coordinator.alive,
        num_gathers=coordinator.num_gathers + alike * coordinator.gathers_in[middle],
        gathered_in_all=coordinator.gathered + alike * coordinator.gathered_in[middle],
        gathered_in_groups=coordinator.grouped + alike * in_groups,
        copied=tuple(elements // ranks for elements in copied)[1:],
        copied_backward=of_all([(size + more) // ranks for size in coordinator.copied_backward]),
        copied_in_all=(coordinator.copied + more) // ranks,
    )


def _layers_to_replay(model: ModelSpec, knobs: ZeroKnobs) -> tuple[int, int]:
    """Return how many layers at either end can differ from those between.

    At the start the prefetcher fills up; at the end it looks into backward, and parameters stay
    that backward uses soon.
    """
    if model.num_moe_layers not in (0, model.num_hidden_layers):
        return model.num_hidden_layers, 0
    ahead = knobs.stage3_max_live_parameters + knobs.stage3_prefetch_bucket_size
    head = 2 + math.ceil(ahead / model.num_params_per_layer)
    behind = knobs.stage3_max_reuse_distance / model.num_params_per_layer
    return head, head + math.ceil(behind)


NOTHING_GATHERED = GatheredBytes(
    forward=(0,), loss=0, turn=0, backward=(0,), end=0, num_gathers=0, gathered_in_all=0
)


@dataclass(slots=True)
class _Gather:
    """Several parameters gathered into one flat buffer, copied out when first waited for."""

    elements: int
    num_unused: int
    is_copied: bool = False


class _Coordinator:
    """Replays the calls of one micro-step; persistent parameters never leave."""

    def __init__(self, calls: ModuleCalls, knobs: ZeroKnobs, *, world_size: int) -> None:
        threshold = knobs.stage3_param_persistence_threshold
        self.calls, self.world_size = calls, world_size
        self.max_live = knobs.stage3_max_live_parameters
        self.prefetch_bucket = knobs.stage3_prefetch_bucket_size
        self.reuse_distance = knobs.stage3_max_reuse_distance
        self.sizes = [parameter.elements for parameter in calls.parameters]
        self.is_trained = [parameter.is_trained for parameter in calls.parameters]
        self.own = [
            tuple(index for index in module if self.sizes[index] > threshold)
            for module in calls.modules
        ]
        fetched = [call.module for call in calls.calls if call.is_fetch]
        self.queue = deque(
            (p, step) for step, module in enumerate(fetched) for p in self.own[module]
        )
        self.uses: list[list[int]] = [[] for _ in self.sizes]
        for parameter, step in self.queue:
            self.uses[parameter].append(step)
        self.traversed = [0]
        for module in fetched:
            numbers = sum(self.sizes[index] for index in calls.modules[module])
            self.traversed.append(self.traversed[-1] + numbers)
        self.step = 0
        self.state = [_AWAY] * len(self.sizes)
        self.last_fetched_for = [-1] * len(self.sizes)
        self.users: list[set[int]] = [set() for _ in self.sizes]
        self.recomputed_for: dict[int, set[int]] = {}
        self.active: dict[int, None] = {}
        self.gathers: dict[int, _Gather] = {}
        self.available = self.alive = self.highest = 0
        self.num_gathers = self.gathered = self.grouped = self.copied = 0
        self.copy_ranks = knobs.copy_ranks(world_size)
        has_copies = self.copy_ranks > 1
        self.is_copied = [has_copies and not trained for trained in self.is_trained]

    def run(self) -> None:
        """Replay all calls, and note the most gathered elements of each place."""
        layers = 1 + max(call.layer for call in self.calls.calls)
        self.forward, self.backward = [0] * layers, [0] * layers
        self.forward_from_host, self.backward_from_host = [0] * layers, [0] * layers
        self.gathers_in, self.gathered_in = [0] * layers, [0] * layers
        self.grouped_in, self.copied_in = [0] * layers, [0] * layers
        self.copied_at_start, self.copied_backward = 0, [0] * layers
        self.loss = self.turn = 0
        for call in self.calls.calls:
            place, layer = call.place, call.layer
            num_gathers, gathered, self.highest = self.num_gathers, self.gathered, 0
            grouped, copied = self.grouped, self.copied
            if call.is_fetch:
                self._fetch(call)
            else:
                self._release(call)
            alive = self.alive
            if place == "loss":
                self.loss = max(self.loss, alive)
            elif place != "start":
                is_forward = place == "forward"
                most = self.forward if is_forward else self.backward
                most[layer] = max(most[layer], alive)
                most = self.forward_from_host if is_forward else self.backward_from_host
                if alive > most[layer] or self.highest > most[layer]:
                    most[layer] = max(alive, self.highest)
                if self.num_gathers != num_gathers:
                    self.gathers_in[layer] += self.num_gathers - num_gathers
                    self.gathered_in[layer] += self.gathered - gathered
                    self.grouped_in[layer] += self.grouped - grouped
                if is_forward:
                    self.copied_in[layer] += self.copied - copied
                else:
                    self.copied_backward[layer] = self.copied
            else:
                self.copied_at_start = self.copied
            if place == "backward" and not self.turn:
                self.turn = alive

    def _fetch(self, call: Call) -> None:
        own = self.own[call.module]
        if not call.is_forward:
            self.active[call.module] = None
        if own:
            self._bring(own, call)
        if self.queue and self.available < self.max_live:
            self._prefetch()
        self.step += 1

    def _bring(self, own: Sequence[int], call: Call) -> None:
        if _AWAY in {self.state[index] for index in own}:
            self._gather([index for index in own if self.state[index] == _AWAY])
        is_recomputing = call.is_forward and call.place == "backward"
        for index in own:
            self.users[index].add(call.module)
            if is_recomputing and not self.is_trained[index]:
                owner = next(reversed(self.active))
                self.recomputed_for.setdefault(owner, set()).add(index)
                self.users[index].add(owner)
            if self.state[index] == _IN_FLIGHT:
                self._wait(index)
        self._drop_from_queue(own)

    def _drop_from_queue(self, own: Sequence[int]) -> None:
        for _ in [index for index in own if self.last_fetched_for[index] < self.step]:
            index, step = self.queue.popleft()
            self.last_fetched_for[index] = step

    def _prefetch(self) -> None:
        limit = min(self.max_live - self.available, self.prefetch_bucket)
        wanted: list[int] = []
        elements = 0
        while self.queue and elements < limit:
            index, step = self.queue.popleft()
            self.last_fetched_for[index] = max(self.last_fetched_for[index], step)
            if self.state[index] == _AWAY and index not in wanted:
                wanted.append(index)
                elements += self.sizes[index]
        self._gather(wanted)

    def _gather(self, wanted: list[int]) -> None:
        if not wanted:
            return
        # What has a copy in the group is gathered there, apart from the rest.
        for is_copied in (True, False):
            together = [index for index in wanted if self.is_copied[index] is is_copied]
            if together:
                self._gather_from(together, self.copy_ranks if is_copied else self.world_size)

    def _gather_from(self, wanted: list[int], ranks: int) -> None:
        elements = sum(self.sizes[index] for index in wanted)
        for index in wanted:
            self.state[index] = _IN_FLIGHT
        self.available += elements
        self.num_gathers += 1
        self.gathered += elements
        self.grouped += elements if self.is_copied[wanted[0]] else 0
        self.alive += elements
        if self.world_size == 1:
            return
        self.highest = max(self.highest, self.alive + elements // ranks)
        if len(wanted) > 1:
            gather = _Gather(elements=elements, num_unused=len(wanted))
            self.gathers.update(dict.fromkeys(wanted, gather))

    def _wait(self, index: int) -> None:
        gather = self.gathers.pop(index, None)
        self.state[index] = _HERE
        if gather is None:
            return
        if not gather.is_copied:
            gather.is_copied = True
            self.alive += gather.elements
        gather.num_unused -= 1
        if gather.num_unused == 0:
            self.alive -= gather.elements

    def _release(self, call: Call) -> None:
        own = self.own[call.module]
        released = {index for index in own if not self._is_used_again(index)}
        candidates = set(own)
        if not call.is_forward:
            recomputed = self.recomputed_for.pop(call.module, set())
            released |= recomputed
            candidates |= recomputed
            self.active.pop(call.module, None)
        for index in candidates:
            self.users[index].discard(call.module)
            if index in released and self.state[index] == _HERE and not self.users[index]:
                self.state[index] = _AWAY
                self.available -= self.sizes[index]
                self.alive -= self.sizes[index]
                if self.copy_ranks > 1 and not self.is_copied[index]:
                    self.is_copied[index] = True
                    self.copied += self.sizes[index]

    def _is_used_again(self, index: int) -> bool:
        """Return whether a prefetch counts on the parameter, or it recurs soon enough."""
        if self.last_fetched_for[index] > self.step:
            return True
        uses = self.uses[index]
        place = bisect.bisect_left(uses, self.step)
        if place == len(uses):
            return False
        distance = self.traversed[uses[place]] - self.traversed[self.step]
        return distance < self.reuse_distance
