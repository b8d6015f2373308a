"""Progress: wakes whoever waits for room, for a move or for an erasure; and the ring of events.

Does not: say what happened to waiters of `Progress` (they look again); keep events for ever.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable

from kvtier.block import Event, EventKind, TierId
from kvtier.ledger.chain import Namespace

# Events one watcher may lag behind before it is told to list again.
PROGRESS_INTERVAL_S = 10.0


class Progress:
    """Something changed that a waiter may have waited for. Event loop only."""

    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[None]] = set()

    def notify(self) -> None:
        """Wakes every waiter once."""
        waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self, timeout_s: float) -> bool:
        """Whether something happened within the time (seconds)."""
        if timeout_s <= 0:
            return False
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            # Not wait_for: before Python 3.12 it swallows a cancellation that meets a wake-up.
            async with asyncio.timeout(timeout_s):
                await waiter
        except TimeoutError:
            return False
        finally:
            self._waiters.discard(waiter)
        return True


class EventRing:
    """The last events of all namespaces, each with a revision that only grows.

    Bounded by `events_max`: a watcher that asks for an older one, or lags further behind, is told
    COMPACTED and goes on from the oldest held. `first_revision` is above every revision of an
    earlier life of the daemon, so that a watcher that comes back is told of what it missed.
    """

    def __init__(self, events_max: int, first_revision: int = 0) -> None:
        self._events: deque[Event] = deque(maxlen=events_max)
        self._changed = Progress()
        self.revision = first_revision

    def add(
        self,
        kind: EventKind,
        space: Namespace,
        *,
        keys: Iterable[bytes] = (),
        tier: TierId | None = None,
        parent: bytes = b"",
    ) -> None:
        """Appends an event and wakes the watchers."""
        self.revision += 1
        packed = b"".join(keys)
        event = Event(self.revision, kind, space.id, packed, space.key_size, tier, parent)
        self._events.append(event)
        self._changed.notify()

    async def watch(self, namespace_id: int, from_revision: int) -> AsyncIterator[Event]:
        """Events of one namespace from a revision on (0 = from now), then as they happen."""
        following = from_revision or self.revision + 1
        if following > self.revision + 1:
            # A revision of an earlier life of the daemon: what it saw since is not known.
            following = self.revision + 1
            yield Event(self.revision, EventKind.COMPACTED, namespace_id)
        while True:
            oldest = self._events[0].revision if self._events else self.revision + 1
            if following < oldest:
                yield Event(oldest, EventKind.COMPACTED, namespace_id)
                following = oldest
            for event in self._since(following):
                following = event.revision + 1
                if event.namespace_id == namespace_id:
                    yield event
            if following > self.revision and not await self._changed.wait(PROGRESS_INTERVAL_S):
                yield Event(self.revision, EventKind.PROGRESS, namespace_id)

    def _since(self, revision: int) -> list[Event]:
        if not self._events:
            return []
        skipped = max(0, revision - self._events[0].revision)
        # A slice at a time: the ring may drop what a slow watcher has not seen, and tells it so.
        return [self._events[i] for i in range(skipped, min(len(self._events), skipped + 256))]

    def __repr__(self) -> str:
        return f"<EventRing {len(self._events)} events to revision {self.revision}>"
