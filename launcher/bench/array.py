"""A sweep as Slurm job arrays: submitted by one call, gathered by later ones."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from launcher.bench.result import Result, describe_result
from launcher.bench.runner import Outputs, append_result, failure_of, outcome_of, planned
from launcher.bench.sweep import Case
from launcher.dispatch.run_state import RunState, observe_readable
from launcher.dispatch.source_version import source_version
from launcher.errors import JobFailedError, RunDirError
from launcher.prepare import Prepared
from launcher.submit import submit_array

Say = Callable[[str], None]
_ENDED = ("finished", "failed", "killed")


def submit_cases(
    cases: Sequence[Case], outputs: Outputs, *, say: Say, max_parallel: int | None
) -> None:
    """Plan cases and submit them, one array for each kind of nodes that they need.

    What was predicted is written down before Slurm sees a job. Cases that are predicted not to
    fit are submitted too: whether they run out of memory is what a sweep is to find out.

    Raises:
        LauncherError: Slurm does not take an array; arrays before it are submitted.
        RunDirError: the list of submitted cases cannot be written.
    """
    by_shape: dict[tuple[Any, ...], list[tuple[dict[str, Any], Prepared]]] = {}
    for case in cases:
        content, prepared = planned(case)
        content["zerofit"] = source_version()
        if prepared is None:
            _record(Result(content=content | {"wall_seconds": 0.0}), outputs, say)
            continue
        cluster = prepared.plan.cluster
        shape = (cluster.num_nodes, cluster.gpus_per_node, cluster.gpu.name)
        by_shape.setdefault(shape, []).append((content, prepared))
    for items in by_shape.values():
        with _list_of_submitted(outputs) as stream:
            handles = submit_array(
                [_to_be_run(prepared) for _, prepared in items],
                outputs.new_run_dir(f"array-{time.strftime('%Y%m%d-%H%M%S')}"),
                say=say,
                tokenize=True,
                max_parallel=max_parallel,
            )
            for (content, _), handle in zip(items, handles, strict=True):
                stream.write(json.dumps(content | {"run_dir": str(handle.run_dir)}) + "\n")


def gather(
    outputs: Outputs, results: Sequence[Result], *, say: Say
) -> tuple[tuple[Result, ...], frozenset[str]]:
    """Record the submitted cases that have ended by now.

    Returns:
        The new results, and the names of cases that wait or run.

    Raises:
        RunDirError: the list of submitted cases is broken, or a result cannot be written.
    """
    # By run directory: a case that failed may have been submitted again.
    done = {result.content.get("run_dir") for result in results}
    open_cases = [item for item in _submitted(outputs) if item["run_dir"] not in done]
    made, waiting = [], set()
    for content, state in zip(open_cases, _states(open_cases), strict=True):
        if state is None:
            error = RunDirError(
                "the run directory is gone", where=content["run_dir"], fix="run it again"
            )
            outcome = outcome_of(Path(content["run_dir"]), failure=failure_of(Path(), error))
            made.append(_record(Result(content=content | outcome), outputs, say))
            continue
        if state.state not in _ENDED:
            waiting.add(str(content["case"]))
            say(f"{content['case']:40} {state.state:13} {state.reason or ''}".rstrip())
            continue
        failure = None
        if state.state != "finished":
            problem = state.reason or f"the run was {state.state}"
            failed = JobFailedError(problem, where=str(state.run_dir), fix="see its log")
            failure = failure_of(state.run_dir, failed)
        result = Result(content=content | outcome_of(state.run_dir, failure=failure))
        made.append(_record(result, outputs, say))
    return tuple(made), frozenset(waiting)


def _states(cases: Sequence[dict[str, Any]]) -> list[RunState | None]:
    """Return how the runs of cases are doing; ``None`` where the run directory is gone."""
    there = [path for case in cases if (path := Path(case["run_dir"])).is_dir()]
    states = {state.run_dir: state for state in observe_readable(there)}
    return [states.get(Path(case["run_dir"])) for case in cases]


def _record(result: Result, outputs: Outputs, say: Say) -> Result:
    append_result(outputs, result)
    say(describe_result(result))
    return result


@contextmanager
def _list_of_submitted(outputs: Outputs) -> Iterator[TextIO]:
    """Open the list of submitted cases, before Slurm has a job that would not be on it."""
    try:
        with outputs.submitted.open("a", encoding="utf-8") as stream:
            yield stream
    except OSError as error:
        raise RunDirError(
            f"cannot be written: {error.strerror}",
            where=str(outputs.submitted),
            fix="free some disk space, or name another folder with --out; "
            "`zerofit list` shows what Slurm has by now",
        ) from None


def _to_be_run(prepared: Prepared) -> Prepared:
    return replace(prepared, plan=replace(prepared.plan, fits=True))


def _submitted(outputs: Outputs) -> list[dict[str, Any]]:
    """Return the submitted cases, each once: its last submission."""
    if not outputs.submitted.is_file():
        return []
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(outputs.submitted.read_text(encoding="utf-8").splitlines(), 1):
        try:
            content = json.loads(line)
            found[content["case"]] = {**content, "run_dir": str(content["run_dir"])}
        except (ValueError, KeyError, TypeError):
            raise RunDirError(
                "this line is no submitted case",
                where=f"{outputs.submitted}:{number}",
                fix="remove the line; `zerofit list` shows the runs",
            ) from None
    return list(found.values())
