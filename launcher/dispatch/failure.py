"""Why a job failed, in one error: from the ranks' files, else from how the ranks ended."""

from __future__ import annotations

import contextlib
import logging
import re
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher import run_dir as rd
from launcher.dispatch.rank_lines import tail
from launcher.errors import JobFailedError, RunDirError
from launcher.failure_kind import FailureKind
from launcher.peaks import RankPeaks

_log = logging.getLogger(__name__)

# Errors of ranks that only noticed that another one had gone.
_CONSEQUENCE = re.compile(
    r"Dist(Network|Store|Backend)?Error|Connection (closed|reset)|Broken pipe|"
    r"remote process exited|Timed out waiting",
    re.IGNORECASE,
)
# Frames of a rank that waits for the others.
_COLLECTIVE = re.compile(r"/(torch/distributed|deepspeed/comm)/")
# pdsh puts the host before each line.
_ERROR_LINE = re.compile(
    r"(?:[\w.:-]+: )?(?:\[rank ?\d+\]:? )?((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadRank:
    """A rank that ended; ``exit_status`` is negative for a signal.

    ``host`` is given where it is not this machine.
    """

    rank: int
    exit_status: int | None
    host: str | None = None
    is_oom_kill: bool = False
    """Whether the kernel killed a process for want of memory when this one ended."""

    def __str__(self) -> str:
        return f"rank {self.rank}" + (f" on {self.host}" if self.host else "")


class HostLostError(JobFailedError):
    """Hosts crashed, were cut off, or hang.

    ``hosts`` are in the order in which they were lost; ``num_left`` is how many the Slurm job still
    has that are fit for the run, ``None`` where a hostfile names the others.
    """

    kind = FailureKind.lost_host

    def __init__(
        self,
        problem: str,
        *,
        where: str,
        fix: str,
        hosts: tuple[str, ...],
        num_left: int | None = None,
    ) -> None:
        super().__init__(problem, where=where, fix=fix)
        self.hosts = hosts
        self.num_left = num_left


@dataclass(frozen=True, slots=True, kw_only=True)
class LostHost:
    """A host that crashed, was cut off, or hangs."""

    host: str
    problem: str
    fix: str


def read_failures(run_dir: Path) -> tuple[RankPeaks, ...]:
    """Return the ranks that say why they failed, the likely cause first.

    When one rank raises, the others fail a moment later in the collective that it left; those
    come last, and among equals the file that was written first comes first. When one hangs,
    those that wait for it hang, too: the one that is in no collective, and of those the one that
    got least far, comes first.
    """
    found: list[tuple[int, tuple[bool, int], float, RankPeaks]] = []
    for path in (run_dir / rd.RANKS).glob("[0-9]*.json"):
        try:
            written = path.stat().st_mtime
            peaks = rd.read_rank(path)
        except (OSError, RunDirError) as error:
            _log.warning("cannot read a rank's file: %s", error)
            continue
        if peaks.failure is not None and peaks.state in ("failed", "out_of_memory"):
            order, progress = 0, (False, 0)
            if is_consequence(peaks):
                order = 2
            elif _is_hang(peaks):
                waits = bool(_COLLECTIVE.search(peaks.failure.traceback))
                order, progress = 1, (waits, peaks.beats)
            found.append((order, progress, written, peaks))
    return tuple(peaks for *_, peaks in sorted(found, key=lambda item: item[:3]))


def is_consequence(peaks: RankPeaks) -> bool:
    """Return whether a rank that failed only noticed that another one was gone."""
    assert peaks.failure is not None
    return bool(_CONSEQUENCE.search(f"{peaks.failure.type}: {peaks.failure.message}"))


def _is_hang(peaks: RankPeaks) -> bool:
    return peaks.failure is not None and peaks.failure.kind is FailureKind.hang


def describe_failure(
    run_dir: Path,
    *,
    exit_code: int | None,
    dead_ranks: Iterable[DeadRank] = (),
    lost_hosts: Sequence[LostHost] = (),
) -> JobFailedError:
    """Return the error for a job that did not finish.

    Args:
        run_dir: the run's directory.
        exit_code: what the launcher ended with; not to be trusted, DeepSpeed ends with 0 when
            its own child is killed.
        dead_ranks: in the order in which they ended.
        lost_hosts: in the order in which they were lost.
    """
    log_file = run_dir / rd.LAUNCHER_LOG
    log = tail(run_dir)
    # Those that were only told to stop come last: the cause is another one.
    told_to_stop = (-signal.SIGTERM, 128 + signal.SIGTERM)
    dead_ranks = sorted(dead_ranks, key=lambda dead: dead.exit_status in told_to_stop)
    failures = read_failures(run_dir)
    if failures and not is_consequence(failures[0]) and not (lost_hosts and _is_hang(failures[0])):
        return _reported(failures, log, where=str(log_file), silent=_silent_ranks(run_dir))
    if lost_hosts:
        return describe_lost_hosts(lost_hosts, where=str(run_dir))
    is_oom_kill = any(dead.is_oom_kill for dead in dead_ranks)
    # What is left of the failures are those of ranks that noticed another one's end.
    noticing = {peaks.rank for peaks in failures}
    dead_ranks = [dead for dead in dead_ranks if dead.rank not in noticing]
    if failures and _first_killed(dead_ranks) is None:
        return _noticed(failures, log, run_dir)
    by_signal = _first_killed(dead_ranks)
    by_exit_code = _killed_by_exit_code(exit_code, is_oom_kill=is_oom_kill)
    if by_exit_code and (by_signal is None or by_signal[1] == signal.SIGTERM != by_exit_code[1]):
        # Whoever was only told to stop is not the cause.
        by_signal = by_exit_code
    if by_signal is not None:
        return _killed(*by_signal, where=str(log_file))
    died = next((dead for dead in dead_ranks if dead.exit_status), None)
    if problem := _storage_problem(run_dir):
        # Neither the rank's file nor the log could be written any more.
        return JobFailedError(
            f"{problem}, and the run has ended",
            where=str(run_dir),
            fix="free some space, or start it again in a folder on a larger disk",
            kind=FailureKind.storage,
        )
    who = str(died) if died else "the deepspeed launcher"
    code = died.exit_status if died else exit_code
    error_line = next((m for line in reversed(log) if (m := _ERROR_LINE.fullmatch(line))), None)
    said = f": {error_line.group(1)}" if error_line else ""
    return JobFailedError(
        f"{who} ended with exit code {code} and the run is not marked as finished{said}",
        where=str(log_file),
        fix="the log has all that was printed",
    )


_SIGNAL_FIXES = {
    signal.SIGKILL.value: (
        "the host probably ran out of memory (`dmesg` shows it); use fewer ranks, a smaller "
        "micro batch, or less offload to the CPU"
    ),
    signal.SIGSEGV.value: "a compiled library crashed; `zerofit doctor` shows mismatched versions",
    signal.SIGBUS.value: "shared memory is probably full; `zerofit doctor` shows what fills it",
    signal.SIGILL.value: "a kernel was built for another processor; remove the folder "
    "~/.cache/torch_extensions and start again",
}


def _silent_ranks(run_dir: Path) -> list[str]:
    """Return the ranks that were ended and had not been able to say anything of it."""
    silent = []
    for path in (run_dir / rd.RANKS).glob("[0-9]*.json"):
        with contextlib.suppress(RunDirError, OSError):  # the others' word is enough
            peaks = rd.read_rank(path)
            if peaks.state == "running":
                silent.append(f"rank {peaks.rank} on {peaks.host}")
    return sorted(silent)


def _noticed(failures: tuple[RankPeaks, ...], log: list[str], run_dir: Path) -> JobFailedError:
    """Return the error where ranks only noticed that another one was gone."""
    where = str(run_dir / rd.LAUNCHER_LOG)
    silent = _silent_ranks(run_dir)
    if not silent:
        return _reported(failures, log, where=where)
    # Whoever watches was not woken before the rank's parent took note of its end.
    return JobFailedError(
        f"{silent[0]} was gone without a word, and the others noticed",
        where=where,
        fix=_SIGNAL_FIXES[signal.SIGKILL.value],
        kind=FailureKind.killed,
    )


def _storage_problem(run_dir: Path) -> str | None:
    try:
        return "the disk is full" if rd.free_bytes(run_dir) < rd.PROBE_BYTES else None
    except OSError as error:
        return f"the run directory has vanished ({error.strerror})"


def _reported(
    failures: tuple[RankPeaks, ...], log: list[str], *, where: str, silent: Sequence[str] = ()
) -> JobFailedError:
    first = failures[0]
    assert first.failure is not None
    failure = first.failure
    # One of our own errors says what to do; any other names its type, and has a traceback.
    message, _, own_fix = failure.message.partition("\n  fix: ")
    what = message if own_fix else f"{failure.type}: {message}"
    problem = f"rank {first.rank} on {first.host} failed in phase {failure.phase}: {what}"
    # Once: what the rank printed itself has been seen already.
    lines = failure.traceback.rstrip().splitlines()
    last = (message.splitlines() or lines or [""])[-1]
    if not own_fix and not any(line.endswith(last) for line in log):
        problem += "\n" + "\n".join(f"    {line}" for line in lines)
    if _is_hang(first) and silent:
        # Its own watchdog did not run either.
        problem += f"; it may wait for {', '.join(silent[:8])}: stopped, or on a host that hangs"
    others = [str(peaks.rank) for peaks in failures[1:9]]
    if others:
        more = f" and {len(failures) - 9} more" if len(failures) > 9 else ""
        problem += f"\n  then failed too: rank {', '.join(others)}{more}"
    fix = own_fix or "mend what the traceback says; the log has all that was printed"
    if first.state == "out_of_memory":
        fix = "`zerofit report` shows which phase was fuller than predicted; use a smaller micro "
        fix += "batch, a higher zero_stage, or offload"
    return JobFailedError(problem, where=where, fix=fix, kind=failure.kind)


def describe_lost_hosts(
    lost_hosts: Sequence[LostHost], *, where: str, num_left: int | None = None
) -> HostLostError:
    """Return the error that names hosts in the order in which they were lost."""
    more = [host.host for host in lost_hosts[1:9]]
    also = f"\n  lost too: {', '.join(more)}" if more else ""
    first = lost_hosts[0]
    return HostLostError(
        f"{first.host} was lost: {first.problem}{also}",
        where=where,
        fix=first.fix,
        hosts=tuple(host.host for host in lost_hosts),
        num_left=num_left,
    )


_Kill = tuple[str, int, bool]
"""Who was killed, by which signal, and whether the kernel did it for want of memory."""


def _killed(who: str, number: int, is_oom_kill: bool, *, where: str) -> JobFailedError:  # noqa: FBT001
    if is_oom_kill and number == signal.SIGKILL:
        return JobFailedError(
            f"{who} was killed by the kernel: the host's memory ran out",
            where=where,
            fix="use fewer ranks or less offload to the CPU, or a host with more memory",
            kind=FailureKind.host_oom,
        )
    return JobFailedError(
        f"{who} was killed by signal {number} ({_signal_name(number)})",
        where=where,
        fix=_SIGNAL_FIXES.get(number, "the log has what the rank printed last"),
        kind=FailureKind.killed,
    )


def _first_killed(dead_ranks: Iterable[DeadRank]) -> _Kill | None:
    first = next((dead for dead in dead_ranks if dead.exit_status), None)
    if first is None or first.exit_status is None or first.exit_status > 0:
        return None
    return str(first), -first.exit_status, first.is_oom_kill


def _killed_by_exit_code(exit_code: int | None, *, is_oom_kill: bool) -> _Kill | None:
    """DeepSpeed's launch.py ends with ``sys.exit(-9)``, which the system makes 247.

    A rank that died before it was ever seen is known by this alone; ``is_oom_kill`` is what the
    end of another one showed.
    """
    if exit_code is None:
        return None
    if exit_code < 0:
        return "the deepspeed launcher", -exit_code, is_oom_kill
    if 256 - 64 <= exit_code <= 255:
        return "a rank", 256 - exit_code, is_oom_kill
    return None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
