"""The fit: damped least squares that a few odd runs cannot turn, judged on runs it has not seen."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.calibrate.runs import MeasuredRun
from launcher.errors import RunDirError
from launcher.hardware import SiteConstants
from launcher.predict.memory import MemoryEstimate, estimate_memory
from launcher.predict.site_constants import default_constants, with_site_constants
from launcher.predict.step_time import TimeEstimate, estimate_time

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vector = NDArray[np.float64]

FEWEST_RUNS = 4
RUNS_FOR_HALVES = 8
"""From so many on, every second run judges; with fewer, each is judged by a fit to the others."""
_LARGEST_FACTOR = 4.0
"""No constant is moved further from where it was fitted first: that would be another physics."""
_HUBER = 1.345
"""Standard deviations from which on a run counts linearly: 95 % efficient where errors are normal
(Huber, "Robust Statistics", 1981, section 4.5)."""
_PRIOR = 1e-8
"""Keeps a constant that the runs say nothing about where it was; too weak to be seen else."""
_STEP = 1e-3
_ROUNDS = 40
_STEP_TIME = "step_seconds"
_LEAST_SHARE = 0.02
"""Of a constant's effect that must differ from the effects of those before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Constants that one measured quantity pins down."""

    quantity: str
    """Whose error is shown and judged."""
    label: str
    beyond: str | None
    """What is taken off it before fitting, so that its errors do not turn the constants."""
    constants: tuple[str, ...]


FAMILIES = (
    Family(
        quantity="peak_reserved_bytes",
        label="reserved by torch",
        beyond="peak_allocated_bytes",
        constants=(
            "block_slack_bytes", "transient_fragmentation",
            "transient_fragmentation_fixed_segments",
        ),
    ),
    Family(
        quantity="device_used_bytes",
        label="in use (nvidia-smi)",
        beyond="peak_reserved_bytes",
        constants=("context_bytes", "all_reduce_bytes"),
    ),
    Family(
        quantity="host_bytes_per_node",
        label="host memory",
        beyond=None,
        constants=("process_host_bytes", "bitsandbytes_host_bytes"),
    ),
    Family(
        quantity=_STEP_TIME,
        label="step time",
        beyond=None,
        constants=(
            "host_op_seconds", "zero3_module_seconds", "gradient_hook_seconds", "matmul_fraction",
            "flash_fraction", "memory_fraction",
        ),
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One family's fit: what it did to runs that it was not made from."""

    family: Family
    num_runs: int
    error_before: float
    """Mean absolute error, as a fraction, with the constants that are used now."""
    error_after: float
    changes: Mapping[str, tuple[float, float]]
    """Constants that moved: before and after."""

    @property
    def is_taken(self) -> bool:
        """Whether the fit predicts better."""
        return bool(self.changes) and self.error_after < self.error_before


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFit:
    """What the runs on one kind of GPU say."""

    gpu_name: str
    num_runs: int
    verdicts: tuple[Verdict, ...]
    constants: Mapping[str, float]
    """What to use from now on: those used now, and those that were taken."""

    @property
    def is_better(self) -> bool:
        """Whether anything was taken."""
        return any(verdict.is_taken for verdict in self.verdicts)


def fit_gpu(runs: Sequence[MeasuredRun], *, used_now: Mapping[str, float]) -> GpuFit:
    """Fit each family of constants to runs on one kind of GPU.

    Args:
        runs: all on the same GPU, in the order in which every second one judges.
        used_now: the site's present constants, empty where it has none.

    Raises:
        RunDirError: fewer than ``FEWEST_RUNS`` runs.
    """
    gpu = runs[0].cluster.gpu
    if len(runs) < FEWEST_RUNS:
        raise RunDirError(
            f"{len(runs)} usable runs on {gpu.name} are too few",
            where="calibrate",
            fix=f"name at least {FEWEST_RUNS} finished runs, of different lengths and strategies",
        )
    constants = {**default_constants(gpu), **used_now}
    taken = dict(used_now)
    verdicts = []
    for family in FAMILIES:
        having = [run for run in runs if _has(run, family)]
        if len(having) < FEWEST_RUNS:
            continue
        verdict = _judge(family, having, constants)
        verdicts.append(verdict)
        if verdict.is_taken:
            found = {name: after for name, (_, after) in verdict.changes.items()}
            constants |= found
            taken |= found
    return GpuFit(gpu_name=gpu.name, num_runs=len(runs), verdicts=tuple(verdicts), constants=taken)


def _has(run: MeasuredRun, family: Family) -> bool:
    wanted = {family.quantity} | ({family.beyond} if family.beyond else set())
    return wanted <= set(run.measured)


def _judge(family: Family, runs: Sequence[MeasuredRun], constants: Mapping[str, float]) -> Verdict:
    """Fit on one half and judge on the other; with few runs, on each that is left out in turn."""
    if len(runs) >= RUNS_FOR_HALVES:
        found = fit_constants(family, runs[0::2], constants)
        judges = runs[1::2]
        after = [_error(run, family, {**constants, **found}) for run in judges]
    else:
        found = fit_constants(family, runs, constants)
        judges, after = runs, []
        for position, run in enumerate(runs):
            others = [*runs[:position], *runs[position + 1 :]]
            without = fit_constants(family, others, constants)
            after.append(_error(run, family, {**constants, **without}))
    before = [_error(run, family, constants) for run in judges]
    return Verdict(
        family=family,
        num_runs=len(runs),
        error_before=statistics.mean(before),
        error_after=statistics.mean(after),
        changes={name: (constants[name], value) for name, value in found.items()},
    )


def predict(run: MeasuredRun, constants: Mapping[str, float], *quantities: str) -> list[float]:
    """Return what is predicted for a run with these constants, in bytes or seconds."""
    site = SiteConstants(values=tuple(constants.items()), num_runs=0, fitted_at="")
    cluster = with_site_constants(run.cluster, site)
    estimate: TimeEstimate | MemoryEstimate
    if quantities == (_STEP_TIME,):
        estimate = estimate_time(run.workload, run.strategy, cluster)
    else:
        estimate = estimate_memory(run.workload, run.strategy, cluster)
    return [float(getattr(estimate, quantity)) for quantity in quantities]


def _error(run: MeasuredRun, family: Family, constants: Mapping[str, float]) -> float:
    measured = run.measured[family.quantity]
    (predicted,) = predict(run, constants, family.quantity)
    return abs(predicted - measured) / measured


def fit_constants(
    family: Family, runs: Sequence[MeasuredRun], start: Mapping[str, float]
) -> dict[str, float]:
    """Return the constants of a family that the runs move, at their best values.

    Levenberg and Marquardt's method on the logarithms, so that every constant stays positive and
    a step is a share of it; reweighted (Huber) in each round. Of constants that these runs
    cannot tell apart, the first takes the difference.
    """
    import numpy as np

    def residuals(x: Vector, names: Sequence[str]) -> Vector:
        values = {name: start[name] * float(np.exp(e)) for name, e in zip(names, x, strict=True)}
        return np.array([_residual(run, family, {**start, **values}) for run in runs])

    def slopes_at(x: Vector, found: Vector, names: Sequence[str]) -> Vector:
        moved = [residuals(x + _STEP * unit, names) for unit in np.eye(len(names))]
        return np.column_stack([(there - found) / _STEP for there in moved])

    x = np.zeros(len(family.constants))
    found = residuals(x, family.constants)
    names = _told_apart(family.constants, slopes_at(x, found, family.constants))
    x = np.zeros(len(names))
    lowest, highest = _bounds(names, start)
    damping = 1e-3
    for _ in range(_ROUNDS if names else 0):
        slopes = slopes_at(x, found, names)
        weights, size = _weights(found)
        square = slopes.T @ (weights[:, None] * slopes)
        prior = _PRIOR * max(float(np.trace(square)), 1e-12)
        target = -(slopes.T @ (weights * found)) - prior * x
        damped = square + np.diag(prior + damping * (np.diag(square) + prior))
        trial = np.clip(x + np.clip(np.linalg.solve(damped, target), -0.7, 0.7), lowest, highest)
        tried = residuals(trial, names)
        if _cost(tried, size) > _cost(found, size):
            damping *= 8
            if damping > 1e8:
                break
            continue
        is_done = float(np.abs(trial - x).max()) < 1e-6
        x, found, damping = trial, tried, max(damping / 8, 1e-12)
        if is_done:
            break
    moved = zip(names, x, strict=True)
    # Five digits are more than the runs say.
    return {
        name: float(f"{start[name] * np.exp(shift):.5g}")
        for name, shift in moved
        if abs(shift) > _STEP
    }


def _told_apart(names: Sequence[str], slopes: Vector) -> list[str]:
    """Return the constants whose effect is none, or nearly a sum of others' effects, left out."""
    import numpy as np

    kept: list[str] = []
    basis: list[Vector] = []
    for name, column in zip(names, slopes.T, strict=True):
        rest = column - sum((unit * (unit @ column) for unit in basis), np.zeros_like(column))
        size = float(np.linalg.norm(column))
        if size > 1e-6 and float(np.linalg.norm(rest)) > _LEAST_SHARE * size:
            kept.append(name)
            basis.append(rest / np.linalg.norm(rest))
    return kept


def _residual(run: MeasuredRun, family: Family, constants: Mapping[str, float]) -> float:
    """Return the error that the constants can mend, as a share of the quantity that is shown."""
    measured = run.measured[family.quantity]
    if family.beyond is None:
        (predicted,) = predict(run, constants, family.quantity)
        return (predicted - measured) / measured
    predicted, beyond = predict(run, constants, family.quantity, family.beyond)
    return (predicted - beyond - (measured - run.measured[family.beyond])) / measured


def _bounds(names: Sequence[str], start: Mapping[str, float]) -> tuple[Any, Any]:
    import numpy as np

    widest = np.log(_LARGEST_FACTOR)
    # A kernel reaches no more than the hardware's peak.
    highest = [
        min(widest, -np.log(start[name])) if name.endswith("_fraction") else widest
        for name in names
    ]
    return np.full(len(names), -widest), np.array(highest)


def _weights(found: Vector) -> tuple[Vector, float]:
    """Return Huber's weights, and the error from which on a run counts linearly."""
    import numpy as np

    # 1.4826 median absolute deviations are a standard deviation where errors are normal.
    size = _HUBER * max(1.4826 * float(np.median(np.abs(found))), 1e-9)
    return np.minimum(1.0, size / np.maximum(np.abs(found), 1e-300)), size


def _cost(found: Vector, size: float) -> float:
    import numpy as np

    large = np.abs(found)
    return float(np.where(large <= size, 0.5 * large**2, size * (large - 0.5 * size)).sum())
