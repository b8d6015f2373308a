"""Puts copies found again at start into the books, a stretch of a chain at a time.

A million blocks must not cost a million insertions (DESIGN section 9): a stretch whose keys nobody
knows becomes a run in one go. Clients are served meanwhile: what they stored, found or evicted
since is there already, and such a stretch is merged block by block.

Does not: read or judge records (tiers do), or forget what is refused here: the caller does.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from functools import lru_cache
from struct import Struct
from typing import Protocol

from kvtier.block import TierId
from kvtier.ledger.chain import Namespace, Run
from kvtier.ledger.ledger import DISPLACED, Ledger

# Blocks merged in one go: 20 us each.
MERGED_MAX = 64


class Stretch(Protocol):
    """Consecutive blocks of a chain; `tiers.records.Stretch` has these fields."""

    @property
    def parent(self) -> bytes: ...
    @property
    def position(self) -> int: ...
    @property
    def key_size(self) -> int: ...
    @property
    def keys(self) -> bytes: ...
    @property
    def slots(self) -> array[int]: ...
    @property
    def checksums(self) -> array[int]: ...
    @property
    def written(self) -> array[int]: ...


def adopt(ledger: Ledger, space: Namespace, tier: TierId, stretch: Stretch) -> bool:
    """Makes the stretch readable in the tier as one new run. False, and nothing was changed, when
    that cannot be: `merge` it.
    """
    size, packed = stretch.key_size, stretch.keys
    if space.key_size not in (0, size):
        return False
    keys = _unpacker(size, len(packed) // size).unpack(packed)
    if space.orphans and not space.orphans.keys().isdisjoint(keys):
        return False  # something hangs on one of them
    slots = ledger.slots[tier]
    slot_class = (space.tenant, space.slot_bytes[tier])
    if not slots.claim(stretch.slots, slot_class):
        return False
    run = ledger.chains.adopt(
        space,
        tier,
        parent=stretch.parent,
        position=stretch.position,
        keys=keys,
        packed=packed,
        slots=stretch.slots,
        checksums=stretch.checksums,
        written=stretch.written,
    )
    if run is None:
        slots.unclaim(stretch.slots, slot_class)
        return False
    space.key_size = size
    return True


@lru_cache(maxsize=64)
def _unpacker(size: int, count: int) -> Struct:
    return Struct(f"{size}s" * count)


def merge(
    ledger: Ledger, space: Namespace, tier: TierId, stretch: Stretch
) -> Iterator[tuple[int, list[int]]]:
    """As `adopt`, block by block beside what is there; MERGED_MAX blocks, then it yields how many
    of them are readable in the tier now, and the slots of the others. Between two turns the ledger
    may be used, but not cleared: throw the rest away then.
    """
    size, shards = stretch.key_size, space.shards
    parent = stretch.parent
    placed, refused = 0, array("I")
    for index in range(len(stretch.keys) // size):
        key = stretch.keys[index * size : (index + 1) * size]
        first, end = index * shards, (index + 1) * shards
        slots = stretch.slots[first:end]
        if _may_have(ledger, space, tier, key, slots):
            run, place = ledger.chains.insert(space, key, parent, stretch.position + index)
            checksums, written_s = stretch.checksums[first:end], stretch.written[index]
            _put(ledger, tier, run, place, slots, checksums, written_s)
            placed += 1
        else:
            refused.extend(slots)
        parent = key
        if index % MERGED_MAX == MERGED_MAX - 1:
            yield placed, list(refused)
            placed, refused = 0, array("I")
    yield placed, list(refused)


def _may_have(
    ledger: Ledger, space: Namespace, tier: TierId, key: bytes, slots: array[int]
) -> bool:
    if space.key_size not in (0, len(key)):
        return False
    found = ledger.chains.find(space, key)
    if found is not None and found[0].state[found[1]] >> tier & 1:
        return False
    return ledger.slots[tier].claim(slots, (space.tenant, space.slot_bytes[tier]))


def _put(
    ledger: Ledger,
    tier: TierId,
    run: Run,
    place: int,
    slots: array[int],
    checksums: array[int],
    written_s: int,
) -> None:
    """The block has this copy. One stored meanwhile that is not known to be the same bytes goes:
    what was computed again never displaces what is on stable storage.
    """
    shards = run.space.shards
    same = run.checksums[place * shards : (place + 1) * shards] == checksums
    ledger.chains.put_copy(run, place, tier, slots, checksums, written_s)
    run.space.forget_note(run.key(place))
    for other in ledger.tiers:
        if other is not tier and not same and run.state[place] >> other & 1:
            ledger.free(run, place, other, DISPLACED)
