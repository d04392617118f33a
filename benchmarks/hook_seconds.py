"""Time ZeRO-3's hooks around modules on this processor: predict/time_calibration.py's source.

    python benchmarks/hook_seconds.py > benchmarks/hook_seconds.jsonl

DeepSpeed's real engine runs chains of modules that hardly compute. Eighty modules more, with or
without parameters of their own, divided by eighty, are one module's seconds in a micro-step of two
passes. One JSON object a line; the first says how fast this machine's Python is, to compare it with
the host of step_parts_h100.jsonl.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import sys
import time
from importlib import import_module
from importlib.metadata import version

from step_loops import python_call_seconds

FEW, MANY = 40, 120
NUM_STEPS, NUM_WARM = 24, 4


def step_seconds(*, owns: bool, num_modules: int, zero_stage: int) -> list[float]:
    """Return the seconds of each micro-step, forward and backward, of a chain of modules."""
    import deepspeed
    import torch

    class Link(torch.nn.Module):
        def __init__(self, *, owns: bool) -> None:
            super().__init__()
            if owns:
                self.weight = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight[:1] if hasattr(self, "weight") else x * 1.0

    chain = [Link(owns=True), *(Link(owns=owns) for _ in range(num_modules))]
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": zero_stage,
            "stage3_param_persistence_threshold": 10,
            "stage3_prefetch_bucket_size": 20_000,
            "stage3_max_reuse_distance": 0,
            "reduce_bucket_size": 10**6,
        },
    }
    model = torch.nn.Sequential(*chain)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3), config=settings
    )
    x = torch.ones(1, 8, dtype=torch.bfloat16)
    times = []
    for _ in range(NUM_WARM + NUM_STEPS):
        started = time.perf_counter()
        engine.backward(engine(x).sum())
        times.append(time.perf_counter() - started)
        engine.step()
    return times[NUM_WARM:]


def main() -> None:
    """Print what one more module costs, under ZeRO-2 and ZeRO-3."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    for name in ("deepspeed", "torch._dynamo"):
        import_module(name)
    import torch
    from deepspeed.utils import logger

    from launcher.worker.trace_engine import fake_rank

    logger.setLevel(logging.ERROR)
    torch.set_num_threads(1)
    versions = {name: version(name) for name in ("deepspeed", "torch")}
    speed = python_call_seconds(seconds=1.0)
    print(json.dumps({"versions": versions, "python_call_seconds": speed}))
    with fake_rank(0, 1):
        for stage in (2, 3):
            for owns in (False, True):
                few, many = (
                    step_seconds(owns=owns, num_modules=count, zero_stage=stage)
                    for count in (FEW, MANY)
                )
                found = {
                    name: (pick(many) - pick(few)) / (MANY - FEW)
                    for name, pick in (("least", min), ("median", statistics.median))
                }
                print(json.dumps({"zero_stage": stage, "owns": owns, "seconds": found}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
