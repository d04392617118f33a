"""What measuring a rank costs: steps of the same model with and without it, in turns.

Prints a line of JSON; measuring_cost.jsonl keeps such lines. It takes about 40 s, or half of that
on the first GPU where there is one. Without a GPU the seconds are the processor's, of all threads,
so that other work on the machine does not count; and the first three steps, in which tensors are
counted, are left out: they cost more by design, and are three.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from launcher.watchdog import Patience
from launcher.worker.heartbeat import Heartbeat
from launcher.worker.peak_memory import TRACKED_STEPS, PeakRecorder

SECONDS = {"cuda": 20.0, "cpu": 36.0}
STEPS_PER_TURN = 8
MICRO_STEPS = 2


class Engine(torch.nn.Module):
    """A model, its optimizer and the three calls that the recorder watches of DeepSpeed's."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        large = device.type == "cuda"
        config = LlamaConfig(
            vocab_size=32_000 if large else 2_000,
            hidden_size=1024 if large else 192,
            intermediate_size=2816 if large else 512,
            num_hidden_layers=16 if large else 4,
            num_attention_heads=16 if large else 4,
            num_key_value_heads=16 if large else 4,
        )
        self.module = LlamaForCausalLM(config).to(device, torch.bfloat16 if large else None)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-5, fused=large)
        shape = (4, 1024) if large else (2, 96)
        self.batch = torch.randint(config.vocab_size, shape, device=device)

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def take_steps(engine: Engine, count: int, end_step: Callable[[], None]) -> list[float]:
    """Return the seconds of each optimizer step: of the clock on a GPU, else of the processor."""
    clock = time.perf_counter if engine.batch.is_cuda else time.process_time
    seconds = []
    for _ in range(count):
        started = clock()
        for _ in range(MICRO_STEPS):
            output = engine(input_ids=engine.batch, labels=engine.batch, use_cache=False)
            engine.backward(output.loss)
        engine.step()
        if engine.batch.is_cuda:
            # As in a run, where the norm of the gradients is read in each step.
            torch.cuda.synchronize()
        end_step()
        seconds.append(clock() - started)
    return seconds


class Spent:
    """Time in some functions, by a clock."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.seconds = 0.0
        self._clock = clock

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            started = self._clock()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += self._clock() - started

        return run


def measured_turn(
    engine: Engine, folder: Path, main: Spent, thread: Spent
) -> tuple[list[float], float]:
    """Return the seconds of steps under a new recorder, and all of them by the clock."""
    plain = engine.forward, engine.backward, engine.step
    plain_reset = torch.cuda.reset_peak_memory_stats
    endless = Patience(training_seconds=0, phase_seconds=0)
    heartbeat = Heartbeat(folder, endless, rank=0, local_rank=0, world_size=1)
    heartbeat.start()
    recorder = PeakRecorder(heartbeat, device=engine.batch.device)
    recorder._sample = thread.counted(recorder._sample)  # type: ignore[method-assign]
    recorder.start()
    recorder.watch_engine(engine)
    recorder.begin_training()
    take_steps(engine, TRACKED_STEPS, recorder.end_step)
    thread.seconds = 0.0
    recorder.switch = main.counted(recorder.switch)  # type: ignore[method-assign]
    started = time.perf_counter()
    seconds = take_steps(engine, STEPS_PER_TURN, recorder.end_step)
    wall_seconds = time.perf_counter() - started
    in_thread = thread.seconds
    recorder.finish()
    thread.seconds = in_thread
    engine.forward, engine.backward, engine.step = plain  # type: ignore[method-assign]
    torch.cuda.reset_peak_memory_stats = plain_reset
    engine.module.get_decoder()._forward_hooks.clear()
    return seconds, wall_seconds


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    engine = Engine(device)
    take_steps(engine, 5, lambda: None)
    with_it: list[float] = []
    without: list[float] = []
    in_main, in_thread, wall = 0.0, 0.0, 0.0
    ends = time.monotonic() + SECONDS[device.type]
    with tempfile.TemporaryDirectory() as name:
        while time.monotonic() < ends:
            take_steps(engine, TRACKED_STEPS, lambda: None)
            without += take_steps(engine, STEPS_PER_TURN, lambda: None)
            # Of the processor: elsewhere on a busy machine the clock would count other work.
            on_main, on_thread = Spent(time.thread_time), Spent(time.thread_time)
            seconds, wall_seconds = measured_turn(engine, Path(name), on_main, on_thread)
            with_it += seconds
            wall += wall_seconds
            in_main += on_main.seconds
            in_thread += on_thread.seconds
    usual, measured = statistics.median(without), statistics.median(with_it)
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "machine": platform.machine(),
        "torch": torch.__version__,
        "load_average": round(os.getloadavg()[0], 1),
        "micro_steps": MICRO_STEPS,
        "steps_each_way": len(with_it),
        "median_step_seconds_without": round(usual, 6),
        "median_step_seconds_with": round(measured, 6),
        "cost_fraction": round(measured / usual - 1, 5),
        "recorder_seconds_per_step": round(in_main / len(with_it), 6),
        "recorder_fraction": round(in_main / len(with_it) / usual, 5),
        # Ten times a second whatever the steps take.
        "sampler_thread_fraction": round(in_thread / wall, 5),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
