"""Ageing: drops blocks that are older than their namespace allows, from every tier.

A block's age counts from its commit, by the wall clock, rounded up; it is written beside its bytes,
so that a restart changes nothing. Within a life a clock that jumps back does not make blocks
younger: what passed since the start is measured. Across a restart such a jump is not known, but
what would be of the future then is dropped at once.

Does not: wipe (tiers/), or drop what is only being written: its age is still to begin.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from kvtier.config import NamespaceConfig
from kvtier.ledger.chain import Run
from kvtier.ledger.ledger import Ledger
from kvtier.units import Clock

# Of the loop, in one tick; and how much earlier than allowed blocks go, since ticks take time.
_SLICE_S = 0.001
_EARLY_S_MAX = 60.0
_EARLY_SHARE = 1 / 8
_DROPPED_MAX = 64  # blocks of one turn
_FUTURE_S = 5  # a clock that is set a little is no jump


class Ageing:
    """Of one ledger. Event loop only. `rule(tenant, model)` may be replaced: call `renew` then."""

    def __init__(
        self, ledger: Ledger, clock: Clock, rule: Callable[[str, str], NamespaceConfig]
    ) -> None:
        self.rule = rule
        self._ledger = ledger
        self._clock = clock
        self._wall_s, self._started_s = clock.wall_s(), clock.monotonic_s()
        self._known_spaces = 0
        self._pass: list[int] = []
        self._all_read = False  # every stamp that came back was looked at
        self._was_over = False
        self._tell()

    def now_s(self) -> float:
        """Wall clock, which in this life never goes back behind what passed."""
        passed_s = self._clock.monotonic_s() - self._started_s
        return max(self._clock.wall_s(), self._wall_s + passed_s)

    def _tell(self) -> None:
        self._ledger.chains.now_s = int(self.now_s())

    def renew(self) -> None:
        """The rules are others now."""
        self._known_spaces = 0

    def learn_spaces(self) -> None:
        """Namespaces opened since the last call have their rules."""
        spaces = self._ledger.spaces
        if len(spaces) != self._known_spaces:
            for space in spaces.values():
                space.max_age_s = self.rule(space.tenant, space.spec.model).max_age_s
            self._known_spaces = len(spaces)

    def tick(self, *, is_recovered: bool) -> bool:
        """Drops some of what is too old; whether it did. A millisecond at most, so call it often.
        `is_recovered`: nothing more comes back from below.
        """
        self._tell()
        self.learn_spaces()
        spaces = self._ledger.spaces
        if not any(space.max_age_s for space in spaces.values()):
            self._pass = []
            return False
        if not self._pass:
            self._all_read = self._was_over
            self._was_over = is_recovered
            self._pass = list(self._ledger.chains.runs)
        return self._drop_some()

    def _drop_some(self) -> bool:
        until_s, dropped = time.perf_counter() + _SLICE_S, False
        while self._pass and time.perf_counter() < until_s:
            run = self._ledger.chains.runs.get(self._pass[-1])
            if run is None or run.condemned or not run.space.max_age_s:
                self._pass.pop()
                continue
            places = self._too_old(run)
            if places:
                self._ledger.age(run, places)
                dropped = True
            else:
                self._pass.pop()
        return dropped

    def _too_old(self, run: Run) -> Sequence[int]:
        """Places of blocks of the run that must go, from its end; a few."""
        now_s, max_age_s = self.now_s(), run.space.max_age_s
        limit_s = now_s - max_age_s + min(max_age_s * _EARLY_SHARE, _EARLY_S_MAX)
        if run.oldest_s > limit_s and self._all_read:
            return ()
        places, oldest_s = [], 2**32 - 1
        for place in range(len(run) - 1, -1, -1):
            if run.state[place]:
                stored_s = run.written[place]
                if stored_s <= limit_s or stored_s > now_s + _FUTURE_S:
                    places.append(place)
                    if len(places) == _DROPPED_MAX:
                        return places
                oldest_s = min(oldest_s, stored_s)
        if not places:
            run.oldest_s = oldest_s
        return places

    def __repr__(self) -> str:
        return f"<Ageing, {len(self._pass)} runs to look at>"
