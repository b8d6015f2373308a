"""restore: what was found at start comes back whole, or is rejected and counted."""

from __future__ import annotations

import random

from books import SSD, Books, keys_of

from kvtier.block import SLOT_BITS, Keys, SegmentPlan, SlotLabel, TierId
from kvtier.ledger.chain import Namespace
from kvtier.ledger.ledger import Ledger
from kvtier.ledger.recovery import Claim, restore
from kvtier.units import KIB


def claim(
    space: Namespace, slot: int, key: str, parent: str = "", *, shard: int = 0, position: int = 0
) -> Claim:
    label = SlotLabel(
        space.digest, space.epoch, keys_of(key)[0], keys_of(parent)[0] if parent else b"",
        position, shard, space.shard_bytes, checksum=slot + 1,
    )  # fmt: skip
    return Claim(slot, space.slot_bytes[SSD], label)


def test_ten_thousand_blocks_with_branches_come_back() -> None:
    per_segment = 64
    plans = [
        SegmentPlan(TierId.DRAM, 2, 16 * KIB),
        SegmentPlan(SSD, 10_000 // per_segment + 1, per_segment * 8 * KIB, header_bytes=4 * KIB),
    ]
    books = Books()
    books.ledger = Ledger(plans)
    space = books.space()
    rng = random.Random(3)
    parents: dict[str, str] = {}
    names: list[str] = []
    for n in range(10_000):
        fresh = rng.random() < 0.01
        parents[f"k{n}"] = "" if fresh or not names else rng.choice(names[-3:])
        names.append(f"k{n}")
    claims = [
        claim(space, n // per_segment << SLOT_BITS | n % per_segment, name, parents[name])
        for n, name in enumerate(names)
    ]
    rng.shuffle(claims)

    assert restore(books.ledger, space, SSD, claims) == (10_000, [])

    books.ledger.check(held={})
    for name in rng.sample(names, 300):
        path = [name]
        while parents[path[-1]]:
            path.append(parents[path[-1]])
        assert books.found(space, keys_of(*reversed(path))) == len(path)
    for one in rng.sample(claims, 300):
        run, place = books.ledger.chains.find(space, one.label.key) or (None, 0)
        assert run is not None
        assert list(run.slots_of(place, SSD)) == [one.slot]
        assert books.ledger.label(run, place, 0).checksum == one.label.checksum
        assert books.ledger.label(run, place, 0).parent == one.label.parent


def test_a_chain_that_starts_in_the_middle_is_joined_later() -> None:
    books = Books()
    space = books.space()
    claims = [claim(space, 0, "a1", "a0"), claim(space, 1, "a2", "a1")]
    assert restore(books.ledger, space, SSD, claims) == (2, [])
    assert books.found(space, keys_of("a0", "a1", "a2")) == 0
    books.store(space, keys_of("a0"))
    assert books.found(space, keys_of("a0", "a1", "a2")) == 3
    books.check()


def test_two_claims_to_one_slot_are_both_rejected() -> None:
    """Found: both were believed, and two blocks shared one slot."""
    books = Books()
    space = books.space()
    claims = [claim(space, 0, "a"), claim(space, 0, "b"), claim(space, 1, "c")]
    count, rejected = restore(books.ledger, space, SSD, claims)
    assert (count, rejected) == (1, claims[:2])
    assert [books.found(space, keys_of(key)) for key in "abc"] == [0, 0, 1]
    books.check()


def test_what_cannot_be_believed_is_rejected() -> None:
    books = Books()
    space = books.space()
    good = claim(space, 0, "good")
    wrong_size = claim(space, 1, "size")
    wrong_size.label.size_bytes += 1
    wrong_slot = claim(space, 2, "slot")._replace(slot_bytes=4 * KIB)
    no_shard = claim(space, 3, "shard", shard=1)
    far_slot = claim(space, 9 << SLOT_BITS, "far")
    same_key = claim(space, 1, "good")
    circle = [claim(space, 2, "x", "y"), claim(space, 3, "y", "x")]
    claims = [good, wrong_size, wrong_slot, no_shard, far_slot, same_key, *circle]

    count, rejected = restore(books.ledger, space, SSD, claims)

    assert count == 1
    assert {id(one) for one in rejected} == {id(one) for one in claims[1:]}
    assert books.used() == (0, 1)
    books.check()


def test_one_record_with_an_odd_key_does_not_speak_for_all() -> None:
    """Found: the first record's key length decided, and all others were rejected."""
    books = Books()
    space = books.space()
    odd = claim(space, 3, "odd")
    odd.label.key += b"x"
    claims = [odd, claim(space, 0, "a"), claim(space, 1, "b", "a")]
    assert restore(books.ledger, space, SSD, claims) == (2, [odd])
    assert space.key_size == 16
    books.check()


def test_shards_come_back_together_or_not_at_all() -> None:
    books = Books()
    space = books.space(shards=2)
    whole = [claim(space, 0, "a"), claim(space, 1, "a", shard=1)]
    half = [claim(space, 2, "b", "a", shard=1)]
    doubled = [claim(space, 3, "a", shard=1)]
    circle = [
        claim(space, 1 << SLOT_BITS | 2 * n + shard, a, b, shard=shard)
        for n, (a, b) in enumerate((("x", "y"), ("y", "x")))
        for shard in (0, 1)
    ]
    count, rejected = restore(books.ledger, space, SSD, [*whole, *half, *doubled, *circle])
    assert count == 1
    assert {id(one) for one in rejected} == {id(one) for one in [*half, *doubled, *circle]}
    assert books.used() == (0, 2)
    books.check()


def test_nothing_found_is_nothing_restored() -> None:
    books = Books()
    space = books.space()
    assert restore(books.ledger, space, SSD, []) == (0, [])
    books.store(space, Keys(b"k" * 24, 24))
    assert restore(books.ledger, space, SSD, []) == (0, [])
    assert space.key_size == 24
    books.check()


def test_labels_carry_the_epoch_they_were_stored_in() -> None:
    books = Books()
    space = books.space()
    books.store(space, keys_of("a"))
    run, place = books.ledger.chains.find(space, keys_of("a")[0]) or (None, 0)
    assert run is not None
    books.ledger.clear(space)
    assert books.ledger.label(run, place, 0).epoch == 1
    books.store(space, keys_of("a"))
    run, place = books.ledger.chains.find(space, keys_of("a")[0]) or (None, 0)
    assert run is not None
    assert books.ledger.label(run, place, 0).epoch == 2
    books.check()
