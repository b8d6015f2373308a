"""Bugs put into the production code, each of which the harness must find (CHAOS_PLANT).

`early` ones are planted before a store opens, `late` ones into an open store.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from stores import Node

import kvtier.tiers.slots
from kvtier.ledger.ledger import DISPLACED
from kvtier.ledger.moves import Moves
from kvtier.tiers.base import SlotRecord


def early() -> None:
    """Plants what the environment names, if it is code."""
    EARLY.get(os.environ.get("CHAOS_PLANT", ""), lambda: None)()


def late(node: Node) -> None:
    """Plants what the environment names, if it is in a store."""
    LATE.get(os.environ.get("CHAOS_PLANT", ""), lambda _: None)(node)


def _everywhere(name: str, original: Any, planted: Any) -> None:
    """In every module that has imported it by name."""
    for module in list(sys.modules.values()):
        if getattr(module, name, None) is original:
            setattr(module, name, planted)


def checksum_off() -> None:
    """What was read is not compared with what was written."""
    _everywhere("_verify", kvtier.tiers.slots._verify, lambda *_, **__: None)


def generation_not_checked() -> None:
    """Every copy of a block found in the slabs is as new as any other."""
    unpack = kvtier.tiers.slots.unpack_slot_header

    def planted(*arguments: Any, **options: Any) -> SlotRecord:
        record = unpack(*arguments, **options)
        return record._replace(label=replace(record.label, generation=1 << 48))

    _everywhere("unpack_slot_header", unpack, planted)


def source_freed_early() -> None:
    """A demotion gives its source away when it is planned, not when the target is readable."""
    plan = Moves._plan

    def planted(self: Moves, run: Any, place: int, *arguments: Any, **options: Any) -> Any:
        move = plan(self, run, place, *arguments, **options)
        if move is not None and move.drop_source:
            self._ledger.free(run, place, move.route.source, DISPLACED)
        return move

    Moves._plan = planted  # type: ignore[method-assign]


def evict_forgets_the_disk(node: Node) -> None:
    """An evict answers before anything is durable, and wipes nothing."""

    async def forgetful(*_: object, **__: object) -> None:
        pass

    erasing: Any = node.store.keeper.erasing
    erasing.for_good = forgetful
    erasing.run = forgetful


EARLY: dict[str, Callable[[], None]] = {
    "checksum-off": checksum_off,
    "generation-not-checked": generation_not_checked,
    "source-freed-early": source_freed_early,
}
LATE: dict[str, Callable[[Node], None]] = {"evict-forgets-the-disk": evict_forgets_the_disk}
