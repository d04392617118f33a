"""Hosts that fall silent; the times of files are set as the ranks' touches would."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from launcher import run_dir as rd
from launcher.dispatch.silent_hosts import SilentHosts

# The file system's clock is far from ours.
EPOCH = 5_000.0


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = rd.create(tmp_path / "run")
    for rank in range(4):
        content = {"host": f"node{rank // 2 + 1}", "state": "running"}
        rd.rank_file(folder, rank).write_text(json.dumps(content))
        touch(folder, rank, 0.0)
    return folder


def touch(run: Path, rank: int, at: float) -> None:
    os.utime(rd.rank_file(run, rank), (EPOCH + at, EPOCH + at))


def test_a_host_whose_ranks_are_silent_is_named_once_and_within_12_seconds(run: Path) -> None:
    hosts = SilentHosts(run_dir=run)
    named: dict[float, list[str]] = {}
    for second in range(14):
        if second % 5 == 0:
            touch(run, 0, second)
        if found := hosts.look(now=100.0 + second):
            named[second] = found
    assert named == {12: ["node2"]}
    # It is heard of again, and lost again.
    touch(run, 2, 14.0)
    assert hosts.look(now=114.0) == []


def test_nobody_is_named_when_all_are_silent(run: Path) -> None:
    hosts = SilentHosts(run_dir=run)
    assert [hosts.look(now=100.0 + second) for second in range(40)] == [[]] * 40


def test_ranks_that_have_ended_are_not_silent(run: Path) -> None:
    hosts = SilentHosts(run_dir=run)
    rd.rank_file(run, 2).write_text(json.dumps({"host": "node2", "state": "finished"}))
    touch(run, 2, 0.0)
    for second in range(0, 40, 5):
        touch(run, 0, second)
        assert hosts.look(now=100.0 + second) == []


def test_when_a_host_was_heard_of_last_is_known_by_slurms_name_of_it(run: Path) -> None:
    hosts = SilentHosts(run_dir=run)
    rd.rank_file(run, 2).write_text('{"host": "node2.site.org", "state": "running"}')
    touch(run, 0, 3.0)
    touch(run, 2, 0.0)
    hosts.look(now=100.0)
    assert hosts.heard_seconds_ago("node1") == 0.0
    assert hosts.heard_seconds_ago("node2") == 3.0
    assert hosts.heard_seconds_ago("node9") is None
