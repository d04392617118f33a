from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from launcher.worker.packing import pack


def test_longest_go_first_and_each_where_it_leaves_the_least_room() -> None:
    # By hand, 10 tokens a sequence: 7 and 6 open two; 4 fits the second (room 4) alone, 3 the
    # first exactly, 2 opens a third.
    assert pack([2, 3, 4, 6, 7], 10) == [[4, 1], [3, 2], [0]]


@given(lengths=st.lists(st.integers(1, 50), max_size=80))
def test_every_example_has_one_place_and_no_sequence_is_too_long(lengths: list[int]) -> None:
    packs = pack(lengths, 50)
    assert sorted(index for members in packs for index in members) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in members) <= 50 for members in packs)
    # The first of a later sequence had no room in an earlier one.
    full = sorted(sum(lengths[index] for index in members) for members in packs)
    assert len(full) < 2 or full[0] + full[1] > 50
