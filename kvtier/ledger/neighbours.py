"""Slots that follow one another in a segment: what was written together lies together.

So that books of many slots are changed by the stretch, not by the slot. Does not: keep any.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from kvtier.block import SLOT_BITS, SLOTS_PER_SEGMENT_MAX

_INDEX_MASK = SLOTS_PER_SEGMENT_MAX - 1


def by_segment(slots: array[int]) -> Iterator[tuple[int, range]]:
    """Segment and places in it of each stretch of consecutive slots: mostly there is one."""
    start, count = 0, len(slots)
    while start < count:
        end = _consecutive(slots, start, count)
        index, first = slots[start] >> SLOT_BITS, slots[start] & _INDEX_MASK
        yield index, range(first, first + end - start)
        start = end


def _consecutive(slots: array[int], start: int, count: int) -> int:
    """Where the slots from `start` on cease to follow one another within one segment."""
    first = slots[start]
    limit = min(count, start + SLOTS_PER_SEGMENT_MAX - (first & _INDEX_MASK))
    if slots[limit - 1] - first == limit - 1 - start and slots[start:limit] == array(
        "I", range(first, first + limit - start)
    ):
        return limit
    end = start + 1
    while end < limit and slots[end] == first + end - start:
        end += 1
    return end
