"""Live tensor bytes on a device without allocator statistics: the CPU, meta and fake tensors."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveTensors:
    """Tensors of one origin that were alive together.

    ``shape`` and ``dtype`` are those of the tensor that first showed the storage; ``tag`` is
    the tracker's tag at that moment.
    """

    op: str
    shape: tuple[int, ...]
    dtype: str
    tag: str
    count: int
    num_bytes: int


@dataclass(slots=True)
class _Storage:
    """One counted storage; ``born`` orders it against the peak."""

    num_bytes: int
    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    tag: str
    born: int
    on_host: bool
    reference: weakref.ref[torch.UntypedStorage]


class StorageTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of distinct tensor storages while the mode is active.

    A storage counts once however many views share it, from the operation that first returns
    it until torch frees it, also when that happens inside backward or after the mode ended.
    ``tensor.resize_`` and ``UntypedStorage.resize_`` change the count. Tensors made before the
    mode started count after :meth:`add_external`, or from the first operation that returns a
    view of them. Scratch buffers inside one kernel are invisible: they never become tensors.

    Meta tensors are ignored unless ``include_meta`` is set (fake tensors have meta storages).
    The result of an operation whose tensors are all on the host is host memory too.

    Source:
        The technique of ``torch/distributed/_tools/mem_tracker.py`` (torch 2.13), reduced to
        storages and with the listing at the peak kept at constant cost per operation.
    """

    def __init__(self, *, include_meta: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tag = ""
        """Written into every storage that appears from now on."""
        self.placement: Literal["device", "host"] | None = None
        """Where new storages are counted; ``None`` follows the operation's inputs."""
        self._include_meta = include_meta
        self._live: dict[int, _Storage] = {}
        self._current_bytes = 0
        self._host_bytes = 0
        self._peak_bytes = 0
        self._peak_host_bytes = 0
        self._sequence = 0
        self._peak_sequence = 0
        self._gone_since_peak: list[_Storage] = []
        self._plain_resize: Callable[..., Any] | None = None

    @property
    def current_bytes(self) -> int:
        """Bytes of the device storages that are alive now."""
        return self._current_bytes

    @property
    def peak_bytes(self) -> int:
        """Highest ``current_bytes`` since the start or the last :meth:`reset_peak`."""
        return self._peak_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes of the live storages in the host's account."""
        return self._host_bytes

    @property
    def peak_host_bytes(self) -> int:
        """Highest ``host_bytes`` so far."""
        return self._peak_host_bytes

    def reset_peak(self) -> None:
        """Start a new peak at the present bytes."""
        self._peak_bytes = self._current_bytes
        self._peak_sequence = self._sequence
        self._gone_since_peak.clear()

    def add_external(self, tensor: torch.Tensor, *, op: str = "external") -> None:
        """Count a tensor that the mode did not see being made, such as a parameter."""
        storage = tensor.untyped_storage()
        if storage.device.type == "meta" and not self._include_meta:
            return
        known = self._live.get(id(storage))
        if known is None:
            self._enter_storage(storage, op, tensor, on_host=False)
        elif known.num_bytes != storage.nbytes():
            self._resized(storage, known, storage.nbytes())

    def is_on_host(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor's storage is in the host's account."""
        if not self._host_bytes:
            return False
        record = self._live.get(id(tensor.untyped_storage()))
        return record is not None and record.on_host

    def add_external_all(self, tensors: Iterable[torch.Tensor], *, op: str = "external") -> None:
        """Count several tensors, as :meth:`add_external` does."""
        for tensor in tensors:
            self.add_external(tensor, op=op)

    def live_at_peak(self) -> tuple[LiveTensors, ...]:
        """Return what was alive at the peak, grouped by origin, largest first."""
        alive = [r for r in self._live.values() if r.born <= self._peak_sequence and not r.on_host]
        alive += [r for r in self._gone_since_peak if r.born <= self._peak_sequence]
        groups: Counter[tuple[str, tuple[int, ...], str, str]] = Counter()
        counts: Counter[tuple[str, tuple[int, ...], str, str]] = Counter()
        for record in alive:
            dtype = str(record.dtype).removeprefix("torch.")
            key = (record.op, record.shape, dtype, record.tag)
            groups[key] += record.num_bytes
            counts[key] += 1
        return tuple(
            LiveTensors(
                op=key[0],
                shape=key[1],
                dtype=key[2],
                tag=key[3],
                count=counts[key],
                num_bytes=num_bytes,
            )
            for key, num_bytes in groups.most_common()
            if num_bytes
        )

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self._count(result, func, args)
        elif result is not None:
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self._count(leaf, func, args)
        return result

    def __enter__(self) -> Self:
        # UntypedStorage.resize_ is not an operator, so the dispatcher never shows it.
        plain_resize = torch.UntypedStorage.resize_

        def resize_and_count(storage: torch.UntypedStorage, size: int) -> Any:
            result = plain_resize(storage, size)
            known = self._live.get(id(storage))
            if known is not None:
                self._resized(storage, known, storage.nbytes())
            return result

        self._plain_resize = plain_resize
        torch.UntypedStorage.resize_ = resize_and_count  # type: ignore[assignment, method-assign]
        return cast("Self", super().__enter__())  # type: ignore[no-untyped-call]

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._plain_resize is not None
        torch.UntypedStorage.resize_ = self._plain_resize  # type: ignore[method-assign]
        super().__exit__(exc_type, exc_value, traceback)  # type: ignore[no-untyped-call]

    def _count(self, tensor: torch.Tensor, func: Any, args: tuple[Any, ...]) -> None:
        storage = tensor.untyped_storage()
        known = self._live.get(id(storage))
        if known is not None:
            if known.num_bytes != storage.nbytes():
                self._resized(storage, known, storage.nbytes())
            return
        if storage.device.type == "meta" and not self._include_meta:
            return
        if func is torch.ops.aten.from_file.default:
            on_host = True  # a mapped file
        elif self.placement is not None:
            on_host = self.placement == "host"
        else:
            inputs = [a for a in tree_leaves(args) if isinstance(a, torch.Tensor)]
            on_host = bool(inputs) and all(self.is_on_host(a) for a in inputs)
        self._enter_storage(storage, func.__name__, tensor, on_host=on_host)

    def _enter_storage(
        self, storage: torch.UntypedStorage, op: str, tensor: torch.Tensor, *, on_host: bool
    ) -> None:
        key = id(storage)
        live = self._live
        tracker = weakref.ref(self)

        # torch keeps a storage's Python object alive as long as the storage itself, so the
        # weak reference dies exactly when the memory is freed.
        def freed(_: weakref.ref[torch.UntypedStorage]) -> None:
            record = live.pop(key, None)
            owner = tracker()
            if record is not None and owner is not None:
                owner._leave(record)

        record = _Storage(
            num_bytes=storage.nbytes(),
            op=op,
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
            tag=self.tag,
            born=0,
            on_host=on_host,
            reference=weakref.ref(storage, freed),
        )
        live[key] = record
        self._join(record)

    def _resized(self, storage: torch.UntypedStorage, record: _Storage, num_bytes: int) -> None:
        """Replace a record whose storage grew or shrank."""
        self._leave(record)
        changed = _Storage(
            num_bytes=num_bytes,
            op=record.op,
            shape=record.shape,
            dtype=record.dtype,
            tag=self.tag,
            born=0,
            on_host=record.on_host,
            reference=record.reference,
        )
        self._live[id(storage)] = changed
        self._join(changed)

    def _join(self, record: _Storage) -> None:
        self._sequence += 1
        record.born = self._sequence
        if record.on_host:
            self._host_bytes += record.num_bytes
            self._peak_host_bytes = max(self._peak_host_bytes, self._host_bytes)
            return
        self._current_bytes += record.num_bytes
        if self._current_bytes > self._peak_bytes:
            self._peak_bytes = self._current_bytes
            self._peak_sequence = self._sequence
            self._gone_since_peak.clear()

    def _leave(self, record: _Storage) -> None:
        if record.on_host:
            self._host_bytes -= record.num_bytes
            return
        self._current_bytes -= record.num_bytes
        if record.born <= self._peak_sequence:
            self._gone_since_peak.append(record)
