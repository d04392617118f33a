"""What must hold when a run on several GPUs is stopped: told apart from how fast it is.

    python benchmarks/scenarios.py --out FOLDER [KEY=VALUE ...]

Each scenario goes through the command line as a user would, on two ranks of this machine: a run is
ended by SIGTERM between two of its checkpoints, then goes on with one rank. Overrides change the
recipe. One JSON object a line: the scenario, `held` (null: zerofit cannot do that yet), and why.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from launcher import run_dir as rd

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
    "optim.max_steps=400", f"optim.save_steps={SAVE_STEPS}", "optim.save_total_limit=2",
]  # fmt: skip
STEPS_AFTER_CHECKPOINT = 5
RESUMED_STEPS = 5
WAIT_SECONDS = 240.0


def scenarios(name: str, recipe: Sequence[str], folder: Path) -> Iterator[dict[str, Any]]:
    """Stop a run with SIGTERM, then go on with one rank; yield what held."""
    run = folder / name
    train = _zerofit("train", *recipe, "--output-dir", str(run), log=folder / f"{name}-train.log")
    if not _wait(train, lambda: _has_logged(run, SAVE_STEPS + STEPS_AFTER_CHECKPOINT)):
        train.kill()
        yield _line(name, "sigterm", held=False, why=_tail(folder / f"{name}-train.log"))
        return
    train.send_signal(signal.SIGTERM)
    status = train.wait(timeout=60)
    kept = _checkpoint_steps(run)
    last_done = _losses(run)[-1][0]
    is_own = bool(kept) and kept[-1] % SAVE_STEPS != 0 and kept[-1] >= last_done
    ended = status == 128 + signal.SIGTERM and rd.read_status(run).state == "interrupted"
    yield _line(
        name, "sigterm-ends-the-run", held=ended,
        why=f"exit status {status}, state {rd.read_status(run).state}",
    )  # fmt: skip
    yield _line(
        name, "sigterm-checkpoints", held=is_own or None,
        why=f"stopped after step {last_done}, checkpoints of steps {kept}",
    )  # fmt: skip
    yield _resume(name, run, folder)


def _resume(name: str, run: Path, folder: Path) -> dict[str, Any]:
    kept = _checkpoint_steps(run)
    if not kept:
        return _line(name, "resume-2-to-1", held=False, why="there is no checkpoint")
    before = dict(_losses(run))
    log = folder / f"{name}-resume.log"
    resume = _zerofit("resume", str(run), "cluster.gpus_per_node=1", log=log)
    # It is enough to see it go on; the rest of its steps would only take time.
    if not _wait(resume, lambda: _runs_alone(run)):
        resume.kill()
        return _line(name, "resume-2-to-1", held=False, why=_tail(log))
    resume.send_signal(signal.SIGTERM)
    resume.wait(timeout=60)
    # The log loses what came after the checkpoint, and goes on from there.
    after = [item for item in _losses(run) if item[0] > kept[-1]]
    if not after:
        return _line(name, "resume-2-to-1", held=False, why="it logged no step")
    first_step, first_loss = after[0]
    expected = before.get(first_step)
    same = expected is None or abs(first_loss - expected) <= 0.01 * abs(expected)
    return _line(
        name, "resume-2-to-1", held=first_step == kept[-1] + 1 and same,
        why=f"went on at step {first_step} from checkpoint {kept[-1]}; loss there {first_loss:.4f} "
        f"on one rank, {expected} on two before",
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


def _line(run: str, scenario: str, *, held: bool | None, why: str) -> dict[str, Any]:
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
    has_failed = False
    for name, recipe in RUNS.items():
        if options.only not in name:
            continue
        for found in scenarios(name, [*recipe, *SHARED, *options.overrides], folder):
            with (options.out / "scenarios.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(found) + "\n")
            word = {True: "held", False: "DID NOT HOLD", None: "cannot do that yet"}[found["held"]]
            print(f"{found['run']:10} {found['scenario']:22} {word}: {found['why']}", flush=True)
            has_failed = has_failed or found["held"] is False
    return int(has_failed)


if __name__ == "__main__":
    raise SystemExit(main())
