"""Lists of hosts that other programs write: machine files of MPI, node lists of Slurm."""

from __future__ import annotations

import re

from launcher.errors import HostfileError, list_problems
from launcher.hostfile import expand_names

# Open MPI: "node1 slots=4 max_slots=8"; MPICH and Intel MPI: "node1:4"; both: a host by itself,
# which counts once more each time it is named.
_ENTRY = re.compile(r"(?P<host>[^\s:]+)(?::(?P<count>\d+))?(?P<options>(?:\s+\w+=\S+)*)")


def parse_machine_file(text: str, *, source: str) -> dict[str, int | None]:
    """Return the slots of each host that an MPI machine file names, ``None`` where it says none.

    Raises:
        HostfileError: no hosts, or lines that cannot be read; all are listed.

    Source: Open MPI 4 orte_hosts(7); MPICH wiki, "Using the Hydra Process Manager".
    """
    slots: dict[str, int | None] = {}
    problems: list[str] = []
    for line_number, line in enumerate(text.splitlines(), start=1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        match = _ENTRY.fullmatch(entry)
        names = expand_names(match.group("host")) if match else f"cannot read {entry!r}"
        if isinstance(names, str) or match is None:
            problems.append(f"{source}:{line_number}: {names}")
            continue
        option = re.search(r"\bslots=(\d+)", match.group("options"))
        count = match.group("count") or (option.group(1) if option else None)
        if count is not None and int(count) == 0:
            problems.append(f"{source}:{line_number}: no slots; leave the host out instead")
            continue
        for name in names:
            if name in slots:
                slots[name] = (slots[name] or 1) + int(count or 1)
            else:
                slots[name] = int(count) if count else None
    if problems:
        raise HostfileError(
            list_problems(problems), where=source, fix="write one host a line: 'node1 slots=8'"
        )
    if not slots:
        raise HostfileError("it names no hosts", where=source, fix="write one host a line")
    return slots


def hosts_of_node_list(node_list: str, *, where: str) -> tuple[str, ...]:
    """Return the names in a list such as Slurm's ``node[01-03,07],gpu1``.

    Raises:
        HostfileError: a part of it is not a host name.
    """
    # Commas inside brackets separate numbers, those outside hosts.
    found: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\]?)+", node_list):
        names = expand_names(part.strip())
        if isinstance(names, str):
            raise HostfileError(names, where=where, fix="write it like node[01-16],gpu1")
        found += names
    if not found:
        raise HostfileError("it names no hosts", where=where, fix="write it like node[01-16]")
    return tuple(found)
