"""The lines of a job's log: which rank printed them, and the last of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from launcher import run_dir as rd

# srun --label: the task's number, padded to the width of the largest.
_LABEL = re.compile(r" *(\d+): ?(.*)", re.DOTALL)
# Our own ranks, when they fail.
_MARK = re.compile(r"\[rank ?(\d+)\]")
_TAIL_BYTES = 2**20


def lines_of_rank(lines: Iterable[str], rank: int, *, is_labelled: bool) -> Iterator[str]:
    """Yield the lines that a rank printed.

    Args:
        lines: of the job's log.
        rank: whose lines.
        is_labelled: whether every rank's line begins with its number, as srun writes them. In
            other logs rank 0 speaks for all, and the others' messages begin with ``[rank N]``.
    """
    for line in lines:
        if is_labelled:
            match = _LABEL.fullmatch(line)
            if match is not None and int(match[1]) == rank:
                yield match[2]
        else:
            marked = _MARK.match(line)
            if (int(marked[1]) if marked else 0) == rank:
                yield line


def tail(run_dir: Path) -> list[str]:
    """Return the last lines of a run's log, at most a MiB; none if there is no log."""
    try:
        with (run_dir / rd.LAUNCHER_LOG).open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - _TAIL_BYTES))
            return stream.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []
