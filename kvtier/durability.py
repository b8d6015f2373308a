"""Durability: blocks on stable storage when somebody asks for it: durable commits and flushes.

Does not: write by itself (the ledger plans, the mover writes) or decide what is demoted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from kvtier.block import Move, TierId
from kvtier.errors import BlocksGone, DaemonUnavailable, TierFailed
from kvtier.ledger.chain import Namespace, Run
from kvtier.ledger.ledger import Ledger
from kvtier.ledger.moves import PLANNED_MAX, Moves
from kvtier.progress import Progress
from kvtier.recovering import Recovering
from kvtier.testing.failpoints import reach
from kvtier.tiers.ssd import SsdTier
from kvtier.transfer.mover import Mover
from kvtier.units import Clock

_LOOK_S = 1.0  # how often a wait looks again when nobody says that something happened
_DIRTY_RUNS_MAX = 4096  # looked at for one turn of a flush
_DURABLE_S = 60.0  # a durable commit that waits longer for the SSD tier is told so


class Durability:
    """Event loop only. `stopping` ends waits: nothing more will be written.

    `copied_down` counts the blocks that got a copy below memory since the start.
    """

    def __init__(
        self,
        ssd: SsdTier | None,
        ledger: Ledger,
        moves: Moves,
        mover: Mover,
        progress: Progress,
        clock: Clock,
        in_thread: Callable[[Callable[[], None]], asyncio.Future[None]],
        recovering: Recovering,
    ) -> None:
        self._ssd = ssd
        self._ledger = ledger
        self._moves = moves
        self._mover = mover
        self._progress = progress
        self._clock = clock
        self._in_thread = in_thread
        self._recovering = recovering
        self.stopping = False
        self.copied_down = 0

    async def make_durable(
        self, space: Namespace, keys: Sequence[bytes], *, expected: Sequence[bytes]
    ) -> None:
        """The blocks are on the SSD tier, synced, when this returns.

        Raises:
            BlocksGone: one of `expected` was evicted or cleared meanwhile.
            TierFailed: the SSD tier could not promise it; what is in memory stays readable.
        """
        if self._ssd is None:
            raise TierFailed("durable commits need the SSD tier: tiers.ssd.enabled")
        lower = TierId.SSD
        reach("durable.begin")
        until_s = self._clock.monotonic_s() + _DURABLE_S
        await self._recovering.settle(_DURABLE_S)
        while True:
            missing = {id(run): run for run in self._only_above(space, keys)}
            moving = any((space.id, key, lower) in self._moves.by_target for key in keys)
            if not missing:
                break
            moves = self._moves.copy_down(iter(missing.values()), len(keys))
            self._mover.submit(moves)
            if len(moves) == PLANNED_MAX:
                await asyncio.sleep(0)
                continue
            if not moves and not moving and lower in self._ledger.closed_tiers:
                raise TierFailed("the SSD tier takes no writes now: the blocks are in memory only")
            if self.stopping:
                raise DaemonUnavailable("the daemon is stopping: the blocks are in memory only")
            if self._clock.monotonic_s() >= until_s:
                raise TierFailed("the SSD tier did not take the blocks: they are in memory only")
            await self._progress.wait(_LOOK_S)
        if self.stopping:
            raise DaemonUnavailable("the daemon is stopping: it could not sync the blocks")
        reach("durable.written")
        await self._in_thread(self._ssd.sync)
        reach("durable.synced")
        gone = sum(self._ledger.chains.find(space, key) is None for key in expected)
        if gone:
            raise BlocksGone(
                f"{gone} of {len(expected)} blocks were evicted meanwhile: store them again"
            )

    def _only_above(self, space: Namespace, keys: Sequence[bytes]) -> Iterator[Run]:
        for key in keys:
            found = self._ledger.chains.find(space, key)
            if found is not None and found[0].state[found[1]] == 1 << self._ledger.top:
                yield found[0]

    async def flush(self, timeout_s: float) -> tuple[int, int]:
        """Writes what is only in memory to the SSD tier and syncs it, within the time (seconds).
        Returns (blocks written, blocks still only in memory). Raises TierFailed.
        """
        before = self.copied_down
        until_s = self._clock.monotonic_s() + timeout_s
        if self._ssd is None:
            return 0, self._ledger.dirty_blocks()
        if self._ledger.dirty_blocks():
            await self._recovering.settle(timeout_s)
        while self._ledger.dirty_blocks() and TierId.SSD not in self._ledger.closed_tiers:
            moves = self._copy_dirty(_DIRTY_RUNS_MAX)
            if not moves and self._mover.is_idle:
                moves = self._copy_dirty(None)  # those looked at fit no segment below: any others?
            now_s = self._clock.monotonic_s()
            if len(moves) == PLANNED_MAX and now_s < until_s:
                await asyncio.sleep(0)
                continue
            if now_s >= until_s or (self._mover.is_idle and not self._ledger.is_erasing):
                break
            await self._progress.wait(until_s - now_s)
        reach("flush.written")
        if self._recovering.is_over:
            await self._in_thread(self._ssd.sync)
        reach("flush.synced")
        return self.copied_down - before, self._ledger.dirty_blocks()

    def _copy_dirty(self, runs_max: int | None) -> list[Move]:
        chains = self._ledger.chains
        runs = [chains.runs[run_id] for run_id in islice(chains.dirty, runs_max)]
        moves = self._moves.copy_down(iter(runs), PLANNED_MAX)
        self._mover.submit(moves)
        return moves
