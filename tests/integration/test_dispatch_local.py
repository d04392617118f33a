"""The local backend with the real ``deepspeed`` launcher and ranks that need no torch."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil
import pytest

from launcher import run_dir as rd
from launcher.dispatch import process_group
from launcher.dispatch.base import JobInterruptedError, run_to_end
from launcher.dispatch.local import LocalBackend, choose_port
from launcher.dispatch.process_group import KILL_GRACE_SECONDS, TERM_GRACE_SECONDS
from launcher.errors import JobFailedError
from launcher.failure_kind import FailureKind
from launcher.job_script import DeepSpeedJob, render_job

pytestmark = pytest.mark.integration

REPOSITORY = Path(__file__).parents[2]

# Behaves as the training worker does towards the launcher; what it does is in FAKE_RANK:
# 'finish', or 'raise', 'kill', 'hang' for rank 1.
FAKE_RANK = """
import os, signal, socket, subprocess, sys, time, traceback
from pathlib import Path

from launcher import run_dir as rd
from launcher.peaks import RankFailure, RankPeaks, peaks_to_json

run_dir = Path(sys.argv[sys.argv.index("--run-dir") + 1])
rank, what = int(os.environ["RANK"]), os.environ["FAKE_RANK"]

def write(state, failure=None):
    peaks = RankPeaks(
        rank=rank, local_rank=rank, world_size=2, host=socket.gethostname(), pid=os.getpid(),
        device="cpu", device_name="cpu", state=state, steps_done=0, failure=failure,
    )
    rd.write_json(rd.rank_file(run_dir, rank), peaks_to_json(peaks))

def wait_until_seen():
    print("rank waits", flush=True)
    while not (run_dir / "is-seen").exists():
        time.sleep(0.02)

print(f"rank {rank} starts", flush=True)
write("running")
if what == "hang":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # A helper in its own session, as a data loader or a tracker may start one.
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    print(f"rank {rank} hangs", flush=True)
    time.sleep(1000)
if what == "finish":
    print(f"run directory {run_dir}", flush=True)
    write("finished")
    if rank == 0:
        rd.write_status(run_dir, "finished")
elif rank == 0:
    if what == "raise-and-linger":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(1000)
elif what.startswith("raise"):
    try:
        raise ValueError("deliberate")
    except ValueError as error:
        write("failed", RankFailure(phase="forward", type="ValueError", message=str(error),
                                    traceback=traceback.format_exc()))
        sys.exit(1)
elif what.startswith("eat:"):
    wait_until_seen()
    Path(what.removeprefix("eat:"), "cgroup.procs").write_text(str(os.getpid()))
    eaten = bytearray(2**28)
elif what == "kill":
    wait_until_seen()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def fake_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make a worker module importable by the ranks; return its name."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "fake_rank_module.py").write_text(textwrap.dedent(FAKE_RANK))
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{REPOSITORY}")
    return "fake_rank_module"


class Console(io.BytesIO):
    """Tells ranks that wait for it when the watch has looked at them once.

    The watch copies what they print each time before it looks.
    """

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self._is_seen = run_dir / "is-seen"

    def flush(self) -> None:
        if self._copies_since_then > 1:
            self._is_seen.touch()
        self._copies_since_then += b"rank waits" in self.getvalue()

    _copies_since_then = 0


def run_job(run_dir: Path, worker_module: str, what: str, console: io.BytesIO) -> None:
    backend = LocalBackend(master_port=choose_port(), num_cores=2)
    job = DeepSpeedJob(
        run_dir=PurePosixPath(run_dir),
        run_id=backend.run_id,
        python=PurePosixPath(sys.executable),
        ranks_per_node=2,
        device_type="cpu",
        master_port=backend.master_port,
        omp_num_threads=1,
        worker_module=worker_module,
        extra_env={"FAKE_RANK": what},
    )
    try:
        run_to_end(backend, render_job(job, files={}), run_dir=run_dir, console=console)
    finally:
        assert process_group.find_processes(backend.run_id) == []


@pytest.mark.parametrize("folder", ["$(id) a;b 'q\" ü"])
def test_a_run_finishes_whatever_its_directory_is_called(
    tmp_path: Path, fake_rank: str, folder: str
) -> None:
    run_dir = rd.create(tmp_path / folder)
    console = io.BytesIO()
    run_job(run_dir, fake_rank, "finish", console)
    assert rd.read_status(run_dir).state == "finished"
    log = (run_dir / rd.LAUNCHER_LOG).read_bytes()
    assert f"run directory {run_dir}".encode() in log
    assert console.getvalue() == log


def test_a_rank_that_raises_is_named_with_its_traceback_once(
    tmp_path: Path, fake_rank: str
) -> None:
    run_dir = rd.create(tmp_path / "run")
    console = io.BytesIO()
    with pytest.raises(JobFailedError) as caught:
        run_job(run_dir, fake_rank, "raise-and-linger", console)
    # DeepSpeed alone waits 30 s for the rank that ignores SIGTERM, and then says how it ended.
    assert "exits with return code" not in (run_dir / rd.LAUNCHER_LOG).read_text()
    assert caught.value.exit_code == 4
    shown = console.getvalue().decode() + str(caught.value)
    assert "rank 1 on" in str(caught.value)
    assert "failed in phase forward: ValueError: deliberate" in str(caught.value)
    assert shown.count("Traceback (most recent call last)") == 1
    assert rd.read_status(run_dir).state == "failed"


def test_a_rank_that_is_killed_is_named_with_the_signal(tmp_path: Path, fake_rank: str) -> None:
    run_dir = rd.create(tmp_path / "run")
    with pytest.raises(
        JobFailedError, match=r"rank 1 was killed by signal 9 \(SIGKILL\)"
    ) as caught:
        run_job(run_dir, fake_rank, "kill", Console(run_dir))
    assert "ran out of memory" in caught.value.fix
    assert rd.read_status(run_dir).state == "failed"


def wait_for_line(path: Path, line: str, *, times: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if path.exists() and path.read_text().count(line) >= times:
            return
        time.sleep(0.1)
    raise AssertionError(f"{line!r} never came")


def test_ctrl_c_ends_ranks_that_ignore_sigterm_and_their_children_soon(
    tmp_path: Path, fake_rank: str
) -> None:
    run_dir = rd.create(tmp_path / "run")
    pressed: list[float] = []

    def press_ctrl_c() -> None:
        wait_for_line(run_dir / rd.LAUNCHER_LOG, "hangs", times=2)
        pressed.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press_ctrl_c)
    presser.start()
    with pytest.raises(JobInterruptedError) as caught:
        run_job(run_dir, fake_rank, "hang", io.BytesIO())
    presser.join()
    # Within 10 s, and what a busy machine adds.
    assert TERM_GRACE_SECONDS + KILL_GRACE_SECONDS < 10
    assert time.monotonic() - pressed[0] < 40
    assert caught.value.exit_code == 4
    assert rd.read_status(run_dir).state == "interrupted"


def test_ranks_that_outlive_a_killed_launcher_are_ended_and_the_run_has_failed(
    tmp_path: Path, fake_rank: str
) -> None:
    """DeepSpeed's launcher ends with exit code 0 here and leaves its ranks."""
    run_dir = rd.create(tmp_path / "run")

    def kill_launch_process() -> None:
        wait_for_line(run_dir / rd.LAUNCHER_LOG, "hangs", times=2)
        peaks = rd.read_ranks(run_dir)[0]
        psutil.Process(peaks.pid).parent().kill()

    killer = threading.Thread(target=kill_launch_process)
    killer.start()
    with pytest.raises(JobFailedError):
        run_job(run_dir, fake_rank, "hang", io.BytesIO())
    killer.join()
    assert rd.read_status(run_dir).state == "failed"


def test_processes_without_the_marker_are_never_touched() -> None:
    stranger = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    try:
        assert process_group.end_processes("no-such-run")
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A control group whose processes may have 64 MiB; skipped where none can be made."""
    root = Path("/sys/fs/cgroup")
    is_v1 = (root / "memory").is_dir()
    folder = root / ("memory" if is_v1 else "") / f"zerofit-test-{os.getpid()}"
    try:
        folder.mkdir()
        limit = "memory.limit_in_bytes" if is_v1 else "memory.max"
        (folder / limit).write_text(str(2**26))
    except OSError as error:
        pytest.skip(f"no control group of memory can be made: {error}")
    yield folder
    folder.rmdir()


@pytest.mark.alone
def test_a_rank_that_the_kernel_kills_for_want_of_memory_is_told_from_one_that_was_killed(
    tmp_path: Path, fake_rank: str, small_cgroup: Path
) -> None:
    run_dir = rd.create(tmp_path / "run")
    with pytest.raises(JobFailedError) as caught:
        run_job(run_dir, fake_rank, f"eat:{small_cgroup}", Console(run_dir))
    assert caught.value.problem == "rank 1 was killed by the kernel: the host's memory ran out"
    assert caught.value.kind is FailureKind.host_oom
