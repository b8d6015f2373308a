"""The hypothesis state machine over `world.World`: every rule is one call of the world."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.model.world import DRAM, PATHS, SPECS, SSD, World

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
        """A whole chain at once, so that there is much to collide with."""
        for shard in shards[: SPECS[at].format.shards]:
            count = len(self.world.reservations)
            self.world.reserve(at, path, 0, 6, shard, session, 6)
            if len(self.world.reservations) > count:
                self.world.begin_commit(count, None)
                self.world.end_commit(len(self.world.copying) - 1, good=True)

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
        self.world.take_erasures()
        self.world.end_erasures(count)

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
