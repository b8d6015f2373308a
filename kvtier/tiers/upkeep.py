"""Upkeep: what is done to the slabs of a tier beside reading and writing blocks.

Headers of slots that nobody claims are looked at (scrub; after a kill, all at once), and slabs are
added or taken away while the tier serves (resize).

Does not: know which slots are claimed; callers see to it that nobody uses what goes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvtier.block import SLOT_BITS, SLOTS_PER_SEGMENT_MAX, SlotLabel
from kvtier.errors import TierFailed
from kvtier.testing.failpoints import reach
from kvtier.tiers.base import SlotRecord
from kvtier.tiers.catalogue import Catalogue
from kvtier.tiers.files import Files
from kvtier.tiers.records import Found
from kvtier.tiers.recovery import strays_in_slabs
from kvtier.tiers.slab import Slab
from kvtier.tiers.wipes import Wipes
from kvtier.units import format_bytes

HEADERS_MAX = 256  # looked at in one call
_FORGET_SLOTS = 4096  # records of one transaction
_NOBODY = SlotLabel(bytes(16), 0, b"", b"", 0, 0, 0)
_MASK = SLOTS_PER_SEGMENT_MAX - 1


class Upkeep:
    """Of one tier's slabs, a list that it shares with the tier. Worker threads."""

    def __init__(
        self,
        files: Files,
        slabs: list[Slab],
        wipes: Wipes,
        catalogue: Catalogue,
        make_slab: Callable[[int], Slab],
        *,
        min_free_bytes: int,
    ) -> None:
        self.files = files
        self._slabs = slabs
        self._wipes = wipes
        self._catalogue = catalogue
        self._make_slab = make_slab
        self._min_free_bytes = min_free_bytes
        #: Whether a slot that no record names may have a header that a rebuild would believe.
        self.has_strays = True

    def slot_bytes(self, segment: int) -> int:
        """What its file is cut into; 0 when there is no file, or none that was cut. Any thread."""
        return self._slabs[segment].slot_bytes

    def strays(self, slots: Sequence[int]) -> list[SlotRecord]:
        """Which of these slots (of one segment, at most HEADERS_MAX) have a header that a rebuild
        would believe. What cannot be read, it could not either.
        """
        if not slots:
            return []
        return self._slabs[slots[0] >> SLOT_BITS].here([slot & _MASK for slot in slots])

    def forget(self, slots: Sequence[int], *, wipe: bool) -> None:
        """No record of these slots any longer and, with `wipe`, no header: neither evicts nor a
        rebuild can bring back what lay there. Nobody may be writing to them. Raises TierFailed.
        """
        for at in range(0, len(slots), _FORGET_SLOTS):
            part = slots[at : at + _FORGET_SLOTS]
            if wipe:
                cuts = [self._slabs[slot >> SLOT_BITS].slot_bytes for slot in part]
                self._wipes.wipe(
                    [SlotRecord(*place, _NOBODY) for place in zip(part, cuts, strict=True)]
                )
            self._catalogue.delete(part)

    def sweep(self, found: Found, stopping: Callable[[], bool]) -> None:
        """What a kill left written but not listed is wiped, durably: listed nowhere, it would miss
        an evict of its block, and come back by a rebuild. So would what a damaged record named.
        `found` is all that is listed, before any write. Raises TierFailed, or DaemonUnavailable:
        `stopping` said so.
        """
        if self.has_strays:
            self.forget(strays_in_slabs(self._slabs, found, stopping), wipe=True)
            self._wipes.sync()
            self.has_strays = False
        reach("recover.swept")

    def is_clean(self) -> bool:
        """Whether no rebuild can find what no record names. At the end: syncs what was wiped."""
        try:
            self._wipes.sync()
        except TierFailed:
            self.has_strays = True
        return not self.has_strays

    def missing_bytes(self, segment_count: int) -> int:
        """How much more the file system must give before that many segments have their files."""
        made = [slab for slab in self._slabs[:segment_count] if slab.fd >= 0]
        return (segment_count - len(made)) * self._slabs[0].size_bytes

    def room_bytes(self) -> int:
        """What slabs may still take of the file system. Raises TierFailed."""
        folder = self._slabs[0].path.parent
        try:
            return self.files.free_bytes(folder) - self._min_free_bytes
        except OSError as error:
            raise TierFailed(f"{folder}: {error.strerror}") from error

    def add(self, segment_count: int) -> None:
        """So many slabs; files of new ones are made when they are first written to.

        Raises TierFailed: what lies there from before cannot be removed; nothing was added.
        """
        more = [self._make_slab(index) for index in range(len(self._slabs), segment_count)]
        for slab in more:
            slab.remove()
            slab.belong_to(self._slabs[0].state_id)
        self._slabs.extend(more)

    def take_away(self, segment_count: int) -> None:
        """Only so many slabs; the files of the others are gone, durably, and the space is free.

        Raises:
            TierFailed: some may be gone, some not; all are slabs of the tier still, and empty.
        """
        going = self._slabs[segment_count:]
        for slab in going:
            self._catalogue.delete_segment(slab.index)
        # What was wiped in them must stay so, should their files be back after a power cut.
        self._wipes.sync()
        reach("resize.wiped")
        for slab in reversed(going):
            with slab.lock:
                slab.remove()
            reach("resize.deleted")
        folder = self._slabs[0].path.parent
        try:
            self.files.sync_directory(folder)
        except OSError as error:
            raise TierFailed(f"{folder}: {error.strerror}") from error
        del self._slabs[segment_count:]

    def __repr__(self) -> str:
        return f"<Upkeep of {len(self._slabs)} slabs of {format_bytes(self._slabs[0].size_bytes)}>"
