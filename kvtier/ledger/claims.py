"""Claims: which block lies in which slot, asked from the side of the slots.

For those who walk over a tier as it lies on its device: scrub, and a tier that becomes smaller.

Does not: change what a block has; a pin only keeps slots from being given to anybody else.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kvtier.block import SLOT_BITS, Move, SlotLabel, TierId
from kvtier.ledger.chain import Namespace, Run
from kvtier.ledger.ledger import Ledger


class Claim(NamedTuple):
    """A slot that holds one shard of a block's copy. `place` is good until the next await."""

    slot: int
    run: Run
    place: int
    shard: int


def claims(
    ledger: Ledger, tier: TierId, segment: int, first: int, *, end: int, count_max: int
) -> tuple[list[Claim], int]:
    """Those of the segment's slots first..end, at most `count_max`, and the slot to go on from.
    A slot in use without a block (being written, being erased) has none.
    """
    slots, runs = ledger.slots[tier].segments[segment], ledger.chains.runs
    found: list[Claim] = []
    at = first
    while len(found) < count_max:
        at = slots.in_use.find(1, at, end)
        if at < 0:
            return found, end
        owner = slots.owner_runs[at]
        claim = _claim(runs[owner], tier, segment << SLOT_BITS | at) if owner else None
        if claim is not None and not claim.run.condemned:
            found.append(claim)
        at += 1
    return found, at


def _claim(run: Run, tier: TierId, slot: int) -> Claim | None:
    held, at = run.slots[tier], -1
    while held is not None:
        try:
            at = held.index(slot, at + 1)
        except ValueError:
            return None
        place, shard = divmod(at, run.space.shards)
        # A place without a copy may name a slot that it had once.
        if run.state[place] >> tier & 1:
            return Claim(slot, run, place, shard)
    return None


def pin(ledger: Ledger, tier: TierId, slots: Iterable[int]) -> int:
    """A holder of these slots: whatever becomes of their blocks, nobody else gets them before
    `unpin`. It is no use of the blocks: their order of eviction stays.
    """
    holder = ledger.next_id()
    for slot in slots:
        ledger.readers.setdefault((tier, slot), set()).add(holder)
    return holder


def unpin(ledger: Ledger, tier: TierId, slots: Iterable[int], holder: int) -> None:
    """The holder lets go of its slots; those of blocks that went meanwhile are erased now."""
    for slot in slots:
        readers = ledger.readers[tier, slot]
        readers.discard(holder)
        if not readers:
            del ledger.readers[tier, slot]
    ledger.end_holder(holder)


def lose(
    ledger: Ledger, tier: TierId, slot: int, label: SlotLabel
) -> tuple[Namespace, bytes] | None:
    """The copy in this slot is damaged: it is dropped, if it is still that block's. Returns
    namespace and key then.
    """
    segment, at = ledger.slots[tier].segments[slot >> SLOT_BITS], slot & ((1 << SLOT_BITS) - 1)
    owner = segment.owner_runs[at] if at < len(segment.owner_runs) else 0
    claim = _claim(ledger.chains.runs[owner], tier, slot) if owner else None
    if claim is None or claim.run.condemned:
        return None
    space, key = claim.run.space, claim.run.key(claim.place)
    if (space.digest, space.epoch, key) != (label.namespace, label.epoch, label.key):
        return None
    ledger.lose(space, key, tier)
    return space, key


def is_there(ledger: Ledger, move: Move) -> bool:
    """Whether the block that is to be moved still has, in these slots, the copy to be read."""
    tier, label = move.route.source, move.labels[0]
    space = ledger.spaces[move.namespace_id]
    found = ledger.chains.find(space, label.key)
    if found is None or found[0].condemned or space.epoch != label.epoch:
        return False
    run, place = found
    return bool(
        run.state[place] >> tier & 1 and tuple(run.slots_of(place, tier)) == move.source_slots
    )
