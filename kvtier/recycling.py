"""Recycling: gives a free segment that one tenant's clients may still map to another tenant.

A sealed memfd can neither be unmapped from afar nor mapped writable again, so the arena goes as a
whole: every session that was sent it is asked to unmap it, and when all have (or ended) the tier
puts a fresh arena in its place. A client that does not answer delays this; `waiting` counts it.

Does not: pick segments in use; the ledger empties them first.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable

from kvtier.ledger.slots import TierSlots
from kvtier.session import Session
from kvtier.tiers.arena import Arena
from kvtier.tiers.dram import DramTier

# Arenas asked back at once.
_AT_ONCE_MAX = 8
_NOBODY = "\0"  # no tenant has this name


class Recycling:
    """Segments of one memory tier on their way to another tenant. Event loop only."""

    def __init__(
        self,
        tier: DramTier,
        slots: TierSlots,
        in_thread: Callable[[Callable[[], Arena]], Awaitable[Arena]],
        done: Callable[[], None],
        recycled: Callable[[int], None],
    ) -> None:
        self._tier = tier
        self._slots = slots
        self._in_thread = in_thread
        self._done = done
        self._recycled = recycled
        self._waiting: dict[int, tuple[int, set[int]]] = {}  # arena -> (segment, sessions)
        self._ready: list[int] = []

    @property
    def waiting(self) -> int:
        """Arenas that some client still maps."""
        return len(self._waiting)

    def start(self, tenant: str, sessions: dict[int, Session]) -> bool:
        """Begins with one more free segment that `tenant` may not own yet; at most
        `_AT_ONCE_MAX` are under way. False: there is none.
        """
        under_way = {*self._ready, *(segment for segment, _ in self._waiting.values())}
        if len(under_way) >= _AT_ONCE_MAX:
            return True
        # A client that never unmaps must not hold up the others: pass over what is under way.
        segment = self._slots.foreign_free(tenant, exclude=under_way)
        if segment is None:
            return bool(under_way)
        arena = self._tier.arena(segment)
        # From here on nobody may own it: not even the tenant whose clients map it, since they are
        # asked to unmap, and since a worker thread replaces the memory.
        self._slots.give_home(segment, _NOBODY)
        holders = {s.id for s in sessions.values() if arena.id in s.announced}
        self._waiting[arena.id] = (segment, holders)
        for session_id in list(holders):
            sessions[session_id].withdraw(arena.id)
        self._look(arena.id)
        return True

    def returned(self, session_id: int, arena_id: int) -> None:
        """The session no longer maps the arena (or is gone)."""
        if arena_id in self._waiting:
            self._waiting[arena_id][1].discard(session_id)
            self._look(arena_id)

    def _look(self, arena_id: int) -> None:
        segment, holders = self._waiting[arena_id]
        if not holders:
            del self._waiting[arena_id]
            self._ready.append(segment)
            self._done()

    async def run(self) -> None:
        """Replaces the arenas of segments that nobody maps any longer."""
        while self._ready:
            segment = self._ready[0]
            await self._in_thread(functools.partial(self._tier.recycle, segment))
            self._slots.recycled(segment)
            self._ready.pop(0)
            self._recycled(segment)
            self._done()
