"""A client of the soak: `chaos_soaker.py FOLDER SEED NAME`, until its input ends or it is killed.

Stores, reads and compares every byte, holds leases and reservations for a while, prefetches,
pins, evicts, clears, goes away and comes back. One line a second: a JSON of what it did so far.
Others work on the shared namespace, so that errors which may be tried again are part of it.
"""

from __future__ import annotations

import json
import random
import select
import sys
import time
from collections import Counter, deque
from pathlib import Path

from daemons import FORMAT, LARGE, content, fill, keys_of

from kvtier.client import Client, Lease, Space
from kvtier.errors import KvTierError

CHAINS = 200


class Soaker:
    """One process's work."""

    def __init__(self, folder: Path, seed: str, name: str) -> None:
        self.folder, self.name = folder, name
        self.rng = random.Random(f"{seed}/{name}")
        self.done: Counter[str] = Counter()
        self.leases: deque[Lease] = deque()
        self.connect()

    def connect(self) -> None:
        self.client = Client(self.folder / "kvtier.sock", deadline_s=2.0, timeout_s=10.0)
        self.spaces = [
            self.client.space(model="shared", format=FORMAT),
            self.client.space(model=f"own-{self.name}", format=FORMAT),
            self.client.space(model="large", format=LARGE),
        ]

    def step(self) -> None:
        acts = (self.store, self.read, self.hold, self.reserve, self.evict, self.clear, self.again)
        act = self.rng.choices(acts, (10, 14, 4, 3, 2, 0.05, 0.1))[0]
        try:
            act()
            self.done[act.__name__] += 1
        except KvTierError as error:
            self.done[f"error {type(error).__name__}"] += 1

    def chain(self) -> tuple[Space, list[bytes]]:
        space = self.rng.choice(self.spaces)
        # Few of them often, many of them seldom: some are hot, most come from below.
        number = min(self.rng.randrange(CHAINS), self.rng.randrange(CHAINS))
        count = 4 if space is self.spaces[2] else 16
        return space, keys_of(f"{space.state.spec.model}-{number}", count)

    def store(self) -> None:
        space, keys = self.chain()
        result = space.store(keys, fill, durable=self.rng.random() < 0.1, timeout_s=10.0)
        self.done["stored blocks"] += result.stored_count

    def read(self) -> None:
        space, keys = self.chain()
        with space.lease(keys, timeout_s=10.0) as lease:
            self.compare(space, keys, lease)

    def compare(self, space: Space, keys: list[bytes], lease: Lease) -> None:
        if not len(lease):
            self.done["misses"] += 1
            return
        for key, view in zip(keys, lease.views, strict=False):
            if bytes(view) != content(key, space.view_bytes):
                lease.check()  # taken back, then, and its bytes do not count
                self.done["WRONG BYTES"] += 1
            self.done["read blocks"] += 1

    def hold(self) -> None:
        space, keys = self.chain()
        lease = space.lease(keys, timeout_s=10.0)
        self.compare(space, keys, lease)
        self.leases.append(lease)
        if len(self.leases) > 8:
            self.leases.popleft().release()

    def reserve(self) -> None:
        space, keys = self.chain()
        reservation = space.reserve(keys, timeout_s=5.0)
        for block in reservation.blocks[: len(reservation.blocks) // 2]:
            fill(block)
        if self.rng.random() < 0.5:
            reservation.commit(reservation.blocks[: len(reservation.blocks) // 2], timeout_s=10.0)
        reservation.abort()

    def evict(self) -> None:
        space, keys = self.chain()
        space.evict(keys[self.rng.randrange(len(keys)) :])

    def clear(self) -> None:
        self.spaces[1].clear()

    def again(self) -> None:
        while self.leases:
            self.leases.pop().release()
        self.client.close()
        self.connect()


def main() -> None:
    soaker = Soaker(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
    told_s = time.monotonic()
    while not select.select([sys.stdin], [], [], 0)[0]:
        soaker.step()
        if time.monotonic() - told_s > 1.0:
            told_s = time.monotonic()
            print(json.dumps(soaker.done), flush=True)  # noqa: T201
    print(json.dumps(soaker.done), flush=True)  # noqa: T201
    while soaker.leases:
        soaker.leases.pop().release()
    soaker.client.close()


if __name__ == "__main__":
    main()
