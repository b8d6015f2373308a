"""Two drivers of `world.World`: a hypothesis state machine, and a plain random walk.

The machine shrinks what it finds; the walk is twenty times as fast, weighted to where blocks
collide, and is what hunts planted bugs and runs for hours.
"""

from __future__ import annotations

import random

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from world import DRAM, PATHS, SPECS, SSD, World

AT = st.integers(0, len(SPECS) - 1)
PATH = st.sampled_from(PATHS)
SMALL = st.integers(0, 7)
SESSION = st.integers(1, 3)
TIER = st.sampled_from((DRAM, SSD))


class LedgerMachine(RuleBasedStateMachine):
    """Small keyspace, tiny tiers: everything collides."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    @rule(at=AT, path=PATH, first=SMALL, count=st.integers(1, 6), shard=st.integers(0, 1),
          session=SESSION, many=st.integers(0, 6))  # fmt: skip
    def reserve(
        self, at: int, path: str, first: int, count: int, shard: int, session: int, many: int
    ) -> None:
        self.world.reserve(at, path, first, count, shard, session, many)

    @rule(at=AT, path=PATH, shards=st.sampled_from(((0, 1), (1, 0), (0,))), session=SESSION)
    def store(self, at: int, path: str, shards: tuple[int, ...], session: int) -> None:
        store(self.world, at, path, session, shards)

    @rule(n=SMALL, indexes=st.none() | st.lists(SMALL, min_size=1, max_size=3))
    def begin_commit(self, n: int, indexes: list[int] | None) -> None:
        self.world.begin_commit(n, indexes)

    @rule(n=SMALL, good=st.sampled_from((True, True, True, False)))
    def end_commit(self, n: int, good: bool) -> None:
        self.world.end_commit(n, good=good)

    @rule(n=SMALL)
    def abort(self, n: int) -> None:
        self.world.abort(n)

    @rule(session=SESSION)
    def end_session(self, session: int) -> None:
        self.world.end_session(session)

    @rule(seconds=st.integers(1, 6))
    def pass_time(self, seconds: int) -> None:
        self.world.pass_time(seconds)

    @rule(groups=st.lists(st.tuples(AT, PATH), min_size=1, max_size=3))
    def lookup(self, groups: list[tuple[int, str]]) -> None:
        self.world.lookup(groups)

    @rule(path=PATH)
    def lookup_all_groups(self, path: str) -> None:
        self.world.lookup([(at, path) for at in range(len(SPECS))])

    @rule(at=AT, path=PATH, session=SESSION)
    def lease(self, at: int, path: str, session: int) -> None:
        self.world.lease(at, path, session)

    @rule(n=SMALL)
    def settle(self, n: int) -> None:
        self.world.settle(n)

    @rule(n=SMALL)
    def shorten(self, n: int) -> None:
        self.world.shorten(n)

    @rule(n=SMALL)
    def release(self, n: int) -> None:
        self.world.release(n)

    @rule(at=AT, path=PATH)
    def promote(self, at: int, path: str) -> None:
        self.world.promote(at, path)

    @rule(n=SMALL)
    def promote_leased(self, n: int) -> None:
        self.world.promote_leased(n)

    @rule(tier=TIER, at=AT, count=st.integers(1, 8))
    def make_room(self, tier: object, at: int, count: int) -> None:
        self.world.make_room(tier, at, count)  # type: ignore[arg-type]

    @rule(tier=TIER, share=st.integers(0, 3))
    def shrink_to(self, tier: object, share: int) -> None:
        self.world.shrink_to(tier, share)  # type: ignore[arg-type]

    @rule(count=st.integers(1, 8))
    def copy_down(self, count: int) -> None:
        self.world.copy_down(count)

    @rule(n=SMALL, good=st.sampled_from((True, True, False)), corrupt=st.booleans())
    def end_move(self, n: int, good: bool, corrupt: bool) -> None:
        self.world.end_move(n, good=good, corrupt=corrupt)

    @rule(count=st.integers(1, 8))
    def erase(self, count: int) -> None:
        erase(self.world, count)

    @rule(tenant=st.sampled_from(("red", "blue")))
    def recycle(self, tenant: str) -> None:
        self.world.recycle(tenant)

    @rule(at=AT, path=PATH, depth=SMALL, tier=TIER)
    def lose(self, at: int, path: str, depth: int, tier: object) -> None:
        self.world.lose(at, path, depth, tier)  # type: ignore[arg-type]

    @rule(at=AT, path=PATH, depth=SMALL)
    def evict(self, at: int, path: str, depth: int) -> None:
        self.world.evict(at, path, depth)

    @rule(at=AT)
    def clear(self, at: int) -> None:
        self.world.clear(at)

    @rule(count=st.integers(1, 4))
    def reap(self, count: int) -> None:
        self.world.reap(count)

    @rule(at=AT, path=PATH)
    def pin(self, at: int, path: str) -> None:
        self.world.pin(at, path)

    @rule(n=SMALL)
    def unpin(self, n: int) -> None:
        self.world.unpin(n)

    @rule(at=AT)
    def end_everything(self, at: int) -> None:
        self.world.end_everything(at)

    @invariant()
    def books_agree(self) -> None:
        self.world.check()


def walk(seed: int, steps: int) -> World:
    """A random life of one node; checks everything after each step. Raises what it finds."""
    rng, world = random.Random(seed), World()
    for _ in range(steps):
        take_step(rng, world)
        world.check()
    return world


def take_step(rng: random.Random, world: World) -> None:
    """One rule, drawn by weight."""
    at, n = rng.randrange(len(SPECS)), rng.randrange(8)
    path, tier = rng.choice(PATHS), rng.choice((DRAM, SSD))
    session, good = rng.randint(1, 3), rng.random() < 0.75
    steps = (
        (6, lambda: store(world, at, path, session, rng.choice(((0, 1), (1, 0), (0,))))),
        (3, lambda: world.reserve(at, path, n, rng.randint(1, 6), rng.randrange(2), session, n)),
        (3, lambda: world.begin_commit(n, None if n < 5 else [n, rng.randrange(8)])),
        (3, lambda: world.end_commit(n, good=good)),
        (1, lambda: world.abort(n)),
        (1, lambda: world.end_session(session)),
        (1, lambda: world.pass_time(rng.randint(1, 6))),
        (2, lambda: world.lookup([(at, path), (rng.randrange(len(SPECS)), path)])),
        (1, lambda: world.lookup([(one, path) for one in range(len(SPECS))])),
        (4, lambda: world.lease(at, path, session)),
        (1, lambda: world.settle(n)),
        (1, lambda: world.shorten(n)),
        (3, lambda: world.release(n)),
        (2, lambda: world.promote(at, path)),
        (2, lambda: world.promote_leased(n)),
        (4, lambda: world.make_room(tier, at, rng.randint(1, 8))),
        (2, lambda: world.shrink_to(tier, rng.randrange(4))),
        (2, lambda: world.copy_down(rng.randint(1, 8))),
        (8, lambda: world.end_move(n, good=good, corrupt=n < 4)),
        (3, lambda: erase(world, n + 1)),
        (1, lambda: world.recycle(rng.choice(("red", "blue")))),
        (2, lambda: world.lose(at, path, n, tier)),
        (2, lambda: world.evict(at, path, n)),
        (1, lambda: world.clear(at) if n < 3 else None),
        (1, lambda: world.reap(rng.randint(1, 4))),
        (1, lambda: world.pin(at, path)),
        (1, lambda: world.unpin(n)),
        (1, lambda: world.end_everything(at) if n < 2 else None),
    )
    (step,) = rng.choices([one for _, one in steps], [weight for weight, _ in steps])
    step()


def store(world: World, at: int, path: str, session: int, shards: tuple[int, ...]) -> None:
    """A whole chain at once, so that there is much to collide with."""
    for shard in shards[: SPECS[at].format.shards]:
        count = len(world.reservations)
        world.reserve(at, path, 0, 6, shard, session, 6)
        if len(world.reservations) > count:
            world.begin_commit(count, None)
            world.end_commit(len(world.copying) - 1, good=True)


def erase(world: World, count: int) -> None:
    """Some records are gone."""
    world.take_erasures()
    world.end_erasures(count)
