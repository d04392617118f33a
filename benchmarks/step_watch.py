"""Runs of zerofit's worker, looked at from within: for step_parts.py."""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import json
import os
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

WARM_UP_STEPS = 3
PLAIN_STEPS = 6
SAMPLED_STEPS = 4
TRACED_STEPS = 2
"""Steps of a run in this order; all but the plain ones are slowed down by being looked at."""
SAMPLE_SECONDS = 0.002
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
        steps = [end - begin for begin, end in itertools.pairwise(plain)]
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
    if not isinstance(backend, LocalBackend):
        raise SystemExit("there is a Slurm job around: run this on one machine without")
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
