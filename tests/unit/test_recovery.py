"""What follows from a failed attempt, and how it is written down."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from launcher.errors import RecipeError, RunDirError, SetupError
from launcher.failure_kind import EXIT_STATUS, FailureKind
from launcher.recipe import parse_recipe
from launcher.recipe_sections import RecoverySection
from launcher.recovery.decide import Action, decide
from launcher.recovery.record import (
    RECOVERY_LOG,
    FailedAttempt,
    append_failed_attempt,
    read_failed_attempts,
)
from launcher.stop_file import ask_to_stop, is_asked_to_stop
from launcher.worker.faults import faults_from_environment


def failed(kind: FailureKind = FailureKind.gpu_oom, attempt: int = 1) -> FailedAttempt:
    return FailedAttempt(
        attempt=attempt, supervisor="here:1", failed_at="2026-01-01T00:00:00+00:00", kind=kind,
        problem="it broke", phase="backward", action="next_rung", reason="because",
        changes={"micro_batch_size_per_gpu": (4, 2)}, given_up=("micro_batch_size_per_gpu",),
    )  # fmt: skip


@pytest.mark.parametrize("kind", [FailureKind.gpu_oom, FailureKind.host_oom])
def test_lack_of_memory_leads_to_the_next_rung(kind: FailureKind) -> None:
    assert decide(kind, [], RecoverySection()).action is Action.next_rung


def test_lack_of_memory_stops_where_the_recipe_says_so() -> None:
    decision = decide(FailureKind.gpu_oom, [], RecoverySection(oom="stop"))
    assert decision.action is Action.stop
    assert "recovery.oom" in decision.reason


def test_a_rank_killed_from_outside_is_started_again_with_the_same_plan() -> None:
    assert decide(FailureKind.killed, [], RecoverySection()).action is Action.same_plan


@pytest.mark.parametrize("kind", [FailureKind.interrupted, FailureKind.other])
def test_what_would_come_again_or_was_wished_for_is_not_tried_again(kind: FailureKind) -> None:
    assert decide(kind, [], RecoverySection()).action is Action.stop


def test_attempts_are_bounded_whatever_fails() -> None:
    earlier = [failed(attempt=number) for number in (1, 2)]
    for kind in FailureKind:
        assert decide(kind, earlier, RecoverySection(max_attempts=3)).action is Action.stop
    assert decide(FailureKind.gpu_oom, earlier, RecoverySection(max_attempts=4)).action != "stop"


def test_a_rank_ends_with_a_status_of_its_own_for_each_kind() -> None:
    assert set(EXIT_STATUS) == set(FailureKind)
    assert len(set(EXIT_STATUS.values())) == len(EXIT_STATUS)
    # sysexits.h ends at 78; a shell's own statuses begin at 126.
    own = [status for kind, status in EXIT_STATUS.items() if kind is not FailureKind.other]
    assert all(78 < status < 126 for status in own)


def test_the_record_of_failed_attempts_is_read_back(tmp_path: Path) -> None:
    assert read_failed_attempts(tmp_path) == ()
    written = (failed(), failed(FailureKind.host_oom, attempt=2))
    for attempt in written:
        append_failed_attempt(tmp_path, attempt)
    assert read_failed_attempts(tmp_path) == written


@pytest.mark.parametrize("line", ["", "[]", "{}", "half", '{"schema_version": 1, "kind": "x"}'])
def test_a_broken_record_is_an_error_that_names_its_line(tmp_path: Path, line: str) -> None:
    append_failed_attempt(tmp_path, failed())
    with (tmp_path / RECOVERY_LOG).open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(RunDirError, match=r"recovery\.jsonl:2"):
        read_failed_attempts(tmp_path)


def test_a_recipe_without_attempts_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"recovery\.max_attempts is 0"):
        parse_recipe("model: {name_or_path: x}\nrecovery: {max_attempts: 0}", source="r")


@pytest.mark.parametrize(
    "text", ["oom", "oon:step", "oom:bakward", "oom:step:step", "oom:step:step=-1", "oom:step:x=1"]
)
def test_a_fault_that_cannot_be_read_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(SetupError, match="ZEROFIT_FAULT"):
        faults_from_environment({"ZEROFIT_FAULT": text}, folder=tmp_path, rank=0)


def test_a_fault_strikes_once_on_its_rank_at_its_step(tmp_path: Path) -> None:
    environment = {"ZEROFIT_FAULT": "host_oom:backward:step=3:rank=1"}
    other = faults_from_environment(environment, folder=tmp_path, rank=0)
    struck = faults_from_environment(environment, folder=tmp_path, rank=1)
    assert other is not None
    assert struck is not None
    other.strike("backward", 2)
    struck.strike("backward", 1)
    struck.strike("forward", 2)
    with pytest.raises(MemoryError, match="on purpose"):
        struck.strike("backward", 2)
    struck.strike("backward", 2)
    assert faults_from_environment({}, folder=tmp_path, rank=1) is None


def test_a_rank_that_waits_in_a_phase_goes_on_when_the_run_is_told_to_stop(tmp_path: Path) -> None:
    waiting = faults_from_environment({"ZEROFIT_FAULT": "wait:eval"}, folder=tmp_path, rank=0)
    assert waiting is not None
    telling = threading.Thread(target=ask_to_stop, args=(tmp_path, "test"))
    telling.start()
    waiting.strike("eval", 2)
    telling.join()
    assert is_asked_to_stop(tmp_path)


def test_after_a_hang_the_same_plan_starts_again_and_after_a_lost_host_other_hosts() -> None:
    assert decide(FailureKind.hang, [], RecoverySection()).action is Action.same_plan
    assert decide(FailureKind.lost_host, [], RecoverySection()).action is Action.other_hosts
