"""Index: a mapping in parts."""

from __future__ import annotations

import random

from kvtier.ledger.index import Index


def test_it_is_a_mapping() -> None:
    rng, index, known = random.Random(7), Index(), dict[bytes, int]()
    for at in range(3000):
        key = rng.randbytes(16)
        index[key] = known[key] = at
        if at % 3 == 0:
            gone = rng.choice(list(known))
            del index[gone], known[gone]
    more = [rng.randbytes(16) for _ in range(100)]
    assert index.add(more, bytes(key[0] for key in more), 5000)
    known.update(zip(more, range(5000, 5100), strict=True))
    assert dict(index.items()) == known
    assert len(index) == len(known) == len(list(index))
    assert all(key in index and index.get(key) == at for key, at in known.items())
    assert index.get(b"k" * 16) is None


def test_keys_are_added_all_or_none() -> None:
    index = Index()
    index[b"b"] = 7
    assert not index.add([b"a", b"b", b"c"], b"abc", 20)
    assert not index.add([b"a", b"c", b"a"], b"aca", 20)
    assert dict(index.items()) == {b"b": 7}
    assert index.add([b"a", b"c"], b"ac", 20)
    assert dict(index.items()) == {b"a": 20, b"b": 7, b"c": 21}
