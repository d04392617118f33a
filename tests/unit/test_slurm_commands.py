"""What Slurm's programs print, read as values; the programs here are scripted."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.dispatch import slurm_commands as slurm
from launcher.errors import SetupError

Program = Callable[[str, str], None]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Return a function that puts a scripted program first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def make(name: str, body: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)

    return make


def test_the_job_number_is_read_with_and_without_a_cluster_name(
    program: Program, tmp_path: Path
) -> None:
    program("sbatch", "echo '4242;main'")
    assert slurm.submit(("sbatch", "job.sbatch"), env={}, cwd=tmp_path) == "4242"


def test_a_rejection_shows_slurm_s_own_message_and_exits_with_4(
    program: Program, tmp_path: Path
) -> None:
    program(
        "sbatch",
        "echo 'sbatch: error: invalid partition specified: nosuch' >&2\n"
        "echo 'sbatch: error: Batch job submission failed: Invalid partition name' >&2\nexit 1",
    )
    with pytest.raises(
        slurm.RejectedError, match="invalid partition specified: nosuch; Batch"
    ) as e:
        slurm.submit(("sbatch", "job.sbatch"), env={}, cwd=tmp_path)
    assert e.value.exit_code == 4


def test_no_slurm_here_is_said_plainly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match="sbatch, squeue, scontrol, scancel not found"):
        slurm.check_programs()


def test_jobs_for_another_cluster_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CLUSTERS", "other")
    with pytest.raises(SetupError, match="SLURM_CLUSTERS names other"):
        slurm.check_cluster()


def test_states_reasons_and_nodes_are_read(program: Program) -> None:
    # The format asked for, as squeue 22.05.8 prints it.
    program(
        "squeue",
        "echo '7|RUNNING|None|node[1-2]|2026-11-22T21:00:00'\n"
        "echo '8_1|PENDING|Resources||N/A'\necho '9|NODE_FAIL|NodeDown|node3|N/A'",
    )
    seen = slurm.ask(["7", "8_1", "9"])
    assert (seen["7"].state, seen["7"].nodes, seen["7"].reason) == ("RUNNING", "node[1-2]", "")
    assert not seen["7"].has_ended
    assert seen["8_1"].is_pending
    assert seen["8_1"].reason == "Resources"
    assert seen["9"].has_ended


def test_a_job_that_the_controller_forgot_is_looked_up_in_the_accounting(program: Program) -> None:
    program("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    program("sacct", "echo '7|CANCELLED by 1000|node1|None'")
    assert slurm.ask(["7"])["7"].state == "CANCELLED"
    program("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert slurm.ask_all(["7"]) == slurm.Answer(jobs={})
    # As sacct 22.05.8 says it while slurmdbd is down: nothing is known of the job.
    program("sacct", "echo 'sacct: error: Problem talking to the database: Conn' >&2; exit 1")
    assert "talking to the database" in (slurm.ask_all(["7"]).accounting_problem or "")


def test_a_controller_that_is_down_is_an_error_and_not_a_job_that_ended(program: Program) -> None:
    program(
        "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"
    )
    with pytest.raises(slurm.ControllerError, match="Unable to contact slurm controller"):
        slurm.ask(["7"])


def test_variables_of_another_job_do_not_reach_sbatch(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "64")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    program("sbatch", 'echo "${SLURM_NTASKS:-none}$SLURM_CONF"')
    assert slurm.submit(("sbatch",), env={}, cwd=tmp_path) == "none/etc/slurm.conf"


def test_what_a_real_slurmdbd_says_of_ended_jobs_is_read(program: Program) -> None:
    # Recorded from sacct 22.05.8 with slurmdbd and MariaDB: done, exit 3, scancel, an array.
    program("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    program(
        "sacct",
        "cat <<'END'\n1|COMPLETED|node[1-2]|None\n2|FAILED|node1|None\n"
        "3|CANCELLED by 0|node[1-2]|None\n4_0|COMPLETED|node1|None\n4_1|COMPLETED|node2|None\n"
        "5|PENDING|None assigned|BeginTime\n7_[0-1,4%2]|CANCELLED by 0|None assigned|None\nEND",
    )
    seen = slurm.ask(["1", "2", "3", "4_0", "4_1", "5", "7_1", "7_4", "99"])
    assert {number: job.state for number, job in seen.items()} == {
        "1": "COMPLETED", "2": "FAILED", "3": "CANCELLED", "4_0": "COMPLETED",
        "4_1": "COMPLETED", "5": "PENDING", "7_1": "CANCELLED", "7_4": "CANCELLED",
    }  # fmt: skip
    assert (seen["3"].reason, seen["3"].nodes) == ("by root", "node[1-2]")
    assert seen["5"].is_pending
    assert seen["5"].nodes == ""


@pytest.mark.parametrize(
    ("partition", "minutes"), [(None, 1440.0), ("short", 2.0), ("short,long", 2.0), ("long", None)]
)
def test_the_partition_says_how_long_a_job_may_take(
    program: Program, partition: str | None, minutes: float | None
) -> None:
    lines = {"short": "short|2:00", "long": "long|infinite", None: "main*|1-00:00:00"}
    shown = [lines[name] for name in (partition.split(",") if partition else (None, "short"))]
    program("sinfo", "\n".join(f"echo '{line}'" for line in shown))
    assert slurm.partition_minutes(partition) == minutes
