"""Why a job failed, from what its ranks left behind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from launcher import run_dir as rd
from launcher.dispatch.failure import (
    DeadRank,
    HostLostError,
    LostHost,
    describe_failure,
    read_failures,
)
from launcher.dispatch.process_group import count_oom_kills
from launcher.errors import JobFailedError
from launcher.failure_kind import FailureKind
from launcher.peaks import RankFailure, RankPeaks, RankState, peaks_to_json

TRACEBACK = 'Traceback (most recent call last):\n  File "x.py", line 1\nValueError: boom\n'


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return rd.create(tmp_path / "run")


def write_rank(
    run_dir: Path,
    rank: int,
    *,
    type_name: str = "ValueError",
    message: str = "boom",
    state: RankState = "failed",
    written: float = 1000.0,
    beats: int = 0,
    **failure: Any,
) -> None:
    peaks = RankPeaks(
        rank=rank,
        local_rank=rank,
        world_size=4,
        host="node1",
        pid=1,
        device="cpu",
        device_name="cpu",
        state=state,
        steps_done=0,
        beats=beats,
        failure=RankFailure(
            **{
                "phase": "forward",
                "type": type_name,
                "message": message,
                "traceback": TRACEBACK,
                **failure,
            }
        ),
    )
    path = rd.rank_file(run_dir, rank)
    rd.write_json(path, peaks_to_json(peaks))
    os.utime(path, (written, written))


def write_log(run_dir: Path, text: str) -> None:
    (run_dir / rd.LAUNCHER_LOG).write_text(text)


def test_the_rank_that_raised_comes_before_those_that_lost_it(run_dir: Path) -> None:
    write_rank(
        run_dir, 0, type_name="RuntimeError", message="Connection closed by peer", written=1000
    )
    write_rank(run_dir, 2, written=1002)
    write_rank(run_dir, 1, written=1001)
    assert [peaks.rank for peaks in read_failures(run_dir)] == [1, 2, 0]
    error = describe_failure(run_dir, exit_code=1)
    assert error.exit_code == 4
    assert error.problem.startswith("rank 1 on node1 failed in phase forward: ValueError: boom")
    assert "then failed too: rank 2, 0" in error.problem


def test_of_ranks_that_hang_the_one_that_the_others_wait_for_comes_first(run_dir: Path) -> None:
    waiting = '  File "/usr/lib/torch/distributed/distributed_c10d.py", line 3252, in all_reduce\n'
    for rank, beats, traceback in [(0, 9, waiting), (1, 8, waiting), (2, 9, TRACEBACK)]:
        write_rank(
            run_dir, rank, kind=FailureKind.hang, beats=beats, traceback=traceback, message="hangs"
        )
    assert [peaks.rank for peaks in read_failures(run_dir)] == [2, 1, 0]
    error = describe_failure(run_dir, exit_code=84)
    assert error.kind is FailureKind.hang
    assert "it may wait for" not in error.problem


def test_a_rank_whose_watchdog_did_not_run_either_is_named(run_dir: Path) -> None:
    write_rank(run_dir, 0, kind=FailureKind.hang, message="hangs")
    write_rank(run_dir, 3, state="running")
    problem = describe_failure(run_dir, exit_code=84).problem
    assert "it may wait for rank 3 on node1: stopped, or on a host that hangs" in problem


def test_a_rank_that_was_killed_is_the_reason_though_others_ended_before_it_was_known(
    run_dir: Path,
) -> None:
    write_rank(run_dir, 0, type_name="RuntimeError", message="Connection closed by peer")
    dead = [DeadRank(rank=0, exit_status=1), DeadRank(rank=1, exit_status=-9, host="node2")]
    error = describe_failure(run_dir, exit_code=1, dead_ranks=dead)
    assert "rank 1 on node2 was killed by signal 9" in error.problem
    assert error.kind is FailureKind.killed


def test_ranks_that_hang_because_a_host_is_lost_are_not_the_reason(run_dir: Path) -> None:
    write_rank(run_dir, 0, kind=FailureKind.hang, message="hangs")
    lost = [LostHost(host="node2", problem="it is silent", fix="look")]
    assert describe_failure(run_dir, exit_code=84, lost_hosts=lost).kind is FailureKind.lost_host


def test_a_rank_that_nobody_saw_die_is_the_reason_why_the_others_lost_their_connections(
    run_dir: Path,
) -> None:
    write_rank(run_dir, 0, type_name="RuntimeError", message="Connection closed by peer")
    write_rank(run_dir, 1, state="running")
    error = describe_failure(run_dir, exit_code=1)
    assert "rank 1 on node1 was gone without a word" in error.problem
    assert error.kind is FailureKind.killed


def test_lost_hosts_are_named_for_whoever_looks_for_others(run_dir: Path) -> None:
    lost = [LostHost(host=name, problem="it is silent", fix="look") for name in ("node2", "node3")]
    error = describe_failure(run_dir, exit_code=None, lost_hosts=lost)
    assert isinstance(error, HostLostError)
    assert (error.hosts, error.kind) == (("node2", "node3"), FailureKind.lost_host)


def test_a_traceback_that_was_not_printed_is_shown(run_dir: Path) -> None:
    write_rank(run_dir, 1)
    assert "Traceback (most recent call last)" in describe_failure(run_dir, exit_code=1).problem


def test_a_traceback_that_the_rank_printed_is_not_shown_again(run_dir: Path) -> None:
    write_rank(run_dir, 1)
    write_log(run_dir, "".join(f"[rank 1] {line}\n" for line in TRACEBACK.splitlines()))
    assert "Traceback" not in describe_failure(run_dir, exit_code=1).problem


def test_a_rank_without_memory_says_what_to_change(run_dir: Path) -> None:
    write_rank(run_dir, 1, type_name="OutOfMemoryError", state="out_of_memory")
    assert "zero_stage" in describe_failure(run_dir, exit_code=1).fix


def test_a_broken_rank_file_hides_no_other(run_dir: Path) -> None:
    rd.rank_file(run_dir, 0).write_text("{half")
    write_rank(run_dir, 1)
    assert [peaks.rank for peaks in read_failures(run_dir)] == [1]


# 256 minus the signal: DeepSpeed's launch.py calls sys.exit(-9). Measured with 0.19.8.
@pytest.mark.parametrize(("exit_code", "name"), [(247, "SIGKILL"), (245, "SIGSEGV")])
def test_deepspeeds_exit_codes_above_191_are_signals(
    run_dir: Path, exit_code: int, name: str
) -> None:
    assert f"({name})" in describe_failure(run_dir, exit_code=exit_code).problem


def test_a_rank_that_was_never_seen_was_killed_by_the_kernel_if_it_killed_something(
    run_dir: Path,
) -> None:
    dead = [DeadRank(rank=0, exit_status=-15, is_oom_kill=True)]
    error = describe_failure(run_dir, exit_code=247, dead_ranks=dead)
    assert error.problem == "a rank was killed by the kernel: the host's memory ran out"
    assert error.kind is FailureKind.host_oom


def test_the_rank_that_was_killed_is_named_and_not_those_that_were_told_to_stop(
    run_dir: Path,
) -> None:
    dead = [
        DeadRank(rank=0, exit_status=143),
        DeadRank(rank=3, exit_status=-15),
        DeadRank(rank=2, exit_status=-9),
    ]
    error = describe_failure(run_dir, exit_code=247, dead_ranks=dead)
    assert error.problem == "rank 2 was killed by signal 9 (SIGKILL)"
    assert "memory" in error.fix


def test_a_rank_that_failed_before_it_could_write_is_named_with_the_last_error_of_the_log(
    run_dir: Path,
) -> None:
    write_log(run_dir, "starting\n[rank 1] ModuleNotFoundError: No module named 'x'\nbye\n")
    error = describe_failure(run_dir, exit_code=1, dead_ranks=[DeadRank(rank=1, exit_status=1)])
    assert error.problem == (
        "rank 1 ended with exit code 1 and the run is not marked as finished: "
        "ModuleNotFoundError: No module named 'x'"
    )
    assert error.where == str(run_dir / rd.LAUNCHER_LOG)


def test_exit_code_0_without_the_mark_of_rank_0_is_a_failure(run_dir: Path) -> None:
    assert "not marked as finished" in describe_failure(run_dir, exit_code=0).problem


def test_a_kill_by_the_kernel_for_want_of_memory_is_told_from_any_other(run_dir: Path) -> None:
    def killed(*, is_oom_kill: bool) -> JobFailedError:
        dead = DeadRank(rank=1, exit_status=-9, host="node2", is_oom_kill=is_oom_kill)
        return describe_failure(run_dir, exit_code=0, dead_ranks=[dead])

    assert killed(is_oom_kill=False).kind is FailureKind.killed
    error = killed(is_oom_kill=True)
    assert error.kind is FailureKind.host_oom
    assert error.problem == "rank 1 on node2 was killed by the kernel: the host's memory ran out"


def test_the_kernel_s_count_of_kills_is_read(tmp_path: Path) -> None:
    vmstat = tmp_path / "vmstat"
    vmstat.write_text("pgfault 12\noom_kill 3\nnr_unstable 0\n")
    assert count_oom_kills(vmstat) == 3
    assert count_oom_kills(tmp_path / "missing") == 0
