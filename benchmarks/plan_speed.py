"""Measure how fast plans are made; --out keeps the numbers.

    python benchmarks/plan_speed.py --out benchmarks/results/plan_speed.json

One core: threads of numerical libraries play no part. Each figure is the best of several, in
seconds of a processor, which on a machine that does nothing else are those of a clock.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from launcher.hardware import default_cluster, find_gpu
from launcher.model_source import load_catalogue_entry
from launcher.model_spec import spec_from_config
from launcher.planning.matrix import STUDY_CONTEXTS, STUDY_MODELS
from launcher.planning.planner import choose_strategy, make_plan
from launcher.resolve import default_precision
from launcher.strategy import Method
from launcher.workload import Workload

COMMAND = (
    "plan", "--model", "llama2-7b", "--method", "lora", "--max-seq-len", "4096",
    "--gpu", "A100-80GB", "--gpus-per-node", "8",
)  # fmt: skip
TARGETS = {
    "matrix_best_only_seconds": 1.0,
    "matrix_every_kind_seconds": 1.0,
    "ten_thousand_gpus_seconds": 1.0,
    "command_seconds": 0.5,
}


def best_of(count: int, act: Callable[[], object]) -> float:
    """Return the shortest of several times of this process and its children, in seconds."""
    times = []
    for _ in range(count):
        started = os.times()
        act()
        # User's and system's time, of this process and of children that have ended.
        times.append(sum(os.times()[:4]) - sum(started[:4]))
    return min(times)


def matrix(gpu: str, method: Method, per_gpu: int, *, every_kind: bool) -> int:
    """Choose every cell of the study's grid; return how many candidates were weighed."""
    cluster = default_cluster(find_gpu(gpu), gpus_per_node=8)
    weighed = 0
    for name in STUDY_MODELS:
        model = spec_from_config(load_catalogue_entry(name).config, name=name)
        for tokens in STUDY_CONTEXTS:
            workload = Workload(
                model=model,
                method=method,
                max_seq_len=tokens,
                global_batch_size=8 * per_gpu,
                precision=default_precision(cluster.gpu),
            )
            choice = choose_strategy(workload, cluster, every_kind=every_kind)
            weighed += len(choice.weighed) + len(choice.smaller)
    return weighed


def ten_thousand_gpus() -> None:
    """Plan full fine-tuning of a 70B model on 1,250 nodes of 8 H100."""
    cluster = default_cluster(find_gpu("H100-80GB"), num_nodes=1250, gpus_per_node=8)
    model = spec_from_config(load_catalogue_entry("llama2-70b").config, name="llama2-70b")
    workload = Workload(model=model, method=Method.full, max_seq_len=4096, global_batch_size=40_000)
    make_plan(workload, cluster)


def command() -> None:
    """Run the command itself, imports and output included.

    With byte-code files, as pip leaves them for an installed package: to compile all modules
    anew, which ``PYTHONDONTWRITEBYTECODE`` makes of every start, takes longer than the plan.
    """
    zerofit = Path(sys.executable).parent / "zerofit"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([zerofit, *COMMAND], check=True, stdout=subprocess.DEVNULL, env=environment)


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, help="write the numbers to this file")
    out = parser.parse_args().out
    cases = [(method, per_gpu) for method in Method for per_gpu in (1, 16)]
    found = {
        f"matrix_{name}_seconds": max(
            best_of(3, partial(matrix, "V100-32GB", *case, every_kind=every_kind)) for case in cases
        )
        for name, every_kind in (("best_only", False), ("every_kind", True))
    } | {
        "ten_thousand_gpus_seconds": best_of(3, ten_thousand_gpus),
        "command_seconds": best_of(5, command),
        "python": platform.python_version(),
        "processor": _processor(),
        "load_average": os.getloadavg()[0],
    }
    for name, target in TARGETS.items():
        print(f"{name}: {found[name]:.3f} (target {target})")
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
