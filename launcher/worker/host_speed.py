"""How fast a host starts work on its GPU: what steps that are bound by Python depend on."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

OPERATIONS = 100
"""Of a round."""
# Each takes some 6 ms: 0.25 s in all.
_ROUNDS = 40


def host_autograd_op_seconds(device: torch.device) -> float | None:
    """Return seconds that the host needs for a recorded operation and its gradient.

    A product of two 16 x 16 tensors; its gradient is two products and a sum. So it is what a step
    mostly is for the host: dispatch in Python and C++, autograd's thread, launches of kernels.
    Hosts differ in it, and one host differs with what its neighbours do: measure it on all ranks
    at the same time. The GPU keeps up and is not waited for, and no memory is kept on it.

    Source:
        Of the loops that ``benchmarks/step_parts.py`` timed twice on one host, five minutes
        apart, this one differed least (61.6 and 60.2 µs) of those that go through autograd.

    Returns:
        The median of 40 rounds; ``None`` on a processor, where the operations themselves take
        the time.
    """
    if device.type == "cpu":
        return None
    import torch

    seconds = median_round_seconds(device, rounds=_ROUNDS) / OPERATIONS
    torch.cuda.empty_cache()
    return seconds


def median_round_seconds(device: torch.device, *, rounds: int) -> float:
    """Return the median seconds of a round of 100 operations and their gradients."""
    import torch

    base = torch.ones(16, 16, device=device, requires_grad=True)
    times = []
    for _ in range(rounds + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        one_round(base)
        times.append(time.perf_counter() - started)
    # The first two load kernels and find memory.
    return statistics.median(times[2:])


def one_round(base: torch.Tensor) -> None:
    """Multiply by a small tensor that needs a gradient again and again, and go back."""
    value = base
    for _ in range(OPERATIONS):
        value = value * base
    value.sum().backward()  # type: ignore[no-untyped-call]
    base.grad = None
