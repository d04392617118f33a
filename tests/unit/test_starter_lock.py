"""A rank notices that the Slurm job around it is over, when nobody else can end it."""

from __future__ import annotations

from pathlib import Path

from launcher.starter_lock import LOCK, StarterLock, starter_lock

JOB = {"SLURM_JOB_ID": "17"}


def started(run_dir: Path) -> StarterLock:
    (run_dir / LOCK).write_text('{"slurm_job": "17", "since": "10:00"}')
    found = starter_lock(run_dir, JOB)
    assert found is not None
    return found


def test_a_lock_that_stays_is_never_lost(tmp_path: Path) -> None:
    lock = started(tmp_path)
    assert not any(lock.is_lost() for _ in range(5))


def test_a_lock_that_is_away_at_two_looks_is_lost(tmp_path: Path) -> None:
    lock = started(tmp_path)
    (tmp_path / LOCK).unlink()
    assert [lock.is_lost(), lock.is_lost()] == [False, True]


def test_the_lock_of_the_same_job_started_again_is_anothers(tmp_path: Path) -> None:
    lock = started(tmp_path)
    (tmp_path / LOCK).write_text('{"slurm_job": "17", "since": "11:00"}')
    assert [lock.is_lost(), lock.is_lost()] == [False, True]


def test_a_lock_that_comes_back_was_not_lost(tmp_path: Path) -> None:
    lock = started(tmp_path)
    kept = (tmp_path / LOCK).rename(tmp_path / "kept")
    assert not lock.is_lost()
    kept.rename(tmp_path / LOCK)
    assert not lock.is_lost()
    (tmp_path / LOCK).unlink()
    assert not lock.is_lost()


def test_a_folder_that_cannot_be_read_says_nothing_of_the_job(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    lock = started(folder)
    folder.rename(tmp_path / "away")
    assert not any(lock.is_lost() for _ in range(5))


def test_outside_slurm_and_without_a_lock_there_is_nothing_to_lose(tmp_path: Path) -> None:
    assert starter_lock(tmp_path, JOB) is None
    (tmp_path / LOCK).touch()
    assert starter_lock(tmp_path, {}) is None
