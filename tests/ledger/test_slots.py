"""TierSlots: segments, classes, homes, and slots found again at start."""

from __future__ import annotations

import pytest

from kvtier.block import SLOT_BITS, SegmentPlan, TierId
from kvtier.errors import InvariantViolated, TierFull
from kvtier.ledger.segment import SlotCounts
from kvtier.ledger.slots import TierSlots
from kvtier.units import KIB

RED, BLUE = ("red", 4 * KIB), ("blue", 4 * KIB)


def two_segments(*, homes: bool = True) -> TierSlots:
    """Each has room for 4 slots of 4 KiB, or one of 12 (and 4 KiB are cut off)."""
    return TierSlots(SegmentPlan(TierId.DRAM, 2, 16 * KIB), homes=homes)


def assert_slots(slots: TierSlots, *, used: int, wasted_kib: int, segments: int) -> None:
    slots.check()
    kib = slots.used_bytes // KIB
    assert slots.counts() == SlotCounts(used, kib * KIB, wasted_kib * KIB, segments)


def test_life_of_a_segment() -> None:
    slots = two_segments()
    assert_slots(slots, used=0, wasted_kib=0, segments=0)

    first = slots.acquire(*RED, 3)
    assert list(first) == [2, 1, 0] or sorted(first) == [0, 1, 2]
    assert_slots(slots, used=3, wasted_kib=4, segments=1)

    more = slots.acquire(*RED, 2)  # fills the first segment, opens the second
    assert sorted(s >> SLOT_BITS for s in more) == [0, 1]
    assert_slots(slots, used=5, wasted_kib=12, segments=2)

    slots.release(first)
    assert_slots(slots, used=2, wasted_kib=24, segments=2)

    slots.release(more)
    assert_slots(slots, used=0, wasted_kib=0, segments=0)


def test_a_segment_has_one_slot_size() -> None:
    slots = two_segments()
    slots.acquire("red", 12 * KIB, 1)
    assert_slots(slots, used=1, wasted_kib=4, segments=1)
    assert slots.available(*RED) == 4
    slots.acquire(*RED, 1)
    assert slots.available("red", 12 * KIB) == 0


def test_nothing_is_acquired_when_too_few_are_there() -> None:
    slots = two_segments()
    with pytest.raises(TierFull, match="9 slots of 4096 bytes wanted in dram, 8 available"):
        slots.acquire(*RED, 9)
    assert_slots(slots, used=0, wasted_kib=0, segments=0)


def test_acquiring_none_owns_nothing() -> None:
    slots = two_segments()
    assert list(slots.acquire("never seen", 4 * KIB, 0)) == []
    assert_slots(slots, used=0, wasted_kib=0, segments=0)


def test_a_mapped_segment_is_another_tenants_only_when_recycled() -> None:
    slots = two_segments()
    slots.release(slots.acquire(*RED, 8))
    assert slots.available(*BLUE) == 0
    segment = slots.foreign_free("blue")
    assert segment is not None
    slots.recycled(segment)
    assert slots.available(*BLUE) == 4
    assert slots.available(*RED) == 8
    assert all(slot >> SLOT_BITS == segment for slot in slots.acquire(*BLUE, 4))


def test_a_tier_nobody_maps_has_no_homes() -> None:
    slots = two_segments(homes=False)
    slots.release(slots.acquire(*RED, 8))
    assert slots.available(*BLUE) == 8
    assert slots.foreign_free("blue") is None


def test_a_slot_is_not_released_twice() -> None:
    slots = two_segments()
    taken = slots.acquire(*RED, 3)
    slots.release(taken[:1])
    with pytest.raises(InvariantViolated, match="not in use"):
        slots.release(taken[:1])
    slots.release(taken[1:])
    with pytest.raises(InvariantViolated, match="its segment is free"):
        slots.release(taken[1:])


def settled(slots: TierSlots) -> TierSlots:
    for _ in slots.settle():
        slots.check()
    slots.check()
    return slots


def test_slots_are_found_again() -> None:
    slots = two_segments()
    assert slots.claim([2, 1 << SLOT_BITS], RED)
    assert slots.claim([0], RED)
    assert_slots(slots, used=3, wasted_kib=20, segments=2)
    with pytest.raises(AssertionError, match="still being found"):
        slots.acquire(*RED, 1)
    settled(slots)
    assert sorted(slots.acquire(*RED, 5)) == [1, 3, *(1 << SLOT_BITS | n for n in (1, 2, 3))]
    slots.check()


@pytest.mark.parametrize(
    "claimed",
    [
        [1, 0, 0],  # two claims to one slot
        [0, 4],  # beyond the segment's slots
        [0, 2 << SLOT_BITS],  # no such segment
        [7, 7],
        [0, 1, 2, 3, 3],  # the segment is full in between
    ],
)
def test_a_claim_that_cannot_be_takes_nothing(claimed: list[int]) -> None:
    slots = two_segments()
    assert not slots.claim(claimed, RED)
    assert slots.counts().used_slots == 0
    assert slots.available(*RED) == 8
    settled(slots)
    assert_slots(slots, used=0, wasted_kib=0, segments=0)


def test_a_segment_of_another_class_is_not_claimed() -> None:
    slots = two_segments()
    assert slots.claim([0], RED)
    assert not slots.claim([1], BLUE)
    assert not slots.claim([0], RED)
    assert not slots.claim([1 << SLOT_BITS], ("red", 20 * KIB))
    assert slots.claim([1], RED)
    assert_slots(settled(slots), used=2, wasted_kib=8, segments=1)


def test_owners_name_the_runs_of_a_segment() -> None:
    slots = two_segments()
    taken = slots.acquire(*RED, 3)
    slots.set_owner(taken[:2], 7)
    assert set(slots.owners(0)) == {7}
    slots.set_owner(taken[:2], 0)
    assert set(slots.owners(0)) == set()
