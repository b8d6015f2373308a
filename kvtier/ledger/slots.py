r"""TierSlots: segments and slots of one tier; who owns which.

A segment's life:

    FREE --acquire() by (tenant, slot size)--> OWNED --last slot released--> FREE
      \-- of a tier that clients map: only the same tenant may own it again until recycled()

Of a segment that is withheld (the tier is to lose it) no more slots are handed out; those in use
stay so until released.

A slot number is `segment << SLOT_BITS | index`. Every slot in use names the run that holds it
(`owner`), so that a segment can be emptied for a starved tenant or slot size.

Invariants, checked by check(): a slot is free or used, never both, never twice; a segment without
used slots has no owner.

Does not: know blocks, bytes or time; not thread-safe, every caller runs on the event loop.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

from kvtier.block import SLOT_BITS, SLOTS_PER_SEGMENT_MAX, SegmentPlan
from kvtier.errors import InvariantViolated, TierFull
from kvtier.ledger.neighbours import by_segment
from kvtier.ledger.segment import INDEX_MASK, Segment, SlotClass, SlotCounts

_SETTLED_SLOTS = 8192
_MANY_SLOTS = 16  # where looking for consecutive ones pays


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
        # Segments with claimed slots whose free ones are not listed yet.
        self._unsettled: dict[int, None] = {}
        self._withheld: set[int] = set()

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
        assert not self._unsettled, "slots are still being found again"
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

    def claim(self, slots: array[int], slot_class: SlotClass) -> bool:
        """Takes these particular slots, found again at start. False, and none was taken, when one
        cannot be so (taken, in a segment of another class, out of range).

        Until `settle` is through, no slot may be acquired here or released.
        """
        for number, (index, places) in enumerate(by_segment(slots)):
            segment = self._claimable(index, slot_class)
            if segment is None or not self._claim(segment, places):
                for other, taken in islice(by_segment(slots), number):
                    self._unclaim(other, taken, slot_class)
                return False
        self._open_slots[slot_class] -= len(slots)
        self._count(slot_class[0], len(slots) * slot_class[1])
        return True

    def _claim(self, segment: Segment, places: range) -> bool:
        in_use, first, end = segment.in_use, places.start, places.stop
        if end > segment.slot_count or in_use.find(1, first, end) >= 0:
            return False
        in_use[first:end] = b"\1" * len(places)
        segment.used += len(places)
        if segment.used == segment.slot_count:
            assert segment.slot_class is not None, "it has slots"
            del self._open[segment.slot_class][segment.index]
        return True

    def _claimable(self, index: int, slot_class: SlotClass) -> Segment | None:
        """The segment, if it is of this class; made so if it is free."""
        if index >= len(self.segments) or not 0 < slot_class[1] <= self.plan.size_bytes:
            return None
        segment = self.segments[index]
        if segment.slot_class is None:
            self._free_segments.remove(index)
            self._open_as(index, slot_class)
            self._unsettled[index] = None
        return segment if segment.slot_class == slot_class else None

    def unclaim(self, slots: array[int], slot_class: SlotClass) -> None:
        """Undoes a claim."""
        for index, places in by_segment(slots):
            self._unclaim(index, places, slot_class)
        self._open_slots[slot_class] += len(slots)
        self._count(slot_class[0], -len(slots) * slot_class[1])

    def _unclaim(self, index: int, places: range, slot_class: SlotClass) -> None:
        segment = self.segments[index]
        if segment.used == segment.slot_count:
            self._open[slot_class][index] = None
        segment.in_use[places.start : places.stop] = bytes(len(places))
        segment.used -= len(places)

    def settle(self) -> Iterator[None]:
        """All that was found again is claimed: what is free between it can be handed out. Yields
        between two parts of it, each a fraction of a millisecond.
        """
        while self._unsettled:
            index = next(iter(self._unsettled))
            segment = self.segments[index]
            assert segment.slot_class is not None, "it has slots"
            segment.fresh = segment.in_use.rfind(1) + 1
            first, returned = index << SLOT_BITS, array("I")
            for end in range(segment.fresh, 0, -_SETTLED_SLOTS):
                start = max(0, end - _SETTLED_SLOTS)
                used = segment.in_use[start:end]
                if used.count(0):
                    below = range(end - 1, start - 1, -1)
                    returned.extend(first | at for at in below if not used[at - start])
                yield
            segment.returned = returned
            del self._unsettled[index]
            if not segment.used:
                self._disown(segment, segment.slot_class)

    def release(self, slots: Iterable[int]) -> None:
        """Slots are free again. Raises InvariantViolated for one that was not in use."""
        for slot in slots:
            segment = self.segments[slot >> SLOT_BITS]
            slot_class = segment.slot_class
            if slot_class is None or segment.used == 0:
                raise InvariantViolated(f"slot {slot:#x} released but its segment is free")
            if not segment.in_use[slot & INDEX_MASK]:
                raise InvariantViolated(f"slot {slot:#x} released but not in use")
            segment.in_use[slot & INDEX_MASK] = 0
            segment.returned.append(slot)
            segment.owner_runs[slot & INDEX_MASK] = 0
            if segment.index not in self._withheld:
                if segment.used == segment.slot_count:
                    self._open.setdefault(slot_class, {})[segment.index] = None
                self._open_slots[slot_class] += 1
            segment.used -= 1
            self._count(slot_class[0], -slot_class[1])
            if segment.used == 0:
                self._disown(segment, slot_class)

    def _disown(self, segment: Segment, slot_class: SlotClass) -> None:
        if len(segment.returned) != segment.fresh:
            raise InvariantViolated(f"segment {segment.index} lost or doubled a slot")
        withheld = segment.index in self._withheld
        if not withheld:
            del self._open[slot_class][segment.index]
            self._open_slots[slot_class] -= segment.slot_count
        segment.slot_class = None
        segment.slot_count = 0
        segment.fresh = 0
        segment.returned = array("I")
        segment.in_use = bytearray()
        segment.owner_runs = array("Q")
        if not withheld:
            self._set_free(segment)

    def _set_free(self, segment: Segment) -> None:
        self._free_segments.append(segment.index)
        self._free_homes[segment.home] = self._free_homes.get(segment.home, 0) + 1

    # --- out of use

    def hold(self, slots: Iterable[int]) -> array[int]:
        """Takes those of these slots that are free in a segment in use; `release` them."""
        held = array("I")
        for slot in slots:
            segment, at = self.segments[slot >> SLOT_BITS], slot & INDEX_MASK
            if segment.index in self._withheld or at >= segment.slot_count or segment.in_use[at]:
                continue
            assert segment.slot_class is not None, "it has slots"
            if at >= segment.fresh:
                segment.returned.extend(range(slot - at + segment.fresh, slot + 1))
                segment.fresh = at + 1
            segment.returned.remove(slot)
            segment.in_use[at] = 1
            segment.used += 1
            if segment.used == segment.slot_count:
                del self._open[segment.slot_class][segment.index]
            self._open_slots[segment.slot_class] -= 1
            self._count(segment.slot_class[0], segment.slot_class[1])
            held.append(slot)
        return held

    def withhold(self, segment_index: int) -> bool:
        """None of its slots is handed out until `give_back`. False: it is withheld already."""
        assert not self._unsettled, "slots are still being found again"
        segment = self.segments[segment_index]
        if segment_index in self._withheld:
            return False
        self._withheld.add(segment_index)
        if segment.slot_class is None:
            self._free_segments.remove(segment_index)
            self._free_homes[segment.home] -= 1
        elif segment.used < segment.slot_count:
            del self._open[segment.slot_class][segment_index]
            self._open_slots[segment.slot_class] -= segment.slot_count - segment.used
        return True

    def give_back(self, segment_index: int) -> None:
        """The withheld segment is like any other again."""
        segment = self.segments[segment_index]
        self._withheld.remove(segment_index)
        if segment.slot_class is None:
            self._set_free(segment)
        elif segment.used < segment.slot_count:
            self._open.setdefault(segment.slot_class, {})[segment_index] = None
            self._open_slots[segment.slot_class] += segment.slot_count - segment.used

    def resize(self, count: int) -> None:
        """So many segments from now on: those beyond are withheld and empty."""
        for segment in self.segments[count:]:
            if segment.slot_class is not None or segment.index not in self._withheld:
                raise InvariantViolated(f"segment {segment.index} is in use and cannot go")
        del self.segments[count:]
        self._withheld = {index for index in self._withheld if index < count}
        more = range(len(self.segments), count)
        self.segments.extend(map(Segment, more))
        self._free_segments[:0] = reversed(more)  # lower ones are taken first
        self._free_homes[None] += len(more)
        self.plan = replace(self.plan, count=count)

    def set_owner(self, slots: Sequence[int], run_id: int) -> None:
        """These slots are held by that run now."""
        segments = self.segments
        if len(slots) >= _MANY_SLOTS:
            for index, places in by_segment(array("I", slots)):
                runs = array("Q", (run_id,)) * len(places)
                segments[index].owner_runs[places.start : places.stop] = runs
            return
        for slot in slots:
            segments[slot >> SLOT_BITS].owner_runs[slot & INDEX_MASK] = run_id

    def owners(self, segment_index: int) -> Iterator[int]:
        """Runs that hold a slot of the segment (0 = a slot that no block has yet is left out)."""
        return iter({run_id for run_id in self.segments[segment_index].owner_runs if run_id})

    def hold_segment(self, index: int) -> array[int]:
        """Takes all free slots of the segment, or all of a free one (and returns none): nobody is
        given one before `let_go`. It must not be withheld.
        """
        segment = self.segments[index]
        if segment.slot_class is None:
            self._free_segments.remove(index)
            self._free_homes[segment.home] -= 1
            return array("I")
        count = segment.slot_count - segment.used
        if not count:
            return array("I")
        del self._open[segment.slot_class][index]
        self._open_slots[segment.slot_class] -= count
        self._count(segment.slot_class[0], count * segment.slot_class[1])
        return segment.take(count)

    def let_go(self, index: int, slots: array[int]) -> None:
        """Undoes `hold_segment`, which returned these."""
        segment = self.segments[index]
        self.release(slots)
        if segment.slot_class is None and index not in self._free_segments:
            self._free_segments.append(index)
            self._free_homes[segment.home] += 1

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
            segment.check(settled=segment.index not in self._unsettled)
            if segment.slot_class is None:
                continue
            used_bytes += segment.used * segment.slot_class[1]
            free = 0 if segment.index in self._withheld else segment.slot_count - segment.used
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
