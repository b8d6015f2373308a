"""Reservations and commits: what races, what repeats, what never becomes visible."""

from __future__ import annotations

from typing import Any

import pytest
from books import DRAM, Books, chain, keys_of

from kvtier.block import BLOCK_BYTES_MAX, BlockFormat, Keys
from kvtier.errors import InvalidRequest, NotFound, ReservationExpired
from kvtier.ledger.filling import RESERVE_KEYS_MAX, Filled


def test_present_keys_are_skipped() -> None:
    books = Books()
    space = books.space()
    books.store(space, chain("a", 2))

    offer = books.reserve(space, chain("a", 4))

    assert (offer.granted, offer.covered_count, offer.present_count) == ((2, 3), 4, 2)
    books.commit(offer)
    assert books.found(space, chain("a", 4)) == 4
    books.check()


def test_the_longest_prefix_that_has_room_is_granted() -> None:
    books = Books(segments=1)
    space = books.space()
    offer = books.reserve(space, chain("a", 6))
    assert (offer.granted, offer.covered_count, offer.present_count) == ((0, 1, 2, 3), 4, 0)

    nothing = books.reserve(space, chain("b", 2))
    assert (nothing.reservation, nothing.covered_count) == (None, 0)
    assert books.used() == (4, 0)
    books.check()


@pytest.mark.parametrize("shards", [1, 2])
def test_no_more_than_count_max_is_granted(shards: int) -> None:
    books = Books()
    space = books.space(shards=shards)
    books.store(space, keys_of("b"))

    offer = books.reserve(space, keys_of("a", "b", "c", "d"), count_max=2)

    assert (offer.granted, offer.covered_count, offer.present_count) == ((0, 2), 3, 1)
    assert books.used()[0] == 3 * shards
    assert books.reserve(space, keys_of("x"), count_max=0).reservation is None
    assert books.used()[0] == 3 * shards
    books.check()


def test_reserving_what_is_there_leaves_other_tenants_room_alone() -> None:
    """Found: it took every free slot for a moment, so each segment became this tenant's home."""
    books = Books()
    red, blue = books.space("red"), books.space("blue")
    books.store(red, chain("a", 4))
    assert books.reserve(red, chain("a", 4)).reservation is None
    assert books.ledger.slots[DRAM].available("blue", blue.slot_bytes[DRAM]) == 12


def test_children_may_come_before_their_parent() -> None:
    books = Books()
    space = books.space()
    whole = chain("a", 4)
    books.store(space, chain("a", 2, first=2), parent=whole[1])
    assert books.found(space, whole) == 0
    books.store(space, keys_of("a0"))
    assert books.found(space, whole) == 1
    books.store(space, keys_of("a1"), parent=whole[0])
    assert books.found(space, whole) == 4
    assert len(books.ledger.lookup([(space, whole)])[1][0]) <= 2
    books.check()


def test_two_sessions_race_and_the_first_commit_wins() -> None:
    books = Books()
    space = books.space()
    first = books.reserve(space, keys_of("a"), session_id=1)
    second = books.reserve(space, keys_of("a"), session_id=2)
    assert books.used()[0] == 2
    assert books.commit(second) == [keys_of("a")[0]]
    entries = books.filling.begin_commit(first.reservation, None)  # type: ignore[arg-type]
    filled = books.filling.finish_commit(first.reservation, entries, [1])  # type: ignore[arg-type]
    assert filled == Filled([], 1, 0)
    assert books.used()[0] == 1
    books.check()


def test_half_the_shards_are_never_visible() -> None:
    books = Books()
    space = books.space(shards=2)
    keys = keys_of("a")
    books.commit(books.reserve(space, keys, shard=0))
    assert books.found(space, keys) == 0
    assert books.used()[0] == 2
    assert books.reserve(space, keys, shard=0).present_count == 1

    # Its other shard never comes: the room goes back.
    books.filling.expire_partials(11)
    assert books.used()[0] == 0
    books.check()

    books.commit(books.reserve(space, keys, shard=1))
    books.commit(books.reserve(space, keys, shard=0))
    assert books.found(space, keys) == 1
    books.check()


def test_a_rival_commits_after_the_first_writer_gave_up() -> None:
    """Found: the abort took the whole block's room, and the rival's commit stopped the daemon."""
    books = Books()
    space = books.space(shards=2)
    keys = keys_of("a")
    first = books.reserve(space, keys, shard=0, session_id=1)
    rival = books.reserve(space, keys, shard=0, session_id=2)
    assert books.used()[0] == 3
    books.filling.abort(first.reservation)  # type: ignore[arg-type]
    books.check()

    assert books.commit(rival) == []
    assert books.commit(books.reserve(space, keys, shard=1)) == [keys[0]]
    assert books.used()[0] == 2
    books.check()


def test_a_rival_commits_after_the_block_came_and_went() -> None:
    """Found: the same, when the block was completed by others and evicted since."""
    books = Books()
    space = books.space(shards=2)
    keys = keys_of("a")
    first = books.reserve(space, keys, shard=0, session_id=1)
    rival = books.reserve(space, keys, shard=0, session_id=2)
    books.commit(first)
    books.commit(books.reserve(space, keys, shard=1))
    books.ledger.evict(space, keys)

    assert books.commit(rival) == []
    assert books.found(space, keys) == 0
    assert books.used()[0] == 0
    books.check()


def test_a_commit_of_an_older_epoch_stores_nothing() -> None:
    books = Books()
    for shards in (1, 2):
        space = books.space(shards=shards)
        offer = books.reserve(space, keys_of("a"))
        books.ledger.clear(space)
        books.filling.clear(space)
        fresh = books.reserve(space, keys_of("a"))
        assert books.commit(offer) == []
        books.check()
        assert books.commit(fresh) == ([keys_of("a")[0]] if shards == 1 else [])
        books.check()


# --- bad input: a clear error, nothing changed


def test_bad_keys_are_refused() -> None:
    books = Books()
    space = books.space()
    for packed, size, match in (
        (b"", 16, "number of keys is 0"),
        (b"x" * 15, 15, "key length in bytes is 15"),
        (b"x" * 65, 65, "key length in bytes is 65"),
        (b"x" * 24, 16, "no multiple"),
        (b"x" * 16 * 65_537, 16, "number of keys is 65537"),
    ):
        with pytest.raises(InvalidRequest, match=match):
            Keys(packed, size)
    with pytest.raises(InvalidRequest, match="twice in one call"):
        books.reserve(space, keys_of("a", "b", "a"))
    with pytest.raises(InvalidRequest, match="parent of 8 bytes"):
        books.reserve(space, keys_of("a"), parent=b"x" * 8)
    with pytest.raises(InvalidRequest, match="shard 1 of a format with 1"):
        books.reserve(space, keys_of("a"), shard=1)
    assert books.used() == (0, 0)
    books.check()


def test_two_first_reservations_agree_on_the_key_length() -> None:
    """Found: both were granted, and the second commit tore the chain's packed keys."""
    books = Books()
    space = books.space()
    offer = books.reserve(space, keys_of("a"))
    with pytest.raises(InvalidRequest, match="keys of 32 bytes"):
        books.reserve(space, Keys(b"b" * 32, 32))
    books.commit(offer)
    for call in (books.found, books.ledger.evict, books.ledger.pin):
        with pytest.raises(InvalidRequest, match="keys of 32 bytes"):
            call(space, Keys(b"b" * 32, 32))
    books.check()


def test_a_commit_is_made_once() -> None:
    books = Books()
    space = books.space()
    offer = books.reserve(space, chain("a", 3))
    reservation = offer.reservation
    assert reservation is not None
    for indexes in ([0, 0], [3], [-1]):
        with pytest.raises(InvalidRequest):
            books.filling.begin_commit(reservation, indexes)
    books.commit(offer, [1])
    with pytest.raises(ReservationExpired, match="committed already"):
        books.filling.begin_commit(reservation, [0, 1])
    assert books.found(space, chain("a", 1)) == 0, "the refused call began nothing"
    books.commit(offer)
    with pytest.raises(ReservationExpired):
        books.filling.get(reservation.id)
    assert books.found(space, chain("a", 3)) == 3
    books.check()


def test_commit_after_expiry_stores_nothing() -> None:
    books = Books()
    space = books.space()
    offer = books.reserve(space, chain("a", 2), deadline_s=5)
    copying = books.filling.begin_commit(offer.reservation, [0])  # type: ignore[arg-type]
    assert books.filling.expire(4.9) == []
    assert books.filling.expire(5) == [offer.reservation]
    with pytest.raises(ReservationExpired):
        books.filling.get(offer.reservation.id)  # type: ignore[union-attr]
    assert books.used()[0] == 1, "a slot that is written now is not given to others"
    books.filling.finish_commit(offer.reservation, copying, [1])  # type: ignore[arg-type]
    assert books.used()[0] == 0
    assert books.found(space, chain("a", 2)) == 0
    books.check()


@pytest.mark.parametrize(
    "fields",
    [
        {"layers": 1024, "kv_heads": 4096, "head_dim": 65_536, "block_tokens": 65_536},
        {"opaque_bytes": BLOCK_BYTES_MAX + 1},
        {"opaque_bytes": 10, "shards": 3},
        {"layers": 0},
        {"dtype": "float7"},
        {"window_tokens": 5},
    ],
)
def test_a_format_out_of_range_is_refused(fields: dict[str, Any]) -> None:
    shape = {"layers": 1, "kv_heads": 1, "head_dim": 8, "dtype": "float32", "block_tokens": 16}
    with pytest.raises(InvalidRequest):
        BlockFormat(**{**shape, **fields})


def test_an_unknown_namespace_and_one_too_large() -> None:
    books = Books()
    with pytest.raises(NotFound, match="namespace 7 is not open"):
        books.ledger.space(7)
    with pytest.raises(InvalidRequest, match="does not fit a segment"):
        books.space(kib=20)
    assert not books.ledger.spaces


def test_one_reserve_looks_at_a_bounded_number_of_keys() -> None:
    books = Books(segments=4, segment_kib=4096)
    space = books.space()
    keys = chain("a", RESERVE_KEYS_MAX + 10)
    offer = books.reserve(space, keys)
    assert offer.covered_count == len(offer.granted) == RESERVE_KEYS_MAX
    books.check()
