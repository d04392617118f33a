"""What one rank needs, phase by phase, and the file that says so even after a kill."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from launcher.failure_kind import FailureKind
from launcher.peaks import PhasePeaks, RankFailure, RankPeaks, RankState
from launcher.predict.memory import PHASES, Phase
from launcher.redact import redacted
from launcher.worker.failures import failure_kind
from launcher.worker.heartbeat import Heartbeat
from launcher.worker.memory_samples import MemorySampler
from launcher.worker.model_facts import decoder_of
from launcher.worker.running_peak import AllocatorPeaks, RunningPeak, StepTimes
from launcher.worker.storage_tracker import StorageTracker

TRACKED_STEPS = 3
"""Optimizer steps during which tensors are counted on CPU: Adam's states appear in the first,
the second is the first complete one; counting every operation for longer only costs time."""
TELL_INTERVAL_SECONDS = 2.0
_PHASES_OF_A_STEP: frozenset[Phase] = frozenset({"forward", "loss", "backward", "step"})


class PeakRecorder:
    """Attribute this rank's memory and time to phases and keep its file up to date.

    At every border between phases the peak counters are read and reset. Nothing synchronises
    with the GPU: torch's allocator counts when the host asks for memory, in program order.
    On CPU, a :class:`StorageTracker` counts tensors until ``TRACKED_STEPS`` steps are done.

    Call :meth:`start` before the model is made and :meth:`finish`, :meth:`fail` or
    :meth:`interrupt` at the end. The file is written when a phase begins for the first time,
    and otherwise by the heartbeat's thread, some seconds behind.
    """

    def __init__(self, heartbeat: Heartbeat, *, device: torch.device) -> None:
        self._heartbeat = heartbeat
        self._device = device
        self._state: RankState = "running"
        self._failure: RankFailure | None = None
        self._peaks: dict[Phase, RunningPeak] = {}
        self._phase: Phase | None = None
        self._phase_started = 0.0
        self._last_phase: Phase | None = None
        self._told = 0.0
        self._steps = StepTimes()
        self._step_border: float | None = None
        self._outside_step_seconds = 0.0
        self._num_tokens = 0
        self._tokens_of_steps = 0
        self._samples = MemorySampler(heartbeat.folder, rank=heartbeat.known.rank, device=device)
        self._tracker: StorageTracker | None = None
        self._is_tracking = False
        self._reset_cuda_peaks: Callable[..., None] = torch.cuda.reset_peak_memory_stats
        self.on_phase: Callable[[Phase, int], None] | None = None
        """Called when a phase begins, with the number of steps done over all attempts."""
        self.earlier_steps = 0
        """Optimizer steps that earlier attempts have done."""
        self.model: torch.nn.Module | None = None
        self.host_autograd_op_seconds: float | None = None
        """What ``launcher.worker.host_speed`` measured, once it did."""
        self.engine: Any = None
        """DeepSpeed's, once it exists."""

    @property
    def phase(self) -> Phase | None:
        """The phase that is running, if any."""
        return self._phase

    @property
    def phase_of_failure(self) -> str:
        """The phase that runs, or ran last; ``start`` before the first."""
        return self._phase or self._last_phase or "start"

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return self._device

    @property
    def steps_done(self) -> int:
        """Optimizer steps that ended."""
        return self._steps.count

    @property
    def num_tokens(self) -> int:
        """Tokens that this rank has put through training forwards, padding included."""
        return self._num_tokens

    @property
    def peak_allocated_bytes(self) -> int:
        """The fullest phase so far, of those that ended."""
        return max((peak.highest.allocated_bytes for peak in self._peaks.values()), default=0)

    def start(self) -> None:
        """Begin to measure, and write the file for the first time."""
        if self._device.type == "cpu":
            self._tracker = StorageTracker()
            self._start_tracker()
        else:
            self._keep_peaks_at_resets()
        self._samples.start(self._sample)
        self.write()

    def switch(self, phase: Phase | None) -> None:
        """End the running phase, if any, and begin another, or none."""
        self._close_phase()
        self._phase = phase
        self._heartbeat.mark(phase, steps_done=self.steps_done)
        if phase is not None:
            self._last_phase = phase
            self._phase_started = time.perf_counter()
            self._reset_counters()
        if phase is not None and phase not in self._peaks:
            self.write()  # the likeliest moment of a kill
        elif time.monotonic() - self._told > TELL_INTERVAL_SECONDS:
            # The heartbeat's thread writes it: training does not wait for a disk.
            self._heartbeat.known = self.snapshot()
            self._told = time.monotonic()
        if phase is not None and self.on_phase is not None:
            self.on_phase(phase, self.earlier_steps + self.steps_done)

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Run a block as one phase; what ran before goes on afterwards.

        A phase inside the same phase is one phase. After an error the phase stays open, so
        that :meth:`fail` can name it.
        """
        before = self._phase
        if before == phase:
            yield
            return
        started = time.perf_counter()
        # Saving and evaluating at the end count their tensors once more, the first time.
        resumes = self._tracker is not None and not self._is_tracking and phase not in self._peaks
        if resumes:
            self._start_tracker()
        self.switch(phase)
        yield
        self.switch(before)
        if resumes:
            self._stop_tracker()
        self._outside_step_seconds += time.perf_counter() - started

    def count_model(self, model: torch.nn.Module) -> None:
        """Count weights that were made out of the tracker's sight, such as by loader threads."""
        self.model = model
        if self._tracker is not None:
            self._tracker.add_external_all(model.parameters(), op="parameter")
            self._tracker.add_external_all(model.buffers(), op="buffer")

    def begin_training(self) -> None:
        """Mark the moment from which the first step counts."""
        self._step_border = time.perf_counter()
        self._outside_step_seconds = 0.0

    def end_step(self) -> None:
        """Count an optimizer step: the time since the last one, saving and evaluating left out."""
        self.switch(None)
        assert self._step_border is not None
        now = time.perf_counter()
        self._steps.add(now - self._step_border - self._outside_step_seconds)
        self._step_border, self._outside_step_seconds = now, 0.0
        self._tokens_of_steps = self._num_tokens
        if self._device.type == "cuda" or self._is_tracking:
            for phase in _PHASES_OF_A_STEP & self._peaks.keys():
                self._peaks[phase].end_step()
        if self.steps_done == TRACKED_STEPS:
            self._stop_tracker()

    def watch_engine(self, engine: Any) -> None:
        """Tell forward, loss, backward and step of a DeepSpeed engine apart from now on."""
        self.engine = engine
        self._wrap_forward(engine)
        plain_backward, plain_step = engine.backward, engine.step

        def backward(*args: Any, **kwargs: Any) -> Any:
            # Backward begins with the loss and the output layer; see _watch_hidden_state.
            self.switch("loss")
            result = plain_backward(*args, **kwargs)
            self.switch(None)
            return result

        def step(*args: Any, **kwargs: Any) -> Any:
            self.switch("step")
            result = plain_step(*args, **kwargs)
            self.switch(None)
            return result

        engine.backward, engine.step = backward, step

    def _wrap_forward(self, engine: Any) -> None:
        plain_forward = engine.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not (engine.training and torch.is_grad_enabled()):
                self._heartbeat.mark(self._phase)
                return plain_forward(*args, **kwargs)
            self._num_tokens += kwargs["input_ids"].numel()
            self.switch("forward")
            result = plain_forward(*args, **kwargs)
            self.switch(None)
            return result

        engine.forward = forward
        decoder = decoder_of(_plain_model(engine.module))
        decoder.register_forward_hook(self._watch_hidden_state)

    def _watch_hidden_state(self, _module: Any, _args: Any, output: Any) -> None:
        """Divide at the last hidden state: the loss begins there and, in backward, ends there."""
        if self._phase != "forward":
            return
        hidden_bsh = output[0] if isinstance(output, tuple) else output.last_hidden_state

        def loss_is_done(_gradient: torch.Tensor) -> None:
            if self._phase == "loss":
                self.switch("backward")

        if hidden_bsh.requires_grad:
            hidden_bsh.register_hook(loss_is_done)
        self.switch("loss")

    def finish(self) -> None:
        """Write the file for the last time: this rank did all that it was asked to do."""
        self._end("finished")

    def fail(self, error: BaseException) -> None:
        """Write the file for the last time: an error ended this rank."""
        kind = failure_kind(error)
        self._failure = RankFailure(
            phase=self.phase_of_failure,
            type=type(error).__name__,
            message=redacted(str(error)),
            traceback=redacted("".join(traceback.format_exception(error))),
            kind=kind,
        )
        is_memory = kind in (FailureKind.gpu_oom, FailureKind.host_oom)
        self._end("out_of_memory" if is_memory else "failed")

    def interrupt(self) -> None:
        """Write the file for the last time: a signal ended this rank.

        Unlike the others, it may be called from another thread while a phase runs.
        """
        self._close_phase()
        self._phase = None
        self._state = "interrupted"
        self.write()

    def write(self) -> None:
        """Replace this rank's file with what is known now."""
        self._heartbeat.write(self.snapshot())
        self._told = time.monotonic()

    def snapshot(self) -> RankPeaks:
        """Return what is known now; a phase counts when it ends."""
        retries, ooms = self._allocator_counts()
        phases: dict[str, PhasePeaks] = {
            phase: self._peaks[phase].frozen() for phase in PHASES if phase in self._peaks
        }
        name = "cpu"
        if self._device.type == "cuda":
            name = torch.cuda.get_device_name(self._device)
        return replace(
            self._heartbeat.known,
            device=self._device.type,
            device_name=name,
            state=self._state,
            steps_done=self.steps_done,
            phases=phases,
            step_seconds=self._steps.seconds(),
            first_step_at=self._steps.first_ended_at,
            tokens_per_step=self._tokens_of_steps // max(1, self.steps_done),
            allocator_retries=retries,
            allocator_ooms=ooms,
            failure=self._failure,
            now=self._samples.now,
            host_autograd_op_seconds=self.host_autograd_op_seconds,
        )

    def _end(self, state: RankState) -> None:
        self._close_phase()
        self._phase = None
        self._samples.stop()
        self._stop_tracker()
        self._state = state
        self._heartbeat.stop()
        self.write()

    def _close_phase(self) -> None:
        if self._phase is None:
            return
        self._keep_allocator_peaks(self._phase)
        self._samples.end_phase(self._peaks[self._phase])
        self._peaks[self._phase].seconds += time.perf_counter() - self._phase_started
        self._peaks[self._phase].count += 1

    def _keep_allocator_peaks(self, phase: Phase) -> None:
        self._peaks.setdefault(phase, RunningPeak()).keep(self._allocator_peaks())

    def _keep_peaks_at_resets(self) -> None:
        """Read torch's peaks before anyone else resets them in the middle of a phase.

        DeepSpeed does in init, after each flattening (0.19.8 ``runtime/utils.py:empty_cache``).
        """
        plain_reset = torch.cuda.reset_peak_memory_stats

        def reset(*args: Any, **kwargs: Any) -> None:
            if self._phase is not None:
                self._keep_allocator_peaks(self._phase)
            plain_reset(*args, **kwargs)

        self._reset_cuda_peaks = plain_reset
        torch.cuda.reset_peak_memory_stats = reset

    def _reset_counters(self) -> None:
        is_in_steps = self._phase in _PHASES_OF_A_STEP and self.steps_done >= TRACKED_STEPS
        self._samples.begin_phase(self._phase, is_cheap=is_in_steps)
        if self._tracker is not None:
            self._tracker.reset_peak()
        if self._device.type == "cuda":
            self._reset_cuda_peaks(self._device)

    def _allocator_peaks(self) -> AllocatorPeaks:
        if self._tracker is not None and self._is_tracking:
            peak = self._tracker.peak_bytes
            return AllocatorPeaks(allocated_bytes=peak, reserved_bytes=peak)
        stats = self._allocator_stats()
        if not stats:
            return AllocatorPeaks()
        allocated, reserved, active = (
            stats[f"{kind}_bytes"]["all"]["peak"] for kind in ("allocated", "reserved", "active")
        )
        return AllocatorPeaks(
            allocated_bytes=allocated, reserved_bytes=reserved, active_bytes=active
        )

    def _allocator_stats(self) -> dict[str, Any]:
        if self._device.type != "cuda":
            return {}
        stats: dict[str, Any] = torch.cuda.memory.memory_stats_as_nested_dict(self._device)
        return stats

    def _allocator_counts(self) -> tuple[int, int]:
        stats = self._allocator_stats()
        return stats.get("num_alloc_retries", 0), stats.get("num_ooms", 0)

    def _present_bytes(self) -> tuple[int | None, int | None]:
        """Return what is allocated and reserved now, for the timeline."""
        if self._tracker is not None:
            return (self._tracker.current_bytes if self._is_tracking else None), None
        stats = self._allocator_stats()
        if not stats:
            return None, None
        allocated, reserved = (
            stats[f"{kind}_bytes"]["all"]["current"] for kind in ("allocated", "reserved")
        )
        return allocated, reserved

    def _sample(self) -> None:
        allocated, reserved = self._present_bytes()
        self._samples.take(allocated, reserved, steps_done=self.steps_done)

    def _start_tracker(self) -> None:
        assert self._tracker is not None
        self._tracker.__enter__()
        self._is_tracking = True

    def _stop_tracker(self) -> None:
        if self._tracker is not None and self._is_tracking:
            self._tracker.__exit__(None, None, None)
            self._is_tracking = False


def _plain_model(module: Any) -> Any:
    """Return the transformers model inside a PEFT wrapper, or the model itself."""
    return module.get_base_model() if hasattr(module, "get_base_model") else module
