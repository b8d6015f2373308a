"""Bugs put into the production code, each of which the harness must find (CHAOS_PLANT)."""

from __future__ import annotations

import os
from typing import Any

from stores import Node

import kvtier.tiers.slots
from kvtier.ledger.ledger import DISPLACED
from kvtier.ledger.moves import Moves


def plant(node: Node) -> None:
    """Plants what the environment names into this process."""
    name = os.environ.get("CHAOS_PLANT", "")
    if name:
        BUGS[name](node)


def checksum_off(_: Node) -> None:
    """What was read is not compared with what was written."""
    kvtier.tiers.slots._verify = lambda *_: None  # type: ignore[assignment]


def evict_forgets_the_disk(node: Node) -> None:
    """An evict answers before anything is durable, and wipes nothing."""

    async def forgetful(*_: object) -> None:
        pass

    node.store.keeper.erase_for_good = forgetful  # type: ignore[method-assign]
    node.store.keeper._erase_pending = forgetful  # type: ignore[method-assign]


def source_freed_early(_: Node) -> None:
    """A demotion gives its source away when it is planned, not when the target is readable."""
    plan = Moves._plan

    def early(self: Moves, run: Any, place: int, *arguments: Any, **options: Any) -> Any:
        move = plan(self, run, place, *arguments, **options)
        if move is not None and move.drop_source:
            self._ledger.free(run, place, move.route.source, DISPLACED)
        return move

    Moves._plan = early  # type: ignore[method-assign]


BUGS = {
    "checksum-off": checksum_off,
    "evict-forgets-the-disk": evict_forgets_the_disk,
    "source-freed-early": source_freed_early,
}
