from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from worker_runs import WAIT_SECONDS, environment

from launcher.peaks import RankPeaks, peaks_from_json, peaks_to_json
from launcher.timeline import timeline_from_json
from launcher.units import MIB
from launcher.watchdog import HUNG_EXIT_STATUS, Patience
from launcher.worker.failures import failure_kind
from launcher.worker.heartbeat import Heartbeat
from launcher.worker.host_speed import host_autograd_op_seconds, median_round_seconds
from launcher.worker.peak_memory import TRACKED_STEPS, PeakRecorder
from launcher.worker.process_memory import HostPeak, resident_bytes

pytestmark = pytest.mark.integration


def test_a_hosts_time_for_operations_is_measured_and_left_out_on_a_processor() -> None:
    device = torch.device("cpu")
    assert median_round_seconds(device, rounds=3) > 0
    assert host_autograd_op_seconds(device) is None


def test_what_the_host_needs_stands_in_the_ranks_file(recorder: PeakRecorder) -> None:
    recorder.host_autograd_op_seconds = 5e-5
    recorder.finish()
    assert peaks_from_json(peaks_to_json(recorder.snapshot())).host_autograd_op_seconds == 5e-5


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[PeakRecorder]:
    endless = Patience(training_seconds=0, phase_seconds=0)
    heartbeat = Heartbeat(tmp_path, endless, rank=3, local_rank=1, world_size=4)
    heartbeat.start()
    made = PeakRecorder(heartbeat, device=torch.device("cpu"))
    made.start()
    yield made
    if made.snapshot().state == "running":
        made.finish()


def written(folder: Path) -> RankPeaks:
    return peaks_from_json(json.loads((folder / "ranks" / "00003.json").read_text()))


def test_a_rank_that_wakes_up_in_a_later_attempt_leaves_no_file_there(tmp_path: Path) -> None:
    endless = Patience(training_seconds=0, phase_seconds=0)
    heartbeat = Heartbeat(tmp_path, endless, rank=3, local_rank=1, world_size=4)
    heartbeat.start()
    heartbeat.write(heartbeat.known)
    before = written(tmp_path)
    earlier = (tmp_path / "ranks").rename(tmp_path / "first")
    (tmp_path / "ranks").mkdir()
    heartbeat.write(replace(before, state="failed"))
    heartbeat.stop()
    assert list((tmp_path / "ranks").iterdir()) == []
    assert peaks_from_json(json.loads((earlier / "00003.json").read_text())) == before


class TinyLanguageModel(torch.nn.Module):
    """A decoder and an output layer, named as transformers names them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(100, 16)
        self.decoder = torch.nn.Linear(16, 16)
        self.head = torch.nn.Linear(16, 100)
        self.decoder.register_forward_hook(
            lambda _module, _args, output: SimpleNamespace(last_hidden_state=output)
        )

    def get_decoder(self) -> torch.nn.Module:
        return self.decoder

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.decoder(self.embedding(input_ids)).last_hidden_state
        return self.head(hidden).square().mean()


class Engine(torch.nn.Module):
    """What the recorder wraps of a DeepSpeed engine."""

    def __init__(self) -> None:
        super().__init__()
        self.module = TinyLanguageModel()
        self.steps = 0

    def forward(self, **inputs: Any) -> torch.Tensor:
        return self.module(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.steps += 1


def take_step(engine: Engine, recorder: PeakRecorder, *, micro_steps: int = 1) -> None:
    for _ in range(micro_steps):
        engine.backward(engine(input_ids=torch.zeros(2, 5, dtype=torch.long)))
    engine.step()
    recorder.end_step()


def test_a_phases_peak_is_what_was_alive_together(recorder: PeakRecorder) -> None:
    with recorder.during("load"):
        kept = torch.zeros(1000)
        torch.zeros(4000)
    with recorder.during("init"):
        more = torch.zeros(500)
    phases = recorder.snapshot().phases
    # fp32: 1000 + 4000 numbers at once, then 1000 + 500.
    assert phases["load"].peak_allocated_bytes == 20_000
    assert phases["init"].peak_allocated_bytes == 6_000
    assert len(kept) + len(more) == 1500


def test_weights_from_elsewhere_are_counted_once(recorder: PeakRecorder) -> None:
    layer = torch.nn.Linear(10, 10, bias=False)
    with recorder.during("load"):
        recorder.count_model(layer)
        recorder.count_model(layer)
    assert recorder.snapshot().phases["load"].peak_allocated_bytes == 400


def test_an_engines_step_is_divided_into_its_phases(recorder: PeakRecorder) -> None:
    engine = Engine()
    recorder.watch_engine(engine)
    recorder.begin_training()
    take_step(engine, recorder, micro_steps=2)
    phases = recorder.snapshot().phases
    # The loss has two parts: after the decoder in forward, before it in backward.
    counts = {name: phase.count for name, phase in phases.items()}
    assert counts == {"forward": 2, "loss": 4, "backward": 2, "step": 1}
    assert engine.steps == 1
    assert recorder.steps_done == 1
    assert recorder.snapshot().tokens_per_step == 2 * 2 * 5


def test_evaluation_is_no_training_forward(recorder: PeakRecorder) -> None:
    engine = Engine().eval()
    recorder.watch_engine(engine)
    with torch.no_grad(), recorder.during("eval"):
        engine(input_ids=torch.zeros(2, 5, dtype=torch.long))
    assert set(recorder.snapshot().phases) == {"eval"}
    assert recorder.num_tokens == 0


def test_time_for_saving_does_not_count_as_a_step(recorder: PeakRecorder) -> None:
    engine = Engine()
    recorder.watch_engine(engine)
    begun = time.monotonic()
    recorder.begin_training()
    with recorder.during("save"):
        time.sleep(0.3)
    take_step(engine, recorder)
    assert recorder.snapshot().step_seconds[0] < time.monotonic() - begun - 0.299


def test_tensors_are_not_counted_after_the_first_steps(recorder: PeakRecorder) -> None:
    engine = Engine()
    recorder.watch_engine(engine)
    recorder.begin_training()
    for _ in range(TRACKED_STEPS):
        take_step(engine, recorder)
    before = recorder.snapshot().phases["forward"].peak_allocated_bytes
    engine(input_ids=torch.zeros(200, 50, dtype=torch.long))
    assert recorder.snapshot().phases["forward"].peak_allocated_bytes == before > 0


def test_the_first_step_and_the_steady_state_are_told_apart(recorder: PeakRecorder) -> None:
    recorder.begin_training()
    for length in (9000, 1000, 3000):
        with recorder.during("forward"):
            torch.zeros(length)
        recorder.end_step()
    forward = recorder.snapshot().phases["forward"]
    assert forward.first_step is not None
    assert forward.steady_state is not None
    # fp32; the median of two is the lower one.
    assert forward.peak_allocated_bytes == forward.first_step.allocated_bytes == 36_000
    assert forward.steady_state.allocated_bytes == 4_000


def test_memory_over_time_is_written_by_its_thread(recorder: PeakRecorder, tmp_path: Path) -> None:
    with recorder.during("load"):
        kept = torch.zeros(1000)
        for _ in range(2):  # the first one may have begun before
            last = recorder.snapshot().now
            while recorder.snapshot().now is last:
                time.sleep(0.01)
    recorder.finish()
    timeline = timeline_from_json(json.loads((tmp_path / "timeline" / "00003.json").read_text()))
    loading = [sample for sample in timeline.samples if sample.phase == "load"]
    assert {sample.allocated_bytes for sample in loading} <= {0, 4 * len(kept)}
    assert loading[-1].allocated_bytes == 4 * len(kept)
    assert all(sample.host_rss_bytes > 10 * MIB for sample in loading)


def test_the_file_names_the_phase_that_an_error_ended(
    recorder: PeakRecorder, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="bad weight") as caught, recorder.during("load"):
        raise ValueError("bad weight")
    recorder.fail(caught.value)
    peaks = written(tmp_path)
    assert peaks.state == "failed"
    assert peaks.failure is not None
    assert (peaks.failure.phase, peaks.failure.type) == ("load", "ValueError")
    assert "bad weight" in peaks.failure.traceback
    assert peaks.phases["load"].count == 1


CPU_ALLOCATOR = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "gpu_oom"),
        (RuntimeError("CUDA error: out of memory"), "gpu_oom"),
        (MemoryError(), "host_oom"),
        (RuntimeError(CPU_ALLOCATOR), "host_oom"),
    ],
)
def test_memory_of_a_gpu_and_of_the_host_are_told_apart(error: BaseException, kind: str) -> None:
    assert failure_kind(error) == kind


def test_another_error_is_not_taken_for_lack_of_memory() -> None:
    assert failure_kind(RuntimeError("CUDA error: device-side assert triggered")) == "other"


def test_out_of_memory_is_a_state_of_its_own(recorder: PeakRecorder, tmp_path: Path) -> None:
    recorder.switch("backward")
    recorder.fail(torch.OutOfMemoryError("CUDA out of memory"))
    peaks = written(tmp_path)
    assert peaks.state == "out_of_memory"
    assert peaks.failure is not None
    assert peaks.failure.phase == "backward"


def test_a_reader_finds_a_running_file_before_any_phase_ended(
    recorder: PeakRecorder, tmp_path: Path
) -> None:
    assert written(tmp_path).state == "running"
    assert written(tmp_path).rank == 3


def test_the_hosts_peak_is_that_of_the_phase() -> None:
    host = HostPeak()
    host.restart()
    before = host.peak_bytes()
    block = bytearray(b"x") * (64 * MIB)
    assert host.peak_bytes() - before >= 60 * MIB
    del block
    host.restart()
    assert host.peak_bytes() - before < 30 * MIB


def test_a_kernel_that_refuses_to_reset_its_counter_is_sampled_instead(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    missing = tmp_path / "no" / "clear_refs"
    monkeypatch.setattr("launcher.worker.process_memory._CLEAR_REFS", missing)
    host = HostPeak()
    assert not host.is_exact
    host.restart()
    before = host.peak_bytes()
    block = bytearray(b"x") * (64 * MIB)
    host.sample(resident_bytes())
    del block
    assert host.peak_bytes() - before >= 60 * MIB
    # Looking costs the most there: in steps that are like those before, the thread alone does.
    host.restart_cheaply()
    assert host.peak_bytes() == 0
    host.sample(before)
    assert host.peak_bytes() == before


WAITING = """
import ctypes, sys
from pathlib import Path
import torch
from launcher.watchdog import Patience
from launcher.worker.heartbeat import Heartbeat
from launcher.worker.interruption import exit_on_signal
from launcher.worker.peak_memory import PeakRecorder

patience = Patience(training_seconds=float(sys.argv[2]), phase_seconds=1000)
heartbeat = Heartbeat(Path(sys.argv[1]), patience, rank=3, local_rank=0, world_size=1)
heartbeat.start()
recorder = PeakRecorder(heartbeat, device=torch.device("cpu"))
exit_on_signal(recorder.interrupt, is_stopping=lambda: False)
recorder.start()
recorder.begin_training()
recorder.end_step()
recorder.switch("backward")

def wait_for_others():
    # Like a rank inside a collective: in C, where Python runs no handlers, and not woken.
    library = ctypes.CDLL(None)
    while True:
        library.usleep(50_000_000)

print("ready", flush=True)
wait_for_others()
"""


@pytest.mark.parametrize(
    ("number", "state", "status"),
    [(signal.SIGTERM, "interrupted", 143), (signal.SIGINT, "interrupted", 130)],
)
def test_a_signal_is_acted_on_at_once(
    tmp_path: Path, number: signal.Signals, state: str, status: int
) -> None:
    peaks, returncode = _signalled(tmp_path, number)
    assert (peaks.state, returncode) == (state, status)
    assert peaks.phases["backward"].count == 1


def test_the_file_is_readable_after_a_kill(tmp_path: Path) -> None:
    peaks, returncode = _signalled(tmp_path, signal.SIGKILL)
    assert (peaks.state, returncode) == ("running", -9)
    assert peaks.pid != os.getpid()


def _waiting(folder: Path, *, watchdog_seconds: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, str(folder), str(watchdog_seconds)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def _signalled(folder: Path, number: signal.Signals) -> tuple[RankPeaks, int]:
    with _waiting(folder, watchdog_seconds=0) as process:
        process.send_signal(number)
        process.wait(timeout=WAIT_SECONDS)
    return written(folder), process.returncode


def test_a_rank_that_hangs_keeps_its_stacks_says_where_and_ends_and_one_that_was_stopped_does_not(
    tmp_path: Path,
) -> None:
    (tmp_path / "logs").mkdir()
    with _waiting(tmp_path, watchdog_seconds=5) as process:
        process.send_signal(signal.SIGSTOP)
        time.sleep(6.5)
        went_on_at = time.time()
        process.send_signal(signal.SIGCONT)
        process.wait(timeout=WAIT_SECONDS)
        # The file was written when it gave up: of the stop, two seconds count.
        assert (tmp_path / "ranks" / "00003.json").stat().st_mtime - went_on_at > 0.2
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == HUNG_EXIT_STATUS
    peaks = written(tmp_path)
    assert peaks.failure is not None
    assert (peaks.state, peaks.phase, peaks.failure.phase) == ("failed", "backward", "backward")
    assert peaks.failure.type == "RankHungError"
    assert peaks.failure.message.startswith("logs/stack-00003.txt: no progress since ")
    where = "for more than 5 s, in step 2 of this attempt, phase backward, at <string>:"
    assert where in said
    assert "in wait_for_others" in said
    assert "in wait_for_others" in (tmp_path / "logs" / "stack-00003.txt").read_text()
