"""WriteRoom: a session's write arena and which parts of it are taken.

Extents are contiguous, page-aligned, first fit from a list of free stretches kept in order of
offset; the few live reservations of a session make that list short.

Does not: survive its session, or hold blocks: commit copies them out (DESIGN section 6).
"""

from __future__ import annotations

from bisect import bisect_left

from kvtier.errors import InvariantViolated
from kvtier.tiers.arena import Arena
from kvtier.units import PAGE_BYTES, align_up


class WriteRoom:
    """Room of one session. Event loop only.

    Invariant (`check`): free stretches are in order, apart from each other, and together with
    the extents handed out they are the arena's data area exactly.
    """

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self._free: list[tuple[int, int]] = [(0, arena.data_bytes)]
        self._taken: dict[int, int] = {}

    def largest_bytes(self) -> int:
        """Bytes of the largest extent that `take` would grant now."""
        return max((size for _, size in self._free), default=0)

    def take(self, size_bytes: int) -> int | None:
        """Offset (in the data area) of a new extent, or None when none is large enough."""
        wanted = align_up(size_bytes, PAGE_BYTES)
        for index, (offset, size) in enumerate(self._free):
            if size >= wanted:
                rest = (offset + wanted, size - wanted)
                self._free[index : index + 1] = [rest] if rest[1] else []
                self._taken[offset] = wanted
                return offset
        return None

    def give_back(self, offset: int) -> None:
        """The extent at `offset` is free again. Raises InvariantViolated if it was not taken."""
        size = self._taken.pop(offset, None)
        if size is None:
            raise InvariantViolated(f"extent at {offset} given back but not taken")
        index = bisect_left(self._free, (offset, 0))
        if index < len(self._free) and self._free[index][0] == offset + size:
            size += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == offset:
            index -= 1
            before = self._free.pop(index)
            offset, size = before[0], before[1] + size
        self._free.insert(index, (offset, size))

    def check(self) -> None:
        """Raises InvariantViolated when free and taken do not tile the arena."""
        end = 0
        for offset, size in sorted([*self._free, *self._taken.items()]):
            if offset != end:
                raise InvariantViolated(f"write room is torn at {end}: next extent at {offset}")
            end = offset + size
        if end != self.arena.data_bytes:
            raise InvariantViolated(f"write room ends at {end} of {self.arena.data_bytes}")
