"""Housekeeping: what the SSD tier needs now and then: syncs, its catalogue tended, a look at wear.

When the day's budget of writes is used up, what memory has no room for is dropped instead of
demoted. Durable commits and flushes still write, and count: their callers were promised it.

Does not: decide what is demoted (ledger/moves.py), or whether the tier is well (health.py).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from kvtier.block import TierId
from kvtier.ledger.ledger import Ledger
from kvtier.sections import SsdConfig
from kvtier.tiers.ssd import SsdTier
from kvtier.units import Clock, format_bytes

_TEND_S = 60.0

log = logging.getLogger(__name__)


class Housekeeping:
    """Of the SSD tier, if there is one. Event loop only."""

    def __init__(
        self,
        ssd: SsdTier | None,
        ledger: Ledger,
        clock: Clock,
        in_thread: Callable[[Callable[[], None]], Awaitable[None]],
        config: SsdConfig,
    ) -> None:
        self._ssd = ssd
        self._ledger = ledger
        self._clock = clock
        self._in_thread = in_thread
        self._synced_s = self._tended_s = clock.monotonic_s()
        self.reconfigure(config)

    def reconfigure(self, config: SsdConfig) -> None:
        """Takes over what may change live."""
        self._config = config
        if self._ssd is not None:
            self._ssd.writer.group.wait_s = config.group_commit_s
            self._ssd.writer.group.bytes_max = config.group_commit_bytes_max

    @property
    def day_bytes(self) -> int:
        """Written to the tier in the last 24 hours."""
        return 0 if self._ssd is None else self._ssd.wear.day_bytes()

    @property
    def problem(self) -> str:
        """Why nothing is demoted, if so."""
        if TierId.SSD not in self._ledger.spent_tiers:
            return ""
        budget = format_bytes(self._config.write_bytes_per_day_max)
        return f"{budget} were written within a day: what memory has no room for is dropped"

    def watch(self) -> None:
        """Begins or ends to drop instead of demoting, by what was written."""
        budget = self._config.write_bytes_per_day_max
        spent = self._ledger.spent_tiers
        if budget and self.day_bytes >= budget:
            if TierId.SSD not in spent:
                spent.add(TierId.SSD)
                log.warning("tier.spent tier=ssd %s", self.problem)
        elif TierId.SSD in spent:
            spent.discard(TierId.SSD)
            log.info("tier.unspent tier=ssd: demotions go on")

    async def run(self) -> None:
        """Does what is due. The tier must serve. Raises TierFailed."""
        if self._ssd is None:
            return
        now_s = self._clock.monotonic_s()
        every_s = self._config.sync_every_s
        if every_s and now_s >= self._synced_s + every_s:
            self._synced_s = now_s
            if self._ssd.has_unsynced:
                await self._in_thread(self._ssd.sync)
        if now_s >= self._tended_s + _TEND_S:
            self._tended_s = now_s
            await self._in_thread(self._ssd.tend)

    def __repr__(self) -> str:
        return f"<Housekeeping {self.day_bytes} bytes today {self.problem}>"
