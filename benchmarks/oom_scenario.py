"""A recipe that really does not fit this GPU recovers by itself: told apart from how fast it is.

    python benchmarks/oom_scenario.py --out FOLDER [--only NAME] [KEY=VALUE ...]

Each case forces a strategy that runs out of memory on one GPU of 80 GB, starts it with `zerofit
train --anyway`, and looks at what the supervisor did; then the planner's own choice is run, whose
losses must be the same: only the memory of the run may have changed. Overrides change the recipe
(`model.name_or_path=…` for a GPU of another size). One JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from launcher import run_dir as rd
from launcher.recovery.record import FailedAttempt, read_failed_attempts

NUM_STEPS = 6
CASES = {
    # 203 GiB of activations and logits are predicted: it ends in the first forward.
    "micro-batch": [
        "model.name_or_path=llama3.2-1b", "method=lora", "max_seq_len=2048",
        "strategy.zero_stage=2", "strategy.micro_batch_size_per_gpu=32",
        "strategy.gradient_checkpointing=none", "strategy.loss=full",
        "optim.global_batch_size=32", "optim.save_steps=2",
    ],
    # Weights, master weights and gradients fit; Adam's moments, made in the first step, do not.
    "optimizer-states": [
        "model.name_or_path=qwen3-4b", "method=full", "max_seq_len=512",
        "strategy.zero_stage=2", "strategy.micro_batch_size_per_gpu=1",
        "strategy.offload_optimizer=none", "optim.global_batch_size=4",
    ],
}  # fmt: skip
SHARED = ["model.random_weights=true", "cluster.gpus_per_node=1", f"optim.max_steps={NUM_STEPS}"]
LOSS_TOLERANCE = 0.001
"""Relative; in bf16 another micro-batch rounds differently."""
LIMIT_SECONDS = 900.0


def run_case(name: str, recipe: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run a case that does not fit, and the planner's own choice; return what held."""
    run, plain = folder / name, folder / f"{name}-plain"
    started = time.monotonic()
    status = _train(*recipe, "--anyway", run=run)
    seconds = time.monotonic() - started
    failed = read_failed_attempts(run)
    free = [item for item in recipe if not item.startswith("strategy.")]
    plain_status = _train(*free, run=plain)
    losses, expected = _losses(run), _losses(plain)
    worst = max(
        (abs(losses[step] - loss) / abs(loss) for step, loss in expected.items() if step in losses),
        default=float("inf"),
    )
    has_recovered = status == 0 and bool(failed) and all(item.kind == "gpu_oom" for item in failed)
    return {
        "case": name,
        "held": has_recovered
        and plain_status == 0
        and set(losses) == set(range(1, NUM_STEPS + 1))
        and worst <= LOSS_TOLERANCE,
        "exit_status": status,
        "seconds": round(seconds, 1),
        "attempts": [
            {
                "problem": item.problem,
                "phase": item.phase,
                "step": item.step,
                "changes": dict(item.changes),
                "given_up": list(item.given_up),
                "seconds_until_decided": _seconds_until_decided(run, item),
            }
            for item in failed
        ],
        "losses": losses,
        "losses_of_the_planners_choice": expected,
        "worst_relative_difference": worst,
        "said": _tail(folder / f"{name}.log") if not has_recovered else "",
    }


def _train(*args: str, run: Path) -> int:
    with (run.parent / f"{run.name}.log").open("wb") as stream:
        done = subprocess.run(
            [sys.executable, "-m", "launcher.cli", "train", *args, "--output-dir", str(run)],
            stdout=stream, stderr=stream, timeout=LIMIT_SECONDS, check=False,
        )  # fmt: skip
    return done.returncode


def _seconds_until_decided(run: Path, item: FailedAttempt) -> float | None:
    """Return the time from the first rank's last words to the decision, ranks ended by then.

    To the second, as the record has it.
    """
    ranks = (run / "attempts" / str(item.attempt) / rd.RANKS).glob("[0-9]*.json")
    first = min((path.stat().st_mtime for path in ranks), default=None)
    if first is None:
        return None
    return round(datetime.fromisoformat(item.failed_at).timestamp() - first, 1)


def _losses(run: Path) -> dict[int, float]:
    log = run / rd.TRAINER_LOG
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    entries = [entry for line in lines if "loss" in (entry := json.loads(line))]
    return {int(entry["step"]): float(entry["loss"]) for entry in entries}


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:])


def main() -> int:
    """Run all cases; the exit status is 1 when one did not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="zerofit-oom-"))
    has_failed = False
    for name, recipe in CASES.items():
        if options.only not in name:
            continue
        found = run_case(name, [*recipe, *SHARED, *options.overrides], folder)
        with (options.out / "oom.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(found) + "\n")
        print(json.dumps(found, indent=1), flush=True)
        has_failed = has_failed or not found["held"]
    shutil.rmtree(folder, ignore_errors=True)
    return int(has_failed)


if __name__ == "__main__":
    raise SystemExit(main())
