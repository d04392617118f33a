"""Run the cases of a sweep one after another; each leaves a result, whatever becomes of it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launcher import run_dir as rd
from launcher.bench.result import (
    FINISHED,
    OUT_OF_TIME,
    REFUSED,
    Result,
    describe_result,
    measurement_of,
    parse_results,
    prediction_of,
    state_of,
)
from launcher.bench.sweep import Case, parse_sweep
from launcher.dispatch.base import Backend, InterruptionError
from launcher.dispatch.failure import read_failures
from launcher.dispatch.source_version import source_version
from launcher.dispatch.warm import ForkServers
from launcher.errors import JobFailedError, LauncherError, RecipeError, RunDirError
from launcher.given_file import read_given
from launcher.job_script import JobRequest
from launcher.launch import check_can_start, create_run, start_run
from launcher.planning.plan import Plan, plan_to_json
from launcher.prepare import Prepared, prepare

_LOG_TAIL_LINES = 40
_LOSSES = ("train_loss_first", "train_loss_last", "eval_loss_before", "eval_loss_after")
_SHORTEST_CASE_SECONDS = 20.0
"""With less left of the sweep's time no further case is begun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Where a sweep writes."""

    folder: Path
    stem: str
    runs: Path
    """Folder of the run directories."""

    @property
    def results(self) -> Path:
        """One JSON object a line, appended as cases end."""
        return self.folder / f"{self.stem}.jsonl"

    @property
    def submitted(self) -> Path:
        """One JSON object a line: cases that Slurm has, with their predictions."""
        return self.folder / f"{self.stem}.submitted.jsonl"

    @property
    def csv(self) -> Path:
        """The same as a table."""
        return self.folder / f"{self.stem}.csv"

    def picture(self, kind: str, number: int) -> Path:
        """Where a picture goes; the first of its kind has no number."""
        return self.folder / f"{self.stem}-{kind}{f'-{number}' if number > 1 else ''}.png"

    def new_run_dir(self, case: str) -> Path:
        """Return a folder for a run that is not there yet; an interrupted one stays."""
        for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
            path = self.runs / f"{case}{suffix}"
            if not path.exists():
                return path
        raise RunDirError(
            "a thousand runs of this case exist", where=str(path), fix="remove some of them"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When to stop; ``None`` is never."""

    case_seconds: float | None = None
    total_seconds: float | None = None
    max_failures_in_a_row: int | None = None
    """Of cases that neither finished nor ran out of memory."""


Start = Callable[[Path, Backend, JobRequest, Plan], None]
"""Runs a job that was written to its directory, to the end."""


def read_sweep(path: Path, overrides: Sequence[str]) -> tuple[Case, ...]:
    """Return the cases of a sweep file.

    Raises:
        RecipeError: it cannot be read, or not used.
    """
    text = read_given(path, error=RecipeError, fix="name a sweep file")
    return parse_sweep(text, source=str(path), overrides=overrides)


def read_outputs(outputs: Outputs) -> tuple[Result, ...]:
    """Return the results that are there already, after proving that more can be written.

    Raises:
        RunDirError: the folder cannot be written, or the file holds something else.
    """
    try:
        outputs.folder.mkdir(parents=True, exist_ok=True)
        with outputs.results.open("a", encoding="utf-8"):
            pass
        text = outputs.results.read_text(encoding="utf-8")
        if text and not text.endswith("\n"):
            # Half a line of a sweep that was killed; what follows must not be glued to it.
            text = text[: text.rfind("\n") + 1]
            rd.write_text(outputs.results, text)
    except (OSError, UnicodeDecodeError) as error:
        raise RunDirError(
            f"results cannot be written here: {error}",
            where=str(outputs.results),
            fix="name another folder with --out",
        ) from None
    return parse_results(text, source=str(outputs.results))


def run_sweep(
    cases: Sequence[Case],
    outputs: Outputs,
    *,
    limits: Limits,
    say: Callable[[str], None],
    start: Start,
) -> tuple[Result, ...]:
    """Run cases in order and return their results; each is on disk before the next begins.

    Args:
        cases: those that are still to do.
        outputs: where to; :func:`read_outputs` has been called.
        limits: when to stop.
        say: shows a line of text.
        start: how to run one job.

    Raises:
        InterruptionError: Ctrl-C or its like; the case that ran leaves no result.
        RunDirError: a result cannot be written.
    """
    made: list[Result] = []
    failures_in_a_row = 0
    deadline = None if limits.total_seconds is None else time.monotonic() + limits.total_seconds
    version = source_version()
    for position, case in enumerate(cases, start=1):
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left < _SHORTEST_CASE_SECONDS:
            say(f"no time left for {len(cases) - position + 1} more cases")
            break
        run_dir = outputs.new_run_dir(case.name)
        seconds = min((s for s in (limits.case_seconds, left) if s is not None), default=None)
        content = _run_case(case, run_dir, seconds=seconds, start=start)
        if content["state"] == OUT_OF_TIME and seconds != limits.case_seconds:
            say(f"the sweep's time is over; {case.name} is left for the next time")
            break
        result = Result(content=content | {"zerofit": version})
        append_result(outputs, result)
        made.append(result)
        say(f"[{position}/{len(cases)}] {describe_result(result)}")
        failures_in_a_row = failures_in_a_row + 1 if result.is_failure else 0
        if result.is_failure:
            for line in _log_tail(run_dir):
                say(f"    {line}")
        if limits.max_failures_in_a_row and failures_in_a_row >= limits.max_failures_in_a_row:
            say(f"stopped after {failures_in_a_row} failures in a row")
            break
    return tuple(made)


def write_summary(path: Path, content: bytes) -> None:
    """Write a table or a picture, replacing an older one.

    Raises:
        RunDirError: it cannot be written.
    """
    try:
        path.write_bytes(content)
    except OSError as error:
        raise _unwritable(path, error) from None


def start_with(outputs: Outputs, stack: ExitStack, *, is_warm: bool) -> Start:
    """Return how jobs are run here; what they print stays in their logs.

    Args:
        outputs: where the fork servers log.
        stack: ends the fork servers when it is closed.
        is_warm: fork ranks from a process that has imported the training stack.
    """
    servers = None
    if is_warm:
        servers = stack.enter_context(ForkServers(outputs.runs / "fork-server.log"))

    def start(run_dir: Path, backend: Backend, request: JobRequest, plan: Plan) -> None:
        chosen = backend if servers is None else servers.warmed(backend, plan)
        start_run(run_dir, chosen, request, say=lambda _line: None, console=None, saves=False)

    return start


def plan_case(case: Case) -> dict[str, Any]:
    """Plan a case; return its line of the results file as far as it is known before the run."""
    content, _ = planned(case)
    return content


def planned(case: Case) -> tuple[dict[str, Any], Prepared | None]:
    """Return a case's line as far as it is known before the run; no plan where it is refused."""
    content: dict[str, Any] = {
        "case": case.name,
        "recipe": case.content,
        "strategy_label": case.strategy_label,
        "planned_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    recipe = case.recipe
    if recipe.tracking.sample_answer is None:
        recipe = replace(recipe, tracking=replace(recipe.tracking, sample_answer=False))
    try:
        prepared = prepare(recipe, source=case.name)
    except LauncherError as error:
        return content | {"state": REFUSED, "failure": str(error)}, None
    return content | {"predicted": prediction_of(plan_to_json(prepared.plan))}, prepared


def _run_case(case: Case, run_dir: Path, *, seconds: float | None, start: Start) -> dict[str, Any]:
    """Plan and run one case; return its line of the results file."""
    # Before anything runs, so that nothing that is measured can reach it.
    content, prepared = planned(case)
    if prepared is None:
        return content | {"wall_seconds": 0.0}
    started = time.monotonic()
    try:
        check_can_start(prepared)
        made_dir, backend, request = create_run(prepared, run_dir)
    except LauncherError as error:
        return content | {"state": REFUSED, "wall_seconds": 0.0, "failure": str(error)}
    failure, is_out_of_time = None, False
    try:
        with _time_limit(seconds):
            start(made_dir, backend, request, prepared.plan)
    except InterruptionError as error:
        if error.signal_number != signal.SIGALRM:
            # A run's own advice, another folder, is not what a sweep needs.
            raise type(error)(
                error.problem,
                where=error.where,
                fix="the same command begins again with this case",
                signal_number=error.signal_number,
            ) from None
        is_out_of_time = True
        failure = {"phase": None, "message": f"it had not ended after {seconds:.0f} s"}
    except LauncherError as error:
        failure = failure_of(made_dir, error)
    outcome = outcome_of(made_dir, failure=failure)
    if is_out_of_time:
        outcome["state"] = OUT_OF_TIME
    return content | outcome | {"wall_seconds": round(time.monotonic() - started, 1)}


def outcome_of(run_dir: Path, *, failure: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what a run that has ended left in its directory.

    Args:
        run_dir: of the run.
        failure: why it did not finish, if it did not.
    """
    # Where the data could not be used, nothing of the run is left.
    ranks = rd.read_ranks(run_dir)
    state = state_of(ranks, has_failed=failure is not None)
    versions: dict[str, str] = {}
    if (run_dir / rd.ENVIRONMENT).is_file():
        packages = rd.read_json(run_dir / rd.ENVIRONMENT)["packages"]
        versions = {name: number for name, number in packages.items() if number is not None}
    return {
        "state": state,
        "versions": versions,
        "device_name": ranks[0].device_name if ranks else None,
        "measured": [measurement_of(rank) for rank in ranks],
        "learnt": _learnt(run_dir),
        "failure": None if state == FINISHED else failure,
    }


def _learnt(run_dir: Path) -> dict[str, Any] | None:
    """Return the losses of a run that reached its end; they mean something with real data."""
    if not (run_dir / rd.RESULTS).is_file():
        return None
    results = rd.read_json(run_dir / rd.RESULTS)
    return {key: results.get(key) for key in _LOSSES}


def failure_of(run_dir: Path, error: LauncherError) -> dict[str, Any]:
    """Return what the rank that failed first says, else what the launcher says."""
    failures = read_failures(run_dir) if isinstance(error, JobFailedError) else ()
    first = failures[0].failure if failures else None
    if first is None:
        return {"phase": None, "message": str(error)}
    return {
        "rank": failures[0].rank,
        "phase": first.phase,
        "message": f"{first.type}: {first.message}",
    }


@contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    """Send this process SIGALRM after some time; whoever watches a job stops it then."""
    if seconds is None:
        yield
        return
    # Until the watch has installed its own handler, the signal must not end this process.
    before = signal.signal(signal.SIGALRM, lambda _number, _frame: None)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def append_result(outputs: Outputs, result: Result) -> None:
    """Write a result to disk, behind the others.

    Raises:
        RunDirError: it cannot be written.
    """
    try:
        with outputs.results.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(result.content) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise _unwritable(outputs.results, error) from None


def _log_tail(run_dir: Path) -> list[str]:
    try:
        text = (run_dir / rd.LAUNCHER_LOG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.splitlines()[-_LOG_TAIL_LINES:]


def _unwritable(path: Path, error: OSError) -> RunDirError:
    return RunDirError(
        f"cannot be written: {error.strerror}",
        where=str(path),
        fix="free some disk space, or name another folder with --out",
    )
