"""THE LIFE of a block, in order; the only place where deciding meets doing. (interface stub)"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence

from kvtier.block import (
    CommitResult,
    Event,
    GroupQuery,
    Keys,
    LeaseGrant,
    LookupAnswer,
    NamespaceSpec,
    Reason,
    ReserveGrant,
)
from kvtier.session import Session
from kvtier.tiers.arena import Arena


class Store:
    """All of kvtier but its sockets. Event loop only; every method but the async ones is a transaction.

    Raises from every verb: InvalidRequest (bad keys, unknown shard...), NotFound (unknown namespace, lease,
    reservation), PermissionDenied (another session's or tenant's thing), plus what each says.
    """

    # --- life of the store itself (called by server/daemon.py)
    @classmethod
    async def open(cls, config: object, *, dram: object, ssd: object | None, clock: object) -> Store:
        """Recovers the SSD tier into the ledger and starts the background tasks."""
        raise NotImplementedError

    async def close(self, *, grace_s: float) -> None:
        """Ends every session's holdings, finishes or aborts moves, flushes DRAM to SSD within the grace, closes tiers."""
        raise NotImplementedError

    # --- sessions (called by server/sessions.py)
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
        """Makes the session and its write arena (`session.room.arena`, None when not `writes` or under
        single-tenant trust). Raises LimitReached, DeviceUnavailable (no memory for the write arena)."""
        raise NotImplementedError

    def end_session(self, session: Session) -> None:
        """Returns every lease, reservation and the write arena. Idempotent, never raises an operating error."""
        raise NotImplementedError

    def arena_returned(self, session: Session, arena_id: int) -> None:
        """The client no longer maps a withdrawn arena."""
        raise NotImplementedError

    # --- the verbs (called by server/cache_service.py), in the order of a block's life
    def open_namespace(self, session: Session, spec: NamespaceSpec, prefill_tokens_per_s: float) -> tuple[int, int, int]:
        """(namespace_id, epoch, shard_bytes). `spec.tenant` is replaced by the session's."""
        raise NotImplementedError

    def lookup(
        self, session: Session, queries: Sequence[GroupQuery], *, lease: bool, prefetch: bool, touch: bool, shard: int
    ) -> LookupAnswer:
        raise NotImplementedError

    async def lease(
        self, session: Session, query: GroupQuery | None, lease_id: int, *, shard: int, deadline_s: float
    ) -> tuple[LeaseGrant, Reason]:
        """Exactly one of `query` and `lease_id` (not 0) is given. Waits for promotions until the deadline
        (seconds from now); past it, grants the readable prefix with Reason.DEADLINE. Raises LeaseLost."""
        raise NotImplementedError

    def release(self, session: Session, lease_ids: Sequence[int]) -> int:
        raise NotImplementedError

    async def reserve(
        self, session: Session, namespace_id: int, keys: Keys, *, parent: bytes, position: int, shard: int, deadline_s: float
    ) -> ReserveGrant:
        """Raises TierFull when not even one block found room by the deadline (everything leased or reserved)."""
        raise NotImplementedError

    async def commit(self, session: Session, reservation_id: int, indexes: Sequence[int] | None, *, durable: bool) -> CommitResult:
        """`indexes` count granted blocks; None = all. Raises ReservationExpired."""
        raise NotImplementedError

    def abort(self, session: Session, reservation_id: int) -> None:
        raise NotImplementedError

    def prefetch(self, session: Session, query: GroupQuery) -> int:
        raise NotImplementedError

    async def evict(self, session: Session | None, query: GroupQuery) -> int:
        """Durable before it returns. `session` None = the operator."""
        raise NotImplementedError

    async def clear_namespace(self, session: Session | None, namespace_id: int) -> tuple[int, int]:
        """(new epoch, blocks forgotten). Durable before it returns."""
        raise NotImplementedError

    def pin(self, session: Session | None, query: GroupQuery) -> int:
        raise NotImplementedError

    def unpin(self, session: Session | None, query: GroupQuery) -> int:
        raise NotImplementedError

    def watch(self, session: Session, namespace_id: int, from_revision: int) -> AsyncIterator[Event]:
        """Bounded: a watcher that does not keep up is told COMPACTED and goes on from the present."""
        raise NotImplementedError

    # --- the operator (called by server/admin_service.py)
    def counts(self, namespaces_max: int) -> object:
        """A frozen `StoreCounts` record with everything StatResponse shows (kvtier/counts.py)."""
        raise NotImplementedError

    def namespaces(self) -> list[object]:
        """list of `NamespaceUse` (kvtier/counts.py), each with `.spec: NamespaceSpec`."""
        raise NotImplementedError

    def blocks(self, namespace_id: int, after_key: bytes, count_max: int) -> list[object]:
        """Page of `BlockUse` (kvtier/counts.py)."""
        raise NotImplementedError

    async def flush(self, timeout_s: float) -> tuple[int, int]:
        """(blocks written, blocks still only in memory)."""
        raise NotImplementedError

    async def drain(self, timeout_s: float) -> tuple[int, int]:
        """Stops taking stores (reserve raises DaemonUnavailable), then flushes."""
        raise NotImplementedError

    def undrain(self) -> None:
        raise NotImplementedError

    def bypass(self, on: bool, namespace_id: int) -> None:
        raise NotImplementedError

    def check(self) -> list[str]:
        """Runs every invariant check; the problems found, as sentences (empty = sound)."""
        raise NotImplementedError
