"""What was found at start comes back, whole stretches at once or beside what is there already."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass

from books import DRAM, SSD, Books, chain, keys_of
from hypothesis import given
from hypothesis import strategies as st

from kvtier.block import SLOT_BITS, Keys
from kvtier.ledger.chain import Namespace
from kvtier.ledger.recovery import adopt, merge

PER_SEGMENT = 4  # slots of 8 KiB in the 32 KiB segments of Books


def joined(*parts: Keys) -> Keys:
    return Keys.of([key for part in parts for key in part.split()])


def first(keys: Keys, count: int) -> Keys:
    return Keys.of(keys.split()[:count])


@dataclass
class Found:
    """A stretch, as the tier gives it."""

    parent: bytes
    position: int
    key_size: int
    keys: bytes
    slots: array[int]
    checksums: array[int]
    written: array[int]


def slot(number: int) -> int:
    return number // PER_SEGMENT << SLOT_BITS | number % PER_SEGMENT


def stretch(
    keys: Keys, number: int, *, parent: bytes = b"", position: int = 0, shards: int = 1
) -> Found:
    """In the slots from that number on; the checksum of a slot is its number and 1000."""
    numbers = range(number, number + len(keys) * shards)
    return Found(
        parent,
        position,
        keys.size,
        keys.packed,
        array("I", map(slot, numbers)),
        array("Q", (1000 + n for n in numbers)),
        array("I", [77] * len(keys)),
    )


def bring(books: Books, space: Namespace, found: Found, *, whole: bool = True) -> list[int]:
    """As the daemon does; the slots refused."""
    if whole and adopt(books.ledger, space, SSD, found):
        return []
    return [s for _, refused in merge(books.ledger, space, SSD, found) for s in refused]


def settle(books: Books) -> None:
    for _ in books.ledger.slots[SSD].settle():
        pass
    books.check()


def test_a_chain_comes_back_and_is_gone_on_with() -> None:
    books = Books()
    space = books.space()
    keys = chain("a", 6)
    assert adopt(books.ledger, space, SSD, stretch(keys, 0))
    settle(books)
    assert books.found(space, keys) == 6
    run, place = books.ledger.chains.find(space, keys[3]) or (None, 0)
    assert run is not None
    assert list(run.slots_of(place, SSD)) == [slot(3)]
    label = books.ledger.label(run, place, 0)
    assert (label.checksum, label.parent, label.position) == (1003, keys[2], 3)
    books.store(space, keys_of("next"), parent=keys[5])
    assert books.found(space, joined(keys, keys_of("next"))) == 7
    books.check()


def test_branches_and_middles_find_their_place() -> None:
    books = Books()
    space = books.space()
    trunk, one, two = chain("t", 4), chain("x", 3), chain("y", 2)
    assert adopt(books.ledger, space, SSD, stretch(one, 0, parent=trunk[1], position=2))
    assert books.found(space, joined(first(trunk, 2), one)) == 0  # it starts in the middle
    assert not adopt(books.ledger, space, SSD, stretch(trunk, 3)), "something hangs on it"
    assert bring(books, space, stretch(trunk, 3)) == []
    assert adopt(books.ledger, space, SSD, stretch(two, 7, parent=trunk[1], position=9))
    settle(books)
    assert books.found(space, trunk) == 4
    for branch in (one, two):
        assert books.found(space, joined(first(trunk, 2), branch)) == 2 + len(branch)
    run, place = books.ledger.chains.find(space, two[0]) or (None, 0)
    assert run is not None
    assert run.position + place == 2  # its parent knows better


def test_what_was_stored_meanwhile_is_one_block_with_two_copies() -> None:
    books = Books()
    space = books.space()
    keys = chain("a", 5)
    books.store(space, first(keys, 3))
    for key in first(keys, 3).split():  # the very bytes that are on disk
        run, place = books.ledger.chains.find(space, key) or (None, 0)
        assert run is not None
        run.checksums[place] = 1000 + place
    assert bring(books, space, stretch(keys, 0)) == []
    settle(books)
    assert books.found(space, keys) == 5
    assert books.used() == (3, 5)
    assert books.ledger.dirty_blocks() == 0


def test_bytes_computed_again_do_not_displace_those_on_disk() -> None:
    books = Books()
    space = books.space()
    keys = chain("a", 3)
    books.store(space, keys)  # with checksums of its own
    assert bring(books, space, stretch(keys, 0)) == []
    settle(books)
    assert books.found(space, keys) == 3
    assert books.used() == (0, 3)
    run, _ = books.ledger.chains.find(space, keys[0]) or (None, 0)
    assert run is not None
    assert list(run.checksums) == [1000, 1001, 1002]


def test_two_tenants_cannot_have_one_segment() -> None:
    """A damaged state directory says so: the second is refused, block by block."""
    books = Books()
    red, blue = books.space("red"), books.space("blue")
    assert bring(books, red, stretch(chain("r", 2), 0)) == []
    assert bring(books, blue, stretch(chain("b", 4), 2)) == [slot(2), slot(3)]
    settle(books)
    assert books.found(red, chain("r", 2)) == 2
    assert books.found(blue, chain("b", 4)) == 0
    assert books.used() == (0, 4)


def test_shards_of_a_block_come_together() -> None:
    books = Books()
    space = books.space(shards=2)
    keys = chain("a", 3)
    assert bring(books, space, stretch(keys, 0, shards=2)) == []
    settle(books)
    assert books.used() == (0, 6)
    assert books.found(space, keys) == 3


def test_keys_of_another_size_are_refused() -> None:
    books = Books()
    space = books.space()
    books.store(space, Keys(b"k" * 24, 24))
    assert bring(books, space, stretch(chain("a", 2), 0)) == [slot(0), slot(1)]
    settle(books)
    assert space.key_size == 24


def test_a_circle_of_parents_is_not_closed() -> None:
    """Keys that are no hashes can do that: b on disk under a, a stored meanwhile under b."""
    books = Books()
    space = books.space()
    a, b = keys_of("a"), keys_of("b")
    books.store(space, a, parent=b[0])
    assert bring(books, space, stretch(b, 0, parent=a[0])) == []
    settle(books)
    assert books.ledger.evict(space, joined(a, b))
    books.check()


def tree(rng: random.Random, count: int) -> dict[bytes, bytes]:
    """Key -> parent, ancestors first."""
    parents: dict[bytes, bytes] = {}
    for n in range(count):
        [key] = keys_of(f"k{n}").split()
        parents[key] = rng.choice([b"", *parents, *list(parents)[-2:]]) if n else b""
    return parents


def path_to(parents: dict[bytes, bytes], key: bytes) -> list[bytes]:
    path = [key]
    while parents[path[-1]]:
        path.append(parents[path[-1]])
    return path[::-1]


@given(st.integers(0, 2**32))
def test_in_pieces_in_any_order_is_as_in_one_go(seed: int) -> None:
    """And a store or an evict in between is as one afterwards, or before."""
    rng = random.Random(seed)
    books = Books(ssd_segments=16, segments=16)
    space = books.space()
    parents = tree(rng, rng.randrange(1, 40))
    pieces = [
        stretch(Keys.of([key]), n, parent=parent, position=len(path_to(parents, key)) - 1)
        for n, (key, parent) in enumerate(parents.items())
    ]
    rng.shuffle(pieces)
    for piece in pieces:
        if rng.random() < 0.2:
            key = rng.choice(list(parents))
            if books.ledger.chains.find(space, key) is None:
                books.store(space, Keys.of([key]), parent=parents[key])
        assert bring(books, space, piece, whole=rng.random() < 0.7) == []
        books.check()
    settle(books)
    for key in parents:
        path = path_to(parents, key)
        assert books.found(space, Keys.of(path)) == len(path)
        run, place = books.ledger.chains.find(space, key) or (None, 0)
        assert run is not None
        assert run.state[place] == 1 << SSD
    assert books.ledger.slots[DRAM].counts().used_slots == 0
    gone = rng.choice(list(parents))
    below = {key for key in parents if gone in path_to(parents, key)}
    assert set(books.ledger.evict(space, Keys.of([gone]))) == below
    for key in parents:
        path = path_to(parents, key)
        assert books.found(space, Keys.of(path)) == sum(k not in below for k in path)
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


def test_more_namespaces_come_back_than_may_be_opened() -> None:
    books = Books()
    specs = [books.space(model=f"m{n}").spec for n in range(3)]
    fewer = Books()
    fewer.ledger._namespaces_max = 1
    recalled = [fewer.ledger.recall_namespace(spec) for spec in specs]
    assert [fewer.ledger.open_namespace(spec) for spec in specs] == recalled
