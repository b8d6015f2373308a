"""Writer: batches on their way into slots of the SSD tier, made sure in groups.

    header + payload -> fdatasync (once per slab and group) -> one LMDB transaction -> answered

Does not: make slabs ready for them, or wipe what failed (ssd.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from kvtier.block import SLOT_BITS, SlotIO, SlotLabel
from kvtier.testing.failpoints import reach
from kvtier.tiers.catalogue import Catalogue
from kvtier.tiers.group_commit import GroupCommit
from kvtier.tiers.identity import Identity
from kvtier.tiers.packing import pack_record
from kvtier.tiers.slab import Slab, places
from kvtier.tiers.slots import SlotStaging, attempt


class Written(NamedTuple):
    """A batch whose payload is in its slots: `failures` by segment are those of syncs before."""

    items: Sequence[SlotIO]
    failures: dict[int, int]
    labels: Sequence[SlotLabel]  # as the headers have them


class Writer:
    """Of one tier's slabs. Any thread."""

    def __init__(
        self, slabs: Sequence[Slab], staging: SlotStaging, identity: Identity, catalogue: Catalogue
    ) -> None:
        self._slabs = slabs
        self._staging = staging
        self._identity = identity
        self._catalogue = catalogue
        self.group = GroupCommit(self._make_sure)

    def write(self, items: Sequence[SlotIO]) -> None:
        """They are in their slots and listed when this returns, or have their error. Their slabs
        are cut and list their namespaces, their checksums are known.
        """
        if not items:
            return
        with self.group.writing():
            slabs = [self._slabs[item.slot >> SLOT_BITS] for item in items]
            failures = {slab.index: slab.sync_failures for slab in slabs}
            for item in items:
                item.label.generation = self._identity.next_generation()
            reach("write.begin")
            labels = self._staging.write(items, *places(items, slabs))
            reach("write.written")
        size_bytes = sum(item.slot_bytes for item in items)
        self.group.join(Written(items, failures, labels), size_bytes)

    def _make_sure(self, parts: Sequence[Written]) -> None:
        """What was written is on stable storage, then listed; each item gets its error."""
        for index in sorted({index for part in parts for index in part.failures}):
            joined = [part for part in parts if index in part.failures]
            written = [i for part in joined for i in part.items if i.slot >> SLOT_BITS == index]
            good = [item for item in written if item.error is None]
            before = min(part.failures[index] for part in joined)
            attempt(good, partial(self._slabs[index].sync, before))
        reach("write.synced")
        rows = [row for part in parts for row in zip(part.items, part.labels, strict=True)]
        rows = [(item, label) for item, label in rows if item.error is None]
        records = [pack_record(item.slot, item.slot_bytes, label) for item, label in rows]
        attempt([item for item, _ in rows], partial(self._catalogue.put, records))
        reach("write.listed")
