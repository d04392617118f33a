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
import contextlib
import functools
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from step_loops import FINDERS, measure_copies, measure_cpu_adam, measure_host, measure_paged_adam
from step_watch import RUNS, Lines, run_worker


class Part:
    """A part of the program: what it does and how long it may take."""

    def __init__(self, name: str, seconds: float, action: Callable[[], None]) -> None:
        self.name, self.seconds, self.action = name, seconds, action
        self.needs_cpu_adam = name == "cpu-adam" or name.endswith(("-off", "-off-both"))


def parts(lines: Lines, folder: Path, changes: Mapping[str, Any], *, small: bool) -> Iterator[Part]:
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
        for part in parts(lines, Path(scratch), changes, small=options.small):
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
