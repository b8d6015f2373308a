r"""Health: whether the SSD tier takes new copies, after it failed to.

    serving --a write fails--> degraded --pause over--> serving
                                  \--errors_max in a row: pause, then a probe that succeeds--/

Degraded: nothing new is written and nothing erased there, what it holds is still read, memory goes
on serving. Pauses double while failures follow one another; a batch that succeeds ends the row.

Does not: decide what a failure was, or move anything.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from kvtier.block import TierId
from kvtier.errors import TierFailed
from kvtier.ledger.ledger import Ledger
from kvtier.tiers.ssd import SsdTier
from kvtier.units import Clock

log = logging.getLogger(__name__)
_PAUSE_S = 5.0
_PAUSE_S_MAX = 300.0


class Health:
    """Of the SSD tier. Event loop only."""

    def __init__(
        self,
        ssd: SsdTier | None,
        ledger: Ledger,
        clock: Clock,
        in_thread: Callable[[Callable[[], None]], Awaitable[None]],
        *,
        errors_max: int,
    ) -> None:
        self._ssd = ssd
        self._ledger = ledger
        self._clock = clock
        self._in_thread = in_thread
        self.errors_max = errors_max
        self.error = ""  # why it is degraded
        self._row = 0
        self._paused_until_s = 0.0

    @property
    def is_closed(self) -> bool:
        """Whether the tier takes no writes now."""
        return TierId.SSD in self._ledger.closed_tiers

    @property
    def is_due(self) -> bool:
        """Whether a pause is over and `reopen` should be tried."""
        return self.is_closed and self._clock.monotonic_s() >= self._paused_until_s

    def failed(self, error: Exception) -> None:
        """A batch failed there. Failures of what was under way when it closed count as one."""
        if not self.is_closed:
            self._row += 1
            log.warning("tier.degraded tier=ssd failures_in_a_row=%d error=%s", self._row, error)
        self.error = str(error)
        self._pause()
        self._ledger.closed_tiers.add(TierId.SSD)

    def _pause(self) -> None:
        pause_s = min(_PAUSE_S * 2 ** (max(self._row, 1) - 1), _PAUSE_S_MAX)
        self._paused_until_s = self._clock.monotonic_s() + pause_s

    def succeeded(self) -> None:
        """A batch was written there: the row of failures is over."""
        self._row = 0

    async def reopen(self, *, probe: bool = False) -> None:
        """Takes writes again; after `errors_max` failures in a row, or if told to `probe`, only
        when a small file could be written, synced and read back.

        Raises:
            TierFailed: the probe failed; it stays degraded, for a longer pause.
        """
        if self._ssd is not None and (probe or self._row >= self.errors_max):
            # Whoever else finds it due meanwhile must not probe, too.
            self._pause()
            try:
                await self._in_thread(self._ssd.probe)
            except TierFailed as error:
                self._row += 1
                self.error = str(error)
                self._pause()
                self._ledger.closed_tiers.add(TierId.SSD)
                raise
        if self.is_closed:
            log.info("tier.serving tier=ssd after: %s", self.error)
        self._ledger.closed_tiers.discard(TierId.SSD)
        self.error = ""
