"""The first file to read: one block's life through the ledger, the whole state after each step.

    reserve -> commit -> lookup -> lease -> demote (kept while leased) -> lookup below -> promote
    -> evict under a lease -> release -> erased: as if it had never been

Bytes do not exist here: where the store would copy, the story just says that it was done.
"""

from __future__ import annotations

from kvtier.block import BlockFormat, Keys, NamespaceSpec, Reason, SegmentPlan, TierId
from kvtier.ledger.filling import Filled, Filling
from kvtier.ledger.ledger import Ledger
from kvtier.ledger.moves import Moves
from kvtier.units import KIB

DRAM, SSD = TierId.DRAM, TierId.SSD
KEYS = Keys.of([b"block-0".ljust(16), b"block-1".ljust(16)])
FIRST = Keys.of([KEYS[0]])
CHECKSUM = 0xC0FFEE


class Books:
    """A ledger with its reservations and moves, and what they say in one line."""

    def __init__(self) -> None:
        plans = [
            SegmentPlan(DRAM, 2, 16 * KIB),
            SegmentPlan(SSD, 2, 32 * KIB, header_bytes=4 * KIB),
        ]
        self.ledger = Ledger(plans)
        self.filling = Filling(self.ledger)
        self.moves = Moves(self.ledger)
        shape = BlockFormat(1, 1, 1, "float32", block_tokens=16, opaque_bytes=4 * KIB)
        self.space = self.ledger.open_namespace(NamespaceSpec(model="tiny", format=shape))


def assert_books(
    books: Books,
    *,
    blocks: int,
    tiers: str,
    dram_used: int = 0,
    ssd_used: int = 0,
    reservations: int = 0,
    leases: int = 0,
    moves: int = 0,
    erasing: bool = False,
) -> None:
    ledger, space = books.ledger, books.space
    held = books.filling.held_slots()
    for tier, count in books.moves.held_slots().items():
        held[tier] = held.get(tier, 0) + count
    ledger.check(held=held)
    assert space.block_count == blocks
    found, _, tokens = ledger.lookup([(space, KEYS)])
    assert " ".join(f"{run.tier.label}:{run.block_count}" for run in found[0].runs) == tiers
    assert tokens == found[0].block_count * 16
    assert ledger.slots[DRAM].counts().used_slots == dram_used
    assert ledger.slots[SSD].counts().used_slots == ssd_used
    assert len(books.filling.reservations) == reservations
    assert len(ledger.leases) == leases
    assert len(books.moves.moves) == moves
    assert ledger.is_erasing is erasing


def test_life_of_a_block() -> None:
    books = Books()
    ledger, filling, moves, space = books.ledger, books.filling, books.moves, books.space
    assert_books(books, blocks=0, tiers="")

    # Reserve: room to write two blocks; neither is visible.
    offer = filling.reserve(
        space, KEYS, parent=b"", position=0, shard=0, session_id=1,
        count_max=9, now_s=0, deadline_s=9,
    )  # fmt: skip
    assert offer.reservation is not None
    assert (offer.granted, offer.covered_count, offer.present_count) == ((0, 1), 2, 0)
    assert_books(books, blocks=0, tiers="", dram_used=2, reservations=1)

    # Commit the first: visible when the copy has ended, not before.
    entries = filling.begin_commit(offer.reservation, [0])
    assert_books(books, blocks=0, tiers="", dram_used=2, reservations=1)
    assert filling.finish_commit(offer.reservation, entries, [CHECKSUM]) == Filled([KEYS[0]], 0, 0)
    assert_books(books, blocks=1, tiers="dram:1", dram_used=2, reservations=1)

    # Abort the rest: as if it had never been reserved.
    filling.abort(offer.reservation)
    assert_books(books, blocks=1, tiers="dram:1", dram_used=1)
    assert ledger.lookup([(space, KEYS)])[0][0].reason is Reason.NEVER_STORED

    # Demotion begins: the block is in DRAM until the target is readable.
    (demotion,) = moves.shrink_to(DRAM, 0)
    assert (str(demotion.route), demotion.drop_source) == ("dram->ssd", True)
    assert_books(books, blocks=1, tiers="dram:1", dram_used=1, ssd_used=1, moves=1)

    # A lease taken meanwhile keeps the source where it is.
    found, spans, _ = ledger.lookup([(space, FIRST)])
    lease = ledger.lease(
        space, FIRST, found[0].block_count, 0, spans[0],
        session_id=1, tenant="default", group="", now_s=0,
    )  # fmt: skip
    assert list(lease.slots or ()) == list(demotion.source_slots)
    demotion.labels[0].checksum = CHECKSUM
    assert moves.finish_move(demotion)
    assert_books(books, blocks=1, tiers="dram:1", dram_used=1, ssd_used=1, leases=1)

    # Nobody reads it: the copy that exists below too is dropped at once.
    ledger.release(lease.id)
    assert moves.shrink_to(DRAM, 0) == []
    assert_books(books, blocks=1, tiers="ssd:1", ssd_used=1)

    # Leased again: it waits for the promotion, and is answered when that has ended.
    found, spans, _ = ledger.lookup([(space, FIRST)])
    lease = ledger.lease(
        space, FIRST, 1, 0, spans[0], session_id=1, tenant="default", group="", now_s=1
    )
    assert not ledger.settle_lease(lease)
    (promotion,) = moves.promote(space, ledger.lease_spans(lease), 8)
    assert moves.promote(space, ledger.lease_spans(lease), 8) == [], "one move per block and target"
    assert_books(books, blocks=1, tiers="ssd:1", dram_used=1, ssd_used=1, leases=1, moves=1)
    promotion.labels[0].checksum = CHECKSUM
    assert moves.finish_move(promotion)
    assert ledger.settle_lease(lease)
    assert list(lease.slots or ()) == list(promotion.target_slots)
    assert_books(books, blocks=1, tiers="dram:1", dram_used=1, ssd_used=1, leases=1)

    # Evicted under the lease: hidden now, its bytes stay while they are read.
    assert ledger.evict(space, FIRST) == [KEYS[0]]
    assert ledger.lookup([(space, KEYS)])[0][0].reason is Reason.EVICTED
    assert_books(books, blocks=0, tiers="", dram_used=1, ssd_used=1, leases=1, erasing=True)
    ledger.release(lease.id)
    assert_books(books, blocks=0, tiers="", ssd_used=1, erasing=True)

    # Its record below is wiped; then the slot is free.
    (erasure,) = ledger.take_erasures()
    assert erasure.wipe
    assert erasure.label.key == KEYS[0]
    ledger.erased([erasure])
    assert_books(books, blocks=0, tiers="")
    assert not ledger.chains.runs, "forgotten"
