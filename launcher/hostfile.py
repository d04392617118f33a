"""DeepSpeed hostfiles: strict text to hosts and back, ranges of names, filters."""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from launcher.errors import HostfileError, did_you_mean, list_problems

# A name that ssh and a remote shell take as it is; a leading '-' would be an option of ssh.
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_RANGES = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]|\[[0-9,-]+\])*")
_ENTRY = re.compile(r"(?P<host>\S+)(?:\s+slots=(?P<slots>\S+))?(?P<rest>\s+.*)?")
_FILTER = re.compile(r"(?P<host>\[[^\]]*:[^\]]*\]|[^:]+)(?::(?P<slots>.*))?")
# The largest machine of the Top500 has fewer than 100,000 nodes; more is a slip of the pen.
_MAX_HOSTS = 100_000
EXAMPLE = "write one line per host, like 'node1 slots=8', or 'node[01-16] slots=8'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A host that ssh reaches by name or address, and its number of GPUs to use.

    ``gpu_ids`` is empty, which means the first ones, unless a filter has chosen some.
    """

    name: str
    slots: int
    gpu_ids: tuple[int, ...] = ()


def parse_hostfile(text: str, *, source: str) -> tuple[Host, ...]:
    """Parse DeepSpeed's ``host slots=N`` lines; ``#`` starts a comment.

    Beyond DeepSpeed's syntax, a name may hold ranges (``node[01-16]``), and an IPv6 address
    may stand in brackets. Stricter than DeepSpeed 0.19.8 (``launcher/runner.py``,
    ``_parse_hostfile``), which skips hosts with ``slots=0``, ignores text after the number,
    and trains on this machine alone when the file is missing.

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
        where = f"line {line_number}"
        found = _parse_entry(entry)
        if isinstance(found, str):
            problems.append(f"{where}: {found}")
            continue
        for host in found:
            first = lines_by_host.setdefault(host.name, line_number)
            if first != line_number:
                problems.append(f"{where}: {host.name!r} is already on line {first}")
        hosts += found
    if problems:
        raise HostfileError(list_problems(problems), where=source, fix=EXAMPLE)
    if not hosts:
        # Never fall back to this machine: a job that silently runs on one node of eight is
        # costlier than one that stops here (DeepSpeed issue 5221).
        raise HostfileError("the hostfile names no hosts", where=source, fix=EXAMPLE)
    return tuple(hosts)


def render_hostfile(hosts: Sequence[Host]) -> str:
    """Return the text that :func:`parse_hostfile` and DeepSpeed read back as these hosts."""
    return "".join(
        f"{host.name} slots={max(host.gpu_ids) + 1 if host.gpu_ids else host.slots}\n"
        for host in hosts
    )


def render_filter(hosts: Sequence[Host]) -> str:
    """Return DeepSpeed's ``--include`` for the GPUs that were chosen on these hosts."""
    return "@".join(
        f"{host.name}:{','.join(map(str, host.gpu_ids or range(host.slots)))}" for host in hosts
    )


def filter_hosts(
    hosts: Sequence[Host], *, include: str | None, exclude: str | None, source: str
) -> tuple[Host, ...]:
    """Keep or leave out hosts and GPUs, in DeepSpeed's syntax with ranges of names.

    ``node1@node[3-4]:0,2`` means all of node1 and GPUs 0 and 2 of node3 and node4.

    Args:
        hosts: of the hostfile.
        include: what to keep, or ``None`` for all.
        exclude: what to leave out; not together with ``include``.
        source: what to call the hostfile in errors.

    Raises:
        HostfileError: both are given, a part cannot be read, or nothing is left.
    """
    if include is None and exclude is None:
        return tuple(hosts)
    if include is not None and exclude is not None:
        raise HostfileError(
            "include and exclude are both given", where="cluster", fix="give one of them"
        )
    key, text = ("include", include) if include is not None else ("exclude", exclude or "")
    chosen = _parse_filter(text or "", hosts, where=f"cluster.{key}")
    kept: list[Host] = []
    for host in hosts:
        slots = chosen.get(host.name, set())
        wanted = [slot for slot in range(host.slots) if (slot in slots) == (key == "include")]
        if len(wanted) == host.slots:
            kept.append(host)
        elif wanted:
            kept.append(replace(host, slots=len(wanted), gpu_ids=tuple(wanted)))
    if not kept:
        raise HostfileError(
            f"{key} {text!r} leaves no host of {source}", where=f"cluster.{key}", fix="widen it"
        )
    return tuple(kept)


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


def expand_names(text: str) -> tuple[str, ...] | str:
    """Return the names that a name with ranges stands for, or what is wrong with it.

    ``node[01-03]`` keeps its zeros; an address stays as it is, without brackets.
    """
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if _is_address(bare):
        return (bare,)
    if _HOST.fullmatch(text):
        return (text,)
    if not _RANGES.fullmatch(text):
        return f"{text!r} is not a host name"
    number = math.prod(map(_count, re.findall(r"\[(.*?)\]", text)))
    if number > _MAX_HOSTS:
        # Before they are made: a billion names would fill the memory.
        return f"{text!r} stands for {number:,} hosts"
    # 20 ms, and most hostfiles have no ranges.
    from ClusterShell.NodeSet import RESOLVER_NOGROUP, NodeSet, NodeSetException

    try:
        names = NodeSet(text, resolver=RESOLVER_NOGROUP)
    except NodeSetException as error:
        return f"{text!r} is not a range of host names: {error}"
    return tuple(names)


def _count(ranges: str) -> int:
    """Return how many numbers ``01-16,20`` stands for; what cannot be read counts as one."""
    pairs = re.findall(r"(\d{1,18})-(\d{1,18})", ranges)
    return 1 + ranges.count(",") + sum(max(0, int(last) - int(first)) for first, last in pairs)


def _parse_entry(entry: str) -> list[Host] | str:
    """Return the hosts of one line, or what is wrong with the line."""
    match = _ENTRY.fullmatch(entry)
    assert match is not None  # the pattern takes any text that is not blank
    name, slots, rest = match.group("host", "slots", "rest")
    names = expand_names(name)
    if isinstance(names, str):
        return names
    if rest:
        return f"cannot read {rest.strip()!r} in {entry!r}"
    if slots is None:
        return f"{entry!r} has no slots"
    if not (slots.isascii() and slots.isdigit()):
        return f"slots={slots!r} is not a number"
    if int(slots) == 0:
        return f"{name!r} has slots=0; leave the line out to leave the host out"
    return [Host(name=each, slots=int(slots)) for each in names]


def _parse_filter(text: str, hosts: Sequence[Host], *, where: str) -> dict[str, set[int]]:
    """Return the chosen slots of each host that a filter names."""
    slots_by_name = {host.name: host.slots for host in hosts}
    chosen: dict[str, set[int]] = {}
    for item in text.split("@"):
        name, slots = item.strip(), None
        match = _FILTER.fullmatch(name)
        if match is not None and not _is_address(name):
            name, slots = match.group("host", "slots")
        names = expand_names(name)
        if isinstance(names, str):
            raise HostfileError(names, where=where, fix="write it like node1@node[3-4]:0,2")
        for each in names:
            if each not in slots_by_name:
                raise HostfileError(
                    f"no host {each!r} in the hostfile",
                    where=where,
                    fix=did_you_mean(each, list(slots_by_name)[:100]),
                )
            known = set(map(str, range(slots_by_name[each])))
            wanted = known if slots is None else {slot.strip() for slot in slots.split(",")}
            if not wanted <= known:
                raise HostfileError(
                    f"{each} has no slot {sorted(wanted - known)[0]!r}",
                    where=where,
                    fix=f"its slots are 0 to {slots_by_name[each] - 1}",
                )
            chosen.setdefault(each, set()).update(map(int, wanted))
    return chosen


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
