"""Fill sequences of one length with several examples: best fit, longest examples first."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


def pack(lengths: Sequence[int], max_seq_len: int) -> list[list[int]]:
    """Return which examples share a sequence.

    Best-fit decreasing: each example, longest first, goes where it leaves the least room. It
    never needs more than 11/9 of the fewest sequences possible, plus one, and no example is
    cut.

    Args:
        lengths: tokens of each example, none longer than ``max_seq_len``.
        max_seq_len: tokens of a sequence.

    Returns:
        Per sequence the examples' indices. The same for the same lengths.

    Source:
        Johnson, "Near-optimal bin packing algorithms", MIT 1973; as in TRL ("bfd").
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    packs: list[list[int]] = []
    # Sequences by the room that they have left, and the rooms that occur, in order.
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for index in order:
        length = lengths[index]
        assert 0 < length <= max_seq_len
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            number, room = len(packs), max_seq_len
            packs.append([])
        else:
            room = rooms[place]
            number = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        packs[number].append(index)
        left = room - length
        if left:
            if left not in by_room:
                by_room[left] = []
                bisect.insort(rooms, left)
            by_room[left].append(number)
    return packs
