"""Measure what a step's parts cost the host of a GPU: what the step-time model's constants are of.

    python benchmarks/step_parts.py --out FOLDER [--seconds 145] [--only NAME ...]

First and last come little loops that say how fast the host is: seconds of an operation's dispatch,
of a module's call, of plain Python. Between them real runs of zerofit's worker, some steps each:
how long the engine's forward, backward and step take, how often and how long DeepSpeed's hooks run
inside them, what the device did meanwhile, and where samples of the stack found the host. Then
optimizers and copies by themselves. One JSON object a line in FOLDER/step_parts.jsonl; every part
is a process of its own with a time limit, and one that fails leaves its error there.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

WARM_UP_STEPS = 3
PLAIN_STEPS = 6
SAMPLED_STEPS = 4
TRACED_STEPS = 2
"""Steps of a run in this order; all but the plain ones are slowed down by being looked at."""
SAMPLE_SECONDS = 0.002
FINDERS: list[Any] = []
"""Python's, before bitsandbytes was hidden from it: a process that has imported it cannot fork."""

_1B = {"model.name_or_path": "llama3.2-1b", "max_seq_len": 512, "strategy.zero_stage": 2}
_FULL = {**_1B, "method": "full"}
_LORA = {**_1B, "method": "lora"}
_GC = {"strategy.gradient_checkpointing": "full"}
_GC_CPU = {"strategy.gradient_checkpointing": "cpu_offload"}
_OFFLOAD = {"strategy.offload_optimizer": "cpu"}
RUNS: Mapping[str, Mapping[str, Any]] = {
    "lora-z2": _LORA,
    "lora-z3": {**_LORA, "strategy.zero_stage": 3},
    "full-z3": {**_FULL, "strategy.zero_stage": 3},
    "full-z2-gc-cpu": {**_FULL, **_GC_CPU, "max_seq_len": 1280},
    "full-z2-gc": {**_FULL, **_GC, "max_seq_len": 1280},
    "full-z2": _FULL,
    "full-z3-off-both": {
        **_FULL, **_OFFLOAD, "strategy.zero_stage": 3, "strategy.offload_param": "cpu",
    },
    "full-z2-off": {**_FULL, **_OFFLOAD},
}  # fmt: skip
_SHARED = {
    "model.random_weights": True, "cluster.gpus_per_node": 1,
    "strategy.micro_batch_size_per_gpu": 1, "optim.global_batch_size": 1,
    "strategy.gradient_checkpointing": "none", "strategy.loss": "full",
    "strategy.attention": "sdpa", "strategy.offload_optimizer": "none",
    "strategy.offload_param": "none", "strategy.optimizer": "adamw",
}  # fmt: skip
TIMED = {
    "deepspeed.runtime.zero.parameter_offload:DeepSpeedZeRoOffload": (
        "pre_sub_module_forward_function", "post_sub_module_forward_function",
        "pre_sub_module_backward_function", "post_sub_module_backward_function",
    ),
    "deepspeed.runtime.zero.partitioned_param_coordinator:PartitionedParameterCoordinator": (
        "fetch_sub_module", "release_sub_module", "reset_step",
        "_PartitionedParameterCoordinator__all_gather_params",
        "_PartitionedParameterCoordinator__release_param", "trace_prologue",
        "_PartitionedParameterCoordinator__params_to_release",
    ),
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3": (
        "reduce_ready_partitions_and_remove_grads", "independent_gradient_partition_epilogue",
        "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads", "partition_grads",
        "step", "_optimizer_step", "_prepare_sub_group", "unscale_and_clip_grads",
        "_release_sub_group", "_reassign_or_swap_out_partitioned_parameters", "_get_norm_groups",
        "complete_grad_norm_calculation_for_cpu_offload", "_post_step", "_pre_step",
        "_overflow_check_and_loss_scale_update", "zero_grad",
    ),
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer": (
        "reduce_ready_partitions_and_remove_grads", "independent_gradient_partition_epilogue",
        "reduce_ipg_grads", "copy_grads_in_partition", "average_tensor", "step", "_optimizer_step",
        "complete_grad_norm_calculation_for_cpu_offload", "scaled_global_norm",
        "unscale_and_clip_grads", "_update_model_bit16_weights", "get_flat_partition",
        "get_grad_norm_direct", "_wait_for_offload_copies", "has_overflow", "zero_grad",
        "async_inplace_copy_grad_to_fp32_buffer_from_gpu", "_get_preflattened_grad_partition",
        "flatten_dense_tensors_aligned", "reset_cpu_buffers", "update_lp_params",
    ),
    "deepspeed.runtime.engine:DeepSpeedEngine": ("forward", "backward", "step"),
    "deepspeed.ops.adam.cpu_adam:DeepSpeedCPUAdam": ("step",),
    "torch.optim.adamw:AdamW": ("step",),
    "torch.optim.adam:Adam": ("step",),
    "transformers.trainer:Trainer": (
        "_maybe_log_save_evaluate", "log", "_prepare_inputs", "get_batch_samples",
    ),
    "launcher.worker.trainer:MeasuredTrainer": ("training_step",),
    "launcher.worker.peak_memory:PeakRecorder": ("switch", "end_step"),
}  # fmt: skip
"""Methods whose calls are counted and timed, inclusive of what they call."""


class Lines:
    """The results file; every line is on the disk at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, part: str, **values: Any) -> None:
        line = json.dumps({"part": part, **values})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line[:1500], flush=True)


# --- How fast the host is -------------------------------------------------------------------


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


def measure_host(lines: Lines, *, when: str, seconds: float) -> None:
    """Measure candidates for a number that says how fast a host starts work."""
    import torch

    torch.set_num_threads(1)
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    found: dict[str, dict[str, float]] = {}
    each = seconds / 9

    def python_calls() -> None:
        class Thing:
            def __init__(self) -> None:
                self.value = 0

            def add(self, other: int) -> int:
                self.value += other
                return self.value

        thing, table = Thing(), {}
        for index in range(10_000):
            table[index & 63] = thing.add(index)

    found["python_call"] = _rounds(python_calls, per_round=10_000, seconds=each)

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

    def forward_and_backward() -> None:
        value = base
        for _ in range(100):
            value = value * base
        value.sum().backward()
        base.grad = None

    found["mul_forward_backward"] = _rounds(forward_and_backward, per_round=100, seconds=each)
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
        def forward(ctx: Any, value: Any) -> Any:
            return value.detach()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return grads[0]

    for module in model.model.layers.modules():
        module.register_forward_pre_hook(lambda _module, arguments: None)
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


# --- Runs of the worker ---------------------------------------------------------------------


class Timers:
    """Calls and seconds of functions, by name; only while they are told to count."""

    def __init__(self) -> None:
        self.counting = False
        self.calls: collections.Counter[str] = collections.Counter()
        self.seconds: collections.Counter[str] = collections.Counter()

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                if self.counting:
                    self.calls[name] += 1
                    self.seconds[name] += time.perf_counter() - started

        return timed

    def wrap_all(self) -> list[str]:
        """Wrap the methods of ``TIMED``; return those that are not there."""
        absent = []
        for place, names in TIMED.items():
            module_name, _, class_name = place.partition(":")
            try:
                module = __import__(module_name, fromlist=[class_name])
                owner = getattr(module, class_name)
            except (ImportError, AttributeError):
                absent.append(place)
                continue
            for name in names:
                if name not in vars(owner):
                    absent.append(f"{class_name}.{name}")
                    continue
                function = vars(owner)[name]
                setattr(owner, name, self.wrap(f"{class_name}.{name}", function))
        return absent

    def per(self, steps: int) -> dict[str, list[float]]:
        """Return calls and milliseconds a step, the longest first."""
        return {
            name: [round(self.calls[name] / steps, 2), round(1e3 * seconds / steps, 3)]
            for name, seconds in self.seconds.most_common()
        }


class Sampler:
    """Looks every other millisecond where the threads that train are: the innermost frames."""

    def __init__(self) -> None:
        self.here: collections.Counter[str] = collections.Counter()
        self.within: collections.Counter[str] = collections.Counter()
        self.count = 0
        self._stop = threading.Event()
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._look, daemon=True)

    def start(self) -> None:
        sys.setswitchinterval(0.0005)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        sys.setswitchinterval(0.005)

    def _look(self) -> None:
        named = {thread.ident for thread in threading.enumerate()} - {self._main}
        while not self._stop.wait(SAMPLE_SECONDS):
            frames = sys._current_frames()
            main = frames.pop(self._main, None)
            # Autograd's threads are not Python's: only those that run hooks have frames here.
            others = [frame for ident, frame in frames.items() if ident not in named]
            chosen = others[0] if others else main
            if chosen is None:
                continue
            self.count += 1
            names = []
            frame = chosen
            while frame is not None:
                code = frame.f_code
                folder = Path(code.co_filename)
                names.append(f"{folder.parent.name}/{folder.name}:{code.co_name}")
                frame = frame.f_back
            self.here[names[0]] += 1
            self.within.update(set(names))

    def most(self) -> dict[str, Any]:
        """Return shares of the samples: innermost frames, and frames anywhere on the stack."""
        total = max(1, self.count)
        return {
            "samples": self.count,
            "innermost": {n: round(c / total, 3) for n, c in self.here.most_common(40)},
            "anywhere": {n: round(c / total, 3) for n, c in self.within.most_common(90)},
        }


class Watched:
    """Follows the worker through its steps and writes what it saw after the last."""

    def __init__(self, name: str, lines: Lines) -> None:
        self.name, self.lines, self.timers = name, lines, Timers()
        self.absent = self.timers.wrap_all()
        self.ends: list[float] = []
        self.sampler = Sampler()
        self.trace: Any = None
        self.before: dict[str, float] = {}

    def end_step(self) -> None:
        """Note a step's end, and begin or end what the next steps are for."""
        self.ends.append(time.perf_counter())
        done = len(self.ends)
        if done == WARM_UP_STEPS:
            self.before = _host_memory()
            self.timers.counting = True
        if done == WARM_UP_STEPS + PLAIN_STEPS:
            self.timers.counting = False
            self._write_plain()
            self.sampler.start()
        if done == WARM_UP_STEPS + PLAIN_STEPS + SAMPLED_STEPS:
            self.sampler.stop()
            self.lines.write(f"{self.name}.samples", **self.sampler.most())
            self._begin_trace()
        if done == WARM_UP_STEPS + PLAIN_STEPS + SAMPLED_STEPS + TRACED_STEPS:
            self._end_trace()
            sys.stdout.flush()
            os._exit(0)

    def _write_plain(self) -> None:
        plain = self.ends[WARM_UP_STEPS - 1 :]
        steps = [end - begin for begin, end in zip(plain, plain[1:], strict=False)]
        after = _host_memory()
        self.lines.write(
            self.name,
            step_seconds=statistics.median(steps), steps=[round(s, 5) for s in steps],
            calls_and_milliseconds=self.timers.per(PLAIN_STEPS), absent=self.absent,
            host_memory={name: after[name] - self.before.get(name, 0) for name in after},
            threads=os.environ.get("OMP_NUM_THREADS"),
        )  # fmt: skip

    def _begin_trace(self) -> None:
        import torch

        if torch.cuda.is_available():
            activities = [torch.profiler.ProfilerActivity.CUDA]
            self.trace = torch.profiler.profile(activities=activities)
            self.trace.__enter__()
            self.trace_started = time.perf_counter()

    def _end_trace(self) -> None:
        if self.trace is None:
            return
        seconds = time.perf_counter() - self.trace_started
        self.trace.__exit__(None, None, None)
        rows: collections.Counter[str] = collections.Counter()
        counts: collections.Counter[str] = collections.Counter()
        spans = []
        for event in self.trace.profiler.kineto_results.events():
            kind = str(event.device_type())
            if "CUDA" not in kind:
                rows[f"host {event.name()}"] += event.duration_ns()
                counts[f"host {event.name()}"] += 1
                continue
            rows[event.name()[:70]] += event.duration_ns()
            counts[event.name()[:70]] += 1
            spans.append((event.start_ns(), event.end_ns()))
        busy, reached = 0, 0
        for begin, end in sorted(spans):
            busy += max(0, end - max(begin, reached))
            reached = max(reached, end)
        self.lines.write(
            f"{self.name}.device",
            step_seconds=seconds / TRACED_STEPS, busy_seconds=busy / 1e9 / TRACED_STEPS,
            milliseconds_and_calls={
                name: [round(ns / 1e6 / TRACED_STEPS, 3), counts[name] / TRACED_STEPS]
                for name, ns in rows.most_common(30)
            },
        )  # fmt: skip


def _host_memory() -> dict[str, float]:
    """Return counts of the pinned allocator's, and the process's page faults."""
    import torch

    faults = resource.getrusage(resource.RUSAGE_SELF)
    found: dict[str, float] = {"minor_faults": faults.ru_minflt, "major_faults": faults.ru_majflt}
    if torch.cuda.is_available() and hasattr(torch.cuda, "host_memory_stats"):
        stats = torch.cuda.host_memory_stats()
        wanted = ("num_host_alloc", "num_host_free", "host_alloc_time.total", "host_alloc_time.max")
        found |= {name: stats[name] for name in wanted if name in stats}
        found |= {n: v for n, v in stats.items() if n.endswith(("current", "allocated"))}
    return found


def run_worker(name: str, lines: Lines, folder: Path, changes: Mapping[str, Any]) -> None:
    """Be a rank of a run of zerofit's worker, watched."""
    from launcher.dispatch.base import write_files
    from launcher.dispatch.local import LocalBackend
    from launcher.job_script import job_environment
    from launcher.launch import create_run
    from launcher.prepare import prepare
    from launcher.recipe import parse_recipe

    steps = WARM_UP_STEPS + PLAIN_STEPS + SAMPLED_STEPS + TRACED_STEPS
    options = {**_SHARED, **RUNS[name], **changes, "optim.max_steps": steps}
    overrides = [
        f"{key}={json.dumps(value) if isinstance(value, bool) else value}"
        for key, value in options.items()
    ]
    recipe = parse_recipe("", source=name, overrides=overrides)
    prepared = prepare(recipe, source=name)
    predicted = prepared.plan
    run_dir, backend, request = create_run(prepared, folder / name)
    assert isinstance(backend, LocalBackend)
    write_files(request, run_dir)
    os.environ.update(job_environment(backend.job(predicted, run_dir)))
    os.chdir(run_dir)
    for variable, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ[variable] = value
    from launcher.worker import model, train
    from launcher.worker.trainer import StepClock

    watched = Watched(name, lines)
    _time_saved_tensors(model, watched.timers)
    usual = StepClock.on_step_end

    def on_step_end(self: Any, *arguments: Any, **keywords: Any) -> None:
        usual(self, *arguments, **keywords)
        watched.end_step()

    StepClock.on_step_end = on_step_end  # type: ignore[method-assign]
    lines.write(
        f"{name}.plan", predicted_step_seconds=predicted.time.step_seconds,
        components=dict(predicted.time.components),
    )  # fmt: skip
    status = train.main(["--run-dir", str(run_dir)])
    lines.write(f"{name}.ended", status=status, log=_tail(run_dir))


def _time_saved_tensors(model: Any, timers: Timers) -> None:
    """Count the tensors that wait on the host, and the seconds of bringing them there and back."""
    usual = model.save_on_cpu

    class Timed(usual):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.pack_hook = timers.wrap("save_on_cpu.pack", self.pack_hook)
            self.unpack_hook = timers.wrap("save_on_cpu.unpack", self.unpack_hook)

    model.save_on_cpu = Timed


def _tail(run_dir: Path) -> list[str]:
    texts = []
    for path in sorted(run_dir.glob("*.log")) + sorted(run_dir.glob("rank*.json")):
        with contextlib.suppress(OSError):
            texts += [f"{path.name}: {line}" for line in path.read_text().splitlines()[-25:]]
    return texts[-60:]


# --- Optimizers and copies by themselves ----------------------------------------------------


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


# --- One part after another -----------------------------------------------------------------


class Part:
    """A part of the program: what it does and how long it may take."""

    def __init__(self, name: str, seconds: float, action: Callable[[], None]) -> None:
        self.name, self.seconds, self.action = name, seconds, action
        self.needs_cpu_adam = name == "cpu-adam" or name.endswith(("-off", "-off-both"))


def parts(lines: Lines, folder: Path, changes: Mapping[str, Any], small: bool) -> Iterator[Part]:
    """Yield all parts in order."""
    yield Part(
        "host-first", 20, lambda: measure_host(lines, when="first", seconds=0.9 if small else 7)
    )
    yield Part("copies", 10, lambda: measure_copies(lines))
    for name in RUNS:
        if name.endswith(("-off", "-off-both")):
            continue
        yield Part(name, 25, functools.partial(run_worker, name, lines, folder, changes))
    sizes = [100_000] if small else [1_000_000, 100_000_000, 1_240_000_000]
    yield Part("paged-adam", 30, lambda: measure_paged_adam(lines, sizes=sizes))
    sizes = [100_000] if small else [1_000_000, 30_000_000, 300_000_000, 1_240_000_000]
    threads = os.cpu_count() or 1
    yield Part("cpu-adam", 30, lambda: measure_cpu_adam(lines, sizes=sizes, threads=threads))
    for name in RUNS:
        if name.endswith(("-off", "-off-both")):
            yield Part(name, 30, functools.partial(run_worker, name, lines, folder, changes))
    yield Part(
        "host-last", 12, lambda: measure_host(lines, when="last", seconds=0.9 if small else 4)
    )


def run_part(part: Part, lines: Lines, *, seconds: float) -> None:
    """Fork the part, wait for it no longer than it may take, and write how it ended."""
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setsid()
            part.action()
            status = 0
        except BaseException as error:  # noqa: BLE001 - the next part must go on
            lines.write(part.name, error=f"{type(error).__name__}: {error}",
                        trace=traceback.format_exc().splitlines()[-15:])  # fmt: skip
        finally:
            sys.stdout.flush()
            os._exit(status)
    status = None
    while time.monotonic() - started < seconds:
        done, raw = os.waitpid(pid, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(raw)
            break
        time.sleep(0.05)
    if status is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, 9)
        os.waitpid(pid, 0)
    took = round(time.monotonic() - started, 2)
    lines.write(f"{part.name}.part", status=status, seconds=took, limit=round(seconds, 1))


def compile_cpu_adam(log: Path) -> subprocess.Popen[bytes]:
    """Begin to compile DeepSpeed's Adam for the processor, which takes a minute.

    It is never killed: it would leave a lock behind that later runs wait for.
    """
    code = "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()"
    env = {**os.environ, "TORCH_CUDA_ARCH_LIST": "9.0"}
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=output,
            stderr=output,
            env=env,
            start_new_session=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=145.0, help="in all")
    parser.add_argument("--only", nargs="*", help="parts to run, by name")
    parser.add_argument("--small", action="store_true", help="sizes for a machine without GPU")
    parser.add_argument("--change", nargs="*", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = Lines(options.out / "step_parts.jsonl")
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cuda")
    from launcher.worker.fork_server import import_stack

    FINDERS.extend(sys.meta_path)
    import_stack(without_bitsandbytes=True)
    lines.write("imported", seconds=round(time.monotonic() - started, 2))
    compiling, is_compiled = None, False
    changes = dict(word.split("=", 1) for word in options.change)
    with tempfile.TemporaryDirectory() as scratch:
        for part in parts(lines, Path(scratch), changes, options.small):
            if options.only and part.name not in options.only:
                continue
            left = options.seconds - (time.monotonic() - started)
            if part.name == "cpu-adam":
                compiling = compiling or compile_cpu_adam(options.out / "compile.log")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    compiling.wait(timeout=max(1.0, left - 25))
                is_compiled = compiling.poll() == 0
                lines.write("compiled", status=compiling.poll(), log=_end(options.out))
            if part.needs_cpu_adam and not is_compiled:
                lines.write(f"{part.name}.part", skipped="CPU Adam is not compiled")
                continue
            left = options.seconds - (time.monotonic() - started)
            if left < 4:
                lines.write(f"{part.name}.part", skipped="no time left")
                continue
            run_part(part, lines, seconds=min(part.seconds * (8 if options.small else 1), left))
            if compiling is None and part.name == "host-first":
                compiling = compile_cpu_adam(options.out / "compile.log")
    lines.write("ended", seconds=round(time.monotonic() - started, 2))


def _end(folder: Path) -> list[str]:
    return (folder / "compile.log").read_text(errors="replace").splitlines()[-8:]


if __name__ == "__main__":
    main()
