"""Maxima, the first step and the steady state of one phase."""

from __future__ import annotations

from report_inputs import rank

from launcher.peaks import StepPeaks, peaks_from_json, peaks_to_json
from launcher.worker.running_peak import KEPT_STEPS, AllocatorPeaks, RunningPeak, StepTimes


def after(*steps: int) -> RunningPeak:
    peak = RunningPeak()
    for size in steps:
        peak.keep(AllocatorPeaks(allocated_bytes=size, reserved_bytes=10, active_bytes=size + 1))
        peak.end_step()
    return peak


def test_the_steady_state_is_the_median_after_the_first_step() -> None:
    frozen = after(9, 1, 2, 8).frozen()
    assert frozen.peak_allocated_bytes == 9
    assert frozen.peak_active_bytes == 10
    assert frozen.first_step == StepPeaks(allocated_bytes=9, reserved_bytes=10, active_bytes=10)
    assert frozen.steady_state == StepPeaks(allocated_bytes=2, reserved_bytes=10, active_bytes=3)


def test_a_phase_outside_steps_has_neither() -> None:
    peak = RunningPeak()
    peak.keep(AllocatorPeaks(allocated_bytes=4))
    assert (peak.frozen().first_step, peak.frozen().steady_state) == (None, None)


def test_load_and_power_are_means_of_what_the_driver_said() -> None:
    peak = RunningPeak()
    peak.keep_load(utilisation_fraction=0.5, power_watts=None)
    peak.keep_load(utilisation_fraction=1.0, power_watts=300.0)
    assert (peak.frozen().gpu_utilisation_fraction, peak.frozen().power_watts) == (0.75, 300.0)


def test_step_times_of_a_long_run_stay_few() -> None:
    times = StepTimes()
    for number in range(KEPT_STEPS + 500):
        times.add(float(number))
    assert times.count == KEPT_STEPS + 500
    assert times.seconds() == (0.0, *(float(n) for n in range(500, KEPT_STEPS + 500)))
    assert times.first_ended_at is not None


def test_a_rank_file_keeps_all_of_it() -> None:
    written = rank(0, phases={"forward": after(9, 1).frozen()}, first_step_at=12.5)
    assert peaks_from_json(peaks_to_json(written)) == written
