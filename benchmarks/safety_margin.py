"""Print what the measured runs needed beyond their prediction: the planner's safety margin.

    python benchmarks/safety_margin.py

Every finished run of results/*.jsonl is predicted anew with the present formulas. A plan that
may use ``1 - m`` of a device stays within it if ``m`` is at least ``(measured - predicted) /
device``; the largest of these over the runs that count, each on the smallest device that holds
it, is the margin, rounded up to a thousandth. It belongs into ``launcher/planning/safety.py``.
"""

from __future__ import annotations

import math

from measured import RESULTS, Row, read_rows

from launcher.hardware import find_gpu, gpu_names

SMALLEST_DEVICE_BYTES = min(find_gpu(name).memory_bytes for name in gpu_names())

# Rank 0's device had 7.1 GB more in use than rank 1's, whose process reserved as much: something
# else was on it.
SHARED_DEVICES = {("h200x2_again", "7b-qlora-z3-2048-gc")}


def needed_fraction(row: Row) -> float:
    """Return the share of a device, just large enough for the run, that had to be left free.

    No device is smaller than the smallest known one: what a run of 5 GiB needed beyond its
    prediction is a share of 15 GiB, not of 5.
    """
    predicted_bytes, measured_bytes = row.values["device_used_bytes"]
    return (measured_bytes - predicted_bytes) / max(measured_bytes, SMALLEST_DEVICE_BYTES)


def counted_rows() -> list[Row]:
    """Return the runs of today's worker whose use of a device was measured, the worst last."""
    rows = [
        row
        for path in RESULTS
        for row in read_rows(path)
        if (path.stem, row.case) not in SHARED_DEVICES
    ]
    counted = [row for row in rows if "device_used_bytes" in row.values and not row.is_outdated]
    return sorted(counted, key=needed_fraction)


def margin(rows: list[Row]) -> float:
    """Return the safety margin, rounded up to a thousandth."""
    worst = max(needed_fraction(row) for row in rows if row.is_planned)
    return math.ceil(1000 * max(0.0, worst)) / 1000


def main() -> None:
    """Print all runs, the worst last, and the margin."""
    rows = counted_rows()
    for row in rows:
        note = "" if row.is_planned else "  (not planned, does not count)"
        print(f"{needed_fraction(row):+7.1%}  {row.case}{note}")
    print(f"\n{len(rows)} runs; SAFETY_FRACTION = {margin(rows)}")


if __name__ == "__main__":
    main()
