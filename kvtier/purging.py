"""Purging: everything of one namespace goes, for good and off the disk.

    wait for leases -> clear (memory) -> moves end, records go -> new epoch, no key (disk)
        -> free slots that may hold bytes of it are zeroed -> stores are taken again

Until it is over lookups in the namespace miss and stores fail; killed in the middle, it was not
answered, and is to be repeated.

Does not: touch other namespaces' blocks, or what lies outside of the state directory's slabs.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from kvtier.block import TierId
from kvtier.erasing import Erasing
from kvtier.errors import BlocksHeld, TierFailed
from kvtier.ledger.chain import Namespace
from kvtier.ledger.filling import Filling
from kvtier.ledger.ledger import Ledger
from kvtier.ledger.moves import Moves
from kvtier.progress import Progress
from kvtier.recovering import Recovering
from kvtier.scrubbing import Scrubbing
from kvtier.session import Session
from kvtier.testing.failpoints import reach
from kvtier.tiers.ssd import SsdTier
from kvtier.units import MIB, Clock

T = TypeVar("T")
_LOOK_S = 0.25  # how often a wait looks again when nobody says that something happened
_SCOUR_BYTES = 64 * MIB  # zeroed in one job of a worker thread


class InThread(Protocol):
    """Runs blocking work in a worker thread."""

    def __call__(self, work: Callable[[], T]) -> Awaitable[T]: ...


@dataclass(frozen=True, slots=True)
class Purged:
    """What a purge did. `wiped_bytes`: zeroed on disk, whatever lay there."""

    block_count: int
    key_destroyed: bool
    wiped_bytes: int


class Purging:
    """Of one store. Event loop only."""

    def __init__(
        self,
        ssd: SsdTier | None,
        ledger: Ledger,
        filling: Filling,
        moves: Moves,
        progress: Progress,
        clock: Clock,
        *,
        in_thread: InThread,
        erasing: Erasing,
        recovering: Recovering,
        scrubbing: Scrubbing,
        turn: asyncio.Lock,
        cleared: Callable[[Namespace], None],
    ) -> None:
        self._ssd = ssd
        self._ledger = ledger
        self._filling = filling
        self._moves = moves
        self._progress = progress
        self._clock = clock
        self._in_thread = in_thread
        self._erasing = erasing
        self._recovering = recovering
        self._scrubbing = scrubbing
        self._cleared = cleared
        self._turn = turn
        self.held_slots = 0  # of the SSD tier, for the ledger's check

    async def purge(
        self, space: Namespace, sessions: Mapping[int, Session], timeout_s: float
    ) -> Purged:
        """After this no block of the namespace is in any tier, none can come back, and nobody can
        read from the disk what was written of it. `timeout_s` bounds the waiting for others.

        Raises:
            BlocksHeld: they are leased; nothing was changed.
            TierFailed: the blocks are gone, but not yet off the disk: purge again.
        """
        until_s = self._clock.monotonic_s() + timeout_s
        async with self._turn:
            await self._recovering.wait()
            space.purging = True
            try:
                await self._wait_for_leases(space, sessions, until_s)
                count = self._ledger.clear(space)
                self._filling.clear(space)
                self._cleared(space)
                reach("purge.begin")
                await self._wait_for_moves(space, until_s)
                more = True
                while more:
                    more = self._ledger.reap()
                    await asyncio.sleep(0)
                if self._ssd is None:
                    return Purged(count, False, 0)
                await self._erasing.run()
                destroyed, suspects = await self._begin_epoch(self._ssd, space)
                wiped_bytes = 0
                for segment in suspects:
                    async with self._scrubbing.turn:  # it holds slots and segments, too
                        wiped_bytes += await self._scour(self._ssd, segment)
                if suspects:
                    await self._in_thread(functools.partial(self._ssd.naming.scoured, space.digest))
                reach("purge.wiped")
                return Purged(count, destroyed, wiped_bytes)
            finally:
                space.purging = False
                self._progress.notify()

    async def _wait_for_leases(
        self, space: Namespace, sessions: Mapping[int, Session], until_s: float
    ) -> None:
        while leases := [lease for lease in self._ledger.leases.values() if lease.space is space]:
            left_s = until_s - self._clock.monotonic_s()
            if left_s <= 0:
                holders = {holder for lease in leases for holder in lease.holders}
                named = [sessions[holder] for holder in sorted(holders) if holder in sessions]
                who = ", ".join(f"{s.client_name or 'unnamed'} (pid {s.pid})" for s in named[:10])
                raise BlocksHeld(
                    f"{len(leases)} leases of namespace {space.id} are held by {who}: end those "
                    "clients or wait for them, then purge again; nothing was changed"
                )
            await self._progress.wait(min(left_s, _LOOK_S))

    async def _wait_for_moves(self, space: Namespace, until_s: float) -> None:
        while any(move.namespace_id == space.id for move in self._moves.moves.values()):
            left_s = until_s - self._clock.monotonic_s()
            if left_s <= 0:
                raise TierFailed("blocks of it are still being moved: purge it again")
            await self._progress.wait(min(left_s, _LOOK_S))

    async def _begin_epoch(self, ssd: SsdTier, space: Namespace) -> tuple[bool, list[int]]:
        done = await self._in_thread(functools.partial(ssd.purge, space.digest, space.epoch))
        # The next block of it needs it registered again, with a key if it is to have one.
        self._recovering.registered.discard(space.digest)
        space.locked = ""
        reach("purge.keyless")
        return done

    async def _scour(self, ssd: SsdTier, segment: int) -> int:
        """Zeroes what no block uses of a segment; nobody is given a slot of it meanwhile."""
        tier_slots = self._ledger.slots[TierId.SSD]
        owned = tier_slots.segments[segment].slot_class
        slots = tier_slots.hold_segment(segment)
        self.held_slots += len(slots)
        try:
            if owned is None:
                return await self._in_thread(functools.partial(ssd.scour, segment, None))
            step, wiped_bytes = max(1, _SCOUR_BYTES // owned[1]), 0
            for at in range(0, max(len(slots), 1), step):
                part = slots[at : at + step]
                wiped_bytes += await self._in_thread(functools.partial(ssd.scour, segment, part))
            return wiped_bytes
        finally:
            self.held_slots -= len(slots)
            tier_slots.let_go(segment, slots)
            self._progress.notify()

    def __repr__(self) -> str:
        return f"<Purging, {self.held_slots} slots held>"
