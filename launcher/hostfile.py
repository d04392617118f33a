"""DeepSpeed hostfiles: strict text to hosts and back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.errors import HostfileError, list_problems

# A name that ssh and a remote shell take as it is; a leading '-' would be an option of ssh.
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*")
_ENTRY = re.compile(r"(?P<host>\S+)(?:\s+slots=(?P<slots>\S+))?(?P<rest>\s+.*)?")
EXAMPLE = "write one line per host, like 'node1 slots=8'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One line of a hostfile: a name that ssh reaches and its number of GPUs."""

    name: str
    slots: int


def parse_hostfile(text: str, *, source: str) -> tuple[Host, ...]:
    """Parse DeepSpeed's ``host slots=N`` lines; ``#`` starts a comment.

    Stricter than DeepSpeed 0.19.8 (``launcher/runner.py``, ``_parse_hostfile``), which skips
    hosts with ``slots=0``, ignores text after the number, and trains on this machine alone
    when the file is missing.

    Args:
        text: the whole file.
        source: what to call the file in errors, usually its path.

    Returns:
        The hosts in the order of the file; at least one.

    Raises:
        HostfileError: no hosts, or lines that cannot be used; all of them are listed, each
            with its number.
    """
    hosts: list[Host] = []
    lines_by_host: dict[str, int] = {}
    problems: list[str] = []
    for line_number, line in enumerate(text.splitlines(), start=1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        where = f"{source}:{line_number}"
        host = _parse_entry(entry)
        if isinstance(host, str):
            problems.append(f"{where}: {host}")
        elif host.name in lines_by_host:
            first = lines_by_host[host.name]
            problems.append(f"{where}: {host.name!r} is already on line {first}")
        else:
            lines_by_host[host.name] = line_number
            hosts.append(host)
    if problems:
        raise HostfileError(list_problems(problems), where=source, fix=EXAMPLE)
    if not hosts:
        # Never fall back to this machine: a job that silently runs on one node of eight is
        # costlier than one that stops here (DeepSpeed issue 5221).
        raise HostfileError("the hostfile names no hosts", where=source, fix=EXAMPLE)
    return tuple(hosts)


def render_hostfile(hosts: Sequence[Host]) -> str:
    """Return the text that :func:`parse_hostfile` and DeepSpeed read back as these hosts."""
    return "".join(f"{host.name} slots={host.slots}\n" for host in hosts)


def equal_slots(hosts: Sequence[Host], *, source: str) -> int:
    """Return the number of slots that every host has.

    Raises:
        HostfileError: the hosts differ; ZeRO's slowest or smallest rank would hold up all.
    """
    counts = {host.slots for host in hosts}
    if len(counts) != 1:
        listed = ", ".join(f"{host.name} {host.slots}" for host in hosts[:8])
        raise HostfileError(
            f"hosts have different numbers of slots ({listed}{', …' if len(hosts) > 8 else ''})",
            where=source,
            fix="give every host the same number of slots, or leave the odd one out",
        )
    return counts.pop()


def _parse_entry(entry: str) -> Host | str:
    """Return the host of one line, or what is wrong with the line."""
    match = _ENTRY.fullmatch(entry)
    assert match is not None  # the pattern takes any text that is not blank
    host, slots, rest = match.group("host", "slots", "rest")
    if not _HOST.fullmatch(host):
        return f"{host!r} is not a host name"
    if rest:
        return f"cannot read {rest.strip()!r} in {entry!r}"
    if slots is None:
        return f"{entry!r} has no slots"
    if not (slots.isascii() and slots.isdigit()):
        return f"slots={slots!r} is not a number"
    if int(slots) == 0:
        return f"{host!r} has slots=0; leave the line out to leave the host out"
    return Host(name=host, slots=int(slots))
