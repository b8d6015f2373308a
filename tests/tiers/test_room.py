"""WriteRoom: extents never overlap, all of it comes back; against a byte map under hypothesis."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.errors import InvariantViolated
from kvtier.tiers.room import WriteRoom
from kvtier.units import PAGE_BYTES

PAGES = 16


def room() -> WriteRoom:
    arena: Any = SimpleNamespace(data_bytes=PAGES * PAGE_BYTES)
    return WriteRoom(arena)


def test_take_and_give_back() -> None:
    one = room()
    assert one.largest_bytes() == PAGES * PAGE_BYTES
    first, second = one.take(1), one.take(PAGE_BYTES + 1)
    assert (first, second) == (0, PAGE_BYTES)
    assert one.largest_bytes() == (PAGES - 3) * PAGE_BYTES
    assert one.take((PAGES - 3) * PAGE_BYTES + 1) is None
    one.check()
    one.give_back(0)
    one.check()
    with pytest.raises(InvariantViolated):
        one.give_back(0)
    one.give_back(PAGE_BYTES)
    assert one._free == [(0, PAGES * PAGE_BYTES)]


def test_a_full_room_and_back() -> None:
    one = room()
    offsets = [one.take(PAGE_BYTES) for _ in range(PAGES)]
    assert one.largest_bytes() == 0
    assert one.take(1) is None
    for offset in (*offsets[::2], *offsets[1::2]):
        assert offset is not None
        one.give_back(offset)
        one.check()
    assert one._free == [(0, PAGES * PAGE_BYTES)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 6 * PAGE_BYTES)), max_size=60))
def test_against_a_map_of_pages(steps: list[tuple[bool, int]]) -> None:
    one = room()
    owner: list[int | None] = [None] * PAGES
    for take, number in steps:
        held = sorted({page for page in owner if page is not None})
        if take:
            pages = -(-number // PAGE_BYTES)
            stretches = "".join("." if page is None else "x" for page in owner).split("x")
            longest = max(len(stretch) for stretch in stretches)
            assert one.largest_bytes() == longest * PAGE_BYTES
            offset = one.take(number)
            assert (offset is None) == (pages > longest)
            if offset is not None:
                start = offset // PAGE_BYTES
                assert owner[start : start + pages] == [None] * pages
                owner[start : start + pages] = [start] * pages
        elif held:
            start = held[number % len(held)]
            one.give_back(start * PAGE_BYTES)
            owner = [None if page == start else page for page in owner]
        one.check()
