"""FakeStore: the interface of Store without blocks, so that the server is tested by itself.

A model called "bug", "invariant", "die", "stray" or "announce N" makes it misbehave.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from kvtier.block import (
    CommitResult,
    Event,
    EventKind,
    Found,
    GroupQuery,
    Keys,
    LeaseGrant,
    LookupAnswer,
    NamespaceSpec,
    Reason,
    ReserveGrant,
    TierId,
    TierRun,
)
from kvtier.config import Config
from kvtier.counts import BlockUse, NamespaceUse, SessionUse, StoreCounts, TierUse
from kvtier.errors import InvariantViolated, NotFound, ReservationExpired, TierFull
from kvtier.session import Session
from kvtier.tiers.arena import Arena
from kvtier.tiers.room import WriteRoom

PAGE = 4096


class FakeStore:
    """Every verb succeeds at once, but lease and reserve, which wait for their deadline."""

    def __init__(self) -> None:
        self.sessions: dict[int, Session] = {}
        self.specs: list[NamespaceSpec] = []
        self.ended = 0
        self.lookups = 0
        self.leases = 0
        self.commits = 0
        self.pins = 0
        self.evicts = 0
        self.returned: list[int] = []
        self.state = "serving"
        self.arenas: list[Arena] = []
        self.started_s = time.monotonic()
        self.die = asyncio.Event()
        self.tending = asyncio.create_task(self._tend())
        self.reconfigured = 0

    async def _tend(self) -> None:
        await self.die.wait()
        raise RuntimeError("a background task died")

    def _stray(self) -> None:
        raise InvariantViolated("the books disagree")

    def open_session(
        self,
        *,
        tenant: str,
        group: str,
        client_name: str,
        pid: int,
        writes: bool,
        announce: Callable[[Arena], None],
        withdraw: Callable[[int], None],
    ) -> Session:
        number = len(self.sessions) + self.ended + 1
        session = Session(number, tenant, group, client_name, pid, 0.0, announce, withdraw)
        if writes:
            session.room = WriteRoom(Arena("write", 16 * PAGE, writable=True, huge_pages="off"))
        self.sessions[number] = session
        return session

    def end_session(self, session: Session) -> None:
        if not session.ended:
            session.ended = True
            self.ended += 1
            del self.sessions[session.id]
            if session.room is not None:
                session.room.arena.close()

    def arena_returned(self, session: Session, arena_id: int) -> None:
        self.returned.append(arena_id)

    def open_namespace(
        self, session: Session, spec: NamespaceSpec, prefill_tokens_per_s: float
    ) -> tuple[int, int, int]:
        if spec.model == "bug":
            raise RuntimeError("a bug")
        if spec.model == "invariant":
            raise InvariantViolated("the books disagree")
        if spec.model == "die":
            self.die.set()
        if spec.model == "stray":
            asyncio.get_running_loop().call_soon(self._stray)
        if spec.model.startswith("announce"):
            arena = Arena("read", PAGE, writable=False, huge_pages="off")
            for _ in range(int(spec.model.split()[1])):
                session.announce(arena)
            arena.close()  # before a client that is slow was sent it
        self.specs.append(spec)
        return len(self.specs), 1, spec.format.shard_bytes

    def _known(self, namespace_id: int) -> None:
        if not 1 <= namespace_id <= len(self.specs):
            raise NotFound(f"there is no namespace {namespace_id}")

    def lookup(
        self,
        session: Session,
        queries: Sequence[GroupQuery],
        *,
        lease: bool,
        prefetch: bool,
        touch: bool,
        shard: int,
    ) -> LookupAnswer:
        self.lookups += 1
        for query in queries:
            self._known(query.namespace_id)
        count = len(queries[0].keys)
        found = Found(count, (TierRun(TierId.DRAM, count),), 1.5)
        leases = []
        for _ in queries if lease else ():
            self.leases += 1
            leases.append(LeaseGrant(self.leases, count, 0, count, None))
        return LookupAnswer((found,) * len(queries), count * 16, tuple(leases))

    async def lease(
        self,
        session: Session,
        query: GroupQuery | None,
        lease_id: int,
        *,
        shard: int,
        deadline_s: float,
    ) -> tuple[LeaseGrant, Reason]:
        await asyncio.sleep(deadline_s)
        self.leases += 1
        return LeaseGrant(self.leases, 1, 0, 0, None), Reason.DEADLINE

    def release(self, session: Session, lease_ids: Sequence[int]) -> int:
        return len(lease_ids)

    async def reserve(
        self,
        session: Session,
        namespace_id: int,
        keys: Keys,
        *,
        parent: bytes,
        position: int,
        shard: int,
        deadline_s: float,
    ) -> ReserveGrant:
        await asyncio.sleep(min(deadline_s, 0.05))
        raise TierFull("everything is leased")

    async def commit(
        self,
        session: Session,
        reservation_id: int,
        indexes: Sequence[int] | None,
        *,
        durable: bool,
    ) -> CommitResult:
        if reservation_id == 404:
            raise ReservationExpired("reservation 404 expired")
        self.commits += 1
        await asyncio.sleep(0.2)
        return CommitResult(self.commits, len(indexes or ()), 0)

    def abort(self, session: Session, reservation_id: int) -> None:
        pass

    def prefetch(self, session: Session, query: GroupQuery) -> int:
        return len(query.keys)

    async def evict(self, session: Session | None, query: GroupQuery) -> int:
        self.evicts += 1
        return len(query.keys)

    async def clear_namespace(self, session: Session | None, namespace_id: int) -> tuple[int, int]:
        self._known(namespace_id)
        return 2, 7

    def pin(self, session: Session | None, query: GroupQuery) -> int:
        self.pins += 1
        return self.pins

    def unpin(self, session: Session | None, query: GroupQuery) -> int:
        return len(query.keys)

    async def watch(
        self, session: Session, namespace_id: int, from_revision: int
    ) -> AsyncIterator[Event]:
        self._known(namespace_id)
        yield Event(1, EventKind.STORED, namespace_id, b"k" * 32, 32, TierId.DRAM)
        await asyncio.sleep(3600)

    def counts(self, namespaces_max: int) -> StoreCounts:
        values: dict[str, Any] = dict.fromkeys(StoreCounts.__slots__, 0)
        tier: dict[str, Any] = dict.fromkeys(TierUse.__slots__, 0)
        sessions = [
            SessionUse(s.client_name, s.tenant, s.group, s.pid, 0, 0, 0.0)
            for s in self.sessions.values()
        ]
        values |= {
            "uptime_s": time.monotonic() - self.started_s,
            "state": self.state,
            "tiers": (TierUse(**(tier | {"tier": TierId.DRAM, "state": "ok"})),),
            "lookup_count": self.lookups,
            "reasons": {Reason.EVICTED: 3},
            "lease_count": self.leases,
            "sessions": tuple(sessions),
            "routes": (),
            "namespaces": tuple(self.namespaces()[:namespaces_max]),
            "stored_blocks": self.commits,
            "evicted_blocks": self.ended,
            "native_kernels": True,
            "events_revision": self.reconfigured,
        }
        return StoreCounts(**values)

    def namespaces(self) -> list[NamespaceUse]:
        return [
            NamespaceUse(index + 1, spec, spec.digest, 1, 0, 0, 0, 0, False)
            for index, spec in enumerate(self.specs)
        ]

    def blocks(self, namespace_id: int, after_key: bytes, count_max: int) -> list[BlockUse]:
        first = int.from_bytes(after_key[-4:], "big") + 1 if after_key else 0
        numbers = range(first, min(first + count_max, 250))
        return [
            BlockUse(number.to_bytes(16, "big"), b"", number, (TierId.DRAM,), 64, 0, 0)
            for number in numbers
        ]

    async def flush(self, timeout_s: float) -> tuple[int, int]:
        return 5, 0

    async def drain(self, timeout_s: float) -> tuple[int, int]:
        self.state = "draining"
        return 5, 0

    def undrain(self) -> None:
        self.state = "serving"

    def bypass(self, on: bool, namespace_id: int) -> None:
        self.state = "bypassed" if on else "serving"

    def check(self) -> list[str]:
        return []

    def reconfigure(self, config: Config) -> None:
        self.reconfigured += 1
        self.bypass(config.server.bypass, 0)

    def __repr__(self) -> str:
        return "<a dump of the books>"

    async def close(self, *, grace_s: float) -> None:
        self.tending.cancel()
        for session in tuple(self.sessions.values()):
            self.end_session(session)
