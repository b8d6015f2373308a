r"""TierSlots: segments and slots of one tier; who owns which.

A segment's life:

    FREE --acquire() by (tenant, slot size)--> OWNED --last slot released--> FREE
      \-- of a tier that clients map: only the same tenant may own it again until recycled()

A slot number is `segment << SLOT_BITS | index`. Every slot in use names the run that holds it
(`owner`), so that a segment can be emptied for a starved tenant or slot size.

Invariants, checked by check(): a slot is free or used, never both, never twice; a segment without
used slots has no owner.

Does not: know blocks, bytes or time; not thread-safe, every caller runs on the event loop.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass

from kvtier.block import SLOT_BITS, SLOTS_PER_SEGMENT_MAX, SegmentPlan
from kvtier.errors import InvariantViolated, TierFull

_INDEX_MASK = SLOTS_PER_SEGMENT_MAX - 1
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
            self.in_use[slot & _INDEX_MASK] = 1
        self.used += count
        return taken


@dataclass(frozen=True, slots=True)
class SlotCounts:
    """A snapshot. `wasted_bytes`: owned but not in use (free slots and cut-off ends)."""

    used_slots: int
    used_bytes: int
    wasted_bytes: int
    segments_used: int


class TierSlots:
    """Hands out slots of one tier.

    `homes`: segments are mapped by a tenant's clients (dram, cxl), so one that another tenant
    used must be recycled first.
    """

    def __init__(self, plan: SegmentPlan, *, homes: bool) -> None:
        self.plan = plan
        self.homes = homes
        self.segments = [Segment(index) for index in range(plan.count)]
        self.used_bytes = 0
        self.used_bytes_by_tenant: dict[str, int] = {}
        self._free_segments = list(range(plan.count - 1, -1, -1))
        # How many of them by home: asked for every block, and a tier may have thousands.
        self._free_homes: dict[str | None, int] = {None: plan.count}
        # Segments of a class with at least one free slot; a dict keeps their order.
        self._open: dict[SlotClass, dict[int, None]] = {}
        self._open_slots: dict[SlotClass, int] = {}

    @property
    def capacity_bytes(self) -> int:
        return self.plan.count * self.plan.size_bytes

    def slots_per_segment(self, slot_bytes: int) -> int:
        return min(self.plan.size_bytes // slot_bytes, SLOTS_PER_SEGMENT_MAX)

    def available(self, tenant: str, slot_bytes: int) -> int:
        """Slots that acquire() would grant now."""
        count = self._open_slots.get((tenant, slot_bytes), 0)
        free = self._free_homes[None] + self._free_homes.get(tenant, 0)
        return count + free * self.slots_per_segment(slot_bytes)

    def _may_own(self, index: int, tenant: str) -> bool:
        home = self.segments[index].home
        return home is None or home == tenant

    def acquire(self, tenant: str, slot_bytes: int, count: int) -> array[int]:
        """`count` slot numbers, fullest segments first.

        Raises:
            TierFull: fewer are available. Nothing was acquired.
        """
        if not count:
            return array("I")
        if count > (available := self.available(tenant, slot_bytes)):
            raise TierFull(
                f"{count} slots of {slot_bytes} bytes wanted in {self.plan.tier.label}, "
                f"{available} available"
            )
        slot_class = (tenant, slot_bytes)
        taken = array("I")
        while len(taken) < count:
            opened = self._open.get(slot_class)
            index = next(iter(opened)) if opened else self._own(slot_class)
            segment = self.segments[index]
            part = min(count - len(taken), segment.slot_count - segment.used)
            taken.extend(segment.take(part))
            if segment.used == segment.slot_count:
                del self._open[slot_class][index]
        self._open_slots[slot_class] -= count
        self._count(tenant, count * slot_bytes)
        return taken

    def _own(self, slot_class: SlotClass) -> int:
        tenant = slot_class[0]
        # Prefer a segment this tenant's clients map already: nothing to hand over again.
        choice = next(
            (s for s in reversed(self._free_segments) if self.segments[s].home == tenant), None
        )
        if choice is None:
            choice = next(s for s in reversed(self._free_segments) if self.segments[s].home is None)
        self._free_segments.remove(choice)
        self._open_as(choice, slot_class)
        return choice

    def _open_as(self, index: int, slot_class: SlotClass) -> None:
        segment = self.segments[index]
        tenant, slot_bytes = slot_class
        self._free_homes[segment.home] -= 1
        segment.slot_class = slot_class
        segment.home = tenant if self.homes else None
        segment.slot_count = self.slots_per_segment(slot_bytes)
        segment.in_use = bytearray(segment.slot_count)
        segment.owner_runs = array("Q", bytes(8 * segment.slot_count))
        self._open.setdefault(slot_class, {})[index] = None
        self._open_slots[slot_class] = self._open_slots.get(slot_class, 0) + segment.slot_count

    def _count(self, tenant: str, size_bytes: int) -> None:
        self.used_bytes += size_bytes
        by_tenant = self.used_bytes_by_tenant
        by_tenant[tenant] = by_tenant.get(tenant, 0) + size_bytes

    def claim_all(self, slots: Iterable[int], slot_class: SlotClass) -> set[int]:
        """Takes these particular slots, found again at start. Returns those that cannot be so (two
        claims on one slot, a segment of another class, out of range): they were not taken.
        """
        by_segment: dict[int, list[int]] = {}
        for slot in slots:
            by_segment.setdefault(slot >> SLOT_BITS, []).append(slot)
        refused: set[int] = set()
        if not self._fits(slot_class[1]):
            return {slot for claimed in by_segment.values() for slot in claimed}
        room = self.slots_per_segment(slot_class[1])
        for index, claimed in by_segment.items():
            if index >= len(self.segments):
                refused.update(claimed)
                continue
            segment = self.segments[index]
            once = set(claimed)
            if len(once) < len(claimed):
                # Which of two claims to one slot is true cannot be told here: neither is believed.
                once = {slot for slot, count in Counter(claimed).items() if count == 1}
            if segment.slot_class is None:
                taken = {slot for slot in once if slot & _INDEX_MASK < room}
            else:
                taken = {
                    s for s in once if segment.slot_class == slot_class and _is_free(segment, s)
                }
            refused.update(slot for slot in claimed if slot not in taken)
            if taken and segment.slot_class is None:
                self._free_segments.remove(index)
                self._open_as(index, slot_class)
            self._take_particular(segment, taken, slot_class)
        return refused

    def _fits(self, slot_bytes: int) -> bool:
        return 0 < slot_bytes <= self.plan.size_bytes

    def _take_particular(self, segment: Segment, taken: set[int], slot_class: SlotClass) -> None:
        if not taken:
            return
        count = len(taken)
        for slot in taken:
            segment.in_use[slot & _INDEX_MASK] = 1
        first = segment.index << SLOT_BITS
        segment.fresh = max(segment.fresh, 1 + max(slot & _INDEX_MASK for slot in taken))
        below = range(segment.fresh - 1, -1, -1)
        segment.returned = array("I", [first | at for at in below if not segment.in_use[at]])
        segment.used += count
        self._open_slots[slot_class] -= count
        if segment.used == segment.slot_count:
            del self._open[slot_class][segment.index]
        self._count(slot_class[0], count * slot_class[1])

    def release(self, slots: Iterable[int]) -> None:
        """Slots are free again. Raises InvariantViolated for one that was not in use."""
        for slot in slots:
            segment = self.segments[slot >> SLOT_BITS]
            slot_class = segment.slot_class
            if slot_class is None or segment.used == 0:
                raise InvariantViolated(f"slot {slot:#x} released but its segment is free")
            if not segment.in_use[slot & _INDEX_MASK]:
                raise InvariantViolated(f"slot {slot:#x} released but not in use")
            segment.in_use[slot & _INDEX_MASK] = 0
            if segment.used == segment.slot_count:
                self._open.setdefault(slot_class, {})[segment.index] = None
            segment.returned.append(slot)
            segment.owner_runs[slot & _INDEX_MASK] = 0
            segment.used -= 1
            self._open_slots[slot_class] += 1
            self._count(slot_class[0], -slot_class[1])
            if segment.used == 0:
                self._disown(segment, slot_class)

    def _disown(self, segment: Segment, slot_class: SlotClass) -> None:
        if len(segment.returned) != segment.fresh:
            raise InvariantViolated(f"segment {segment.index} lost or doubled a slot")
        del self._open[slot_class][segment.index]
        self._open_slots[slot_class] -= segment.slot_count
        segment.slot_class = None
        segment.slot_count = 0
        segment.fresh = 0
        segment.returned = array("I")
        segment.in_use = bytearray()
        segment.owner_runs = array("Q")
        self._free_segments.append(segment.index)
        self._free_homes[segment.home] = self._free_homes.get(segment.home, 0) + 1

    def set_owner(self, slots: Iterable[int], run_id: int) -> None:
        """These slots are held by that run now."""
        segments = self.segments
        for slot in slots:
            segments[slot >> SLOT_BITS].owner_runs[slot & _INDEX_MASK] = run_id

    def owners(self, segment_index: int) -> Iterator[int]:
        """Runs that hold a slot of the segment (0 = a slot that no block has yet is left out)."""
        return iter({run_id for run_id in self.segments[segment_index].owner_runs if run_id})

    def foreign_free(self, tenant: str, exclude: Container[int] = ()) -> int | None:
        """A free segment that another tenant's clients may still map, or None."""
        return next(
            (s for s in self._free_segments if s not in exclude and not self._may_own(s, tenant)),
            None,
        )

    def recycled(self, segment_index: int) -> None:
        """No client maps the free segment any longer: any tenant may own it."""
        self.give_home(segment_index, None)

    def give_home(self, segment_index: int, home: str | None) -> None:
        """Who may own the free segment from now on; None = anybody."""
        segment = self.segments[segment_index]
        assert segment.slot_class is None, "a segment in use cannot be recycled"
        self._free_homes[segment.home] -= 1
        self._free_homes[home] = self._free_homes.get(home, 0) + 1
        segment.home = home

    def counts(self) -> SlotCounts:
        used = sum(s.used for s in self.segments)
        owned = sum(1 for s in self.segments if s.slot_class is not None)
        wasted = owned * self.plan.size_bytes - self.used_bytes
        return SlotCounts(used, self.used_bytes, wasted, owned)

    def check(self) -> None:
        """Raises InvariantViolated if the books disagree. O(slots): tests, idle time, doctor."""
        used_bytes = 0
        open_slots: dict[SlotClass, int] = {}
        for segment in self.segments:
            if segment.slot_class is None:
                if segment.used or segment.fresh or len(segment.returned):
                    raise InvariantViolated(f"free segment {segment.index} has slots")
                continue
            if not segment.used:
                raise InvariantViolated(f"segment {segment.index} is owned but holds nothing")
            if segment.in_use.count(1) != segment.used:
                raise InvariantViolated(f"segment {segment.index}: slots in use are miscounted")
            returned = {slot & _INDEX_MASK for slot in segment.returned}
            if len(segment.returned) + segment.used != segment.fresh:
                raise InvariantViolated(f"segment {segment.index}: free + used != slots")
            if len(returned) != len(segment.returned):
                raise InvariantViolated(f"segment {segment.index}: a slot is free twice")
            if any(segment.in_use[at] for at in returned) or any(segment.in_use[segment.fresh :]):
                raise InvariantViolated(f"segment {segment.index}: a slot is free and in use")
            used_bytes += segment.used * segment.slot_class[1]
            free = segment.slot_count - segment.used
            open_slots[segment.slot_class] = open_slots.get(segment.slot_class, 0) + free
        if used_bytes != self.used_bytes:
            raise InvariantViolated(f"{used_bytes} bytes used, {self.used_bytes} in the books")
        homes = Counter(self.segments[index].home for index in self._free_segments)
        if homes != Counter(self._free_homes):
            raise InvariantViolated(f"free segments by home: {homes}, in the books otherwise")
        for slot_class, count in self._open_slots.items():
            if open_slots.get(slot_class, 0) != count:
                raise InvariantViolated(f"{slot_class}: {count} open slots in the books")

    def __repr__(self) -> str:
        counts = self.counts()
        return (
            f"<TierSlots {self.plan.tier.label}: {counts.used_slots} slots used, "
            f"{counts.segments_used} of {self.plan.count} segments>"
        )


def _is_free(segment: Segment, slot: int) -> bool:
    index = slot & _INDEX_MASK
    return index < segment.slot_count and not segment.in_use[index]
