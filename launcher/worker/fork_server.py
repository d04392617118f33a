"""A process that imports the training stack once and forks the ranks of one job after another.

Importing torch, DeepSpeed and transformers takes longer than a short run. ``zerofit bench
--warm`` talks to this program: a JSON object a line on standard input asks for a job, lines on
standard output say its processes and, later, how it ended. One job runs at a time.

A process that has looked at a GPU cannot be forked into ranks that use it. bitsandbytes does so
when it is imported, and PEFT imports it where it is installed. So this program exists in two
kinds: with ``--without-bitsandbytes`` it hides that package and imports everything else; without,
it leaves PEFT, and what imports PEFT, to the ranks.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.machinery
import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from importlib.metadata import DistributionFinder
from pathlib import Path
from typing import Any, TextIO

from launcher import run_dir as rd
from launcher.worker.program import QUIET_ENVIRONMENT, quiet_libraries

_HIDDEN = "bitsandbytes"
_STACK = (
    "deepspeed", "transformers", "accelerate", "launcher.worker.train",
    "launcher.worker.peak_memory", "datasets", "launcher.worker.data_writer",
    "launcher.worker.chat_templates", "launcher.worker.batches",
    *(f"transformers.models.{m}.modeling_{m}" for m in ("llama", "qwen2", "mistral", "phi3")),
)  # fmt: skip
_STACK_WITH_PEFT = (*_STACK, "peft", "launcher.worker.model", "launcher.worker.trainer")


class _WithoutHidden:
    """Python's finder of modules on ``sys.path``, blind to one package."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] == _HIDDEN:
            return None
        return importlib.machinery.PathFinder.find_spec(name, path, target)

    def find_distributions(self, context: DistributionFinder.Context) -> Any:
        if context.name == _HIDDEN:
            return iter(())
        return importlib.machinery.PathFinder.find_distributions(context)

    def invalidate_caches(self) -> None:
        importlib.machinery.PathFinder.invalidate_caches()


def import_stack(*, without_bitsandbytes: bool) -> None:
    """Import what a rank needs and what does not look at a GPU.

    Raises:
        RuntimeError: a module did look at it.
    """
    if without_bitsandbytes:
        position = sys.meta_path.index(importlib.machinery.PathFinder)
        sys.meta_path[position] = _WithoutHidden()
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # torch's other way to ask whether there is a GPU starts CUDA.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    for name in _STACK_WITH_PEFT if without_bitsandbytes else _STACK:
        importlib.import_module(name)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            raise RuntimeError(f"importing {name} touched the GPU, so ranks cannot be forked")


def serve(requests: TextIO, answers: TextIO) -> None:
    """Run jobs until there are no more requests."""
    for line in requests:
        request = json.loads(line)
        answers.flush()
        pid = os.fork()
        if pid == 0:
            _run_job(request, answers)
        _, status = os.waitpid(pid, 0)
        _answer(answers, {"exit_code": os.waitstatus_to_exitcode(status)})


def _answer(answers: TextIO, value: Mapping[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


def _run_job(request: Mapping[str, Any], answers: TextIO) -> None:
    """Be the launcher of one job: fork its ranks, end all when one fails; never return."""
    status = 1
    try:
        os.setsid()
        run_dir = Path(request["run_dir"])
        os.chdir(run_dir)
        with (run_dir / rd.LAUNCHER_LOG).open("ab") as log, Path(os.devnull).open("rb") as nothing:
            for source, target in ((nothing, 0), (log, 1), (log, 2)):
                os.dup2(source.fileno(), target)
        os.environ.update(request["env"])
        ranks = [_fork_rank(run_dir, place, answers) for place in request["places"]]
        _answer(answers, {"pid": os.getpid(), "rank_pids": ranks})
        os.close(answers.fileno())
        status = _wait(set(ranks))
    except BaseException:  # noqa: BLE001 - a child must not return into the server's loop
        traceback.print_exc()
    finally:
        _leave(status)


def _fork_rank(run_dir: Path, place: Mapping[str, str], answers: TextIO) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.close(answers.fileno())
        os.environ.update(place)
        from launcher.worker import train

        status = train.main(["--run-dir", str(run_dir)])
    except BaseException:  # noqa: BLE001 - likewise
        traceback.print_exc()
    finally:
        _leave(status)
    raise AssertionError("unreachable")


def _wait(ranks: set[int]) -> int:
    """Wait for all ranks; return the first bad status as DeepSpeed's launcher would."""
    first_bad = 0
    while ranks:
        pid, status = os.wait()
        ranks.discard(pid)
        code = os.waitstatus_to_exitcode(status)
        if code and not first_bad:
            first_bad = code % 256
            # They wait for it in a collective.
            for other in ranks:
                os.kill(other, signal.SIGTERM)
    return first_bad


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> int:
    """Import the stack, say so, and serve."""
    parser = argparse.ArgumentParser(prog="python -m launcher.worker.fork_server")
    parser.add_argument("--without-bitsandbytes", action="store_true")
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not look like an answer
    quiet_libraries(10)
    try:
        import_stack(without_bitsandbytes=options.without_bitsandbytes)
    except (ImportError, RuntimeError) as error:
        _answer(answers, {"error": str(error)})
        return 1
    _answer(answers, {"ready": True})
    serve(sys.stdin, answers)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
