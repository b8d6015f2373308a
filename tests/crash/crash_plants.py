"""Bugs put into the production code, to see that the harness catches them.

`fsync`, `order` and `purge` spoil what is written; `checksum`, `generation` and `strays` what is
done with what is found.
"""

from __future__ import annotations

from typing import Any

import kvtier.tiers.recovery
import kvtier.tiers.slots
from kvtier.tiers.records import Arranger, Found, Shape
from kvtier.tiers.slab import Slab
from kvtier.tiers.upkeep import Upkeep
from kvtier.tiers.wipes import Wipes

WRITING = ("fsync", "order", "purge")
READING = ("checksum", "generation", "strays")


def plant(name: str) -> None:
    """Patches this process. An unknown name is a mistake in the harness."""
    if name:
        {
            "fsync": _fsync, "order": _order, "purge": _purge,
            "checksum": _checksum, "generation": _generation, "strays": _strays,
        }[name]()  # fmt: skip


def _fsync() -> None:
    """What was written to slabs is never synced."""
    Slab.sync = lambda self, failures_before: None  # type: ignore[method-assign]


def _order() -> None:
    """The catalogue lists blocks, and says so, before their bytes are on disk: one write late."""
    sync = Slab.sync
    late: list[tuple[Slab, int]] = []

    def postponed(slab: Slab, failures_before: int) -> None:
        while late:
            slab_before, before = late.pop()
            if slab_before.fd >= 0:
                sync(slab_before, before)
        late.append((slab, failures_before))

    Slab.sync = postponed  # type: ignore[method-assign]


def _purge() -> None:
    """What was purged is not overwritten."""
    Wipes.scour = lambda *_: 0  # type: ignore[method-assign]


def _strays() -> None:
    """What a cut left in slots that nothing names stays there."""
    Upkeep.sweep = lambda *_: None  # type: ignore[method-assign]


def _checksum() -> None:
    """What was read is believed."""
    kvtier.tiers.slots._verify = lambda *_: None


def _generation() -> None:
    """Neither epochs nor cuts are looked at."""

    def careless(pieces: Any, cuts: Any, segment_bytes: int, shapes: dict[bytes, Shape]) -> Found:
        anything = {digest: shape._replace(epoch=_Equal()) for digest, shape in shapes.items()}
        return Arranger(pieces, [(cut[0], 0) for cut in cuts], segment_bytes, anything).run()

    def is_here(self: Slab, record: Any, index: int) -> bool:
        return bool(record.slot_bytes == self.slot_bytes)

    kvtier.tiers.recovery.arrange = careless
    Slab._is_here = is_here  # type: ignore[method-assign]


class _Equal(int):
    """The epoch of every namespace is whatever it is compared with."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__
