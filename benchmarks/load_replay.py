"""What torch reserves while a model is loaded weight by weight, without expandable segments.

nvidia-smi shows segments, not tensors. A quantized weight leaves a hole of its 16-bit size, which
later weights fill in part; KAITO's figures for int8 and nf4 contain these holes. The stack is that
of their study (torch 2.2, transformers 4.4x, bitsandbytes 0.4x), not the one that zerofit runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from launcher.model_spec import ModelSpec, WeightSpec
from launcher.units import MIB

_BLOCK = 512


@dataclass(eq=False, slots=True)
class _Block:
    """A piece of a segment; neighbours are linked so that free ones can be joined."""

    size: int
    is_small: bool
    is_free: bool = False
    before: _Block | None = None
    after: _Block | None = None


class CachingAllocator:
    """torch's allocator on one stream with segments of fixed size; sizes in bytes.

    Source:
        torch 2.2 ``c10/cuda/CUDACachingAllocator.cpp``: ``round_size``, ``get_allocation_size``,
        ``should_split``; the smallest free block that is large enough is taken.
    """

    def __init__(self) -> None:
        self._free: dict[bool, list[_Block]] = {True: [], False: []}
        self.reserved_bytes = 0
        self.peak_reserved_bytes = 0

    def allocate(self, size: int) -> _Block:
        """Return a block of at least ``size`` bytes."""
        size = max(_BLOCK, -(-size // _BLOCK) * _BLOCK)
        is_small = size <= MIB
        pool = self._free[is_small]
        fitting = [block for block in pool if block.size >= size]
        if fitting:
            block = min(fitting, key=lambda block: block.size)
            pool.remove(block)
        else:
            block = _Block(size=_segment_size(size), is_small=is_small)
            self.reserved_bytes += block.size
            self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        block.is_free = False
        rest = block.size - size
        if rest >= _BLOCK if is_small else rest > MIB:
            block.size = size
            left = _Block(
                size=rest, is_small=is_small, is_free=True, before=block, after=block.after
            )
            if block.after is not None:
                block.after.before = left
            block.after = left
            pool.append(left)
        return block

    def free(self, block: _Block) -> None:
        """Give a block back, joined with its free neighbours."""
        pool = self._free[block.is_small]
        block.is_free = True
        if block.after is not None and block.after.is_free:
            pool.remove(block.after)
            self._join(block, block.after)
        if block.before is not None and block.before.is_free:
            pool.remove(block.before)
            block = self._join(block.before, block)
        pool.append(block)

    def empty_cache(self) -> None:
        """Return whole free segments to the driver."""
        for pool in self._free.values():
            for block in [b for b in pool if b.before is None and b.after is None]:
                pool.remove(block)
                self.reserved_bytes -= block.size

    @staticmethod
    def _join(one: _Block, other: _Block) -> _Block:
        one.size += other.size
        one.after = other.after
        if one.after is not None:
            one.after.before = one
        return one


def _segment_size(size: int) -> int:
    if size <= MIB:
        return 2 * MIB
    return 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB


def peak_reserved_bytes(
    model: ModelSpec, *, element_bytes: int, quantization: Literal["nf4", "int8"] | None
) -> int:
    """Return the most that torch reserves while ``model`` is loaded onto one GPU.

    Source:
        accelerate 0.30 ``utils/modeling.py:set_module_tensor_to_device`` empties the cache after
        each weight that is not quantized; bitsandbytes 0.43 ``nn/modules.py``,
        ``functional.py:quantize_4bit`` and ``double_quant``.
    """
    allocator = CachingAllocator()
    for weight in _loading_order(model):
        if weight.role != "linear" or quantization is None:
            allocator.allocate(element_bytes * weight.num_elements)
            allocator.empty_cache()
        elif quantization == "nf4":
            _load_nf4(allocator, weight.num_elements)
        else:
            _load_int8(allocator, weight)
    return allocator.peak_reserved_bytes


def _loading_order(model: ModelSpec) -> Iterator[WeightSpec]:
    """Yield each weight as often as there are layers, in safetensors' order: by name."""
    outside = sorted((w for w in model.weights if not w.in_layer), key=lambda w: w.name)
    in_layer = sorted((w for w in model.weights if w.in_layer), key=lambda w: w.name)
    yield from (w for w in outside if w.role in ("embedding", "lm_head"))
    for _ in range(model.num_hidden_layers):
        yield from in_layer
    yield from (w for w in outside if w.role not in ("embedding", "lm_head"))


def _load_nf4(allocator: CachingAllocator, count: int) -> None:
    """Quantize to nf4 with double quantization: block 64, then 256 of those."""
    weight, scales = allocator.allocate(2 * count), allocator.allocate(4 * count // 64)
    allocator.allocate(count // 2)
    allocator.allocate(4 * count // 64 // 256)
    allocator.allocate(count // 64)
    for block in (scales, weight):
        allocator.free(block)


def _load_int8(allocator: CachingAllocator, weight: WeightSpec) -> None:
    """Quantize by row; the column-wise copy that ``double_quant`` makes too is dropped."""
    half = allocator.allocate(2 * weight.num_elements)
    allocator.allocate(4 * weight.shape[0])
    columns = allocator.allocate(4 * weight.shape[1])
    allocator.allocate(weight.num_elements)
    transposed = allocator.allocate(weight.num_elements)
    for block in (transposed, columns, half):
        allocator.free(block)
