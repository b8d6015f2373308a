"""DramTier: slots in memory that clients map, one arena per segment. Also CXL memory's.

    slot s lies at `arena(s >> SLOT_BITS).address + base_offset + (s & mask) * slot_bytes`

A segment's arena is replaced (`recycle`) before another tenant gets the segment: a sealed memfd
cannot be taken from those who map it, so memory changes hands as whole arenas.

Does not: know tenants or leases; nothing here survives the process.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from kvtier import native
from kvtier.block import SLOT_BITS, SLOTS_PER_SEGMENT_MAX, SegmentPlan, SlotIO, TierId
from kvtier.errors import BlockCorrupt, DeviceUnavailable, InvariantViolated, TierFailed
from kvtier.tiers.arena import Arena
from kvtier.tiers.base import SlotRecord, TierCounts
from kvtier.units import PAGE_BYTES, format_bytes

Trust = Literal["isolated", "single-tenant"]
_SLOT_MASK = SLOTS_PER_SEGMENT_MAX - 1


class DramTier:
    """Memory of `segment_count` arenas, all there and prefaulted once constructed.

    `trust="single-tenant"` makes the arenas writable for clients: bytes are committed where the
    client wrote them (`checksum_in_place`). `name` tells the memory from other daemons' in /proc.
    `progress(done, segment_count)` is called after each arena, in order (about 0.3 s a GiB with
    small pages).

    Addresses given to `write` and `read` need no alignment and exactly `size_bytes` of room.

    Raises:
        DeviceUnavailable: not all of the memory is to be had; nothing is kept.
    """

    def __init__(
        self,
        segment_count: int,
        segment_bytes: int,
        *,
        tier: TierId = TierId.DRAM,
        trust: Trust = "isolated",
        huge_pages: str = "auto",
        name: str = "",
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        assert segment_bytes % PAGE_BYTES == 0

        self.plan = SegmentPlan(tier, segment_count, segment_bytes)
        self.trust = trust
        self._huge_pages = huge_pages
        self._kind = f"{name}-{tier.label}" if name else tier.label
        self._generations = itertools.count(1)
        self._lock = threading.Lock()
        self._counts = TierCounts()
        self._arenas: list[Arena | None] = []
        try:
            for done in range(segment_count):
                self._arenas.append(self._new_arena())
                if progress is not None:
                    progress(done + 1, segment_count)
        except BaseException:
            self.close()
            raise

    def _new_arena(self) -> Arena:
        writable = self.trust == "single-tenant"
        return Arena(
            self._kind, self.plan.size_bytes, writable=writable, huge_pages=self._huge_pages
        )

    # --- where slots lie

    def arena(self, segment: int) -> Arena:
        """The segment's arena now. Raises TierFailed when `recycle` could not make a new one."""
        arena = self._arenas[segment]
        if arena is None:
            raise TierFailed(f"{self.plan.tier.label} segment {segment} has no memory")
        return arena

    def address(self, slot: int, slot_bytes: int) -> int:
        """Where the slot starts in this process, until its segment is recycled. Any thread.

        Raises:
            TierFailed: the segment has no memory. InvariantViolated: there is no such slot.
        """
        arena = self.arena(slot >> SLOT_BITS)
        return arena.address + self._offset(arena, slot, slot_bytes)

    def _offset(self, arena: Arena, slot: int, slot_bytes: int) -> int:
        start = (slot & _SLOT_MASK) * slot_bytes
        if start + slot_bytes > self.plan.size_bytes:
            raise InvariantViolated(f"slot {slot:#x} of {slot_bytes} bytes is beyond its segment")
        return arena.base_offset + start

    def revoke(self, slot: int, slot_bytes: int) -> int:
        """Tells readers of this slot that it is no longer theirs; returns its new generation.

        Call before the slot is written again. Any thread. Raises as `address` does.
        """
        arena = self.arena(slot >> SLOT_BITS)
        return arena.revoke(self._offset(arena, slot, slot_bytes), slot_bytes)

    def recycle(self, segment: int) -> Arena:
        """Gives the segment a fresh, zeroed arena with another id; what it held is gone.

        Only when no client maps the old one, no slot is in use and no batch is under way. The old
        memory is given back first. Worker thread (prefaults).

        Raises:
            TierFailed: no memory for the new one. The segment then has none; try again.
        """
        old, self._arenas[segment] = self._arenas[segment], None
        if old is not None:
            old.close()
        try:
            arena = self._new_arena()
        except DeviceUnavailable as error:
            self._count(TierCounts(error_count=1))
            raise TierFailed(f"{self.plan.tier.label} segment {segment}: {error}") from error
        self._arenas[segment] = arena
        return arena

    # --- the Tier protocol

    def write(self, batch: Sequence[SlotIO]) -> None:
        """Copies and checksums in one pass: `label.checksum` is that of the bytes stored."""
        items, addresses = self._located(batch)
        sizes = [item.label.size_bytes for item in items]
        checksums = native.copy_checksum(addresses, [item.address for item in items], sizes)
        self._written(items, checksums, sizes)
        self._count(TierCounts(error_count=len(batch) - len(items)))

    def checksum_in_place(self, batch: Sequence[SlotIO]) -> None:
        """Like `write` for bytes that a client put into the slots itself: nothing is copied.

        `item.address` is ignored. Worker thread. Under single-tenant trust only.
        """
        items, addresses = self._located(batch)
        sizes = [item.label.size_bytes for item in items]
        self._written(items, native.checksum(addresses, sizes), sizes)
        self._count(TierCounts(error_count=len(batch) - len(items)))

    def read(self, batch: Sequence[SlotIO]) -> None:
        """Copies out and verifies: an item whose bytes are not `label.checksum` is corrupt."""
        items, addresses = self._located(batch)
        sizes = [item.label.size_bytes for item in items]
        checksums = native.copy_checksum([item.address for item in items], addresses, sizes)
        good = corrupt = 0
        for item, checksum, size in zip(items, checksums, sizes, strict=True):
            if checksum == item.label.checksum:
                good += size
                continue
            corrupt += 1
            item.error = BlockCorrupt(
                f"{self.plan.tier.label} slot {item.slot:#x}: checksum {checksum:#x}, "
                f"not {item.label.checksum:#x}"
            )
        self._count(
            TierCounts(
                read_bytes=good,
                read_slots=len(items) - corrupt,
                corrupt_count=corrupt,
                error_count=len(batch) - len(items),
            )
        )

    def _located(self, batch: Sequence[SlotIO]) -> tuple[list[SlotIO], list[int]]:
        """The items that have memory, and where; the others get their error."""
        items, addresses = [], []
        for item in batch:
            item.error = None
            if item.label.size_bytes > item.slot_bytes:
                raise InvariantViolated(
                    f"{item.label.size_bytes} bytes in a {item.slot_bytes} slot"
                )
            try:
                addresses.append(self.address(item.slot, item.slot_bytes))
            except TierFailed as error:
                item.error = error
            else:
                items.append(item)
        return items, addresses

    def _written(self, items: list[SlotIO], checksums: list[int], sizes: list[int]) -> None:
        for item, checksum in zip(items, checksums, strict=True):
            item.label.checksum = checksum
            item.label.generation = next(self._generations)
        self._count(TierCounts(written_bytes=sum(sizes), written_slots=len(items)))

    def _count(self, more: TierCounts) -> None:
        with self._lock:
            self._counts = add_counts(self._counts, more)

    def erase(self, slots: Iterable[SlotRecord], *, durable: bool) -> None:
        """Nothing to do: memory has no books, and nothing in it outlives the process."""

    def sync(self) -> None:
        """Nothing to do: memory does not survive a power cut, and nobody is told it would."""

    def counts(self) -> TierCounts:
        """Snapshot; any thread."""
        return self._counts

    def check(self) -> None:
        """Raises InvariantViolated: two segments share an arena id, or one has a wrong size."""
        arenas = [arena for arena in self._arenas if arena is not None]
        if len({arena.id for arena in arenas}) != len(arenas):
            raise InvariantViolated("two segments have one arena id")
        if any(arena.data_bytes != self.plan.size_bytes for arena in arenas):
            raise InvariantViolated("an arena is not of its segment's size")

    def close(self) -> None:
        """Gives all memory back. No batch may be under way. Idempotent."""
        for segment, arena in enumerate(self._arenas):
            self._arenas[segment] = None
            if arena is not None:
                arena.close()

    def __repr__(self) -> str:
        size = format_bytes(self.plan.count * self.plan.size_bytes)
        return f"<DramTier {self.plan.tier.label} {size}, {self.trust}, {self._counts}>"


def add_counts(one: TierCounts, other: TierCounts) -> TierCounts:
    """Field by field."""
    return TierCounts(
        written_bytes=one.written_bytes + other.written_bytes,
        read_bytes=one.read_bytes + other.read_bytes,
        written_slots=one.written_slots + other.written_slots,
        read_slots=one.read_slots + other.read_slots,
        error_count=one.error_count + other.error_count,
        corrupt_count=one.corrupt_count + other.corrupt_count,
    )
