"""A table as rows of text, and the unit that its sizes share. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from launcher.report.text import NOTHING
from launcher.units import GIB, KIB, MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A titled table; every row has as many cells as the header."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    num_text_columns: int = 1
    """Leading columns that hold words; the others hold numbers and align right."""
    has_sentences: bool = False
    """The last two columns hold sentences, which may be broken into lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One unit for all sizes of a table, so that they can be compared at a glance."""

    name: str
    scale: int
    decimals: int

    def show(self, size: float | None) -> str:
        """Return bytes in this unit, without its name."""
        return NOTHING if size is None else f"{size / self.scale:.{self.decimals}f}"


def unit_for(sizes: Iterable[float | None]) -> Unit:
    """Return the unit in which the largest size has at most five digits before the point."""
    largest = max((size for size in sizes if size is not None), default=0)
    if largest >= 10 * GIB:
        return Unit(name="GiB", scale=GIB, decimals=2)
    if largest >= 10 * MIB:
        return Unit(name="MiB", scale=MIB, decimals=1)
    return Unit(name="KiB", scale=KIB, decimals=1)


def without_empty_columns(table: Table, *, names: Sequence[str] = ()) -> Table:
    """Drop columns, or of them those named, that say nothing in any row: device memory on CPU."""
    may_go = names or table.header[table.num_text_columns :]
    kept = [
        index
        for index, name in enumerate(table.header)
        if name not in may_go or any(row[index] != NOTHING for row in table.rows)
    ]
    return Table(
        title=table.title,
        header=tuple(table.header[index] for index in kept),
        rows=tuple(tuple(row[index] for index in kept) for row in table.rows),
        note=table.note,
        num_text_columns=table.num_text_columns,
    )
