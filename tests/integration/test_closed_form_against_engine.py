"""Drift guard: DeepSpeed, run now, must still give the grid that the closed form is tested on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

GRID = Path(__file__).resolve().parents[2] / "benchmarks" / "oracle_grid.jsonl"
PHASES = ("load", "init", "forward", "loss", "backward", "step")
# One per path through DeepSpeed: stages 0 to 3, with and without offload, both methods.
CASES = (
    "7b-z0-lora64qv-gc_none-s2048-n64-auto",
    "7b-z1-full-gc_full-s256-n8-auto",
    "7b-z1o-full-gc_full-s256-n64-auto",
    "7b-z2-lora16all-gc_none-s2048-n2-default",
    "7b-z2o-full-gc_none-s256-n1-auto",
    "7b-z3o-lora64qv-gc_none-s256-n1-auto",
)


def test_the_engine_still_gives_the_stored_bytes() -> None:
    """After an upgrade: run benchmarks/make_oracle_grid.py and see what moved."""
    records = [json.loads(line) for line in GRID.read_text(encoding="utf-8").splitlines()]
    stored = [
        next(r for r in records if r["name"] == name and r["request"]["rank"] == 0)
        for name in CASES
    ]
    done = subprocess.run(
        [sys.executable, "-m", "launcher.worker.trace", "-"],
        input="".join(json.dumps(record["request"]) + "\n" for record in stored),
        capture_output=True,
        text=True,
        timeout=900,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    now = [json.loads(line) for line in done.stdout.splitlines()]
    for record, fresh in zip(stored, now, strict=True):
        was = record["result"]
        versions = (was["versions"], fresh["versions"])
        for phase in PHASES:
            # Scalars of 4 bytes, which the scale does not shrink, live until Python frees them.
            assert fresh["phases"][phase] == pytest.approx(was["phases"][phase], rel=1e-5), (
                record["name"],
                phase,
                versions,
            )
