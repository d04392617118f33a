"""What must hold when a run on several GPUs is stopped: told apart from how fast it is.

    python benchmarks/scenarios.py --out FOLDER [KEY=VALUE ...]

Each scenario goes through the command line as a user would, on two ranks of this machine: a run is
stopped by SIGTERM between two of its checkpoints, goes on with one rank from what it saved then,
is stopped by SIGUSR1, and goes on once more, from the checkpoint before the first stop, through
steps whose losses are known. Recipes that cannot fit, on two GPUs or on one of 80 GB, are started
all the same, and the planner's own choice beside them: only the memory may differ, not the losses.
Overrides change the recipe. One JSON object a line: the scenario, whether it held, and why.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher import run_dir as rd
from launcher.errors import JobFailedError
from launcher.failure_kind import FailureKind
from launcher.recovery.record import read_failed_attempts

SAVE_STEPS = 25
# Adapters under ZeRO-2, and all weights under ZeRO-3.
RUNS = {
    "lora-z2": [
        "model.name_or_path=llama3.2-1b", "method=lora", "max_seq_len=512",
        "strategy.zero_stage=2",
    ],
    "full-z3": [
        "model.name_or_path=smollm2-135m", "method=full", "max_seq_len=512",
        "strategy.zero_stage=3",
    ],
}  # fmt: skip
SHARED = [
    "model.random_weights=true", "cluster.gpus_per_node=2", "optim.global_batch_size=4",
    "optim.max_steps=400", f"optim.save_steps={SAVE_STEPS}", "optim.save_total_limit=9",
]  # fmt: skip
TOO_LARGE = {
    # 65,536 tokens a rank: 214 GB, of which logits and loss are 84 (10 bytes each).
    "too-large": [
        "model.name_or_path=llama3.2-1b", "method=lora",
        "max_seq_len=8192", "strategy.zero_stage=2", "strategy.loss=full",
        "strategy.gradient_checkpointing=none", "strategy.micro_batch_size_per_gpu=8",
        "strategy.offload_optimizer=none",
        "cluster.gpus_per_node=2", "optim.global_batch_size=16", "optim.max_steps=4",
    ],
    # 203 GiB of activations and logits are predicted: it ends in the first forward.
    "too-large-one-gpu": [
        "model.name_or_path=llama3.2-1b", "method=lora", "max_seq_len=2048",
        "strategy.zero_stage=2", "strategy.micro_batch_size_per_gpu=32",
        "strategy.gradient_checkpointing=none", "strategy.loss=full",
        "cluster.gpus_per_node=1", "optim.global_batch_size=32", "optim.max_steps=6",
        "optim.save_steps=2",
    ],
    # Weights, master weights and gradients fit; Adam's moments, made in the first step, do not.
    "optimizer-states-one-gpu": [
        "model.name_or_path=qwen3-4b", "method=full", "max_seq_len=512",
        "strategy.zero_stage=2", "strategy.micro_batch_size_per_gpu=1",
        "strategy.offload_optimizer=none",
        "cluster.gpus_per_node=1", "optim.global_batch_size=4", "optim.max_steps=6",
    ],
}  # fmt: skip
LOSS_TOLERANCE = 0.001
"""Relative; in bf16 another micro-batch rounds differently."""
STEPS_AFTER_CHECKPOINT = 5
RESUMED_STEPS = 5
WAIT_SECONDS = 240.0
STOP_SECONDS = 120.0
"""Longest time for the step that runs and for saving, whole engine of the larger run included."""


def scenarios(name: str, recipe: Sequence[str], folder: Path) -> Iterator[dict[str, Any]]:
    """Stop a run twice and go on with one rank each time; yield what held."""
    run = folder / name
    train = _zerofit("train", *recipe, "--output-dir", str(run), log=folder / f"{name}-train.log")
    if not _wait(train, lambda: _has_logged(run, SAVE_STEPS + STEPS_AFTER_CHECKPOINT)):
        train.kill()
        yield _line(name, "sigterm", held=False, why=_tail(folder / f"{name}-train.log"))
        return
    yield from _stop(name, run, train, signal.SIGTERM)
    before = dict(_losses(run))
    newest = max(before)
    yield from _resume(name, run, folder, before, scenario="resume-2-to-1")
    before |= dict(_losses(run))
    for step in _checkpoint_steps(run):
        if step >= newest:
            shutil.rmtree(run / rd.CHECKPOINTS / f"checkpoint-{step}")
    yield from _resume(name, run, folder, before, scenario="resume-earlier-2-to-1")


def _stop(
    name: str, run: Path, process: subprocess.Popen[bytes], number: signal.Signals
) -> Iterator[dict[str, Any]]:
    """Send a signal to a run's command; yield how it ended, and what it saved."""
    said = number.name.lower()
    started = time.monotonic()
    process.send_signal(number)
    status = process.wait(timeout=STOP_SECONDS)
    seconds = time.monotonic() - started
    found, kept = rd.read_status(run), _checkpoint_steps(run)
    last_done = _losses(run)[-1][0]
    yield _line(
        name, f"{said}-ends-the-run",
        held=status == JobFailedError.exit_code and found.state == "interrupted",
        why=f"exit status {status} after {seconds:.1f} s, state {found.state} ({found.reason})",
    )  # fmt: skip
    yield _line(
        name, f"{said}-checkpoints", held=bool(kept) and kept[-1] == last_done,
        why=f"stopped after step {last_done}, checkpoints of steps {kept}",
    )  # fmt: skip


def _resume(
    name: str, run: Path, folder: Path, before: Mapping[int, float], *, scenario: str
) -> Iterator[dict[str, Any]]:
    """Go on with one rank, and stop again; yield what held.

    Args:
        name: of the run.
        run: its directory.
        folder: for what the commands print.
        before: losses of steps that were made in an earlier attempt.
        scenario: name of the scenario.
    """
    kept = _checkpoint_steps(run)
    if not kept:
        yield _line(name, scenario, held=False, why="there is no checkpoint")
        return
    log = folder / f"{name}-{scenario}.log"
    attempt = _num_attempts(run) + 1
    resume = _zerofit("resume", str(run), "cluster.gpus_per_node=1", log=log)
    # It is enough to see it go on; the rest of its steps would only take time.
    if not _wait(resume, lambda: _num_attempts(run) == attempt and _runs_alone(run)):
        resume.kill()
        yield _line(name, scenario, held=False, why=_tail(log))
        return
    stopped = list(_stop(name, run, resume, signal.SIGUSR1))
    # The log loses what came after the checkpoint, and goes on from there.
    after = [item for item in _losses(run) if item[0] > kept[-1]]
    known = [(loss, before[step]) for step, loss in after if step in before]
    same = all(abs(loss - expected) <= 0.01 * abs(expected) for loss, expected in known)
    yield _line(
        name, scenario, held=bool(after) and after[0][0] == kept[-1] + 1 and same,
        why=f"went on from checkpoint {kept[-1]} with steps {[step for step, _ in after[:3]]}; "
        f"losses now and before: {[(round(a, 4), round(b, 4)) for a, b in known[:3]]}",
    )  # fmt: skip
    yield from stopped


def out_of_memory(name: str, recipe: Sequence[str], folder: Path) -> Iterator[dict[str, Any]]:
    """Start what cannot fit; yield whether it finished with the losses of the planner's choice."""
    run, plain = folder / name, folder / f"{name}-plain"
    recipe = ["model.random_weights=true", *recipe]
    free = [item for item in recipe if not item.startswith("strategy.")]
    for where, argv in ((run, [*recipe, "--anyway"]), (plain, free)):
        log = folder / f"{where.name}.log"
        train = _zerofit("train", *argv, "--output-dir", str(where), log=log)
        try:
            status = train.wait(timeout=WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            train.kill()
            status = train.wait()
        if status != 0 or rd.read_status(where).state != "finished":
            yield _line(name, "oom-recovers", held=False, why=f"{status}: {_tail(log)}")
            return
    attempts = read_failed_attempts(run)
    losses, expected = dict(_losses(run)), dict(_losses(plain))
    worst = max(
        abs(losses.get(step, float("inf")) - loss) / abs(loss) for step, loss in expected.items()
    )
    tries = "; ".join(f"{item.kind} in {item.phase}: {dict(item.changes)}" for item in attempts)
    is_oom = bool(attempts) and all(item.kind is FailureKind.gpu_oom for item in attempts)
    yield _line(
        name, "oom-recovers", held=is_oom and worst <= LOSS_TOLERANCE,
        why=f"finished {max(losses)} steps after {tries}; losses differ by {worst:.1e} at most",
    )  # fmt: skip


def _zerofit(*argv: str, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "launcher.cli", *argv], stdout=stream, stderr=stream
        )


def _wait(process: subprocess.Popen[bytes], is_reached: Callable[[], bool]) -> bool:
    """Return whether something came true before the process ended, or took too long."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        if is_reached():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.1)
    return False


def _has_logged(run: Path, step: int) -> bool:
    return (run / rd.TRAINER_LOG).is_file() and any(done >= step for done, _ in _losses(run))


def _num_attempts(run: Path) -> int:
    """Return how many attempts were set aside for a newer one."""
    return len(list((run / "attempts").glob("*")))


def _runs_alone(run: Path) -> bool:
    ranks = rd.read_ranks(run)
    return any(rank.world_size == 1 and rank.steps_done >= RESUMED_STEPS for rank in ranks)


def _checkpoint_steps(run: Path) -> list[int]:
    found = (run / rd.CHECKPOINTS).glob("checkpoint-*")
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in found)


def _losses(run: Path) -> list[tuple[int, float]]:
    """Return (step, loss) of the log's entries."""
    # Without a last line that is being written.
    lines = (run / rd.TRAINER_LOG).read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
    entries = [entry for line in lines if "loss" in (entry := json.loads(line))]
    return [(int(entry["step"]), float(entry["loss"])) for entry in entries]


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:])


def _line(run: str, scenario: str, *, held: bool, why: str) -> dict[str, Any]:
    return {"run": run, "scenario": scenario, "held": held, "why": why}


def main() -> int:
    """Run all scenarios; the exit status is 1 when one did not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="runs whose name contains this")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="zerofit-scenarios-"))
    runs = {
        name: scenarios(name, [*recipe, *SHARED, *options.overrides], folder)
        for name, recipe in RUNS.items()
    }
    runs |= {
        name: out_of_memory(name, [*recipe, *options.overrides], folder)
        for name, recipe in TOO_LARGE.items()
    }
    has_failed = False
    for name, founds in runs.items():
        if options.only not in name:
            continue
        for found in founds:
            with (options.out / "scenarios.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(found) + "\n")
            word = "held" if found["held"] else "DID NOT HOLD"
            print(f"{found['run']:10} {found['scenario']:22} {word}: {found['why']}", flush=True)
            has_failed = has_failed or not found["held"]
    return int(has_failed)


if __name__ == "__main__":
    raise SystemExit(main())
