"""Run many small cases on this machine's GPUs and keep predicted beside measured.

    python benchmarks/sweep.py benchmarks/h100.yaml --out results.jsonl

A case is a recipe: the file's ``defaults`` with the case's own keys merged in. Every case runs
through zerofit's own planner, run directory and worker. The libraries are imported once, in a
parent that never touches the GPU, and each rank is forked from it, so that a case costs seconds
instead of half a minute. A case that is in the results already is not run again; failures are
results too. After ``--max-failures`` failures in a row that are no out-of-memory, the sweep stops.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import yaml

from launcher.dispatch.local import choose_port
from launcher.ds_config import merge
from launcher.errors import DataError, LauncherError
from launcher.launch import create_run
from launcher.peaks import RankPeaks
from launcher.planning.plan import plan_to_json
from launcher.prepare import prepare
from launcher.recipe import parse_recipe
from launcher.run_dir import RESULTS, read_ranks

BITSANDBYTES_SITE = os.environ.get("BITSANDBYTES_SITE", "")
"""Folder that only ranks that need bitsandbytes get on their path."""
PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "peft")


def cases(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each case's name and recipe."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for case in content["cases"]:
        name = case.pop("name")
        yield name, merge(content.get("defaults", {}), case)


def run_case(name: str, content: dict[str, Any], *, folder: Path, seconds: float) -> dict[str, Any]:
    """Run one case and return its result as JSON values."""
    recipe = parse_recipe(yaml.safe_dump(content), source=name)
    prepared = prepare(recipe, source=name)
    # The cases fix what they compare; whether the planner would have chosen it does not matter.
    prepared = replace(prepared, plan=replace(prepared.plan, fits=True))
    run_dir, _, _ = create_run(prepared, folder / name)
    if recipe.data.path is not None:
        _tokenize(run_dir)
    started = time.monotonic()
    strategy = prepared.plan.strategy
    needs_bitsandbytes = recipe.method == "qlora" or "8bit" in strategy.optimizer
    start = _spawn_rank if needs_bitsandbytes else _fork_rank
    is_out_of_time = _run_ranks(start, run_dir, prepared.plan.cluster.world_size, seconds=seconds)
    ranks = read_ranks(run_dir)
    failure = next((rank.failure for rank in ranks if rank.failure is not None), None)
    return {
        "case": name,
        "recipe": content,
        "state": "out_of_time" if is_out_of_time else _state(ranks),
        "wall_seconds": round(time.monotonic() - started, 1),
        "versions": {package: version(package) for package in PACKAGES},
        "device_name": ranks[0].device_name if ranks else None,
        "predicted": predicted(plan_to_json(prepared.plan)),
        "measured": [measured(rank) for rank in ranks],
        "learnt": learnt(run_dir),
        "failure": None
        if failure is None
        else {"phase": failure.phase, "message": failure.message},
    }


def predicted(plan: dict[str, Any]) -> dict[str, Any]:
    """Return what of a plan is compared."""
    memory = plan["memory"]
    return {
        "strategy": plan["strategy"],
        "phases": {name: phase["allocated_bytes"] for name, phase in memory["phases"].items()},
        **{
            key: memory[key]
            for key in (
                "peak_allocated_bytes",
                "peak_reserved_bytes",
                "device_used_bytes",
                "host_bytes_per_node",
            )
        },
        "step_seconds": plan["time"]["step_seconds"],
    }


def measured(rank: RankPeaks) -> dict[str, Any]:
    """Return what of a rank's file is compared; the step time is the median after two steps."""
    phases = rank.phases
    used = [phase.device_used_bytes for phase in phases.values() if phase.device_used_bytes]
    steady = rank.step_seconds[2:] or rank.step_seconds
    return {
        "rank": rank.rank,
        "phases": {name: phase.peak_allocated_bytes for name, phase in phases.items()},
        "phases_reserved": {name: phase.peak_reserved_bytes for name, phase in phases.items()},
        "peak_allocated_bytes": max((p.peak_allocated_bytes for p in phases.values()), default=0),
        "peak_reserved_bytes": max((p.peak_reserved_bytes for p in phases.values()), default=0),
        "device_used_bytes": max(used, default=None),
        "host_rss_bytes": max((p.host_rss_bytes for p in phases.values()), default=0),
        "step_seconds": statistics.median(steady) if steady else None,
        "steps_done": rank.steps_done,
        "allocator_retries": rank.allocator_retries,
    }


def learnt(run_dir: Path) -> dict[str, Any] | None:
    """Return the losses of a run on data that reached its end."""
    path = run_dir / RESULTS
    if not path.is_file():
        return None
    results = json.loads(path.read_text(encoding="utf-8"))
    return {
        key: results[key]
        for key in ("train_loss_first", "train_loss_last", "eval_loss_before", "eval_loss_after")
    }


def _tokenize(run_dir: Path) -> None:
    """Tokenise a run's data in a child: the parent must not start threads before it forks."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with (run_dir / "logs" / "data.log").open("wb") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            from launcher.worker import data

            status = data.main(["--run-dir", str(run_dir)])
        except BaseException:  # noqa: BLE001 - the child must not return into the parent's loop
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    if os.waitpid(child, 0)[1] != 0:
        log_text = (run_dir / "logs" / "data.log").read_text(errors="replace")
        raise DataError(log_text[-1000:], where=str(run_dir), fix="mend the case's data section")


def _state(ranks: tuple[RankPeaks, ...]) -> str:
    states = {rank.state for rank in ranks}
    for state in ("out_of_memory", "failed", "running", "interrupted"):
        if state in states:
            return state
    return "finished" if states else "failed"


def _run_ranks(
    start: Callable[[Path, int, int, int], int], run_dir: Path, world_size: int, *, seconds: float
) -> bool:
    """Run the ranks of one case; return whether they ran out of time and were killed."""
    port = choose_port()
    children = [start(run_dir, rank, world_size, port) for rank in range(world_size)]
    deadline = time.monotonic() + seconds
    is_killed = False
    while children:
        for child in tuple(children):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                children.remove(child)
                if status != 0:
                    # The others wait for it in a collective.
                    deadline = min(deadline, time.monotonic() + 10)
        if time.monotonic() > deadline and children and not is_killed:
            is_killed = True
            for child in children:
                os.kill(child, 9)
        time.sleep(0.05)
    return is_killed


def _fork_rank(run_dir: Path, rank: int, world_size: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    os.environ.update(_places(rank, world_size, port))
    with _log(run_dir, rank) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    status = 1
    try:
        from launcher.worker import train

        status = train.main(["--run-dir", str(run_dir)])
    except BaseException:  # noqa: BLE001 - the child must not return into the parent's loop
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _spawn_rank(run_dir: Path, rank: int, world_size: int, port: int) -> int:
    paths = [os.environ.get("PYTHONPATH", ""), BITSANDBYTES_SITE]
    env = os.environ | _places(rank, world_size, port)
    env["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    with _log(run_dir, rank) as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "launcher.worker.train", "--run-dir", str(run_dir)],
            env=env,
            stdout=log,
            stderr=log,
        )
    return process.pid


def _places(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _log(run_dir: Path, rank: int) -> IO[bytes]:
    return (run_dir / "logs" / f"rank-{rank}.log").open("wb")


def _import_stack() -> None:
    """Import once, before forking, all that every rank needs.

    Not bitsandbytes: it looks at the GPU when it is imported, and a process that has done so
    cannot be forked. Ranks that need it start as processes of their own.
    """
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a look at CUDA bars forking
    sys.path[:] = [entry for entry in sys.path if entry != BITSANDBYTES_SITE]
    import torch

    names = ["deepspeed", "transformers", "peft", "launcher.worker.model"]
    names += ["launcher.worker.train", "launcher.worker.trainer", "launcher.worker.peak_memory"]
    names += [f"transformers.models.{m}.modeling_{m}" for m in ("llama", "qwen2", "mistral")]
    for name in names:
        importlib.import_module(name)
        if torch.cuda.is_initialized():
            raise RuntimeError(f"importing {name} touched the GPU, so ranks cannot be forked")


def main() -> int:
    """Run the cases that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--only", default="", help="run cases whose name contains this")
    parser.add_argument("--case-seconds", type=float, default=90)
    parser.add_argument("--total-seconds", type=float, default=570)
    parser.add_argument("--max-failures", type=int, default=2)
    options = parser.parse_args()
    started = time.monotonic()
    done = set()
    if options.out.exists():
        done = {json.loads(line)["case"] for line in options.out.read_text().splitlines()}
    _import_stack()
    print(f"imports took {time.monotonic() - started:.1f} s", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="zerofit-sweep-"))
    failures_in_a_row = 0
    for name, content in cases(options.sweep):
        if name in done or options.only not in name:
            continue
        left = options.total_seconds - (time.monotonic() - started)
        if left < 20:
            print("no time left for more cases")
            break
        try:
            result = run_case(name, content, folder=folder, seconds=min(options.case_seconds, left))
        except LauncherError as error:
            result = {"case": name, "recipe": content, "state": "refused", "failure": str(error)}
        with options.out.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(result) + "\n")
        print(_line(result), flush=True)
        failed = result["state"] in ("failed", "running", "refused", "out_of_time")
        failures_in_a_row = failures_in_a_row + 1 if failed else 0
        if failed:
            for log in sorted((folder / name / "logs").glob("rank-*.log")):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}")
        if failures_in_a_row >= options.max_failures:
            print(f"stopped after {failures_in_a_row} failures in a row")
            return 1
        shutil.rmtree(folder / name, ignore_errors=True)
    return 0


def _line(result: dict[str, Any]) -> str:
    text = f"{result['case']:44} {result['state']:10}"
    if not result.get("measured") or result["state"] != "finished":
        return f"{text} {result.get('failure')}"[:300]
    fullest = max(result["measured"], key=lambda rank: rank["peak_allocated_bytes"])
    guess = result["predicted"]
    parts = []
    for key in ("peak_allocated_bytes", "peak_reserved_bytes", "device_used_bytes"):
        if fullest[key]:
            error = (guess[key] - fullest[key]) / fullest[key]
            parts.append(f"{guess[key] / 1e9:6.2f}/{fullest[key] / 1e9:6.2f} GB {error:+6.1%}")
    seconds = fullest["step_seconds"]
    parts.append(f"{guess['step_seconds']:6.3f}/{seconds:6.3f} s")
    return f"{text} {'  '.join(parts)}  ({result['wall_seconds']} s)"


if __name__ == "__main__":
    raise SystemExit(main())
