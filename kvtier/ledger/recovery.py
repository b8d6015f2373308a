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


class _Block(NamedTuple):
    key: bytes
    parent: bytes
    position: int
    slots: tuple[int, ...]
    checksums: tuple[int, ...]


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
    for block in blocks.values():
        if block.key not in placed:
            slots.release(block.slots)
    circular = {
        slot for block in blocks.values() if block.key not in placed for slot in block.slots
    }
    rejected.extend(claim for claim in believed if circular and claim.slot in circular)
    return len(placed), rejected


def _believable(
    space: Namespace, slot_bytes: int, claims: Sequence[Claim]
) -> tuple[list[Claim], list[Claim]]:
    size, shards = space.shard_bytes, space.shards
    # One damaged record must not speak for all others.
    sizes = Counter(map(len, (claim.label.key for claim in claims)))
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
    if space.shards == 1:
        blocks: dict[bytes, _Block] = {}
        doubled: list[Claim] = []
        for claim in claims:
            label = claim.label
            if label.key in blocks:
                doubled.append(claim)
                continue
            blocks[label.key] = _Block(
                label.key, label.parent, label.position, (claim.slot,), (label.checksum,)
            )
        return blocks, doubled
    by_key: dict[bytes, dict[int, Claim]] = {}
    torn: list[Claim] = []
    for claim in claims:
        shards = by_key.setdefault(claim.label.key, {})
        if claim.label.shard in shards:
            torn.append(claim)
        else:
            shards[claim.label.shard] = claim
    blocks = {}
    for key, shards in by_key.items():
        if len(shards) < space.shards:
            torn.extend(shards.values())
            continue
        members = [shards[shard] for shard in range(space.shards)]
        label = members[0].label
        blocks[key] = _Block(
            key,
            label.parent,
            label.position,
            tuple(m.slot for m in members),
            tuple(m.label.checksum for m in members),
        )
    return blocks, torn


def _place_chains(
    ledger: Ledger, space: Namespace, tier: TierId, blocks: dict[bytes, _Block]
) -> set[bytes]:
    children: dict[bytes, list[_Block]] = {}
    starts: list[_Block] = []
    for block in blocks.values():
        if block.parent in blocks:
            children.setdefault(block.parent, []).append(block)
        else:
            starts.append(block)
    placed: set[bytes] = set()
    while starts:
        block = starts.pop()
        stretch = [block]
        branches = children.get(block.key, ())
        while len(branches) == 1 and len(stretch) < RUN_BLOCKS_MAX:
            stretch.append(branches[0])
            branches = children.get(branches[0].key, ())
        starts.extend(branches)
        placed.update(member.key for member in stretch)
        ledger.chains.adopt(
            space,
            tier,
            parent=block.parent,
            position=block.position,
            keys=[member.key for member in stretch],
            slots=array("I", [slot for member in stretch for slot in member.slots]),
            checksums=array("Q", [c for member in stretch for c in member.checksums]),
        )
    return placed
