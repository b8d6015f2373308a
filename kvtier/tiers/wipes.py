"""Wipes: headers of erased slots made zero, so that no rebuild from slabs brings a block back.

A wipe is written at every erasure and synced when somebody asks for durability: then those of all
slabs are, since an older copy of the same block, dropped before, may lie in another one.

Does not: know the catalogue, or which slots may be wiped.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

from kvtier.block import SLOT_BITS, SlotIO
from kvtier.errors import TierFailed
from kvtier.tiers.base import SlotRecord
from kvtier.tiers.slab import Slab, places
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
