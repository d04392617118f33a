"""What a run's user should change, each piece of advice computed by the planner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

from launcher import run_dir as rd
from launcher.config_facts import is_unknown
from launcher.data_cache import DATA, SUMMARY, load_summary
from launcher.errors import LauncherError
from launcher.failure_kind import FailureKind
from launcher.hardware import ClusterSpec
from launcher.model_source import find_config
from launcher.model_spec import spec_from_config
from launcher.planning.ceiling import NO_CEILING, Ceiling
from launcher.planning.length_advice import LengthAdvice, Lengths, whole_section
from launcher.planning.plan import Candidate, strategy_from_json
from launcher.planning.planner import choose_strategy
from launcher.post_mortem import read_post_mortems
from launcher.predict.memory import estimate_memory
from launcher.prepare import packages, resolve_cluster
from launcher.recipe import parse_recipe
from launcher.recipe_sections import Recipe, StrategySection
from launcher.recovery.next_rung import ceiling_after, what_may_change, with_leave
from launcher.report.run_report import RunReport
from launcher.resolve import PACKABLE, resolve_workload
from launcher.strategy import Precision, Strategy
from launcher.units import format_bytes
from launcher.workload import Workload

LEAST_GAIN = 1.1
"""Predicted step times are good to about a tenth (benchmarks/accuracy.md); less is no advice."""
_BATCH_FACTORS = (2, 4, 8, 16)
# Of the gain of the largest batch, so much must remain for a smaller one to be named.
_MOST_OF_THE_GAIN = 0.9
# Choices of the user that change what is learnt, not only how much memory it takes.
_NOT_FREED = frozenset({"optimizer", "grad_accum_dtype", "nvme_path"})
_SPEED_STATES = frozenset({"running", "finished"})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """A run as the planner sees it: what was trained where, and with which strategy."""

    recipe: Recipe
    workload: Workload
    cluster: ClusterSpec
    strategy: Strategy
    limit_bytes: int
    safety_fraction: float

    def best(self, fixed: StrategySection, *, batch_factor: int = 1) -> Candidate | None:
        """Return the planner's choice under fixed fields, ``None`` when nothing works."""
        batch = self.workload.global_batch_size * batch_factor
        return self.best_for(replace(self.workload, global_batch_size=batch), fixed)

    def best_for(
        self, workload: Workload, fixed: StrategySection, ceiling: Ceiling = NO_CEILING
    ) -> Candidate | None:
        """Return the planner's choice for another workload on the same cluster."""
        try:
            choice = choose_strategy(
                workload,
                self.cluster,
                fixed=fixed,
                raw_deepspeed=self.recipe.deepspeed,
                packages=packages(self.recipe),
                safety_fraction=self.safety_fraction,
                ceiling=ceiling,
            )
        except LauncherError:
            return None
        return choice.best if choice.fits else None


def advise(directory: Path, report: RunReport) -> tuple[str, ...]:
    """Return what to change, most useful first; empty where the planner has nothing better.

    A run that ran out of memory is told the next rung of its plan's ladder; another one what
    would be faster and fits. Where the planner cannot be asked, one sentence says why.

    Args:
        directory: of the run.
        report: of the run.
    """
    if not report.ranks:
        return ()
    try:
        plan = rd.read_mapping(directory / rd.PLAN, schema_version=1)
        if report.state == "out_of_memory":
            return tuple(_save_memory(plan, directory, report))
        has_steps = report.state in _SPEED_STATES and report.time.num_steps
        crowded = tuple(_leave_room(plan, report)) if has_steps else ()
        if crowded or not has_steps:
            return crowded
        run = _read_run(directory, plan)
        return (*_go_faster(run, report), *_from_lengths(run, directory))
    except LauncherError as error:
        return (f"No advice: {error.problem}.",)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        # The files of a run are anybody's: what is wrong with them must not stop the report.
        return (f"No advice: the plan or the recipe cannot be used ({type(error).__name__}).",)


def _save_memory(plan: Mapping[str, Any], directory: Path, report: RunReport) -> Iterator[str]:
    rungs = plan["ladder"]
    if rungs:
        yield f"Out of memory: {_rung(plan, rungs[0])}"
        return
    run = _read_run(directory, plan)
    then = _best_below(run, directory, report)
    if then is None:
        yield (
            "Out of memory, and the planner knows no more frugal strategy that fits: use shorter "
            "samples, more or larger GPUs, or method=qlora."
        )
        return
    saved = plan["memory"]["device_used_bytes"] - then.memory.device_used_bytes
    slower = then.time.step_seconds / plan["time"]["step_seconds"]
    yield (
        "Out of memory, and no more frugal strategy fits within what the recipe fixes; another "
        f"one is predicted to {_trade(saved, slower)}: {_overrides(run.strategy, then.strategy)}"
    )


def _best_below(run: _Run, directory: Path, report: RunReport) -> Candidate | None:
    """Return the fastest that needs less of what ran out, as recovery does with its leave to."""
    first = report.failures[0].failure if report.failures else None
    ceiling = ceiling_after(
        estimate_memory(run.workload, run.strategy, run.cluster),
        first.kind if first else FailureKind.gpu_oom,
        first.phase if first else None,
        limit_bytes=run.limit_bytes,
        num_earlier=0,
        found=read_post_mortems(directory),
    )
    changes = what_may_change(with_leave(run.recipe))
    found = (run.best_for(run.workload, fixed, ceiling) for fixed in changes)
    return next((candidate for candidate in found if candidate is not None), None)


def _leave_room(plan: Mapping[str, Any], report: RunReport) -> Iterator[str]:
    """Say when the fullest rank used more than the plan may."""
    balance = report.balance
    if balance is None or balance.headroom_bytes is None or not plan["ladder"]:
        return
    if balance.headroom_bytes < plan["safety_margin_bytes"] / 2:
        free = format_bytes(balance.headroom_bytes)
        yield f"Only {free} were free on the fullest rank: {_rung(plan, plan['ladder'][0])}"


def _rung(plan: Mapping[str, Any], rung: Mapping[str, Any]) -> str:
    now, then = strategy_from_json(plan["strategy"]), strategy_from_json(rung["strategy"])
    saved = plan["memory"]["device_used_bytes"] - rung["device_used_bytes"]
    slower = rung["step_seconds"] / plan["time"]["step_seconds"]
    return (
        f"the planner's next more frugal strategy is predicted to {_trade(saved, slower)}: "
        f"{_overrides(now, then)}"
    )


def _trade(saved_bytes: int, slower: float) -> str:
    return f"need {format_bytes(saved_bytes)} less and to take {slower:.2f}x the time"


def _read_run(directory: Path, plan: Mapping[str, Any]) -> _Run:
    path = directory / rd.RECIPE
    recipe = parse_recipe(rd.read_text(path), source=str(path))
    is_on_gpu = plan["device_type"] == "cuda"
    section = replace(
        recipe.cluster,
        gpu=plan["gpu"] if is_on_gpu else None,
        num_nodes=plan["num_nodes"],
        gpus_per_node=plan["gpus_per_node"],
        hostfile=None,
        backend="local",
    )
    memory_bytes = plan["limit_bytes"] + plan["safety_margin_bytes"]
    cluster = replace(resolve_cluster(section), free_memory_bytes=memory_bytes)
    name, config = find_config(recipe.model.name_or_path, revision=recipe.model.revision)
    if is_unknown(config):
        raise LauncherError(
            "the model's architecture would have to be traced", where=name, fix="run zerofit plan"
        )
    workload = resolve_workload(
        recipe, spec_from_config(config, name=name), cluster.gpu, source=str(path)
    )
    return _Run(
        recipe=recipe,
        workload=replace(
            workload,
            max_seq_len=plan["max_seq_len"],
            global_batch_size=plan["global_batch_size"],
            precision=Precision(plan["precision"]),
        ),
        cluster=cluster,
        strategy=strategy_from_json(plan["strategy"]),
        limit_bytes=plan["limit_bytes"],
        safety_fraction=plan["safety_margin_bytes"] / memory_bytes,
    )


def _go_faster(run: _Run, report: RunReport) -> Iterator[str]:
    """Yield changes after which more tokens go through in a second, as the planner predicts."""
    now = run.best(whole_section(run.strategy))
    if now is None:
        return
    margin = _measured_over_predicted(report)
    freed = _best_freed(run, now, margin)
    if freed is not None:
        yield _sentence(run, report, freed, now.time.step_seconds / freed.time.step_seconds)
    grown = _best_batch(run, now, margin)
    if grown is not None and freed is None:
        factor, candidate = grown
        gain = factor * now.time.step_seconds / candidate.time.step_seconds
        batch = run.workload.global_batch_size * factor
        yield (
            _sentence(run, report, candidate, gain)
            + f" optim.global_batch_size={batch}. That is another training: fewer, larger steps."
        )


def _from_lengths(run: _Run, directory: Path) -> Iterator[str]:
    """Yield what the lengths of the data say, where there is data."""
    if not (directory / DATA / SUMMARY).is_file():
        return
    data = load_summary(directory / DATA)
    lengths = Lengths(
        max_seq_len=data.max_seq_len,
        percentile_99=data.train.whole_length_percentiles["99"],
        mean=data.train.mean_sequence_tokens,
        can_pack=run.workload.model.model_type in PACKABLE,
    )
    if data.packing:
        return
    advice = LengthAdvice(
        lengths=lengths,
        workload=run.workload,
        plans=run.best_for,
        fixed=run.recipe.strategy,
        now=whole_section(run.strategy),
        least_gain=LEAST_GAIN,
    )
    yield from advice.shorter()
    yield from advice.packed()


def _best_freed(run: _Run, now: Candidate, margin: float) -> Candidate | None:
    """Return the planner's choice without one of the recipe's fixed fields, or without all."""
    fixed = run.recipe.strategy
    names = [name for name in fixed.given() if name not in _NOT_FREED]
    found = []
    for freed in [(name,) for name in names] + [tuple(names)] * (len(names) > 1):
        candidate = run.best(fixed.without(*freed))
        if candidate is not None and _fits(run, candidate, margin):
            found.append(candidate)
    best = min(found, key=lambda item: item.time.step_seconds, default=None)
    if best is None or now.time.step_seconds < LEAST_GAIN * best.time.step_seconds:
        return None
    return best


def _best_batch(run: _Run, now: Candidate, margin: float) -> tuple[int, Candidate] | None:
    """Return the smallest larger batch that brings most of what the largest would."""
    fixed = run.recipe.strategy.without("micro_batch_size_per_gpu")
    gains: dict[int, tuple[float, Candidate]] = {}
    for factor in _BATCH_FACTORS:
        candidate = run.best(fixed, batch_factor=factor)
        if candidate is not None and _fits(run, candidate, margin):
            gain = factor * now.time.step_seconds / candidate.time.step_seconds
            gains[factor] = gain, candidate
    most = max((gain for gain, _ in gains.values()), default=0.0)
    if most < LEAST_GAIN:
        return None
    return next(
        (factor, candidate)
        for factor, (gain, candidate) in gains.items()
        if gain >= LEAST_GAIN and gain >= _MOST_OF_THE_GAIN * most
    )


def _measured_over_predicted(report: RunReport) -> float:
    """Return by how much the fullest rank needed more than predicted; at least 1."""
    if report.balance is None:
        return 1.0
    used = report.rank(report.balance.fullest_rank).device_used_bytes
    if not used.predicted or not used.measured:
        return 1.0
    return max(used.measured / used.predicted, 1.0)


def _fits(run: _Run, candidate: Candidate, margin: float) -> bool:
    """Return whether it fits also when the prediction is as wrong as it was for this run."""
    return candidate.memory.device_used_bytes * margin <= run.limit_bytes


def _sentence(run: _Run, report: RunReport, candidate: Candidate, gain: float) -> str:
    free = ""
    if report.balance is not None and report.balance.headroom_bytes is not None:
        free = f"{format_bytes(report.balance.headroom_bytes)} free on the fullest rank: "
    then, keys = candidate.strategy, _overrides(run.strategy, candidate.strategy)
    micro, larger = run.strategy.micro_batch_size_per_gpu, then.micro_batch_size_per_gpu
    used, limit = candidate.memory.device_used_bytes, run.limit_bytes
    fits = f"fits ({format_bytes(used)} of {format_bytes(limit)}) and is {gain:.1f}x faster"
    if micro == larger:
        return f"{free}{keys} {fits}, both predicted."
    return f"{free}micro-batch {larger} in place of {micro} {fits}, both predicted: {keys}"


def _overrides(now: Strategy, then: Strategy) -> str:
    """Return the recipe's keys that turn one strategy into the other."""
    names = [item.name for item in fields(StrategySection) if hasattr(now, item.name)]
    changed = [name for name in names if getattr(now, name) != getattr(then, name)]
    return " ".join(f"strategy.{name}={_plain(getattr(then, name))}" for name in changed)


def _plain(value: object) -> str:
    shown = value.value if isinstance(value, Enum) else value
    return str(shown).lower() if isinstance(shown, bool) else str(shown)
