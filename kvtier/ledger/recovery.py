"""Puts copies found again at start back into the books, whole chains at a time.

A million records must not cost a million separate insertions (DESIGN section 9: served again
within 7 s), so chains are followed from parent to child in a dict and become runs in one go.

Does not: read the records (tiers do) or believe them blindly: a slot claimed twice, a shard
missing, a size that is not the namespace's, or parents that run in a circle are rejected.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from kvtier.block import SlotLabel, TierId
from kvtier.ledger.chain import RUN_BLOCKS_MAX, Namespace
from kvtier.ledger.ledger import Ledger


class Claim(NamedTuple):
    """A record of one shard's copy; `tiers.base.SlotRecord` has the same fields."""

    slot: int
    slot_bytes: int
    label: SlotLabel


# A whole block's claims, one a shard.
_Block = tuple[Claim, ...]


def restore(
    ledger: Ledger, space: Namespace, tier: TierId, claims: Sequence[Claim]
) -> tuple[int, list[Claim]]:
    """Makes every whole block of `claims` (all of this namespace) readable in the tier.

    Returns the number of blocks and the claims that could not be believed. Call it once a
    namespace, before anything else is stored in it.
    """
    slots = ledger.slots[tier]
    expected = space.slot_bytes[tier]
    believed, rejected = _believable(space, expected, claims)
    refused = slots.claim_all([claim.slot for claim in believed], (space.tenant, expected))
    if refused:
        rejected.extend(claim for claim in believed if claim.slot in refused)
        believed = [claim for claim in believed if claim.slot not in refused]
    blocks, torn = _whole_blocks(space, believed)
    if torn:
        slots.release(claim.slot for claim in torn)
        rejected.extend(torn)
    placed = _place_chains(ledger, space, tier, blocks)
    if placed < len(blocks):
        # Those whose parents run in a circle were not reached from any start.
        circular = [c for k, block in blocks.items() if k not in space.index for c in block]
        slots.release(claim.slot for claim in circular)
        rejected.extend(circular)
    return placed, rejected


def _believable(
    space: Namespace, slot_bytes: int, claims: Sequence[Claim]
) -> tuple[list[Claim], list[Claim]]:
    size, shards = space.shard_bytes, space.shards
    # One damaged record must not speak for all others; a hundred of them are asked.
    sizes = Counter(len(claim.label.key) for claim in claims[:100])
    key_size = space.key_size or (sizes.most_common(1)[0][0] if sizes else 0)
    space.key_size = key_size
    believed: list[Claim] = []
    rejected: list[Claim] = []
    for claim in claims:
        label = claim.label
        fits = (
            claim.slot_bytes == slot_bytes
            and label.size_bytes == size
            and label.shard < shards
            and len(label.key) == key_size
        )
        (believed if fits else rejected).append(claim)
    return believed, rejected


def _whole_blocks(
    space: Namespace, claims: Sequence[Claim]
) -> tuple[dict[bytes, _Block], list[Claim]]:
    torn: list[Claim] = []
    if space.shards == 1:
        single: dict[bytes, _Block] = {}
        for claim in claims:
            first = single.setdefault(claim.label.key, (claim,))
            if first[0] is not claim:
                torn.append(claim)
        return single, torn
    by_key: dict[bytes, dict[int, Claim]] = {}
    for claim in claims:
        first_claim = by_key.setdefault(claim.label.key, {}).setdefault(claim.label.shard, claim)
        if first_claim is not claim:
            torn.append(claim)
    blocks: dict[bytes, _Block] = {}
    for key, shards in by_key.items():
        if len(shards) < space.shards:
            torn.extend(shards.values())
        else:
            blocks[key] = tuple(shards[shard] for shard in range(space.shards))
    return blocks, torn


def _place_chains(
    ledger: Ledger, space: Namespace, tier: TierId, blocks: dict[bytes, _Block]
) -> int:
    """Makes runs of all chains that have a start; returns how many blocks that were."""
    first_child: dict[bytes, bytes] = {}
    more_children: dict[bytes, list[bytes]] = {}
    starts: list[bytes] = []
    for key, block in blocks.items():
        parent = block[0].label.parent
        if parent not in blocks:
            starts.append(key)
        elif first_child.setdefault(parent, key) is not key:
            more_children.setdefault(parent, []).append(key)
    placed = 0
    while starts:
        key = starts.pop()
        label = blocks[key][0].label
        stretch = [key]
        child = first_child.get(key)
        while child is not None and len(stretch) < RUN_BLOCKS_MAX and key not in more_children:
            key = child
            stretch.append(key)
            child = first_child.get(key)
        if child is not None:
            starts.append(child)
            starts.extend(more_children.get(key, ()))
        placed += len(stretch)
        members = [claim for key in stretch for claim in blocks[key]]
        ledger.chains.adopt(
            space,
            tier,
            parent=label.parent,
            position=label.position,
            keys=stretch,
            slots=array("I", [claim.slot for claim in members]),
            checksums=array("Q", [claim.label.checksum for claim in members]),
        )
    return placed
