"""Wipes: headers of erased slots made zero, so that no rebuild from slabs brings a block back.

Where not even the bytes may stay (`scour`), all of the slot is made zero.

A wipe is written at every erasure and synced when somebody asks for durability: then those of all
slabs are, since an older copy of the same block, dropped before, may lie in another one.

Does not: know the catalogue, or which slots may be wiped.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence

from kvtier.block import SLOT_BITS, SlotIO
from kvtier.errors import TierFailed
from kvtier.tiers.base import SlotRecord
from kvtier.tiers.slab import SLAB_RESERVED_BYTES, Slab, places
from kvtier.tiers.slots import SlotStaging


class Wipes:
    """Of the slabs of one tier. Any thread."""

    def __init__(self, slabs: Sequence[Slab], staging: SlotStaging) -> None:
        self._slabs = slabs
        self._staging = staging
        self._lock = threading.Lock()
        self._unsynced: dict[int, int] = {}  # slab -> its sync_failures before the first wipe

    def doubt(self) -> None:
        """At a start: whether what was wiped before it is synced is not known of any slab."""
        self._unsynced = {slab.index: slab.sync_failures for slab in self._slabs if slab.fd >= 0}

    def wipe_whole(self, records: Sequence[SlotRecord]) -> None:
        """As `wipe`, and of the slots' bytes nothing is left."""
        self.wipe(records)
        for record in records:
            slab = self._slabs[record.slot >> SLOT_BITS]
            if slab.fd >= 0 and slab.slot_bytes == record.slot_bytes:
                start = slab.offset(record.slot)
                slab.zero(start, start + record.slot_bytes)

    def wipe(self, records: Sequence[SlotRecord | SlotIO]) -> None:
        """Zeroes these slots' headers, not yet durably; of slabs cut anew there is none left.

        Raises TierFailed: some may still be there.
        """
        slabs = [self._slabs[record.slot >> SLOT_BITS] for record in records]
        here = [
            (record, slab)
            for record, slab in zip(records, slabs, strict=True)
            if slab.fd >= 0 and slab.slot_bytes == record.slot_bytes
        ]
        with self._lock:
            for _, slab in here:
                self._unsynced.setdefault(slab.index, slab.sync_failures)
        where = places([record for record, _ in here], [slab for _, slab in here])
        for (record, _), error in zip(here, self._staging.wipe(*where), strict=True):
            if error:
                raise TierFailed(f"ssd slot {record.slot:#x} not wiped: {os.strerror(error)}")

    def scour(self, segment: int, slots: Sequence[int] | None) -> int:
        """Zeroes these slots of the segment, or (None) all of it, and what no slot covers, durably.
        None of them may be in use. Returns how many bytes. Raises TierFailed.
        """
        slab = self._slabs[segment]
        if slab.fd < 0:
            return 0
        with slab.lock:  # it is not cut anew meanwhile
            before = slab.sync_failures
            if slots is None or not slab.slot_bytes:
                ranges = [(SLAB_RESERVED_BYTES, slab.size_bytes)]
            else:
                count = (slab.size_bytes - SLAB_RESERVED_BYTES) // slab.slot_bytes
                ranges = _joined((slab.offset(slot), slab.slot_bytes) for slot in sorted(slots))
                ranges.append((slab.offset(count), slab.size_bytes))
            for start, end in ranges:
                slab.zero(start, end)
            slab.sync(before)
            if slots is None and slab.has_former:
                slab.list_names(slab.names, has_former=False)
        return sum(end - start for start, end in ranges)

    def sync(self) -> None:
        """All wipes so far survive a power cut. Raises TierFailed: that is not sure of some."""
        with self._lock:
            left, self._unsynced = self._unsynced, {}
        try:
            for index in list(left):
                # None: the tier was made smaller, and a slab goes only after its wipes are synced.
                slab = self._slabs[index] if index < len(self._slabs) else None
                if slab is not None and slab.fd >= 0:
                    slab.sync(left[index])
                del left[index]
        finally:
            with self._lock:
                for index in left.keys() & set(range(len(self._slabs))):
                    # The failure is told to this caller; what the next one waits for is a new sync.
                    self._unsynced.setdefault(index, self._slabs[index].sync_failures)


def _joined(pieces: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(start, length) of pieces in order, as (start, end) of what they make together."""
    ranges: list[tuple[int, int]] = []
    for start, size in pieces:
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], start + size)
        else:
            ranges.append((start, start + size))
    return ranges
