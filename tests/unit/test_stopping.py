"""From a signal to the end of a run, as the command that watches it decides."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from launcher import run_dir as rd
from launcher.dispatch.host_guard import POLL_SECONDS
from launcher.dispatch.interruptions import Interruptions
from launcher.dispatch.process_group import TERM_GRACE_SECONDS
from launcher.dispatch.stopping import SHORTEST_GRACE_SECONDS, Stopping, grace_seconds
from launcher.dispatch.watch import FAILURE_LINGER_SECONDS, SCAN_SECONDS
from launcher.peaks import PhasePeaks, RankPeaks, peaks_to_json
from launcher.stop_file import STOP_FILE, ask_to_stop, clear_stop, is_asked_to_stop, stop_reason

FORWARD = PhasePeaks(
    peak_allocated_bytes=1,
    peak_reserved_bytes=1,
    device_used_bytes=None,
    host_rss_bytes=1,
    seconds=1.0,
    count=1,
)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Return the directory of a run whose rank 0 trains."""
    peaks = RankPeaks(
        rank=0,
        local_rank=0,
        world_size=1,
        host="here",
        pid=1,
        device="cpu",
        device_name="cpu",
        state="running",
        steps_done=0,
        phases={"forward": FORWARD},
    )
    (tmp_path / rd.RANKS).mkdir()
    rd.write_json(rd.rank_file(tmp_path, 0), peaks_to_json(peaks))
    return tmp_path


def stopping(run_dir: Path, *received: int, saves: bool = True) -> Stopping:
    interruptions = Interruptions(saves=saves)
    interruptions.received.extend(received)
    return Stopping(run_dir=run_dir, interruptions=interruptions, started=time.time() - 60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_ranks_that_train_are_asked_to_save_and_get_time_for_it(
    run_dir: Path, number: signal.Signals
) -> None:
    asked = stopping(run_dir, number)
    assert not asked.is_time_to_end()
    assert asked.is_waiting
    assert stop_reason(run_dir) == number.name
    assert not asked.is_time_to_end()


@pytest.mark.parametrize(
    "received",
    [
        (signal.SIGINT,),
        (signal.SIGHUP,),
        (signal.SIGALRM,),
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGUSR1, signal.SIGINT),
    ],
)
def test_ctrl_c_and_a_second_signal_end_the_run_at_once(
    run_dir: Path, received: tuple[int, ...]
) -> None:
    assert stopping(run_dir, *received).is_time_to_end()
    assert not (run_dir / STOP_FILE).exists()


def test_a_sweep_s_case_is_not_worth_a_checkpoint(run_dir: Path) -> None:
    assert stopping(run_dir, signal.SIGTERM, saves=False).is_time_to_end()


def test_ranks_that_have_made_no_step_are_ended_at_once(run_dir: Path) -> None:
    path = rd.rank_file(run_dir, 0)
    os.utime(path, (time.time() - 3600, time.time() - 3600))  # of an earlier attempt
    assert stopping(run_dir, signal.SIGTERM).is_time_to_end()
    path.unlink()
    assert stopping(run_dir, signal.SIGTERM).is_time_to_end()
    assert not (run_dir / STOP_FILE).exists()


def test_a_cancelled_run_ends_whatever_it_is_saving(run_dir: Path) -> None:
    asked = stopping(run_dir, signal.SIGTERM)
    assert not asked.is_time_to_end()
    (run_dir / rd.CANCEL).touch()
    assert asked.is_time_to_end()


def test_the_time_to_save_follows_from_the_plan(tmp_path: Path) -> None:
    # Writing takes 500 s, a step of 10 s takes 17 s at most; four times as long is given.
    for write_seconds, expected_seconds in ((500.0, 4 * 517.0), (0.005, 4 * 17.005)):
        plan = {
            "checkpoint": {"write_seconds": write_seconds},
            "time": {"step_seconds": 10.0},
        }
        rd.write_json(tmp_path / rd.PLAN, plan)
        (tmp_path / rd.RECIPE).write_text("model: {name_or_path: m}\n")
        assert grace_seconds(tmp_path) == pytest.approx(expected_seconds)
    (tmp_path / rd.RECIPE).write_text("recovery: {save_grace_seconds: 7}\nmodel: {name_or_path: m}")
    assert grace_seconds(tmp_path) == 7.0
    (tmp_path / rd.RECIPE).unlink()
    assert grace_seconds(tmp_path) == SHORTEST_GRACE_SECONDS


def test_a_request_says_who_asks_until_it_is_forgotten(tmp_path: Path) -> None:
    assert not is_asked_to_stop(tmp_path)
    (tmp_path / STOP_FILE).touch()
    assert is_asked_to_stop(tmp_path)
    assert stop_reason(tmp_path) == "a file named stop"
    ask_to_stop(tmp_path, "SIGTERM")
    assert stop_reason(tmp_path) == "SIGTERM"
    clear_stop(tmp_path)
    clear_stop(tmp_path)
    assert not is_asked_to_stop(tmp_path)
    assert not is_asked_to_stop(tmp_path / "vanished")


def test_eight_seconds_after_a_rank_s_last_word_at_most_the_others_get_sigkill() -> None:
    """All shall be gone after ten, which leaves the kernel two to take back their memory."""
    until_it_is_read, until_sigterm, on_another_host = (
        SCAN_SECONDS, FAILURE_LINGER_SECONDS, POLL_SECONDS
    )  # fmt: skip
    assert until_it_is_read + until_sigterm + on_another_host + TERM_GRACE_SECONDS <= 8
