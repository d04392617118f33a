"""A run's report as types: what every rank measured, beside what the plan predicted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from launcher.peaks import PhasePeaks, RankFailure, RankPeaks
from launcher.predict.memory import PHASES
from launcher.report.prediction import Prediction
from launcher.timeline import Timeline

RunState = Literal[
    "created", "pending", "running", "finished", "failed", "out_of_memory", "interrupted",
    "killed", "unknown",
]  # fmt: skip
FAILED_STATES: frozenset[RunState] = frozenset({"failed", "out_of_memory", "interrupted", "killed"})


MAX_RANK_ROWS = 16
MAX_FAILED_ROWS = 3
STEP_PHASES = frozenset({"forward", "loss", "backward", "step"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What whoever runs a run says of it now, such as Slurm or the process table."""

    state: str
    """A ``launcher.dispatch.run_state.State``."""
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How long the training records are, before they are cut."""

    bins: tuple[tuple[int, int, int], ...]
    """First length, last length (tokens), records."""
    max_seq_len: int
    """Tokens."""
    num_truncated: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """An earlier attempt at the same run, or what was done about its failure."""

    number: int
    state: str
    reason: str | None
    strategy: Mapping[str, str]
    steps_done: int | None
    peak_allocated_bytes: int | None
    """Of its fullest rank, among the ranks that were read."""
    reaction: str | None
    """What was changed for the next attempt, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryAtFailure:
    """What a rank that ran out of memory found on its device, largest first."""

    rank: int
    phase: str
    requested_bytes: int | None
    device_free_bytes: int | None
    predicted: Mapping[str, int]
    """Bytes by component."""
    measured: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """The content of a run directory as far as it could be read; the input of a report."""

    name: str
    plan: Mapping[str, object] | None = None
    status: Mapping[str, object] | None = None
    results: Mapping[str, object] | None = None
    ranks: tuple[RankPeaks, ...] = ()
    log: tuple[Mapping[str, object], ...] = ()
    timelines: tuple[Timeline, ...] = ()
    """Of a few telling ranks, the fullest first."""
    lengths: Lengths | None = None
    attempts: tuple[Attempt, ...] = ()
    memory_at_failure: MemoryAtFailure | None = None
    recipe: Mapping[str, object] = field(default_factory=dict)
    """Values by dotted key, as the recipe's file has them."""
    observation: Observation | None = None
    problems: tuple[str, ...] = ()
    """One sentence for each file that is missing, half-written or of another version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A predicted number beside the measured one, in the unit of the field that holds it."""

    predicted: float | None
    measured: float | None

    @property
    def error_fraction(self) -> float | None:
        """``(predicted - measured) / measured``; negative when more was used than predicted."""
        if self.predicted is None or not self.measured:
            return None
        return (self.predicted - self.measured) / self.measured


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseReport:
    """One phase on one rank."""

    phase: str
    predicted_bytes: int | None
    """Allocated on the fullest rank."""
    measured: PhasePeaks
    """As the rank wrote it."""

    @property
    def allocated_bytes(self) -> Comparison:
        """The highest allocated bytes beside the predicted ones."""
        return Comparison(
            predicted=self.predicted_bytes, measured=self.measured.peak_allocated_bytes
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """One rank: its highest figures over all phases, and every phase."""

    rank: int
    host: str
    device: str
    device_name: str
    state: str
    steps_done: int
    allocated_bytes: Comparison
    reserved_bytes: Comparison
    device_used_bytes: Comparison
    host_rss_bytes: int | None
    peak_phase: str | None
    """The phase in which most was allocated; ``None`` when nothing was measured."""
    phases: tuple[PhaseReport, ...]
    allocator_retries: int
    allocator_ooms: int

    @property
    def measured_bytes(self) -> int:
        """Highest allocated bytes of any phase, 0 when nothing was measured."""
        return round(self.allocated_bytes.measured or 0)

    @property
    def first_step_bytes(self) -> int | None:
        """Highest allocated bytes of the first optimizer step."""
        steps = [phase.measured.first_step for phase in self.phases]
        return max((step.allocated_bytes for step in steps if step), default=None)

    @property
    def steady_bytes(self) -> int | None:
        """Highest allocated bytes of a usual later step."""
        steps = [phase.measured.steady_state for phase in self.phases]
        return max((step.allocated_bytes for step in steps if step), default=None)

    @property
    def host_pinned_bytes(self) -> int | None:
        """Highest page-locked host memory."""
        sizes = [phase.measured.host_pinned_bytes for phase in self.phases]
        return max((size for size in sizes if size is not None), default=None)

    @property
    def gpu_utilisation_fraction(self) -> float | None:
        """Mean over the phases of steps, by their time; 0-1."""
        return self._mean_in_steps(lambda peaks: peaks.gpu_utilisation_fraction)

    @property
    def power_watts(self) -> float | None:
        """Mean draw over the phases of steps, by their time."""
        return self._mean_in_steps(lambda peaks: peaks.power_watts)

    def _mean_in_steps(self, read: Callable[[PhasePeaks], float | None]) -> float | None:
        pairs = [
            (value, phase.measured.seconds)
            for phase in self.phases
            if phase.phase in STEP_PHASES and (value := read(phase.measured)) is not None
        ]
        seconds = sum(weight for _, weight in pairs)
        return sum(value * weight for value, weight in pairs) / seconds if seconds else None

    def phase(self, name: str) -> PhaseReport | None:
        """Return one phase, ``None`` when this rank did not reach it."""
        return next((phase for phase in self.phases if phase.phase == name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """One host: the sum of its ranks' peak resident memory against the prediction."""

    host: str
    num_ranks: int
    """Ranks of this host whose file was readable."""
    host_bytes: Comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceReport:
    """How the measured peaks spread over the ranks."""

    fullest_rank: int
    median_rank: int
    emptiest_rank: int
    imbalance_fraction: float
    """Fullest over mean, minus 1."""
    headroom_bytes: int | None
    """Device memory that the fullest rank left free; ``None`` on CPU or an unknown GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeReport:
    """Seconds of an optimizer step (the slowest rank's), and the throughput that follows."""

    num_steps: int
    first_step_seconds: float | None
    max_step_seconds: float | None
    """Slowest step after the first."""
    step_seconds: Comparison
    """Measured: the median of the steps after the first (of all, when there is only one)."""
    tokens_per_step_per_gpu: Comparison
    """Tokens that one rank processes in a step, padding included; the prediction is for
    sequences of full length."""
    tokens_per_second_per_gpu: Comparison
    """Padding included."""
    tokens_per_second: float | None
    """All reported ranks together."""
    phase_fractions: Mapping[str, float] = field(default_factory=dict)
    """Share of the steps' time that each phase took on the host's clock, mean of the ranks, 0-1;
    what is left was spent between phases: with data, logging and saving's bookkeeping."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossReport:
    """Training loss by step, and the loss on held-out text before and after."""

    train: tuple[tuple[int, float], ...]
    held_out: tuple[tuple[int, float], ...]
    held_out_before: float | None
    held_out_after: float | None
    is_after_final: bool
    """``held_out_after`` was measured at the end of the run, not at its last evaluation so far."""
    not_finite_steps: tuple[int, ...]
    """Steps whose loss was NaN or infinite."""

    @property
    def held_out_change(self) -> float | None:
        """After minus before; negative is better."""
        if self.held_out_before is None or self.held_out_after is None:
            return None
        return self.held_out_after - self.held_out_before


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleReport:
    """The same prompt answered by the model before and after training."""

    prompt: str
    before: str | None
    after: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureReport:
    """A failure, once, with every rank that reported the same."""

    rank: int
    host: str
    state: str
    failure: RankFailure
    same_on_ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One drawing in two widths, with the sentence that it shows."""

    name: str
    finding: str
    wide_svg: str
    narrow_svg: str


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """Everything that can be said about a run, finished or not."""

    name: str
    state: RunState
    state_reason: str | None
    """What status.json says about the state, in the words of who wrote it."""
    observation: Observation | None
    prediction: Prediction
    world_size: int | None
    missing_ranks: tuple[int, ...]
    ranks: tuple[RankReport, ...]
    nodes: tuple[NodeReport, ...]
    balance: BalanceReport | None
    time: TimeReport
    loss: LossReport
    tokens_seen: int | None
    train_seconds: float | None
    sample: SampleReport | None
    throughput: tuple[tuple[int, float], ...] = ()
    """Tokens per second of all ranks by step, as they were logged."""
    timelines: tuple[Timeline, ...] = ()
    lengths: Lengths | None = None
    attempts: tuple[Attempt, ...] = ()
    """Oldest first; the run's own, last attempt is not among them."""
    memory_at_failure: MemoryAtFailure | None = None
    advice: tuple[str, ...] = ()
    """What to change, each computed by the planner."""
    recipe: Mapping[str, object] = field(default_factory=dict)
    clock_skews_seconds: Mapping[str, float] = field(default_factory=dict)
    """Hosts whose clock differs from most others', by how much."""
    failures: tuple[FailureReport, ...] = ()
    problems: tuple[str, ...] = ()
    phase_names: tuple[str, ...] = field(default=PHASES)
    """Phases that were predicted or measured, in the order in which they happen."""

    @property
    def is_on_cpu(self) -> bool:
        """No rank used a GPU: there are no allocator statistics and no device figures."""
        return bool(self.ranks) and all(rank.device == "cpu" for rank in self.ranks)

    def rank(self, number: int) -> RankReport:
        """Return one of the reported ranks."""
        return next(rank for rank in self.ranks if rank.rank == number)

    def fullest_in(self, phase: str) -> RankReport | None:
        """Return the rank that allocated most in a phase, ``None`` when none measured it."""
        return self._fullest.get(phase)

    @functools.cached_property
    def largest_measured_bytes(self) -> int:
        """Highest allocated bytes of any rank, 0 when nothing was measured."""
        return max((rank.measured_bytes for rank in self.ranks), default=0)

    @functools.cached_property
    def _fullest(self) -> dict[str, RankReport]:
        found: dict[str, tuple[float, RankReport]] = {}
        for rank in sorted(self.ranks, key=lambda rank: rank.rank):
            for row in rank.phases:
                size = row.allocated_bytes.measured
                if size is not None and (row.phase not in found or size > found[row.phase][0]):
                    found[row.phase] = size, rank
        return {phase: rank for phase, (_, rank) in found.items()}


def select_ranks(report: RunReport) -> tuple[RankReport, ...]:
    """Return the ranks to show: all, or the fullest, median, emptiest and first failed ones."""
    if len(report.ranks) <= MAX_RANK_ROWS:
        return report.ranks
    numbers: set[int] = set()
    if report.balance is not None:
        balance = report.balance
        numbers |= {balance.fullest_rank, balance.median_rank, balance.emptiest_rank}
    failed = [rank.rank for rank in report.ranks if rank.state not in ("finished", "running")]
    numbers |= set(failed[:MAX_FAILED_ROWS])
    return tuple(rank for rank in report.ranks if rank.rank in numbers)
