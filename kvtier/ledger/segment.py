"""Segment: the slots of one segment, free and in use; and how many of a tier are.

Does not: choose a segment (slots.py).
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from kvtier.block import SLOT_BITS, SLOTS_PER_SEGMENT_MAX
from kvtier.errors import InvariantViolated

INDEX_MASK = SLOTS_PER_SEGMENT_MAX - 1
SlotClass = tuple[str, int]  # tenant, slot size in bytes


class Segment:
    """One segment: its owner class, its free slots and the run that holds each slot.

    Free are the slots from index `fresh` on, which were not handed out since the segment was owned,
    and those in `returned` (a stack): so that owning one need not list all of them.
    """

    __slots__ = (
        "fresh",
        "home",
        "in_use",
        "index",
        "owner_runs",
        "returned",
        "slot_class",
        "slot_count",
        "used",
    )

    def __init__(self, index: int) -> None:
        self.index = index
        self.slot_class: SlotClass | None = None
        self.home: str | None = None  # tenant whose clients may still map it
        self.slot_count = 0
        self.used = 0
        self.fresh = 0
        self.returned = array("I")
        self.in_use = bytearray()  # 1 = handed out: a second release must not pass
        self.owner_runs = array("Q")

    def take(self, count: int) -> array[int]:
        """`count` free slots (there are as many), in use now: returned ones first."""
        taken = self.returned[-count:]
        del self.returned[-count:]
        fresh = count - len(taken)
        first = self.index << SLOT_BITS | self.fresh
        taken.extend(range(first, first + fresh))
        self.fresh += fresh
        for slot in taken:
            self.in_use[slot & INDEX_MASK] = 1
        self.used += count
        return taken

    def check(self, *, settled: bool) -> None:
        """Raises InvariantViolated if its slots are miscounted. `settled`: free ones are listed."""
        here = f"segment {self.index}"
        if self.slot_class is None:
            if self.used or self.fresh or len(self.returned):
                raise InvariantViolated(f"free {here} has slots")
            return
        if settled and not self.used:
            raise InvariantViolated(f"{here} is owned but holds nothing")
        if self.in_use.count(1) != self.used:
            raise InvariantViolated(f"{here}: slots in use are miscounted")
        if not settled:
            return
        returned = {slot & INDEX_MASK for slot in self.returned}
        if len(self.returned) + self.used != self.fresh:
            raise InvariantViolated(f"{here}: free + used != slots")
        if len(returned) != len(self.returned):
            raise InvariantViolated(f"{here}: a slot is free twice")
        if any(self.in_use[at] for at in returned) or any(self.in_use[self.fresh :]):
            raise InvariantViolated(f"{here}: a slot is free and in use")


@dataclass(frozen=True, slots=True)
class SlotCounts:
    """A snapshot. `wasted_bytes`: owned but not in use (free slots and cut-off ends)."""

    used_slots: int
    used_bytes: int
    wasted_bytes: int
    segments_used: int
