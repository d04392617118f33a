"""Little loops that say how fast a host is, and optimizers and copies: for step_parts.py."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from step_watch import Lines, Timers

from launcher.worker.host_speed import OPERATIONS, one_round

FINDERS: list[Any] = []
"""Python's, before bitsandbytes was hidden from it: a process that has imported it cannot fork."""


def _rounds(action: Callable[[], None], *, per_round: int, seconds: float) -> dict[str, float]:
    """Return seconds of one of ``per_round`` repetitions that ``action`` makes: least, median."""
    import torch

    action()
    times, ends = [], time.perf_counter() + seconds
    while time.perf_counter() < ends or len(times) < 5:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        action()
        times.append((time.perf_counter() - started) / per_round)
    tenths = statistics.quantiles(times, n=10) if len(times) > 1 else times * 9
    return {
        "least": min(times), "tenth": tenths[0], "median": statistics.median(times),
        "ninth": tenths[8], "rounds": len(times),
    }  # fmt: skip


def python_call_seconds(*, seconds: float) -> dict[str, float]:
    """Return how long Python takes to call a method and to write into a dictionary."""

    class Thing:
        def __init__(self) -> None:
            self.value = 0

        def add(self, other: int) -> int:
            self.value += other
            return self.value

    def calls() -> None:
        thing, table = Thing(), {}
        for index in range(10_000):
            table[index & 63] = thing.add(index)

    return _rounds(calls, per_round=10_000, seconds=seconds)


def measure_host(lines: Lines, *, when: str, seconds: float) -> None:
    """Measure candidates for a number that says how fast a host starts work."""
    import torch

    torch.set_num_threads(1)
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    found: dict[str, dict[str, float]] = {}
    each = seconds / 9

    found["python_call"] = python_call_seconds(seconds=each)

    def additions(where: torch.device) -> Callable[[], None]:
        one = torch.ones(16, device=where)

        def action() -> None:
            for _ in range(500):
                torch.add(one, one)

        return action

    found["add_cpu"] = _rounds(additions(torch.device("cpu")), per_round=500, seconds=each)
    found["add_device"] = _rounds(additions(device), per_round=500, seconds=each)
    found |= _autograd_candidates(device, each)
    found |= _model_candidates(device, each)
    if has_gpu:
        one = torch.ones(16, device=device)

        def waits() -> None:
            for _ in range(50):
                one.add_(1)
                torch.cuda.synchronize()

        found["launch_and_wait"] = _rounds(waits, per_round=50, seconds=each)
    lines.write(f"host-{when}", machine=_machine(), load=os.getloadavg(), seconds_of=found)


def _autograd_candidates(device: Any, each: float) -> dict[str, dict[str, float]]:
    """Return seconds of an operation that autograd records, forward and backward."""
    import torch

    found = {}
    base = torch.ones(16, 16, device=device, requires_grad=True)

    found["mul_forward_backward"] = _rounds(
        lambda: one_round(base), per_round=OPERATIONS, seconds=each
    )
    layers = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(50))).to(device)
    rows = torch.ones(4, 32, device=device)

    def modules() -> None:
        layers(rows).sum().backward()
        layers.zero_grad()

    found["linear_forward_backward"] = _rounds(modules, per_round=50, seconds=each)
    return found


def _model_candidates(device: Any, each: float) -> dict[str, dict[str, float]]:
    """Return seconds of a tiny Llama's layer, forward and backward; then with module hooks."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device)
    tokens = torch.zeros(1, 16, dtype=torch.long, device=device)

    def steps() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        model.zero_grad()

    found = {"llama_layer": _rounds(steps, per_round=8, seconds=each)}

    class Pass(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: Any, value: Any) -> Any:
            return value.detach()

        @staticmethod
        def backward(_ctx: Any, *grads: Any) -> Any:
            return grads[0]

    for module in model.model.layers.modules():
        module.register_forward_pre_hook(lambda _module, _arguments: None)
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _module, _arguments, output: Pass.apply(output))
    found["llama_layer_with_hooks"] = _rounds(steps, per_round=8, seconds=each)
    return found


def _machine() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {"cpus": os.cpu_count(), "python": platform.python_version()}
    facts["torch"] = torch.__version__
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "cpu MHz", "cache size"):
                facts.setdefault(name.strip(), value.strip())
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name(0)
    return facts


def measure_cpu_adam(lines: Lines, *, sizes: Sequence[int], threads: int) -> None:
    """Measure DeepSpeed's Adam on the processor against the number of parameters."""
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    torch.set_num_threads(threads)
    has_gpu = torch.cuda.is_available()
    for size in sizes:
        began = time.perf_counter()
        parameter = torch.nn.Parameter(torch.zeros(size, pin_memory=has_gpu))
        optimizer = DeepSpeedCPUAdam([parameter], lr=1e-5)
        parameter.grad = torch.full((size,), 1e-3, pin_memory=has_gpu)
        made = time.perf_counter() - began
        steps = []
        for _ in range(6):
            started = time.perf_counter()
            optimizer.step()
            steps.append(round(time.perf_counter() - started, 5))
        extra = _half_copies(parameter, steps=4)
        lines.write(
            "cpu-adam", elements=size, threads=threads, made_seconds=made, steps=steps, **extra,
            nanoseconds_per_element=1e9 * min(steps) / size,
        )  # fmt: skip
        del optimizer, parameter


def _half_copies(parameter: Any, *, steps: int) -> dict[str, Any]:
    """Return seconds of what follows the update: the 16-bit copy, made on the host or sent."""
    import torch

    times: dict[str, list[float]] = {"grad_mul": [], "to_half_on_host": [], "half_to_device": []}
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    half = torch.zeros(parameter.numel(), dtype=torch.bfloat16, device=device)
    for _ in range(steps):
        started = time.perf_counter()
        parameter.grad.mul_(1.0)
        times["grad_mul"].append(round(time.perf_counter() - started, 5))
        started = time.perf_counter()
        on_host = parameter.data.to(torch.bfloat16)
        times["to_half_on_host"].append(round(time.perf_counter() - started, 5))
        started = time.perf_counter()
        half.copy_(parameter.data)
        if has_gpu:
            torch.cuda.synchronize()
        times["half_to_device"].append(round(time.perf_counter() - started, 5))
        del on_host
    return times


def measure_paged_adam(lines: Lines, *, sizes: Sequence[int]) -> None:
    """Measure bitsandbytes' 8-bit AdamW with states on the device, and paged."""
    sys.meta_path[:] = FINDERS
    import bitsandbytes
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for size in sizes:
        for is_paged in (False, True):
            parameter = torch.nn.Parameter(torch.zeros(size, device=device))
            optimizer = bitsandbytes.optim.AdamW8bit([parameter], lr=1e-5, is_paged=is_paged)
            steps, prefetched = [], []
            timers = Timers()
            timers.counting = True
            for name in ("prefetch_state", "update_step"):
                setattr(optimizer, name, timers.wrap(name, getattr(optimizer, name)))
            for _ in range(7):
                parameter.grad = torch.full((size,), 1e-3, device=device)
                _wait(device)
                started = time.perf_counter()
                optimizer.step()
                _wait(device)
                steps.append(round(time.perf_counter() - started, 5))
                prefetched.append(round(timers.seconds["prefetch_state"], 5))
                parameter.grad = None
            lines.write(
                "paged-adam" if is_paged else "adam-8bit", elements=size, steps=steps,
                prefetch_seconds_so_far=prefetched, calls=timers.per(7),
            )  # fmt: skip
            del optimizer, parameter


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def measure_copies(lines: Lines) -> None:
    """Measure pinned memory: making it, taking it again, and copies to and fro."""
    import torch

    if not torch.cuda.is_available():
        lines.write("copies", skipped="there is no GPU")
        return
    for mebibytes in (1, 4, 5, 16, 32, 128):
        size = mebibytes << 20
        source = torch.ones(size, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        made, taken, down, up = [], [], [], []
        kept = []
        for _ in range(6):
            started = time.perf_counter()
            kept.append(torch.empty(size, dtype=torch.uint8, pin_memory=True))
            made.append(round(time.perf_counter() - started, 6))
        kept.clear()
        for _ in range(6):
            started = time.perf_counter()
            packed = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            taken.append(round(time.perf_counter() - started, 6))
            started = time.perf_counter()
            packed.copy_(source, non_blocking=True)
            started_wait = time.perf_counter()
            torch.cuda.synchronize()
            down.append([round(started_wait - started, 6), round(time.perf_counter() - started, 6)])
            started = time.perf_counter()
            back = packed.to("cuda", non_blocking=True)
            started_wait = time.perf_counter()
            torch.cuda.synchronize()
            up.append([round(started_wait - started, 6), round(time.perf_counter() - started, 6)])
            del back, packed
        lines.write("copies", mebibytes=mebibytes, made=made, taken=taken, down=down, up=up)
