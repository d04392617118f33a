"""Two memories in one process: tells host tensors from device tensors while all live on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch.overrides import TorchFunctionMode

from launcher.worker.storage_tracker import StorageTracker

Side = Literal["device", "host"]

HOST_DEVICE = torch.device("cpu", 1)
"""What host tensors report as their device; torch ignores a CPU's index."""

_FACTORIES = frozenset(
    {torch.empty, torch.zeros, torch.ones, torch.full, torch.tensor, torch.arange, torch.rand}
    | {torch.randn, torch.randint, torch.empty_strided}
)
_LIKE = frozenset(
    {torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like}
    | {torch.Tensor.new_empty, torch.Tensor.new_zeros, torch.Tensor.new_full}
)
_GET_DEVICE = torch.Tensor.device.__get__


class AcceleratorName(str):
    """The device name that the traced accelerator gives out; a plain ``cpu`` means the host."""

    __slots__ = ()


class DeviceBoundary(TorchFunctionMode):
    """Make moves between "device" and "host" real copies, and count each side by itself.

    DeepSpeed says where a tensor goes by the device it names: the accelerator's own name, or
    ``cpu``. On a CPU-only machine both are the same memory and ``tensor.to("cpu")`` copies
    nothing; here it copies, and the tracker knows the copy as host memory.

    ``default_side`` is where tensors without a device go: the device while the model is
    built, the host (as on a GPU machine) in DeepSpeed's own code.
    """

    def __init__(self, tracker: StorageTracker) -> None:
        super().__init__()
        self._tracker = tracker
        self.default_side: Side = "device"

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func == _GET_DEVICE:
            is_on_host = self._tracker.is_on_host(args[0])
            return HOST_DEVICE if is_on_host else func(*args, **kwargs)
        if func in _FACTORIES:
            device = kwargs.get("device")
            side = self.default_side if device is None else side_named(device)
            with self._placing(side):
                return func(*args, **kwargs)
        if func in _LIKE and kwargs.get("device") is not None:
            with self._placing(side_named(kwargs["device"])):
                return func(*args, **kwargs)
        if func is torch.Tensor.to or func is torch.Tensor.cpu:
            target = "host" if func is torch.Tensor.cpu else self._target(args, kwargs)
            if target is not None and target != self._side_of(args[0]):
                return self._move(args, kwargs, target)
            # torch would copy from "cpu" to "cpu:1"; staying on a side copies nothing.
            args, kwargs = (
                tuple(_on_cpu(arg) for arg in args),
                {name: _on_cpu(arg) for name, arg in kwargs.items()},
            )
        if func is torch.Tensor.copy_ and self._side_of(args[0]) != self._side_of(args[1]):
            self._convert_on_device(args[0], args[1], kwargs.get("non_blocking", args[2:] != ()))
        return func(*args, **kwargs)

    def _side_of(self, tensor: torch.Tensor) -> Side:
        return "host" if self._tracker.is_on_host(tensor) else "device"

    def _target(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Side | None:
        """Return where ``tensor.to(...)`` goes, ``None`` if it names no device."""
        other = kwargs.get("other", args[1] if len(args) > 1 else None)
        if isinstance(other, torch.Tensor):
            return self._side_of(other)
        device = kwargs.get("device", other)
        return side_named(device) if isinstance(device, str | torch.device) else None

    def _move(self, args: tuple[Any, ...], kwargs: dict[str, Any], side: Side) -> torch.Tensor:
        dtypes = [a for a in (*args[1:], kwargs.get("dtype")) if isinstance(a, torch.dtype)]
        with self._placing(side):
            moved = torch.empty_like(args[0], dtype=dtypes[0] if dtypes else None)
        self._convert_on_device(moved, args[0], kwargs.get("non_blocking", False))
        return moved.copy_(args[0].detach())

    def _convert_on_device(
        self,
        target: torch.Tensor,
        source: torch.Tensor,
        non_blocking: bool,  # noqa: FBT001
    ) -> None:
        """Raise the peak by the temporary of a copy that also converts.

        Source: torch 2.13 ``aten/src/ATen/native/cuda/Copy.cu``, ``copy_kernel_cuda``:
        asynchronous copies convert on the GPU, blocking ones on the CPU.
        """
        if not non_blocking or target.dtype == source.dtype:
            return
        dtype = source.dtype if self._side_of(source) == "host" else target.dtype
        with self._placing("device"):
            torch.empty(source.shape, dtype=dtype)

    @contextmanager
    def _placing(self, side: Side) -> Iterator[None]:
        before = self._tracker.placement
        self._tracker.placement = side
        try:
            yield
        finally:
            self._tracker.placement = before


def side_named(device: object) -> Side:
    """Return the side that a device argument means: only a plain ``cpu`` is the host."""
    if isinstance(device, torch.device):
        return "host" if device == HOST_DEVICE else "device"
    if isinstance(device, AcceleratorName) or not isinstance(device, str):
        return "device"
    return "host" if str(getattr(device, "value", device)) == "cpu" else "device"


def _on_cpu(argument: Any) -> Any:
    return torch.device("cpu") if isinstance(argument, str | torch.device) else argument
