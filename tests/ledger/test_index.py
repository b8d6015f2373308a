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
    more = [(rng.randbytes(16), at) for at in range(100)]
    index.update(more)
    known.update(more)
    assert dict(index.items()) == known
    assert len(index) == len(known) == len(list(index))
    assert all(key in index and index.get(key) == at for key, at in known.items())
    assert index.get(b"k" * 16) is None
