"""SsdTier: slots in preallocated slab files, written around the page cache, listed in LMDB.

A write's way, and what a crash after each step leaves:

    header + payload -> fdatasync (once per slab and batch) -> one LMDB transaction -> answered
         old or torn        whole, but nobody lists it            listed      there after a kill

State directory: `VERSION`, `identity` (its id, the number of the start), `namespaces` (epochs),
`catalogue/` (LMDB), `clean` (left by `close`), `slabs/00017.slab`. Slabs alone rebuild everything.
The caller holds the directory's lock.

Does not: choose slots, or retry: what failed is the caller's to place elsewhere.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from kvtier import native
from kvtier.block import SLOT_BITS, SLOTS_PER_SEGMENT_MAX, SegmentPlan, SlotIO, TierId
from kvtier.errors import BlockCorrupt, InvariantViolated, TierFailed
from kvtier.testing.failpoints import reach
from kvtier.tiers.base import SlotRecord, TierCounts
from kvtier.tiers.catalogue import Catalogue
from kvtier.tiers.cipher import Keyring
from kvtier.tiers.dram import add_counts
from kvtier.tiers.files import Files
from kvtier.tiers.identity import Identity
from kvtier.tiers.naming import Naming
from kvtier.tiers.records import Found
from kvtier.tiers.recovery import newest_in_slabs, obey, open_slabs, read_catalogue
from kvtier.tiers.slab import SLAB_RESERVED_BYTES, Slab, places, remove_strays
from kvtier.tiers.slots import SLOT_HEADER_BYTES, SlotStaging, attempt
from kvtier.tiers.starts import StartLog
from kvtier.tiers.state import choose_direct_io, prepare_directory, prove
from kvtier.tiers.upkeep import Upkeep
from kvtier.tiers.wear import Wear
from kvtier.tiers.wipes import Wipes
from kvtier.tiers.writing import Writer
from kvtier.units import GIB, PAGE_BYTES, align_up, format_bytes

_MASK: Final = SLOTS_PER_SEGMENT_MAX - 1

logger = logging.getLogger(__name__)


class SsdTier:
    """Slabs of `segment_bytes` of slots each, made when first written to, and their catalogue.

    On disk a segment takes `file_bytes` (slots and 64 KiB); `min_free_bytes` of the file system
    stay unused. `direct_io`: "auto", "off" or "require". `address`es that are no multiple of 4096,
    and sizes that are none, cost a copy. Call `recover` once before anything else. One tier of a
    process may `record_crashes`: then repeated ones end with less being believed (starts.py).

    Raises:
        DeviceUnavailable: no such directory can be made, or no O_DIRECT and it is required.
    """

    def __init__(
        self,
        directory: Path,
        segment_count: int,
        segment_bytes: int,
        *,
        direct_io: str = "auto",
        min_free_bytes: int = GIB,
        files: Files | None = None,
        record_crashes: bool = False,
        keyring: Keyring | None = None,
    ) -> None:
        assert segment_bytes % PAGE_BYTES == 0

        self.plan = SegmentPlan(TierId.SSD, segment_count, segment_bytes, SLOT_HEADER_BYTES)
        self.directory = directory
        self.file_bytes = SLAB_RESERVED_BYTES + segment_bytes
        self._min_free_bytes = min_free_bytes
        self._lock = threading.Lock()
        self._files = files or Files()
        self.keyring = keyring or Keyring()
        self._staging = SlotStaging(self._files, self.keyring)
        self._counts = TierCounts()
        self._loaded = self._recovered = False
        prepare_directory(self._files, directory)
        self.direct_io = choose_direct_io(directory, direct_io)
        folder, direct = directory / "slabs", self.direct_io

        def slab(index: int) -> Slab:
            path = folder / f"{index:05}.slab"
            return Slab(self._files, path, index, segment_bytes, direct=direct)

        self._slabs = [slab(index) for index in range(segment_count)]
        self._wipes = Wipes(self._slabs, self._staging)
        self._identity = Identity(self._files, directory / "identity")
        self.naming = Naming(self._files, directory, self._slabs, self.keyring)
        self._catalogue = Catalogue(self._files, directory, segment_count * segment_bytes)
        self.wear = Wear(self._files, directory / "wear")
        self.writer = Writer(self._slabs, self._staging, self._identity, self._catalogue)
        self._starts = StartLog(self._files, directory / "starts", on=record_crashes)
        self.upkeep = Upkeep(
            self._files, self._slabs, self._wipes, self._catalogue, slab,
            min_free_bytes=min_free_bytes,
        )  # fmt: skip

    # --- coming back

    def load(self) -> None:
        """Reads what slabs and the small files say: `namespaces` is right after this, and epochs
        can be set. Milliseconds, and `find` does it where it was not done. Raises TierFailed.
        """
        if self._loaded:
            return
        folder = self.directory / "slabs"
        obey(self._starts.begin(), self._catalogue, self._files, folder)
        remove_strays(self._files, self._slabs, folder)
        open_slabs(self._slabs, self._identity, self.naming.book)
        self._wipes.doubt()
        self.naming.unlock()
        self.wear.load()
        reach("recover.opened")
        self._loaded = True

    def recover(self) -> Found:
        """`load`, `find` and `forget`. Worker thread. Raises as they do."""
        found = self.find()
        self.forget(found)
        return found

    def find(self, *, stopping: Callable[[], bool] = lambda: False) -> Found:
        """What is there, after at most a kill or power cut; until then nothing can be written.

        Damaged parts are set aside and rebuilt from slabs; records of older epochs, of a newer
        copy's rivals, or that do not fit this plan are left out: have them forgotten. Once, or
        again after an error. Worker thread (2 s a million blocks).

        Raises:
            TierFailed: it cannot be read. DaemonUnavailable: `stopping` said so.
        """
        self.load()
        try:
            found = read_catalogue(
                self._catalogue, self._slabs, self.naming.names, self.plan, stopping
            )
        except TierFailed:
            self._catalogue.abandon()
            raise
        self.upkeep.has_strays = bool(found.damaged_count) or not self._catalogue.lists_all
        set_aside, self._catalogue.set_aside_count = self._catalogue.set_aside_count, 0
        self._count(TierCounts(corrupt_count=found.damaged_count + set_aside))
        newest = max([found.generation_max, *(slab.cut_generation for slab in self._slabs)])
        if self._identity.start is None:
            newest = max(newest, newest_in_slabs(self._slabs, stopping))
        self._identity.begin(newest)
        self._recovered = True
        self._starts.recovered()
        return found

    def forget(self, found: Found, *, stopping: Callable[[], bool] = lambda: False) -> None:
        """No record any longer of what `find` left out, and no header of the stale ones, nor of
        what a kill left unlisted: neither evicts nor a rebuild can bring them back. After `find`,
        before any write. Raises TierFailed, or DaemonUnavailable: `stopping` said so.
        """
        self.upkeep.forget(found.stale, wipe=True)
        self.upkeep.forget(found.dropped, wipe=False)
        self.upkeep.sweep(found, stopping)
        reach("recover.cleaned")

    # --- namespaces

    def register_namespace(self, digest: bytes, descriptor: bytes, epoch: int) -> None:
        """Blocks of this namespace may be written from now on. Durable; a later epoch known wins.

        `descriptor`: JSON of the NamespaceSpec, kept beside its blocks. Worker thread. Raises
        TierFailed: it is not registered.
        """
        self.naming.register(digest, descriptor, epoch)

    def namespaces(self) -> list[tuple[bytes, bytes, int]]:
        """(digest, descriptor, epoch) of all that are known. Any thread, after `recover`."""
        return [(digest, n.descriptor, n.epoch) for digest, n in self.naming.names.items()]

    def set_epoch(self, digest: bytes, epoch: int) -> None:
        """Blocks of older epochs never come back, also after a power cut. Worker thread.

        Raises:
            TierFailed: that cannot be promised (it may hold all the same).
            InvariantViolated: no such namespace is registered, or the epoch is older.
        """
        self.naming.set_epoch(digest, epoch)

    def purge(self, digest: bytes, epoch: int) -> tuple[bool, list[int]]:
        """The namespace begins this epoch: nothing written before comes back, by no rebuild, and
        its key is destroyed. Whether there was one, and segments whose free slots may hold bytes of
        it that were not encrypted: `scour` those. Worker thread; no write of it may be under way.

        Raises:
            TierFailed: that is not sure. Call it again.
        """
        known = self.naming.purge(digest, epoch)
        if known is None:
            return False, []
        suspects = [slab.index for slab in self._slabs if known.plain and slab.may_hold(digest)]
        return bool(known.key), suspects

    def scour(self, segment: int, slots: Sequence[int] | None) -> int:
        """Free slots of the segment (None: it is free) are zero, durably; the caller holds them.
        Returns how many bytes that were. Worker thread. Raises TierFailed.
        """
        return self._wipes.scour(segment, slots)

    # --- the Tier protocol

    def write(self, batch: Sequence[SlotIO]) -> None:
        """Header and payload, `fdatasync`, catalogue: then done. A given checksum is believed."""
        assert self._recovered, "recover() comes first"

        for item in batch:
            item.error = None
        attempt(batch, self._identity.promise)
        items = self._ready([item for item in batch if item.error is None])
        unsummed = [item for item in items if item.label.checksum == 0]
        checksums = native.checksum(
            [item.address for item in unsummed], [item.label.size_bytes for item in unsummed]
        )
        for item, checksum in zip(unsummed, checksums, strict=True):
            item.label.checksum = checksum
        self.writer.write(items)
        self._wipe_failed(items)
        done = [item.label.size_bytes for item in items if item.error is None]
        counts = TierCounts(written_bytes=sum(done), written_slots=len(done))
        # Also what failed afterwards was written.
        self.wear.add(sum(align_up(i.label.size_bytes, PAGE_BYTES) + PAGE_BYTES for i in items))
        self._count(replace(counts, error_count=len(batch) - len(done)))

    def _wipe_failed(self, items: Sequence[SlotIO]) -> None:
        """What is not listed must not be found by a rebuild: it may be evicted by then."""
        failed = [item for item in items if item.error is not None]
        try:
            self._wipes.wipe(failed)
        except TierFailed:  # the slot is not in use: it is as if we had been killed here
            self.upkeep.has_strays = True

    def _ready(self, batch: Sequence[SlotIO]) -> list[SlotIO]:
        """The items whose slab is there, cut and lists their namespace; others get their error."""
        ready = []
        for item in batch:
            slab = self._slab(item)
            label = item.label
            try:
                named = self.naming.current(label.namespace)
                if slab.slot_bytes != item.slot_bytes or slab.names.get(label.namespace) != named:
                    self._prepare(slab, item)
            except TierFailed as error:
                item.error = error
            else:
                ready.append(item)
        return ready

    def _slab(self, item: SlotIO) -> Slab:
        segment, end = item.slot >> SLOT_BITS, ((item.slot & _MASK) + 1) * item.slot_bytes
        if segment >= self.plan.count or end > self.plan.size_bytes:
            raise InvariantViolated(f"slot {item.slot:#x} of {item.slot_bytes} bytes is not ours")
        if self.plan.slot_bytes(item.label.size_bytes) > item.slot_bytes:
            raise InvariantViolated(f"slot {item.slot:#x} is too small for its label")
        return self._slabs[segment]

    def _prepare(self, slab: Slab, item: SlotIO) -> None:
        """Makes, cuts and lists what this item needs of its slab."""
        digest = item.label.namespace
        with slab.lock:
            if slab.fd < 0:
                slab.create(min_free_bytes=self._min_free_bytes)
            if slab.slot_bytes != item.slot_bytes:
                self._catalogue.delete_segment(slab.index)
                slab.forget_names()
                slab.cut(item.slot_bytes, self._identity.next_generation())
            named = self.naming.current(digest)
            if slab.names.get(digest) != named:
                slab.list_names({**slab.names, digest: named})

    def resize(self, segment_count: int) -> None:
        """So many segments from now on. Nothing may lie in those that go, and nobody look at them.
        Worker thread. Raises TierFailed: it has as many as before.
        """
        if segment_count > self.plan.count:
            self.upkeep.add(segment_count)
        else:
            self.upkeep.take_away(segment_count)
        self.plan = replace(self.plan, count=segment_count)

    def recycle(self, segment: int) -> None:
        """What the segment held is gone, also for a rebuild; another tenant may have it next.

        No slot of it may be in use. Worker thread. Raises TierFailed: try again.
        """
        self._identity.promise()
        slab = self._slabs[segment]
        with slab.lock:
            if slab.fd >= 0:
                before = slab.sync_failures
                self._catalogue.delete_segment(segment)
                slab.forget_names()
                slab.cut(slab.slot_bytes, self._identity.next_generation())
                slab.sync(before)

    def read(self, batch: Sequence[SlotIO]) -> None:
        """Straight from disk to each `address`; then header and payload must be what we asked."""
        items, slabs, corrupt = [], [], 0
        for item in batch:
            slab = self._slab(item)
            if item.label.namespace in self.keyring.locked:
                item.error = TierFailed(f"ssd slot {item.slot:#x} is encrypted under another key")
            elif slab.fd >= 0 and slab.slot_bytes == item.slot_bytes:
                item.error = None
                items.append(item)
                slabs.append(slab)
            else:
                here = f"ssd slot {item.slot:#x}"
                item.error = BlockCorrupt(f"{here} was never written", damage="header")
                corrupt += 1
        if items:
            corrupt += self._staging.read(items, *places(items, slabs))
        good = [item.label.size_bytes for item in items if item.error is None]
        counts = TierCounts(read_bytes=sum(good), read_slots=len(good), corrupt_count=corrupt)
        self._count(replace(counts, error_count=len(batch) - len(good) - corrupt))

    def erase(self, slots: Iterable[SlotRecord], *, durable: bool, whole: bool = False) -> None:
        """Forgets these copies where they still lie as the records say, and wipes their headers, or
        all of them (`whole`).

        With `durable` all wipes and the catalogue are synced: neither these nor what was erased
        before comes back, not even by a rebuild from slabs. Without, a power cut may bring one
        back until then, or until its slot is written again.

        Raises:
            TierFailed: that was not possible for all of them; some may be gone.
        """
        records = self._catalogue.matching(slots)
        reach("erase.matched")
        (self._wipes.wipe_whole if whole else self._wipes.wipe)(records)
        reach("erase.wiped")
        if durable:
            self._wipes.sync()
            reach("erase.synced")
        self._catalogue.delete(record.slot for record in records)
        reach("erase.deleted")
        if durable:
            self._catalogue.sync()

    def sync(self) -> None:
        """All finished writes survive a power cut once this returns. Raises TierFailed."""
        self._catalogue.sync()

    @property
    def has_unsynced(self) -> bool:
        """Whether something was listed or forgotten since the last sync."""
        return self._catalogue.has_unsynced

    def probe(self) -> None:
        """A small file can be written, synced and read back, and a failed sync of the catalogue is
        made good. Worker thread. Raises TierFailed.
        """
        prove(self._files, self.directory)
        self._catalogue.renew()

    def tend(self) -> None:
        """Once a minute. Worker thread. Raises TierFailed."""
        self.wear.save()
        self._catalogue.tend()

    def counts(self) -> TierCounts:
        """Snapshot; any thread."""
        return self._counts

    def _count(self, more: TierCounts) -> None:
        with self._lock:
            self._counts = add_counts(self._counts, more)

    def check(self) -> None:
        """Raises InvariantViolated: a slab is cut beyond its segment, or lists an unknown name."""
        for slab in self._slabs:
            if slab.slot_bytes > self.plan.size_bytes:
                raise InvariantViolated(f"{slab} has slots larger than its segment")
            if slab.names.keys() - self.naming.names.keys():
                raise InvariantViolated(f"{slab} lists unknown namespaces")

    def close(self) -> None:
        """Syncs and leaves the clean marker. No batch may be under way. Idempotent."""
        try:
            self.wear.save()
            self._catalogue.close(clean=self.upkeep.is_clean())
        finally:
            self._starts.end()
            for slab in self._slabs:
                slab.close()

    def __repr__(self) -> str:
        made = sum(slab.fd >= 0 for slab in self._slabs)
        size = format_bytes(self.plan.count * self.plan.size_bytes)
        return f"<SsdTier {self.directory} {size}, {made} slabs, {self._counts}>"
