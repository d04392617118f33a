"""The order in which ZeRO-3's hooks see a model's modules in one micro-step.

Every module counts, with parameters or without: each call lets the prefetcher run once more.
Read off DeepSpeed's own trace of Llama, full and LoRA, with and without checkpointing; a test
compares the gathered elements that follow from it with the engine's.

Source:
    DeepSpeed 0.19.8 ``runtime/zero/parameter_offload.py:_register_deepspeed_module``;
    transformers 5.23 ``modeling_layers.py:GradientCheckpointingLayer``; torch 2.13
    ``utils/checkpoint.py`` (recomputing stops once the last saved tensor is there).
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal, NamedTuple

from launcher.model_spec import ModelSpec, WeightSpec
from launcher.strategy import LOSS_CHUNK_ELEMENTS, Checkpointing, Loss, Method, Strategy
from launcher.workload import Workload

Place = Literal["start", "forward", "loss", "backward"]
# More calls of the output layer than this tell the coordinator nothing new.
_MOST_CHUNKS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A parameter as ZeRO-3 gathers it: packed 4-bit weights count as the numbers they fill."""

    elements: int
    is_trained: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSetting:
    """What decides the calls; hashable, so that they are made once."""

    model: ModelSpec
    adapter_targets: frozenset[str]
    adapter_rank: int
    packing: int
    """Weights of a quantized matrix that look like one number."""
    is_full: bool
    is_recomputed: bool
    loss: Loss
    num_loss_chunks: int


class Call(NamedTuple):
    """A module's hook: before it runs (fetch) or after it has run, forward or backward."""

    is_fetch: bool
    is_forward: bool
    module: int
    place: Place
    layer: int
    """Number of the decoder layer, from the first; -1 outside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleCalls:
    """Modules with the parameters of their own, and their hooks in order."""

    parameters: tuple[Parameter, ...]
    modules: tuple[tuple[int, ...], ...]
    """Indices of each module's parameters."""
    calls: tuple[Call, ...]


def call_setting(workload: Workload, strategy: Strategy) -> CallSetting:
    """Return what decides the calls of a workload's modules."""
    model = workload.model
    tokens = strategy.micro_batch_size_per_gpu * workload.max_seq_len
    logits = tokens / strategy.sequence_parallel_size * model.vocab_size
    chunks = math.ceil(logits / LOSS_CHUNK_ELEMENTS) if strategy.loss is Loss.chunked else 1
    is_quantized = workload.num_quantized_params > 0
    return CallSetting(
        model=model,
        adapter_targets=frozenset(weight.name for weight in workload.lora_weights),
        adapter_rank=0 if workload.method is Method.full else workload.lora.r,
        # ``bnb_4bit_quant_storage`` is the compute type; int8 is refused under ZeRO-3.
        packing=2 * workload.precision.bytes_per_element if is_quantized else 1,
        is_full=workload.method is Method.full,
        is_recomputed=strategy.gradient_checkpointing is not Checkpointing.none,
        loss=strategy.loss,
        num_loss_chunks=min(max(1, chunks), _MOST_CHUNKS),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Node:
    """A module: its own parameters and the modules that it calls, in order."""

    parameters: tuple[Parameter, ...] = ()
    children: tuple[_Node, ...] = ()


class _Writer:
    """Numbers modules and parameters, and writes their calls down."""

    def __init__(self) -> None:
        self.parameters: list[Parameter] = []
        self.modules: list[tuple[int, ...]] = []
        self.calls: list[Call] = []

    def number(self, node: _Node) -> _Numbered:
        """Give a module, its parameters and all below it their numbers."""
        first = len(self.parameters)
        self.parameters.extend(node.parameters)
        return self.register(
            tuple(range(first, len(self.parameters))),
            tuple(self.number(child) for child in node.children),
        )

    def register(self, parameters: tuple[int, ...], children: tuple[_Numbered, ...]) -> _Numbered:
        """Give a module with these parameters its number."""
        self.modules.append(parameters)
        return _Numbered(module=len(self.modules) - 1, children=children)

    def call(self, hook: str, node: _Numbered, place: Place, layer: int = -1) -> None:
        """Write one hook down: ``ff`` fetches forward, ``rb`` releases backward, and so on."""
        if hook[0] == "r" and not self.modules[node.module]:
            return  # nothing to release
        self.calls.append(Call(hook[0] == "f", hook[1] == "f", node.module, place, layer))

    def forward(self, node: _Numbered, place: Place, layer: int = -1, *, until: int = -1) -> bool:
        """Write a forward; return whether it ended early, inside the module ``until``."""
        self.call("ff", node, place, layer)
        if node.module == until:
            return True
        for child in node.children:
            if self.forward(child, place, layer, until=until):
                return True
        self.call("rf", node, place, layer)
        return False

    def backward(
        self, node: _Numbered, place: Place, layer: int, *, recomputed: _Numbered | None = None
    ) -> None:
        """Write a backward; a layer is recomputed when its last module needs what it saved."""
        self.call("fb", node, place, layer)
        if recomputed is not None and not node.children:
            for child in recomputed.children:
                if self.forward(child, place, layer, until=node.module):
                    break
        for child in reversed(node.children):
            self.backward(child, place, layer, recomputed=recomputed)
            recomputed = None
        self.call("rb", node, place, layer)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Numbered:
    module: int
    children: tuple[_Numbered, ...] = ()


@functools.lru_cache(maxsize=64)
def module_calls(setting: CallSetting, *, num_layers: int) -> ModuleCalls:
    """Return a model's modules and their hooks in forward, loss and backward.

    Args:
        setting: the model and what it is trained with.
        num_layers: how many decoder layers to write, the last ones: experts come last.
    """
    model, writer = setting.model, _Writer()
    ends = {weight.role: weight for weight in model.weights if not weight.in_layer}
    embedding = writer.number(_Node(parameters=(_own(ends["embedding"], setting),)))
    have_experts = [index >= num_layers - model.num_moe_layers for index in range(num_layers)]
    kinds = {is_moe: _layer(setting, is_moe=is_moe) for is_moe in set(have_experts)}
    layers = [writer.number(kinds[is_moe]) for is_moe in have_experts]
    norms = [w for w in model.weights if w.role == "norm" and not w.in_layer]
    norm = writer.number(_Node(parameters=tuple(_own(w, setting) for w in norms)))
    if "lm_head" in ends:
        head = writer.number(_Node(parameters=(_own(ends["lm_head"], setting),)))
    else:
        head = writer.register(writer.modules[embedding.module], ())
    # Liger's loss reads the output matrix itself, without its module: the model then owns it,
    # from before the first layer, and its backward hook never comes (no input has a gradient).
    is_owned = setting.loss is Loss.liger
    decoder = writer.register((), ())
    whole = writer.register(writer.modules[head.module] if is_owned else (), ())
    writer.call("ff", whole, "start")
    writer.call("ff", decoder, "start")
    writer.forward(embedding, "start")
    for index, layer in enumerate(layers):
        writer.forward(layer, "forward", index)
    writer.forward(norm, "forward")
    writer.call("rf", decoder, "forward")
    _write_loss(writer, setting, whole, head)
    writer.call("fb", decoder, "backward", len(layers) - 1)
    writer.backward(norm, "backward", len(layers) - 1)
    for index in range(len(layers) - 1, -1, -1):
        layer = layers[index]
        recomputed = layer if setting.is_recomputed else None
        writer.backward(layer, "backward", index, recomputed=recomputed)
    writer.call("fb", embedding, "backward", 0)
    return ModuleCalls(
        parameters=tuple(writer.parameters),
        modules=tuple(writer.modules),
        calls=tuple(writer.calls),
    )


def _write_loss(writer: _Writer, setting: CallSetting, whole: _Numbered, head: _Numbered) -> None:
    """Write the output layer's calls: once, or in chunks that are recomputed one by one."""
    is_owned = setting.loss is Loss.liger
    for _ in range(0 if is_owned else setting.num_loss_chunks):
        writer.forward(head, "loss")
    writer.call("rf", whole, "loss")
    writer.call("fb", whole, "loss")
    for _ in range(0 if is_owned else setting.num_loss_chunks):
        if setting.loss is Loss.chunked:
            writer.forward(head, "loss")
        writer.call("fb", head, "loss")
        writer.call("rb", head, "loss")


def _layer(setting: CallSetting, *, is_moe: bool) -> _Node:
    """Return a decoder layer: norm, attention, other norms, MLP."""
    model = setting.model
    weights = [w for w in model.weights if w.in_layer and _has(setting, w, is_moe=is_moe)]
    inner = [w for w in weights if w.role != "norm" or "attn." in w.name]
    outer = [w for w in weights if w.role == "norm" and w not in inner]
    attention = [w for w in inner if "attn" in w.name or "attention" in w.name]
    names = list(dict.fromkeys(w.module for w in outer))
    norms = [
        _Node(parameters=tuple(_own(w, setting) for w in outer if w.module == n)) for n in names
    ]
    # The activation, a module without parameters, follows the first matrix.
    first, *others = _linears(setting, [w for w in inner if w not in attention])
    return _Node(
        children=(
            *norms[:1],
            _Node(children=_linears(setting, attention)),
            *norms[1:],
            _Node(children=(first, _Node(), *others)),
        )
    )


def _has(setting: CallSetting, weight: WeightSpec, *, is_moe: bool) -> bool:
    """Return whether a layer with experts, or one without, has this weight."""
    if setting.model.traced is not None:
        return weight.layers in ("all", "moe" if is_moe else "dense")
    is_routed = weight.role in {"expert", "router"}
    return is_routed or "mlp" not in weight.name if is_moe else not is_routed


def _linears(setting: CallSetting, weights: list[WeightSpec]) -> tuple[_Node, ...]:
    """Return modules by the names of their weights; one with an adapter is five."""
    found: list[_Node] = []
    for name, count in Counter(w.name.rpartition(".")[0] for w in weights).items():
        own = [w for w in weights if w.name.rpartition(".")[0] == name]
        assert len(own) == count
        base = _Node(parameters=tuple(_own(w, setting) for w in own))
        adapted = next((w for w in own if w.name in setting.adapter_targets), None)
        if adapted is None:
            found.append(base)
            continue
        out_features, in_features = adapted.shape
        rank = setting.adapter_rank
        pair = [Parameter(elements=rank * n, is_trained=True) for n in (in_features, out_features)]
        adapters = (_Node(), *(_Node(parameters=(parameter,)) for parameter in pair))
        found.append(_Node(children=(base, *adapters)))
    return tuple(found)


def _own(weight: WeightSpec, setting: CallSetting) -> Parameter:
    packing = setting.packing if weight.role == "linear" else 1
    return Parameter(elements=weight.num_elements // packing, is_trained=setting.is_full)
