"""Making room: whose blocks go, in which order, and what never goes."""

from __future__ import annotations

from books import DRAM, SSD, Books, chain, keys_of

from kvtier.block import SegmentPlan
from kvtier.ledger import givers
from kvtier.ledger.ledger import Ledger
from kvtier.ledger.moves import Moves
from kvtier.units import KIB


def test_a_burst_larger_than_dram_loses_nothing() -> None:
    books = Books(segments=2, ssd_segments=16)
    space = books.space()
    for first in range(0, 32, 4):
        books.moves.make_room(DRAM, space, 4)
        books.finish()
        parent = chain("a", 32)[first - 1] if first else b""
        books.store(space, chain("a", 4, first=first), parent=parent)
    assert books.found(space, chain("a", 32)) == 32
    books.check()


def test_leased_blocks_hide_no_others() -> None:
    """Found: only the oldest runs were looked at, so leases that stand long hid all others."""
    count = givers._CANDIDATES_MAX + 10
    books = Books(segments=count // 2, ssd_segments=count)
    space = books.space()
    for n in range(count):
        books.store(space, keys_of(f"leased{n}"))
        books.lease(space, keys_of(f"leased{n}"))
    books.store(space, chain("free", 8))
    free = books.ledger.slots[DRAM].available("red", space.slot_bytes[DRAM])
    assert len(books.moves.make_room(DRAM, space, free + 8)) == 8


def test_parents_hide_no_leaves() -> None:
    """Found: as above, with parents that are older than all their children."""
    count = givers._CANDIDATES_MAX + 10
    books = Books(segments=count, ssd_segments=count)
    space = books.space()
    for n in range(count):
        books.store(space, keys_of(f"parent{n}"))
        books.ledger.pin(space, keys_of(f"parent{n}"))  # so that the child is a run of its own
    for n in range(count):
        books.store(space, keys_of(f"child{n}"), parent=keys_of(f"parent{n}")[0])
    free = books.ledger.slots[DRAM].available("red", space.slot_bytes[DRAM])
    moves = books.moves.make_room(DRAM, space, free + 8)
    assert len(moves) == 8
    assert all(move.labels[0].key.startswith(b"child") for move in moves)


def test_a_shrink_frees_what_it_was_asked_for() -> None:
    """Found: slots being erased still count as used, so every run gave the whole excess."""
    books = Books(ssd_segments=8)
    space = books.space()
    for name in "abcdef":
        books.moves.make_room(DRAM, space, 16)
        books.finish()
        books.store(space, chain(name, 4))
    books.moves.make_room(DRAM, space, 16)
    books.finish()
    assert books.used() == (0, 24)
    books.moves.shrink_to(SSD, 20 * space.slot_bytes[SSD])
    books.moves.shrink_to(SSD, 20 * space.slot_bytes[SSD])
    books.finish()
    assert books.used() == (0, 20)
    assert books.ledger.evicted_blocks == 4
    books.check()


def test_a_guaranteed_share_is_not_taken_by_others() -> None:
    books = Books(segments=2, ssd_segments=8)
    red, blue = books.space("red"), books.space("blue")
    books.store(red, chain("a", 4))
    books.store(blue, chain("b", 4))
    books.ledger.guaranteed_bytes["red", DRAM] = 3 * red.slot_bytes[DRAM]
    books.moves.shrink_to(DRAM, 0)
    books.finish()
    assert books.ledger.slots[DRAM].used_bytes_by_tenant == {
        "red": 3 * red.slot_bytes[DRAM],
        "blue": 0,
    }
    # Nor is a segment emptied for others, when that would eat into it.
    books.store(blue, chain("c", 4))
    assert books.moves.make_room(DRAM, blue, 4) != []
    books.finish()
    assert books.found(red, chain("a", 3)) == 3
    assert books.ledger.slots[DRAM].used_bytes_by_tenant["red"] == 3 * red.slot_bytes[DRAM]
    books.check()


def test_fewer_slots_than_shards_are_no_room() -> None:
    """Found: one free slot kept a segment from being emptied for a block of two shards."""
    books = Books(segments=2)
    other, space = books.space("red", model="other"), books.space("blue", shards=2)
    wide = books.space("blue", kib=4, model="single")
    books.store(other, chain("a", 4))
    lease = books.lease(wide, keys_of("none"))
    books.store(wide, chain("b", 3))
    books.ledger.release(lease)
    books.lease(wide, chain("b", 3))
    assert books.ledger.slots[DRAM].available("blue", space.slot_bytes[DRAM]) == 1
    books.moves.make_room(DRAM, space, 2)
    books.finish()
    segment = books.ledger.slots[DRAM].foreign_free("blue")
    assert segment is not None, "a segment of red's was emptied"


def test_a_block_that_fits_no_segment_below_is_forgotten_for_room() -> None:
    """Found: it was neither demoted nor forgotten, and its room never came back."""
    books = Books()
    books.ledger = Ledger(
        [SegmentPlan(DRAM, 2, 16 * KIB), SegmentPlan(SSD, 8, 8 * KIB, header_bytes=4 * KIB)]
    )
    books.moves = Moves(books.ledger)
    books.filling._ledger = books.ledger
    space = books.space(kib=16)
    books.store(space, chain("a", 2))
    assert books.moves.make_room(DRAM, space, 1) == []
    assert books.found(space, chain("a", 2)) == 1
    books.check()


def test_ancestors_stay_while_a_descendant_is_copied_up() -> None:
    """Found: while the end of a chain was promoted, the blocks before it were forgotten below."""
    books = Books(ssd_segments=8)
    space = books.space()
    books.store(space, chain("a", 3))
    books.moves.make_room(DRAM, space, 16)
    books.finish()
    _, (spans,), _ = books.ledger.lookup([(space, chain("a", 3))])
    (run, _, end) = spans[0]
    promotion = books.moves.promote(space, [(run, end - 1, end)], 8)
    assert len(promotion) == 1
    books.moves.shrink_to(SSD, 0)
    assert books.found(space, chain("a", 3)) == 3
    books.finish()
    books.moves.shrink_to(SSD, 0)
    books.finish()
    assert books.used()[1] == 0
    books.check()


def test_a_move_of_an_evicted_block_is_not_wanted() -> None:
    """Found: with no checksum taken yet, old bytes became a copy of what was stored since."""
    books = Books()
    space = books.space()
    offer = books.reserve(space, keys_of("a"))
    entries = books.filling.begin_commit(offer.reservation, None)  # type: ignore[arg-type]
    books.filling.finish_commit(offer.reservation, entries, [0])  # type: ignore[arg-type]
    (move,) = books.moves.shrink_to(DRAM, 0)
    books.ledger.evict(space, keys_of("a"))
    offer = books.reserve(space, keys_of("a"))
    entries = books.filling.begin_commit(offer.reservation, None)  # type: ignore[arg-type]
    books.filling.finish_commit(offer.reservation, entries, [0])  # type: ignore[arg-type]
    move.labels[0].checksum = 77

    assert not books.moves.finish_move(move)

    assert books.used() == (1, 1)
    (erasure,) = books.ledger.take_erasures()
    assert erasure.wipe
    books.ledger.erased([erasure])
    assert books.used() == (1, 0)
    books.check()


def test_a_failed_move_changes_nothing_and_a_damaged_source_is_lost() -> None:
    books = Books()
    space = books.space()
    books.store(space, keys_of("a"))
    (move,) = books.moves.shrink_to(DRAM, 0)
    books.moves.abort_move(move, source_corrupt=False, written=True)
    assert books.found(space, keys_of("a")) == 1
    books.finish()
    assert books.used() == (1, 0)
    (move,) = books.moves.shrink_to(DRAM, 0)
    books.moves.abort_move(move, source_corrupt=True)
    assert books.found(space, keys_of("a")) == 0
    assert books.used() == (0, 0)
    books.check()


def test_clear_twice_with_half_of_it_reaped() -> None:
    """Found: the second clear stopped the daemon (KeyError of a run that was reaped)."""
    books = Books()
    space = books.space()
    books.store(space, chain("a", 4))
    books.store(space, chain("b", 2), parent=chain("a", 4)[1])
    books.ledger.clear(space)
    assert books.ledger.reap(2)
    books.store(space, chain("c", 2))
    books.ledger.clear(space)
    while books.ledger.reap(1):
        books.check()
    assert books.used() == (0, 0)
    assert space.epoch == 3


def test_reap_takes_no_more_than_its_part() -> None:
    """Found: it took the whole subtree of a run at once, however large."""
    books = Books(segments=16)
    space = books.space()
    books.store(space, chain("root", 2))
    for n in range(8):
        books.store(space, chain(f"leaf{n}-", 4), parent=chain("root", 2)[0])
    before = books.used()[0]
    books.ledger.clear(space)
    assert books.ledger.reap(3)
    assert books.used()[0] == before - 3
    books.check()


def test_dead_blocks_are_not_demoted() -> None:
    """Found: blocks of a cleared namespace were written to the SSD tier for room."""
    books = Books()
    space = books.space()
    books.store(space, chain("a", 4))
    books.ledger.clear(space)
    assert books.moves.shrink_to(DRAM, 0) == []
    assert books.used() == (0, 0)
    assert not books.ledger.reap()
    books.check()
