"""A case's result: what was predicted before it ran beside what every rank measured. Pure."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import yaml

from launcher.bench.sweep import Case
from launcher.errors import RecipeError, RunDirError
from launcher.peaks import RankPeaks
from launcher.recipe import parse_recipe
from launcher.recipe_sections import Recipe

FINISHED = "finished"
OUT_OF_MEMORY = "out_of_memory"
OUT_OF_TIME = "out_of_time"
FAILED = "failed"
REFUSED = "refused"
"""Nothing was started: the case cannot be planned, or not be run here."""

_BYTES = ("peak_allocated_bytes", "peak_reserved_bytes", "device_used_bytes")
_WARM_UP_STEPS = 2
"""Optimizer steps left out of the step time: kernels are compiled and memory is found in them."""
_CSV_COLUMNS = (
    "case", "model", "max_seq_len", "method", "zero_stage", "strategy", "world_size", "state",
    "predicted_fits", "predicted_peak_allocated_bytes", "measured_peak_allocated_bytes",
    "predicted_peak_reserved_bytes", "measured_peak_reserved_bytes",
    "predicted_device_used_bytes", "measured_device_used_bytes", "predicted_step_seconds",
    "measured_step_seconds", "measured_tokens_per_second_per_rank", "wall_seconds",
    "device_name", "zerofit_version", "zerofit_commit", "failure",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One line of a results file, and what is asked of it most."""

    content: Mapping[str, Any]
    """The line itself: JSON values."""

    @property
    def case(self) -> str:
        """Name of the case."""
        return str(self.content["case"])

    @property
    def state(self) -> str:
        """``finished``, ``out_of_memory``, ``failed``, ``out_of_time`` or ``refused``."""
        return str(self.content["state"])

    @property
    def is_failure(self) -> bool:
        """Whether something went wrong; memory that did not suffice is a measurement."""
        return self.state not in (FINISHED, OUT_OF_MEMORY)

    @property
    def recipe(self) -> Recipe:
        """What was run.

        Raises:
            RecipeError: this zerofit does not read it.
        """
        return _parsed(json.dumps(self.content["recipe"]), f"result of {self.case}")

    @property
    def failure(self) -> str | None:
        """What ended the run, in words; ``None`` when it finished."""
        found = self.content.get("failure")
        if isinstance(found, Mapping):
            phase = f"in phase {found['phase']}: " if found.get("phase") else ""
            return f"{phase}{found['message']}"
        return found

    @property
    def fullest(self) -> Mapping[str, Any] | None:
        """What the rank with the highest peak measured; ``None`` if no rank said anything."""
        ranks = self.content.get("measured") or []
        return max(ranks, key=lambda rank: int(rank["peak_allocated_bytes"]), default=None)

    def predicted(self, quantity: str) -> float | None:
        """Return what was predicted for one rank before the run, such as ``step_seconds``."""
        value = (self.content.get("predicted") or {}).get(quantity)
        return None if value is None else float(value)

    def measured(self, quantity: str) -> float | None:
        """Return what the fullest rank measured; ``None`` unless the run finished."""
        if self.state != FINISHED or self.fullest is None or not self.fullest.get(quantity):
            return None
        return float(self.fullest[quantity])

    def error_fraction(self, quantity: str) -> float | None:
        """Return (predicted - measured) / measured."""
        predicted, measured = self.predicted(quantity), self.measured(quantity)
        if predicted is None or measured is None:
            return None
        return (predicted - measured) / measured


@lru_cache(maxsize=4096)
def _parsed(recipe: str, source: str) -> Recipe:
    # YAML reads some of JSON's numbers as text: 1e-05.
    return parse_recipe(yaml.safe_dump(dict(json.loads(recipe))), source=source)


def prediction_of(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a plan's JSON is compared; bytes and phases are those of one rank.

    ZeRO gives every rank an equal share; the values are the fullest rank's.
    """
    memory = plan["memory"]
    return {
        "fits": plan["fits"],
        "limit_bytes": plan["limit_bytes"],
        "world_size": plan["world_size"],
        "strategy": plan["strategy"],
        "phases": {name: phase["allocated_bytes"] for name, phase in memory["phases"].items()},
        **{key: memory[key] for key in _BYTES},
        "host_bytes_per_node": memory["host_bytes_per_node"],
        "step_seconds": plan["time"]["step_seconds"],
        "bound_by": plan["time"].get("bound_by"),
    }


def measurement_of(rank: RankPeaks) -> dict[str, Any]:
    """Return what of a rank's file is compared.

    ``step_seconds`` is the median of the steps after the first two; ``all_step_seconds`` has
    each of them.
    """
    phases = rank.phases
    used = [phase.device_used_bytes for phase in phases.values() if phase.device_used_bytes]
    steady = rank.step_seconds[_WARM_UP_STEPS:] or rank.step_seconds
    return {
        "rank": rank.rank,
        "host": rank.host,
        "state": rank.state,
        "phases": {name: phase.peak_allocated_bytes for name, phase in phases.items()},
        "phases_reserved": {name: phase.peak_reserved_bytes for name, phase in phases.items()},
        "phases_device_used": {name: phase.device_used_bytes for name, phase in phases.items()},
        "phases_seconds": {name: phase.seconds for name, phase in phases.items()},
        "peak_allocated_bytes": max((p.peak_allocated_bytes for p in phases.values()), default=0),
        "peak_reserved_bytes": max((p.peak_reserved_bytes for p in phases.values()), default=0),
        "device_used_bytes": max(used, default=None),
        "host_rss_bytes": max((p.host_rss_bytes for p in phases.values()), default=0),
        "step_seconds": statistics.median(steady) if steady else None,
        "all_step_seconds": list(rank.step_seconds),
        "tokens_per_step": rank.tokens_per_step,
        "steps_done": rank.steps_done,
        "allocator_retries": rank.allocator_retries,
        "allocator_ooms": rank.allocator_ooms,
        "host_autograd_op_seconds": rank.host_autograd_op_seconds,
    }


def state_of(ranks: Sequence[RankPeaks], *, has_failed: bool) -> str:
    """Return a finished run's state from its ranks and from what the launcher said."""
    if any(rank.state == OUT_OF_MEMORY for rank in ranks):
        return OUT_OF_MEMORY
    return FAILED if has_failed or not ranks else FINISHED


def parse_results(text: str, *, source: str) -> tuple[Result, ...]:
    """Return the results of a JSON Lines file; of several for one case, the last.

    A last line without an end is left out: the program was killed while it wrote it.

    Raises:
        RunDirError: a line is no result.
    """
    found: dict[str, Result] = {}
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        try:
            result = Result(content=json.loads(line))
            _prove_readable(result)
            found.pop(result.case, None)
            found[result.case] = result
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            if not line.endswith("\n"):
                break
            raise RunDirError(
                "this line is no result of a sweep",
                where=f"{source}:{number}",
                fix="remove the line, or write the results into another folder",
            ) from None
    return tuple(found.values())


def _prove_readable(result: Result) -> None:
    """Look at all that is shown of a result, so that what it lacks is found where it is read."""
    describe_result(result)
    # A recipe of another zerofit: whoever needs it says so.
    with suppress(RecipeError):
        dict(_csv_cells(result))


def remaining(
    cases: Iterable[Case], results: Iterable[Result], *, source: str, retry_failed: bool
) -> tuple[Case, ...]:
    """Return the cases that still have to run.

    Args:
        cases: of the sweep.
        results: of earlier runs of it.
        source: what to call the results in errors.
        retry_failed: run those again that neither finished nor ran out of memory.

    Raises:
        RunDirError: a case's result is of another recipe than the case has now.
    """
    by_name = {result.case: result for result in results}
    left = []
    for case in cases:
        done = by_name.get(case.name)
        if done is None or (retry_failed and done.is_failure):
            left.append(case)
            continue
        try:
            is_same = done.recipe == case.recipe
        except RecipeError:
            is_same = False
        if not is_same:
            raise RunDirError(
                f"the result of case {case.name} is of other settings than the sweep file has now",
                where=source,
                fix="write into another folder (--out), or give the changed case another name",
            )
    return tuple(left)


def results_to_csv(results: Iterable[Result]) -> str:
    """Return one line per result below a header; bytes and seconds of the fullest rank."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _CSV_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for result in results:
        writer.writerow(dict(_csv_cells(result)))
    return text.getvalue()


def _csv_cells(result: Result) -> Iterator[tuple[str, Any]]:
    content, recipe = result.content, result.content["recipe"]
    predicted = content.get("predicted") or {}
    zerofit = content.get("zerofit") or {}
    yield from {
        "case": result.case,
        "model": recipe["model"]["name_or_path"],
        "max_seq_len": result.recipe.max_seq_len,
        "method": result.recipe.method.value,
        "zero_stage": (predicted.get("strategy") or {}).get("zero_stage"),
        "strategy": content.get("strategy_label"),
        "world_size": predicted.get("world_size"),
        "state": result.state,
        "predicted_fits": predicted.get("fits"),
        "wall_seconds": content.get("wall_seconds"),
        "device_name": content.get("device_name"),
        "zerofit_version": zerofit.get("version"),
        "zerofit_commit": zerofit.get("commit"),
        "failure": " ".join((result.failure or "").split()),
    }.items()
    for quantity in (*_BYTES, "step_seconds"):
        yield f"predicted_{quantity}", result.predicted(quantity)
        yield f"measured_{quantity}", result.measured(quantity)
    seconds, tokens = result.measured("step_seconds"), result.measured("tokens_per_step")
    if seconds and tokens:
        yield "measured_tokens_per_second_per_rank", round(tokens / seconds, 1)


def describe_result(result: Result) -> str:
    """Return a line for people: predicted / measured and the error, or why there is none."""
    text = f"{result.case:40} {result.state:13}"
    if result.state != FINISHED:
        return f"{text} {' '.join((result.failure or '').split())[:200]}"
    parts = []
    for quantity in _BYTES:
        predicted, measured = result.predicted(quantity), result.measured(quantity)
        error = result.error_fraction(quantity)
        if predicted and measured and error is not None:
            parts.append(f"{predicted / 1e9:6.2f}/{measured / 1e9:6.2f} GB {error:+6.1%}")
    seconds, error = result.measured("step_seconds"), result.error_fraction("step_seconds")
    if seconds and error is not None:
        parts.append(f"{result.predicted('step_seconds'):6.3f}/{seconds:6.3f} s {error:+.0%}")
    return f"{text} {'  '.join(parts)}  {_wall(result)}".rstrip()


def _wall(result: Result) -> str:
    seconds = result.content.get("wall_seconds")
    return "" if seconds is None else f"({seconds} s)"
