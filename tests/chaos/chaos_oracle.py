"""Oracle: what the answers of all lives so far allow a store to hold. It is never killed.

It reads the lines that lives print (a file: they survive a kill), `S` a space, `C` a chain:

    begin S C | done S C durable|plain | evict S C FROM | evicted S C FROM
    clear S | cleared S | purge S | purged S | flush WHO | flushed WHO

An evict, clear or purge that was begun and not answered may have happened, in part.
"""

from __future__ import annotations

from dataclasses import dataclass

BLOCKS = 8


@dataclass(slots=True)
class Chain:
    """At least `least` and at most `most` blocks are there; `limit`: evicts that were begun."""

    least: int = 0
    most: int = BLOCKS
    limit: int = BLOCKS
    stored: bool = False

    def promise(self) -> None:
        self.least = self.limit


class Oracle:
    """Learns lines; `allowed()` is space -> chain -> [least, most] blocks. With `tight`, a full
    tier may forget anything, and only what was forgotten is promised.
    """

    def __init__(self, *, tight: bool = False) -> None:
        self.tight = tight
        self.chains: dict[str, dict[str, Chain]] = {}
        self.kept = self.gone = 0
        self._flushing: dict[str, list[Chain]] = {}

    def learn(self, lines: list[str]) -> None:
        """All lines of one life, which is over."""
        for line in lines:
            verb, *words = line.split(" ")
            learn = getattr(self, f"_on_{verb}", None)
            if learn is not None:
                learn(*words)
        self._flushing.clear()
        # What is in memory only went with that life.
        for chains in self.chains.values():
            for chain in chains.values():
                chain.stored = False

    def allowed(self) -> dict[str, dict[str, list[int]]]:
        return {
            space: {
                name: [0 if self.tight else chain.least, chain.most]
                for name, chain in chains.items()
            }
            for space, chains in self.chains.items()
        }

    def _on_begin(self, space: str, name: str) -> None:
        chains = self.chains.setdefault(space, {})
        chain = chains.setdefault(name, Chain())
        chain.most = BLOCKS
        chain.stored = False
        for asked in self._flushing.values():
            asked[:] = [other for other in asked if other is not chain]

    def _on_done(self, space: str, name: str, how: str) -> None:
        chain = self.chains[space][name]
        # What was evicted before is there again.
        chain.limit, chain.stored = BLOCKS, True
        if how == "durable":
            chain.promise()
            self.kept += 1

    def _on_evict(self, space: str, name: str, start: str) -> None:
        self._limit(self.chains[space][name], int(start))

    def _on_evicted(self, space: str, name: str, start: str) -> None:
        chain = self.chains[space][name]
        chain.most = min(chain.most, int(start))
        self.gone += 1

    def _on_clear(self, space: str) -> None:
        for chain in self.chains.get(space, {}).values():
            self._limit(chain, 0)

    def _on_cleared(self, space: str) -> None:
        for chain in self.chains.get(space, {}).values():
            chain.most = 0
        self.gone += 1

    _on_purge = _on_clear
    _on_purged = _on_cleared

    @staticmethod
    def _limit(chain: Chain, start: int) -> None:
        chain.limit = min(chain.limit, start)
        chain.least = min(chain.least, start)

    def _on_flush(self, who: str) -> None:
        self._flushing[who] = [
            chain for chains in self.chains.values() for chain in chains.values() if chain.stored
        ]

    def _on_flushed(self, who: str) -> None:
        for chain in self._flushing.pop(who, []):
            if chain.stored:
                chain.promise()
                self.kept += 1
