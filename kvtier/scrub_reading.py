"""ScrubReading: a scrub of one piece of the SSD tier: it is read, and what is damaged dropped.

Each copy is pinned while it is read, like a move's source, and that is no use of its block: the
order of eviction stays. A damaged copy is lost (the block too, if it has no other), its slot
erased. A slot that cannot be read is damaged only if others can be: a device that is gone must not
cost all that is on it. Where no block is, a header that a rebuild would believe is wiped.

Does not: choose the pieces, or wait between them (scrubbing.py).
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from kvtier import native
from kvtier.block import SLOT_BITS, SlotIO, TierId
from kvtier.errors import BlockCorrupt, KvTierError, TierFailed
from kvtier.ledger.claims import claims, lose, pin, unpin
from kvtier.ledger.ledger import Ledger
from kvtier.tally import Tally, damage_of
from kvtier.testing.failpoints import reach
from kvtier.tiers.base import SlotRecord
from kvtier.tiers.slots import SLOT_HEADER_BYTES
from kvtier.tiers.ssd import SsdTier
from kvtier.tiers.upkeep import HEADERS_MAX
from kvtier.units import MIB, PAGE_BYTES, align_up

T = TypeVar("T")
# Of one read: little enough for a promotion that waits behind it, and for the loop.
_BATCH_BYTES = 4 * MIB
_BATCH_BLOCKS = 32
_UNREADABLE_MAX = 16  # in a row: it is the device, not a slot
_LOGGED_MAX = 100

log = logging.getLogger(__name__)


class InThread(Protocol):
    """Runs blocking work in a worker thread."""

    def __call__(self, work: Callable[[], T]) -> asyncio.Future[T]: ...


@dataclass(slots=True)
class Read:
    """What was read and found. `end`: the slot to go on from; None: the segment is through."""

    end: int | None = None
    disk_bytes: int = 0
    block_count: int = 0
    read_bytes: int = 0
    stray_count: int = 0
    damaged: Counter[str] = field(default_factory=Counter)


class ScrubReading:
    """Of one SSD tier. Event loop only; segments must stay while it works (`Scrubbing.turn`)."""

    def __init__(self, ssd: SsdTier, ledger: Ledger, tally: Tally, in_thread: InThread) -> None:
        self.held_count = 0  # slots taken from the ledger to be wiped
        self._ssd = ssd
        self._ledger = ledger
        self._tally = tally
        self._in_thread = in_thread
        self._unreadable: list[SlotIO] = []
        self._logged_count = 0
        self._buffer: native.AlignedBuffer | None = None

    async def piece(self, segment_index: int, first: int) -> Read:
        """The slots of the segment from `first` on that one turn is good for: those that hold
        blocks are read, of the others the headers. Raises TierFailed: the device cannot be read.
        """
        segment = self._ledger.slots[TierId.SSD].segments[segment_index]
        cut = self._ssd.upkeep.slot_bytes(segment_index)
        slot_bytes = segment.slot_class[1] if segment.slot_class else cut
        slots = self._ledger.slots[TierId.SSD]
        count = slots.slots_per_segment(slot_bytes) if slot_bytes else 0
        if first >= count:
            return Read()
        found, end = claims(
            self._ledger, TierId.SSD, segment_index, first,
            end=min(count, first + HEADERS_MAX),
            count_max=max(1, min(_BATCH_BLOCKS, _BATCH_BYTES // slot_bytes)),
        )  # fmt: skip
        # Nobody here has the key: nothing can be said of them.
        found = [claim for claim in found if not claim.run.space.locked]
        in_use, base = segment.in_use, segment_index << SLOT_BITS
        empty = [base | at for at in range(first, end) if not in_use or not in_use[at]]
        label = self._ledger.label
        items = [SlotIO(c.slot, slot_bytes, 0, label(c.run, c.place, c.shard)) for c in found]
        taken = [item.slot for item in items]
        holder = pin(self._ledger, TierId.SSD, taken)
        reach("scrub.pinned")
        try:
            strays = await self._in_thread(
                functools.partial(self._look, items, empty if cut == slot_bytes else [])
            )
        finally:
            unpin(self._ledger, TierId.SSD, taken, holder)
        read = Read(end)
        read.block_count = sum(item.label.shard == 0 for item in items)
        read.read_bytes = sum(SLOT_HEADER_BYTES + item.label.size_bytes for item in items)
        read.disk_bytes = read.read_bytes + SLOT_HEADER_BYTES * len(empty)
        self._judge(items, read)
        if strays:
            read.stray_count = await self._wipe(strays)
        return read

    def _look(self, items: list[SlotIO], empty: list[int]) -> list[SlotRecord]:
        """Worker thread. Each item gets its error; returns the headers that should not be there."""
        wanted = sum(align_up(item.label.size_bytes, PAGE_BYTES) for item in items)
        if wanted and (self._buffer is None or self._buffer.size_bytes < wanted):
            self.close()
            self._buffer = native.AlignedBuffer(wanted)
        at = 0
        for item in items:
            assert self._buffer is not None
            item.address = self._buffer.address + at
            at += align_up(item.label.size_bytes, PAGE_BYTES)
        self._read(items)
        # Once more: a device that was busy with something else gets a second chance.
        self._read([item for item in items if isinstance(item.error, TierFailed)])
        return self._ssd.upkeep.strays(empty)

    def _read(self, items: Sequence[SlotIO]) -> None:
        try:
            if items:
                self._ssd.read(items)
        except KvTierError as error:
            for item in items:
                item.error = error

    def _judge(self, items: Sequence[SlotIO], read: Read) -> None:
        for item in items:
            if item.error is None or isinstance(item.error, BlockCorrupt):
                row, self._unreadable = self._unreadable, []
                for other in (*row, item):
                    self._drop(other, read)
                continue
            self._unreadable.append(item)
            if len(self._unreadable) >= _UNREADABLE_MAX:
                raise TierFailed(
                    f"{len(self._unreadable)} slots in a row cannot be read, and none of them was "
                    f"dropped: look at the device ({item.error})"
                )

    async def finish(self) -> Read:
        """At the end: those last ones that could not be read. Raises TierFailed when it is the
        device, not these slots.
        """
        read = Read()
        if self._unreadable:
            await self._in_thread(self._ssd.probe)
            for item in self._unreadable:
                self._drop(item, read)
        return read

    def _drop(self, item: SlotIO, read: Read) -> None:
        if item.error is None:
            return
        lost = lose(self._ledger, TierId.SSD, item.slot, item.label)
        if lost is None:
            return  # it went meanwhile
        damage = damage_of(item.error)
        self._tally.corrupt[damage] += 1
        read.damaged[damage] += 1
        self._logged_count += 1
        if self._logged_count <= _LOGGED_MAX:
            log.warning(
                "scrub.damaged namespace=%d key=%s slot=%#x damage=%s: dropped",
                lost[0].id, lost[1].hex(), item.slot, damage,
            )  # fmt: skip

    async def _wipe(self, strays: Sequence[SlotRecord]) -> int:
        """Headers where no block is: they would be believed if the catalogue were lost. The slots
        are held meanwhile, or the whole segment where nothing of it is in use.
        """
        slots, index = self._ledger.slots[TierId.SSD], strays[0].slot >> SLOT_BITS
        if slots.segments[index].slot_class is None:
            if not slots.withhold(index):
                return 0
            try:
                await self._in_thread(functools.partial(self._ssd.recycle, index))
            finally:
                slots.give_back(index)
            return len(strays)
        held = slots.hold(record.slot for record in strays)
        self.held_count = len(held)
        try:
            # Again, now that nobody can be writing there.
            again = await self._in_thread(functools.partial(self._ssd.upkeep.strays, held))
            wiped = [record.slot for record in again]
            await self._in_thread(functools.partial(self._ssd.upkeep.forget, wiped, wipe=True))
        finally:
            slots.release(held)
            self.held_count = 0
        return len(wiped)

    def close(self) -> None:
        """Its memory goes. Idempotent."""
        if self._buffer is not None:
            self._buffer.close()
            self._buffer = None

    def __repr__(self) -> str:
        return f"<ScrubReading {len(self._unreadable)} unreadable, {self.held_count} held>"
