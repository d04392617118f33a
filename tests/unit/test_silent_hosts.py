"""Hosts that fall silent; the times of files are set as the ranks' touches would."""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path

import pytest

from launcher import run_dir as rd
from launcher.dispatch.silent_hosts import SilentHosts
from launcher.dispatch.slurm_nodes import SlurmNodes

# The file system's clock is far from ours.
EPOCH = 5_000.0


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = rd.create(tmp_path / "run")
    for rank in range(4):
        content = {"host": f"node{rank // 2 + 1}", "local_rank": rank % 2, "state": "running"}
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
    rd.rank_file(run, 2).write_text(
        '{"host": "node2.site.org", "local_rank": 0, "state": "running"}'
    )
    touch(run, 0, 3.0)
    touch(run, 2, 0.0)
    hosts.look(now=100.0)
    assert hosts.heard_seconds_ago("node1") == 0.0
    assert hosts.heard_seconds_ago("node2") == 3.0
    assert hosts.heard_seconds_ago("node9") is None


def test_a_node_answers_again_when_a_step_on_it_is_listed_and_not_when_no_step_is_left_there(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What sstat says while a step on node2 goes, after it, and of the next one (Slurm 22.05)."""
    shown, refused = tmp_path / "shown", tmp_path / "refused"
    sstat = tmp_path / "sstat"
    sstat.write_text(f"#!/bin/sh\ncat '{shown}'\ncat '{refused}' >&2\n")
    sstat.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    nodes = SlurmNodes(run_dir=run)
    times = itertools.count(100.0, 10.0)

    def ask(steps: str, errors: str = "") -> None:
        """Ask once, and wait for the answer."""
        shown.write_text(steps)
        refused.write_text(errors)
        now, deadline = next(times), time.monotonic() + 60
        nodes.look(now, "7", names="node[1-2]")
        assert nodes._daemons is not None
        while nodes._daemons.is_asking:
            assert time.monotonic() < deadline
            nodes.look(now, "7", names="node[1-2]")

    ask("7.batch|node1\n", "unknown return given from node2: 9001 rc = no connection\n")
    assert caplog.text.count("slurmd on node2 does not answer") == 1
    ask("7.batch|node1\n")
    assert "answers again" not in caplog.text
    ask("7.batch|node1\n", "unknown return given from node2: 9001 rc = no connection\n")
    assert caplog.text.count("slurmd on node2 does not answer") == 1
    ask("7.batch|node1\n7.1|node[1-2]\n")
    assert caplog.text.count("slurmd on node2 answers again") == 1
    ask("7.batch|node1\n7.1|node[1-2]\n")
    assert caplog.text.count("answers again") == 1
    nodes.close()


def test_a_node_is_lost_when_neither_its_slurmd_nor_its_ranks_are_heard(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sstat = tmp_path / "sstat"
    refused = "slurm_job_step_stat: unknown return given from node2: 9001 rc = no connection"
    sstat.write_text(f"#!/bin/sh\necho '{refused}' >&2\n")
    sstat.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    nodes = SlurmNodes(run_dir=run)
    nodes.look(100.0, "7")
    assert [host.host for host in nodes.settle()] == ["node2"]
    deadline = time.monotonic() + 60
    while "slurmd on node2 does not answer; its ranks were heard of 7 s ago" not in caplog.text:
        assert time.monotonic() < deadline
        nodes.look(107.0, "7")
    assert nodes.lost == ()
    touch(run, 0, 12.0)
    nodes.look(112.0, "7")
    (lost,) = nodes.lost
    assert (lost.host, lost.problem) == (
        "node2",
        "its slurmd does not answer, its ranks were heard of 12 s ago",
    )
    nodes.close()
