"""Relocation: a copy changes its slots within one tier, so that a segment can be emptied.

    plan (slots taken elsewhere) --> Move, source tier = target tier --> finish | Moves.abort_move

The former slots are erased only after the new ones are readable. While it runs it is a move like
any other: one per block and target tier, and an evict waits for its end.

Does not: copy bytes, or choose what is relocated and what is evicted instead (resizing).
"""

from __future__ import annotations

from array import array

from kvtier.block import Move, Route, TierId
from kvtier.ledger.chain import Namespace, Run
from kvtier.ledger.claims import Claim, is_there
from kvtier.ledger.ledger import DISPLACED, Ledger
from kvtier.ledger.moves import Moves


def has_room(ledger: Ledger, space: Namespace, tier: TierId) -> bool:
    """Whether a block of this namespace finds slots in the tier now."""
    return ledger.slots[tier].available(space.tenant, space.slot_bytes[tier]) >= space.shards


def plan(ledger: Ledger, moves: Moves, run: Run, place: int, tier: TierId) -> Move | None:
    """A move of the block's copy to other slots of the tier, which are taken; None when there are
    none, too many moves run, or one of this block to this tier does.
    """
    space, key = run.space, run.key(place)
    slots, slot_bytes = ledger.slots[tier], space.slot_bytes[tier]
    if moves.is_full or (space.id, key, tier) in moves.by_target:
        return None
    if not has_room(ledger, space, tier):
        return None
    move = Move(
        id=ledger.next_id(),
        namespace_id=space.id,
        route=Route(tier, tier),
        source_slots=tuple(run.slots_of(place, tier)),
        target_slots=tuple(slots.acquire(space.tenant, slot_bytes, space.shards)),
        source_slot_bytes=slot_bytes,
        target_slot_bytes=slot_bytes,
        labels=tuple(ledger.label(run, place, shard) for shard in range(space.shards)),
    )
    moves.begin(space, move)
    return move


def finish(ledger: Ledger, moves: Moves, move: Move) -> bool:
    """The new slots hold the bytes: the copy is there now. False when the block, or this copy of
    it, went away meanwhile: the new slots are given back.
    """
    tier, key = move.route.target, move.labels[0].key
    space = moves.end(move)
    found = ledger.chains.find(space, key)
    wanted = is_there(ledger, move)
    if found is None or not wanted:
        ledger.discard_target(tier, move.target_slots, move.labels, written=True)
    else:
        ledger.replace_copy(*found, tier, move.target_slots)
        # What reading found: of a recovered copy that is encrypted only the former tag was known.
        first = found[1] * space.shards
        checksums = array("Q", (label.checksum for label in move.labels))
        found[0].checksums[first : first + space.shards] = checksums
    ledger.end_holder(move.id)
    return wanted


def drop(ledger: Ledger, claim: Claim, tier: TierId) -> bool:
    """Drops a copy that has no place any longer. False: it is pinned, leased or being read."""
    run, place = claim.run, claim.place
    if ledger.chains.runs.get(run.id) is not run or place >= len(run):
        return True  # it went meanwhile
    if not run.state[place] >> tier & 1:
        return True
    if run.pins or place < ledger.leased_end(run) or (tier, claim.slot) in ledger.readers:
        return False
    ledger.free(run, place, tier, DISPLACED)
    ledger.evicted_blocks += not run.state[place]
    ledger.chains.trim(run, DISPLACED)
    return True


def set_segment_count(ledger: Ledger, tier: TierId, count: int) -> None:
    """The tier has so many segments from now on; those that go are withheld and empty."""
    ledger.slots[tier].resize(count)
    ledger.plans[tier] = ledger.slots[tier].plan
