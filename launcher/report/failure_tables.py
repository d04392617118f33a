"""Tables of what went wrong: earlier attempts, and what filled the memory that ran out. Pure."""

from __future__ import annotations

from launcher.report.run_report import RunReport
from launcher.report.table import Table, unit_for
from launcher.report.text import NOTHING, printable, shorten
from launcher.units import format_bytes


def attempts_table(report: RunReport) -> Table:
    """Return the earlier attempts at the run and what was changed after each."""
    unit = unit_for(attempt.peak_allocated_bytes for attempt in report.attempts)
    rows = [
        (
            str(attempt.number),
            attempt.state.replace("_", " "),
            NOTHING if attempt.steps_done is None else str(attempt.steps_done),
            unit.show(attempt.peak_allocated_bytes),
            printable(shorten(attempt.reason or NOTHING, 200)),
            printable(shorten(attempt.reaction or NOTHING, 300)),
        )
        for attempt in report.attempts
    ]
    return Table(
        title="Earlier attempts",
        header=("attempt", "ended", "steps", f"peak ({unit.name})", "because", "then"),
        rows=tuple(rows),
        num_text_columns=2,
        has_sentences=True,
    )


def failure_memory_table(report: RunReport) -> Table:
    """Return what filled the memory of the rank that ran out of it; no rows when none did."""
    found = report.memory_at_failure
    if found is None:
        return Table(title="", header=("", "predicted", "measured"), rows=())
    unit = unit_for([*found.predicted.values(), *found.measured.values()])
    names = dict.fromkeys([*found.predicted, *found.measured])
    note = ""
    if found.requested_bytes is not None:
        note = f"It asked for {format_bytes(found.requested_bytes)} more"
        if found.device_free_bytes is not None:
            note += f"; {format_bytes(found.device_free_bytes)} of the device were free"
        note += "."
    return Table(
        title=f"What filled the memory of rank {found.rank} in {found.phase}, in {unit.name}",
        header=("", "predicted", "measured"),
        rows=tuple(
            (
                printable(shorten(name, 60)),
                unit.show(found.predicted.get(name)),
                unit.show(found.measured.get(name)),
            )
            for name in names
        ),
        note=note,
    )
