"""Erasing: records of dropped copies go from the SSD tier, then their slots are free; evicts.

Does not: choose what is dropped (the ledger does), or wipe bytes (tiers/).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator

from kvtier.block import Keys
from kvtier.errors import TierFailed
from kvtier.ledger.chain import Namespace
from kvtier.ledger.holdings import Erasure
from kvtier.ledger.ledger import Ledger
from kvtier.ledger.moves import Moves
from kvtier.progress import Progress
from kvtier.recovering import Recovering
from kvtier.testing.failpoints import reach
from kvtier.tiers.base import SlotRecord
from kvtier.tiers.ssd import SsdTier
from kvtier.units import MIB

# Keys evicted between two turns of the loop: a fraction of a millisecond.
_EVICT_KEYS = 64
_ERASE_SLOTS = 1024
_ERASE_BYTES = 64 * MIB
_LOOK_S = 0.25  # how often a wait looks again when nobody says that something happened


class Erasing:
    """Erasures of one ledger's SSD tier. Event loop only."""

    def __init__(
        self,
        ssd: SsdTier | None,
        ledger: Ledger,
        moves: Moves,
        progress: Progress,
        in_thread: Callable[[Callable[[], None]], asyncio.Future[None]],
        recovering: Recovering,
    ) -> None:
        self._ssd = ssd
        self._ledger = ledger
        self._moves = moves
        self._progress = progress
        self._in_thread = in_thread
        self._recovering = recovering
        self._turn = asyncio.Lock()
        self._unerased: list[Erasure] = []  # the tier failed: to be tried again
        self._wipes_failed = 0

    async def run(self) -> None:
        """Records first, then the slots are free. In order: a slot written anew is never erased.

        Raises:
            TierFailed: some could not be erased: they are kept, and tried again by the next call.
        """
        # In a task of its own: its caller may be cancelled, but a slot whose record a thread is
        # erasing must not be written meanwhile.
        work = asyncio.get_running_loop().create_task(self._in_turn())
        work.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(work)

    async def _in_turn(self) -> None:
        """What fails is kept, its slots with it, and tried again: it must not come back at a
        restart, and whoever evicts it again is told the truth. Raises TierFailed, at the end.
        """
        async with self._turn:
            erasures = self._unerased + self._ledger.take_erasures()
            self._unerased = []
            failed: TierFailed | None = None
            kinds = ((True, True), (True, False), (False, True), (False, False))
            for wipe, whole in kinds:
                chosen = [e for e in erasures if (e.wipe, e.whole) == (wipe, whole)]
                for part in _parts(chosen, whole):
                    try:
                        await self._erase(part, wipe, whole)
                    except TierFailed as error:
                        self._unerased.extend(part)
                        self._wipes_failed += wipe
                        failed = error
            self._progress.notify()
            if failed is not None:
                raise failed

    async def _erase(self, erasures: list[Erasure], wipe: bool, whole: bool) -> None:
        assert self._ssd is not None
        records = [SlotRecord(e.slot, e.slot_bytes, e.label) for e in erasures]
        reach("erase.begin")
        erase = functools.partial(self._ssd.erase, records, durable=wipe, whole=whole)
        await self._in_thread(erase)
        reach("erase.done")
        self._ledger.erased(erasures)
        self._progress.notify()

    async def evict(self, space: Namespace, keys: Keys, wake: Callable[[], None]) -> int:
        """Forgets these blocks and their descendants, for good when it returns. Returns how many.

        While the SSD tier is recovering it waits: what comes back meanwhile goes, too.

        Raises:
            TierFailed: they are gone from memory, but that they stay so cannot be promised.
        """
        count = 0
        moves: list[int] = []
        while True:
            all_was_there = self._recovering.is_over
            for part in keys.parts(_EVICT_KEYS):
                done = False
                while not done:
                    gone, done = self._ledger.evict_some(space, part)
                    if gone:
                        count += len(gone)
                        moves += self.moves_of(space, gone)
                        wake()
                    await asyncio.sleep(0)
            if all_was_there:
                break
            await self._recovering.wait()
        await self.for_good(moves)
        return count

    def moves_of(self, space: Namespace, keys: Iterable[bytes]) -> list[int]:
        """Moves of these blocks that are under way."""
        running = self._moves.by_target
        targets = ((space.id, key, tier) for key in keys for tier in self._ledger.tiers)
        return [running[target] for target in targets if target in running]

    async def for_good(self, moves: Collection[int]) -> None:
        """Returns when nothing of what was evicted can come back, not even by these moves, which
        were under way.

        Raises TierFailed when the SSD tier could not promise that.
        """
        if self._ssd is None:
            return
        failed_before = self._wipes_failed
        while any(move in self._moves.moves for move in moves):
            await self._progress.wait(_LOOK_S)
        with contextlib.suppress(TierFailed):
            await self.run()
        if self._wipes_failed != failed_before:
            raise TierFailed("the blocks are gone, but not yet durably so: evict them again")


def _parts(erasures: list[Erasure], whole: bool) -> Iterator[list[Erasure]]:
    """As many as are erased at once; where all bytes are written, not too many of them."""
    at = 0
    while at < len(erasures):
        count = _ERASE_SLOTS
        if whole:
            count = min(count, max(1, _ERASE_BYTES // erasures[at].slot_bytes))
        yield erasures[at : at + count]
        at += count
