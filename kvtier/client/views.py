"""Places and Views: where a grant's slots lie, and memoryviews that keep their lease.

A view's memory belongs to an exporter (a ctypes array over the mapping) that refers to the
lease's `Hold`. Arrays made from the view keep the exporter (buffer protocol), hence the Hold;
when the last is gone, the Hold's finalizer has the lease released. The mapping stays as long:
the Hold refers to the arenas, and nobody closes an arena that something refers to.

Does not: copy bytes, or make anything per block before it is asked for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, Final, overload

from kvtier import wire
from kvtier.block import SLOT_BITS, SlotTable
from kvtier.client.session import Session
from kvtier.errors import LeaseLost
from kvtier.tiers.arena import MappedArena

_INDEX_MASK: Final = (1 << SLOT_BITS) - 1


class Places:
    """Where the slots of a grant lie in mapped arenas.

    Raises:
        DaemonUnavailable: an arena of the table was never sent.
    """

    __slots__ = ("_slots", "arenas", "size_bytes", "table")

    def __init__(self, session: Session, table: SlotTable) -> None:
        self.table = table
        self.size_bytes = table.size_bytes
        self.arenas: dict[int, tuple[MappedArena, int]] = {
            view.segment: (session.arena(view.arena_id), view.base_offset) for view in table.views
        }
        self._slots: tuple[int, ...] | None = None

    @property
    def slots(self) -> tuple[int, ...]:
        """Slot numbers, one per block of the grant; unpacked when first asked for."""
        if self._slots is None:
            self._slots = wire.unpack_u32(self.table.slots)
        return self._slots

    def place(self, index: int) -> tuple[MappedArena, int]:
        """Arena and offset in it of slot `index` of the table. Raises InvalidRequest."""
        slot = self.slots[index]
        arena, base_offset = self.arenas[slot >> SLOT_BITS]
        offset = base_offset + (slot & _INDEX_MASK) * self.table.slot_bytes
        arena.layout.check_range(offset, self.size_bytes)
        return arena, offset

    def taken_back(self) -> bool:
        """Whether the daemon took a slot back since the grant: O(arenas) unless one was."""
        revocations = self.table.revocations
        moved = {
            id(arena)
            for arena, _ in self.arenas.values()
            if arena.revocations() != revocations.get(arena.id, 0)
        }
        if not moved:
            return False
        generations = self.table.generations
        for index, slot in enumerate(self.slots):
            arena, offset = self.place(index)
            if id(arena) in moved and arena.generation(offset) != generations.get(slot, 0):
                return True
        return False


class Holding:
    """The books of one lease's Hold; outlives it."""

    __slots__ = ("free", "lease_id", "leaving", "number", "session")

    def __init__(self, session: Session, lease_id: int) -> None:
        self.session = session
        self.lease_id = lease_id
        self.number = session.hold()
        self.leaving = False  # the lease's own release is under way and will see `free`
        self.free = False


class Hold:
    """Lives as long as the lease object or anything derived from its views does."""

    __slots__ = ("__weakref__", "holding", "places")

    def __init__(self, session: Session, lease_id: int, places: Places) -> None:
        self.holding = Holding(session, lease_id)
        self.places = places

    def __del__(self) -> None:
        # Any thread, any moment: only appends and a write to an eventfd.
        holding = self.holding
        holding.free = True
        holding.session.let_go(holding.number)
        if holding.lease_id and not holding.leaving:
            holding.session.drop(holding.lease_id)


class Views(Sequence[memoryview]):
    """Read-only memoryviews of a lease's blocks, made when asked for. No bytes are copied.

    `len` is known at once; each view costs about a microsecond. Every view, and every array made
    from one, keeps the lease; this sequence itself does too.
    """

    __slots__ = ("_hold", "_whole")

    def __init__(self, hold: Hold) -> None:
        self._hold = hold
        self._whole: dict[int, memoryview] = {}

    def __len__(self) -> int:
        return len(self._hold.places.table.slots) // 4

    @overload
    def __getitem__(self, index: int) -> memoryview: ...

    @overload
    def __getitem__(self, index: slice) -> list[memoryview]: ...

    def __getitem__(self, index: int | slice) -> memoryview | list[memoryview]:
        if isinstance(index, slice):
            return [self._view(i) for i in range(*index.indices(len(self)))]
        return self._view(index)

    def __iter__(self) -> Iterator[memoryview]:
        return map(self._view, range(len(self)))

    def _view(self, index: int) -> memoryview:
        places = self._hold.places
        arena, offset = places.place(index)
        whole = self._whole.get(arena.id)
        if whole is None:
            whole = self._whole[arena.id] = _export(arena, self._hold)
        return whole[offset : offset + places.size_bytes]

    def __repr__(self) -> str:
        return f"<Views {len(self)} of {self._hold.places.size_bytes} bytes>"


def _export(arena: MappedArena, hold: Hold) -> memoryview:
    """All of an arena, read-only; whatever is made of it keeps `hold`."""
    exporter: Any = (ctypes.c_ubyte * arena.size).from_address(arena.address)
    exporter.hold = hold
    return memoryview(exporter).cast("B").toreadonly()


def released() -> LeaseLost:
    """What using a released lease raises."""
    return LeaseLost("the lease was released; its views are no longer yours")
