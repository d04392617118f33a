"""Bytes, rates and times for people; the only place where GiB is known."""

from __future__ import annotations

KIB = 2**10
MIB = 2**20
GIB = 2**30
GB = 10**9


def format_gib(num_bytes: float) -> str:
    """Return ``num_bytes`` as GiB (2**30 bytes) with its unit, for people."""
    return f"{num_bytes / GIB:.2f} GiB"


def format_bytes(num_bytes: float) -> str:
    """Return ``num_bytes`` in the largest binary unit that keeps it at or above 1."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(num_bytes) >= unit:
            return f"{num_bytes / unit:.2f} {name}"
    return f"{num_bytes:.0f} B"


def format_seconds(seconds: float) -> str:
    """Return a duration for people: ``0.42 s``, ``3 min 20 s``, ``5 h 03 min``."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def format_count(count: float) -> str:
    """Return a count of parameters or tokens for people: ``6.74B``, ``33.6M``."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # What three digits round up to the unit is written in it: 1B, not 1e+03M.
        if abs(count) >= 0.9995 * unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.0f}"
