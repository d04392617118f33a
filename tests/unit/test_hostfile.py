"""Hostfiles: strict text to hosts and back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import HostfileError
from launcher.hostfile import (
    Host,
    equal_slots,
    filter_hosts,
    parse_hostfile,
    render_filter,
    render_hostfile,
)

ROOT = Path(__file__).resolve().parents[2]


def test_hosts_keep_their_order_and_comments_are_left_out() -> None:
    text = "# the cluster\n\nnode2 slots=8\n  node1\tslots=4  # the old one\n"
    assert parse_hostfile(text, source="hostfile") == (
        Host(name="node2", slots=8),
        Host(name="node1", slots=4),
    )


def test_of_hundreds_of_broken_lines_the_first_twenty_are_shown() -> None:
    with pytest.raises(HostfileError) as error:
        parse_hostfile("{}\n" * 200, source="hosts")
    lines = error.value.problem.splitlines()
    assert lines[0] == "200 problems"
    assert lines[20].startswith("  - line 20: ")
    assert lines[21:] == ["  - and 180 more"]


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n"])
def test_empty_hostfile_never_falls_back_to_this_machine(text: str) -> None:
    with pytest.raises(HostfileError, match="my_hosts: the hostfile names no hosts"):
        parse_hostfile(text, source="my_hosts")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("node2", "'node2' has no slots"),
        ("node2 slots=", "has no slots|cannot read 'slots='"),
        ("node2 slots=x", "slots='x' is not a number"),
        ("node2 slots=-1", "slots='-1' is not a number"),
        ("node2 slots=\u0664", "is not a number"),
        ("node2 slots=0", "'node2' has slots=0"),
        # DeepSpeed accepts these two without a word (measured with 0.19.8).
        ("node2 slots=4;reboot", "slots='4;reboot' is not a number"),
        ("node2 slots=4 max_slots=8", "cannot read 'max_slots=8'"),
        ("node2:8", "'node2:8' is not a host name"),
        ("slots=8", "is not a host name|has no slots"),
        ("-oProxyCommand=reboot slots=1", "is not a host name"),
        ("$(id) slots=1", "is not a host name"),
        ("node1 slots=4", "'node1' is already on line 1"),
        ("node[1-2] slots=4", "'node1' is already on line 1"),
        ("node[3-2] slots=4", "is not a range of host names"),
        ("node[ slots=4", "is not a host name"),
        ("node[1-9999999] slots=4", "stands for 9,999,999 hosts"),
        # It would fill the memory if its names were made first.
        ("node[1-9]x[1-9999999999] slots=4", "stands for 89,999,999,991 hosts"),
        ("x;rm slots=4", "is not a host name"),
        ("n\u00f6de slots=4", "is not a host name"),
        ("@all slots=4", "is not a host name"),
        ("fd77::zz slots=4", "is not a host name"),
    ],
)
def test_a_line_that_cannot_be_used_is_named_with_its_number(line: str, problem: str) -> None:
    with pytest.raises(HostfileError, match=problem) as caught:
        parse_hostfile(f"node1 slots=8\n# next\n{line}\n", source="hosts")
    assert "hosts: line 3: " in str(caught.value)


def test_ranges_stand_for_hosts_and_keep_their_zeros() -> None:
    hosts = parse_hostfile("rack[1-2]n[08-10] slots=8\n", source="hosts")
    assert [host.name for host in hosts] == [
        *("rack1n08", "rack1n09", "rack1n10", "rack2n08", "rack2n09", "rack2n10")
    ]


@pytest.mark.parametrize("text", ["fd77::1 slots=2", "[fd77::1] slots=2"])
def test_an_ipv6_address_is_a_host(text: str) -> None:
    assert parse_hostfile(text, source="hosts") == (Host(name="fd77::1", slots=2),)


FOUR = tuple(Host(name=f"n{number}", slots=4) for number in range(1, 5))


def test_include_keeps_hosts_and_gpus() -> None:
    kept = filter_hosts(FOUR, include="n1@n[3-4]:0,2", exclude=None, source="hosts")
    assert render_filter(kept) == "n1:0,1,2,3@n3:0,2@n4:0,2"
    assert render_hostfile(kept) == "n1 slots=4\nn3 slots=3\nn4 slots=3\n"
    assert [host.slots for host in kept] == [4, 2, 2]


def test_exclude_leaves_hosts_and_gpus_out() -> None:
    kept = filter_hosts(FOUR, include=None, exclude="n[1-2]@n4:3", source="hosts")
    assert render_filter(kept) == "n3:0,1,2,3@n4:0,1,2"


@pytest.mark.parametrize(
    ("filters", "problem"),
    [
        ({"include": "n1", "exclude": "n2"}, "both given"),
        ({"include": "n9", "exclude": None}, "no host 'n9' in the hostfile"),
        ({"include": "n1:4", "exclude": None}, "n1 has no slot '4'"),
        ({"include": "n1:x", "exclude": None}, "n1 has no slot 'x'"),
        ({"include": "", "exclude": None}, "'' is not a host name"),
        ({"include": None, "exclude": "n[1-4]"}, "leaves no host of hosts"),
        ({"include": "$(id)", "exclude": None}, "is not a host name"),
    ],
)
def test_a_filter_that_cannot_be_used_says_why(filters: dict[str, str], problem: str) -> None:
    with pytest.raises(HostfileError, match=re.escape(problem)):
        filter_hosts(FOUR, source="hosts", **filters)


def test_all_bad_lines_are_reported_at_once() -> None:
    with pytest.raises(HostfileError) as caught:
        parse_hostfile("a\nb slots=1\nc slots=none\n", source="hosts")
    assert "line 1: " in str(caught.value)
    assert "line 3: " in str(caught.value)


def test_hosts_with_different_slots_are_refused() -> None:
    hosts = (Host(name="a", slots=8), Host(name="b", slots=4))
    with pytest.raises(HostfileError, match="a 8, b 4"):
        equal_slots(hosts, source="hosts")
    assert equal_slots(hosts[:1], source="hosts") == 8


names = st.from_regex(r"[a-z0-9_][a-z0-9_.-]{0,20}", fullmatch=True)


@given(st.dictionaries(names, st.integers(1, 64), min_size=1, max_size=20))
def test_rendered_hosts_are_read_back(slots_by_name: dict[str, int]) -> None:
    hosts = tuple(Host(name=name, slots=slots) for name, slots in slots_by_name.items())
    assert parse_hostfile(render_hostfile(hosts), source="hosts") == hosts


def test_every_example_hostfile_can_be_read() -> None:
    examples = [path for path in (ROOT / "hostfiles").rglob("*") if path.is_file()]
    assert len(examples) == 1
    for path in examples:
        assert parse_hostfile(path.read_text(encoding="utf-8"), source=str(path))
