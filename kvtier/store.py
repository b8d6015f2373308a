"""THE LIFE of a block, in order; the only place where deciding meets doing.

    lookup -> lease -> release          reading
    reserve -> commit | abort           writing
    promote, demote, evict              what `keeper.py` does in the background, and on request

Each verb asks the ledger (pure, synchronous) what to do and has bytes moved by worker threads. The
ledger is only ever touched on the event loop, between two awaits.

Does not: know sockets or protobuf (server/), or how bytes are kept (tiers/).
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from kvtier.accounts import accounts, all_namespaces
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
    SegmentView,
    SlotIO,
    SlotTable,
)
from kvtier.config import Config
from kvtier.counts import BlockUse, NamespaceUse, StoreCounts
from kvtier.errors import (
    BlocksGone,
    DaemonUnavailable,
    EpochEnded,
    InvalidRequest,
    InvariantViolated,
    KvTierError,
    LeaseLost,
    LimitReached,
    PermissionDenied,
    ReservationExpired,
    TierFull,
)  # fmt: skip
from kvtier.keeper import Keeper
from kvtier.ledger.chain import Namespace
from kvtier.ledger.filling import RESERVE_KEYS_MAX
from kvtier.ledger.holdings import Entry, Lease, Reservation, stretches
from kvtier.ledger.search import Span, cut_spans, segments_of
from kvtier.purging import Purged
from kvtier.session import Session
from kvtier.tally import block_uses
from kvtier.testing.failpoints import reach
from kvtier.tiers.arena import Arena
from kvtier.tiers.room import WriteRoom
from kvtier.units import MIB

T = TypeVar("T")
# One worker-thread job copies at least this much, so that small commits are one job.
_COPY_JOB_BYTES = 16 * MIB


class Store:
    """All of kvtier but its sockets. Event loop only; verbs without `async` are transactions.

    Raises from every verb: InvalidRequest (bad keys, no such shard), NotFound (unknown namespace),
    PermissionDenied (another tenant's or session's thing), plus what each verb says.
    """

    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper
        self._ledger = keeper.ledger
        self._filling = keeper.filling
        self._moves = keeper.moves
        self._sessions: dict[int, Session] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._spare_room: WriteRoom | None = None
        keeper.sessions = self._sessions
        keeper.on_reservation_over = self._return_room

    # --- life of the store itself

    @classmethod
    async def open(cls, *args: Any, **kwargs: Any) -> Store:
        """Starts the background work, recovery of the SSD tier first; see Keeper.open."""
        store = cls(await Keeper.open(*args, **kwargs))
        store._make_spare_room()
        return store

    async def close(self, *, grace_s: float) -> None:
        """Ends every session's holdings, flushes DRAM to SSD within the grace (seconds), waits for
        bytes in flight, closes the tiers. After a clean close all of the SSD tier comes back.
        """
        for session in list(self._sessions.values()):
            self.end_session(session)
        await self.keeper.close(grace_s=grace_s)
        if self._tasks:
            await asyncio.wait(list(self._tasks))
        if self._spare_room is not None:
            self._spare_room.arena.close()

    @property
    def tending(self) -> asyncio.Task[None] | None:
        """The background task: when it ends by an exception the daemon must stop."""
        return self.keeper.tending

    def reconfigure(self, config: Config) -> None:
        """Takes over what may change live (SIGHUP)."""
        self.keeper.reconfigure(config)

    # --- sessions

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
        """Makes the session and its write arena (`session.room.arena`; none when not `writes`, or
        under single-tenant trust). Raises LimitReached, DeviceUnavailable (no memory for it).
        """
        if len(self._sessions) >= self.keeper.config.server.sessions_max:
            raise LimitReached(f"{len(self._sessions)} sessions (server.sessions_max) are attached")
        room = self._take_room() if writes and not self.keeper.single_tenant else None
        session = Session(
            id=self._ledger.next_id(),
            tenant=tenant,
            group=group,
            client_name=client_name,
            pid=pid,
            started_s=self.keeper.now_s(),
            announce=announce,
            withdraw=withdraw,
            room=room,
        )
        self._sessions[session.id] = session
        return session

    def _take_room(self) -> WriteRoom:
        room, self._spare_room = self._spare_room, None
        if room is None:
            room = self._new_room()
        self._make_spare_room()
        return room

    def _new_room(self) -> WriteRoom:
        size_bytes = self.keeper.config.limits.write_arena_bytes
        kind = f"{self.keeper.config.state.memory_name}-write"
        return WriteRoom(Arena(kind, size_bytes, writable=True, huge_pages="off"))

    def _make_spare_room(self) -> None:
        """Prefaulting takes a tenth of a second: done ahead, off the loop, for the next client."""
        if self.keeper.single_tenant:
            return

        async def make() -> None:
            room = await self.keeper.in_thread(self._new_room)
            if self._spare_room is None and not self.keeper.draining:
                self._spare_room = room
            else:
                room.arena.close()

        self._run(make())

    def end_session(self, session: Session) -> None:
        """Returns every lease, reservation and the write arena. Idempotent."""
        if session.ended:
            return
        session.ended = True
        del self._sessions[session.id]
        for lease_id in list(session.leases):
            self._let_go(session, lease_id)
        for reservation_id in list(session.reservations):
            reservation = self._filling.reservations.get(reservation_id)
            if reservation is not None:
                self._filling.abort(reservation)
                self._return_room(reservation, session)
        self._close_room_when_quiet(session)
        for arena_id in list(session.announced):
            self.keeper.recycling.returned(session.id, arena_id)
        self.keeper.progress.notify()

    def _close_room_when_quiet(self, session: Session) -> None:
        if session.room is not None and session.copying == 0:
            session.room.arena.close()
            session.room = None

    def arena_returned(self, session: Session, arena_id: int) -> None:
        """The client no longer maps a withdrawn arena."""
        session.announced.discard(arena_id)
        self.keeper.recycling.returned(session.id, arena_id)

    def _space(self, session: Session | None, namespace_id: int) -> Namespace:
        space = self._ledger.space(namespace_id)
        if session is not None and session.ended:
            raise DaemonUnavailable("this session has ended")
        if session is not None and space.tenant != session.tenant:
            raise PermissionDenied(f"namespace {namespace_id} belongs to another tenant")
        return space

    # --- namespaces

    def open_namespace(
        self, session: Session, spec: NamespaceSpec, prefill_tokens_per_s: float
    ) -> tuple[int, int, int]:
        """(namespace_id, epoch, shard_bytes). `spec.tenant` is replaced by the session's."""
        if spec.format.shard_bytes > self.keeper.config.limits.block_bytes_max:
            raise InvalidRequest(
                f"a shard of {spec.format.shard_bytes} bytes is over limits.block_bytes_max = "
                f"{self.keeper.config.limits.block_bytes_max}"
            )
        space = self._ledger.open_namespace(replace(spec, tenant=session.tenant))
        self.keeper.ageing.learn_spaces()
        if prefill_tokens_per_s > 0:
            space.prefill_tokens_per_s = prefill_tokens_per_s
        return space.id, space.epoch, space.shard_bytes

    # --- lookup

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
        """Longest restorable prefix; never waits, so it is always before its deadline.

        With `lease` what was found is pinned; `prefetch` starts promotions. A shard out of range
        is InvalidRequest. Under bypass everything is a miss.
        """
        asked = [(self._space(session, query.namespace_id), query.keys) for query in queries]
        if not asked:
            raise InvalidRequest("a lookup needs at least one group")
        if self.keeper.is_bypassed(asked):
            return self._missed(asked, Reason.BYPASSED)
        for space, _ in asked:
            _check_shard(space, shard)
        found, spans, tokens = self._ledger.lookup(asked)
        if len(found) > 1:
            # What several groups have in common is not cut further: only timed.
            found = [
                replace(one, load_ms=self.keeper.load_ms(space, one))
                for (space, _), one in zip(asked, found, strict=True)
            ]
        else:
            found = [self.keeper.predicted(asked[0][0], found[0])]
            tokens = found[0].block_count * asked[0][0].block_tokens
            spans = [cut_spans(spans[0], found[0].block_count - found[0].first_needed)]
        if lease and tokens:
            self._check_lease_limit(session, len(asked))
        self.keeper.tally.lookup(asked, found)
        leases: list[LeaseGrant] = []
        if lease and tokens:
            for (space, keys), one, where in zip(asked, found, spans, strict=True):
                held = self._take_lease(session, space, keys, one, where)
                if held.slots is None:
                    self.keeper.promote(space, where)
                leases.append(self._grant(session, held, shard))
        elif touch:
            for where in spans:
                self._ledger.touch(where)
        if prefetch:
            for (space, _), where in zip(asked, spans, strict=True):
                self.keeper.promote(space, where)
        return LookupAnswer(tuple(found), tokens, tuple(leases))

    def _missed(self, asked: Sequence[tuple[Namespace, Keys]], reason: Reason) -> LookupAnswer:
        found = tuple(Found(0, reason=reason) for _ in asked)
        self.keeper.tally.lookup(asked, found)
        return LookupAnswer(found, 0)

    # --- lease

    async def lease(
        self,
        session: Session,
        query: GroupQuery | None,
        lease_id: int,
        *,
        shard: int,
        deadline_s: float,
    ) -> tuple[LeaseGrant, Reason]:
        """Waits until the blocks of a new lease (`query`) or of a standing one (`lease_id`) are
        readable; past the deadline (seconds from now) grants the readable prefix.

        Raises:
            LeaseLost: there is no such lease (any longer).
        """
        if query is None:
            lease = self._standing_lease(session, lease_id)
            _check_shard(lease.space, shard)
            held_before = session.id in lease.holders
            self._hold(session, lease)
        else:
            space = self._space(session, query.namespace_id)
            _check_shard(space, shard)
            asked = [(space, query.keys)]
            if self.keeper.is_bypassed(asked):
                return LeaseGrant(0, 0, 0, 0, None), Reason.BYPASSED
            found, spans, tokens = self._ledger.lookup(asked)
            if not tokens:
                return LeaseGrant(0, 0, 0, 0, None), found[0].reason
            held_before = False
            lease = self._take_lease(session, space, query.keys, found[0], spans[0])
            lease.reason = found[0].reason
        try:
            await self._settle(lease, deadline_s)
        except BaseException:
            if not held_before and self._let_go(session, lease.id):
                self.keeper.progress.notify()
            raise
        if lease.id not in self._ledger.leases or session.id not in lease.holders:
            raise LeaseLost(f"lease {lease.id} ended while it waited")
        if lease.needed_count <= 0:
            self._let_go(session, lease.id)
            self.keeper.progress.notify()
            return LeaseGrant(0, 0, 0, 0, None), lease.reason
        return self._grant(session, lease, shard), lease.reason

    def _standing_lease(self, session: Session, lease_id: int) -> Lease:
        lease = self._ledger.leases.get(lease_id)
        if lease is None or session.ended:
            raise LeaseLost(f"lease {lease_id} is over: look up again")
        same_group = session.group and session.group == lease.group
        if lease.tenant != session.tenant or not (lease.session_id == session.id or same_group):
            raise PermissionDenied(f"lease {lease_id} is of another session and not of its group")
        return lease

    def _take_lease(
        self, session: Session, space: Namespace, keys: Keys, found: Found, spans: list[Span]
    ) -> Lease:
        self._check_lease_limit(session, 1)
        lease = self._ledger.lease(
            space,
            keys,
            found.block_count,
            found.first_needed,
            spans,
            session_id=session.id,
            tenant=session.tenant,
            group=session.group,
            now_s=self.keeper.now_s(),
        )
        self._hold(session, lease)
        return lease

    @staticmethod
    def _hold(session: Session, lease: Lease) -> None:
        session.leases.add(lease.id)
        lease.holders.add(session.id)

    def _check_lease_limit(self, session: Session, more: int) -> None:
        if len(session.leases) + more > self.keeper.config.limits.leases_per_session_max:
            raise LimitReached(
                f"{len(session.leases)} leases of this session (limits.leases_per_session_max): "
                "release some"
            )

    async def _settle(self, lease: Lease, deadline_s: float) -> None:
        until_s = self.keeper.now_s() + deadline_s
        while lease.id in self._ledger.leases and not self._ledger.settle_lease(lease):
            self.keeper.promote(lease.space, self._ledger.lease_spans(lease))
            if not await self.keeper.progress.wait(until_s - self.keeper.now_s()):
                if lease.id in self._ledger.leases:
                    self._ledger.shorten_lease(lease, Reason.DEADLINE)
                return

    def _grant(self, session: Session, lease: Lease, shard: int) -> LeaseGrant:
        count, first = lease.count, lease.first_needed
        if lease.slots is None:
            pending = self._moves.pending(lease.space, lease.keys, first, count)
            return LeaseGrant(lease.id, count, first, count - pending, None)
        shards = lease.space.shards
        slots = lease.slots if shards == 1 else lease.slots[shard::shards]
        self.keeper.tally.read_bytes += len(slots) * lease.space.shard_bytes
        return LeaseGrant(lease.id, count, first, count, self._table(session, lease.space, slots))

    def _table(self, session: Session, space: Namespace, slots: array[int]) -> SlotTable:
        """Where these DRAM slots are mapped; the client has been sent every arena named."""
        views: list[SegmentView] = []
        revocations: dict[int, int] = {}
        packed = slots.tobytes()
        for segment in segments_of(packed):
            arena = self.keeper.dram.arena(segment)
            views.append(SegmentView(segment, arena.id, arena.base_offset))
            if arena.id not in session.announced:
                session.announce(arena)
                session.announced.add(arena.id)
            if self.keeper.revoked:
                revocations[arena.id] = arena.revocations
        generations = {}
        if self.keeper.revoked:
            generations = {s: self.keeper.revoked[s] for s in slots if s in self.keeper.revoked}
        slot_bytes = space.slot_bytes[self._ledger.top]
        return SlotTable(
            packed, slot_bytes, space.shard_bytes, tuple(views), generations, revocations
        )

    def release(self, session: Session, lease_ids: Sequence[int]) -> int:
        """Lets go of leases this session took or joined; returns how many it held. The last
        holder's release ends a lease: a member that still reads keeps it. A session holds a lease
        once, however often it joined.
        """
        count = sum(self._let_go(session, lease_id) for lease_id in lease_ids)
        if count:
            self.keeper.progress.notify()
        return count

    def _let_go(self, session: Session, lease_id: int) -> bool:
        lease = self._ledger.leases.get(lease_id)
        if lease is None or session.id not in lease.holders:
            session.leases.discard(lease_id)
            return False
        lease.holders.discard(session.id)
        session.leases.discard(lease_id)
        if not lease.holders:
            self._ledger.release(lease_id)
        return True

    # --- reserve

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
        """Room for the longest prefix of `keys` (of those looked at: `covered_count`) that finds
        some; waits for room while demotion makes it, and holds nothing while it waits.

        Raises:
            TierFull: not one block found room by the deadline (seconds from now).
            DaemonUnavailable: the daemon is draining.
        """
        space = self._space(session, namespace_id)
        if space.purging:
            raise BlocksGone(f"namespace {namespace_id} is being purged: store again later")
        if self.keeper.is_bypassed([(space, keys)]):
            return ReserveGrant(0, (), len(keys), 0, None)
        if len(session.reservations) >= self.keeper.config.limits.reservations_per_session_max:
            raise LimitReached(
                f"{len(session.reservations)} reservations of this session "
                "(limits.reservations_per_session_max): commit or abort some"
            )
        until_s = self.keeper.now_s() + deadline_s
        looked_at = min(len(keys), RESERVE_KEYS_MAX)
        while True:
            if self.keeper.draining:
                raise DaemonUnavailable("the daemon is draining: it takes no stores")
            now_s = self.keeper.now_s()
            offer = self._filling.reserve(
                space,
                keys,
                parent=parent,
                position=position,
                shard=shard,
                session_id=session.id,
                count_max=self._room_count(session, space, len(keys)),
                now_s=now_s,
                deadline_s=now_s + self.keeper.config.limits.reservation_ttl_s,
            )
            if offer.reservation is not None:
                table = self._place(session, offer.reservation)
                break
            if offer.covered_count == looked_at:
                return ReserveGrant(0, (), looked_at, offer.present_count, None)
            await self._wait_for_room(session, space, until_s, keys)
        if offer.covered_count < looked_at:
            self.keeper.make_room(space, looked_at - offer.covered_count)
        return ReserveGrant(
            offer.reservation.id, offer.granted, offer.covered_count, offer.present_count, table
        )

    def _room_count(self, session: Session, space: Namespace, count: int) -> int:
        if session.room is None:
            if not self.keeper.single_tenant:
                raise PermissionDenied("this session said that it does not write")
            return count
        return session.room.largest_bytes() // space.slot_bytes[self._ledger.top]

    async def _wait_for_room(
        self, session: Session, space: Namespace, until_s: float, keys: Keys
    ) -> None:
        slot_bytes = space.slot_bytes[self._ledger.top]
        if session.room is not None and slot_bytes > session.room.arena.data_bytes:
            raise TierFull(
                f"a block of {slot_bytes} bytes is larger than the write arena of "
                f"{session.room.arena.data_bytes}: raise limits.write_arena_bytes"
            )
        if self.keeper.make_room(space, len(keys)) and self._room_count(session, space, 1):
            return
        if not await self.keeper.progress.wait(until_s - self.keeper.now_s()):
            raise TierFull(
                f"no room for a block of {slot_bytes} bytes in {self._ledger.top.label} by the "
                f"deadline: {len(self._ledger.leases)} leases and "
                f"{len(self._filling.reservations)} reservations hold it; release some, or raise "
                f"tiers.{self._ledger.top.label}.size_bytes"
            )
        if session.ended:
            raise DaemonUnavailable("the session ended while it waited for room")

    def _place(self, session: Session, reservation: Reservation) -> SlotTable:
        """Where the client writes: a stretch of its write arena, or the slots themselves."""
        session.reservations.add(reservation.id)
        space = reservation.space
        slots = array("I", [entry.slot for entry in reservation.entries])
        if session.room is None:
            return self._table(session, space, slots)
        slot_bytes = space.slot_bytes[self._ledger.top]
        extent = session.room.take(len(slots) * slot_bytes)
        if extent is None:
            raise InvariantViolated("the write room was measured and has no room")
        reservation.extent = extent
        arena = session.room.arena
        view = SegmentView(0, arena.id, arena.base_offset + extent)
        numbers = array("I", range(len(slots)))
        return SlotTable(numbers.tobytes(), slot_bytes, space.shard_bytes, (view,))

    # --- commit, abort

    async def commit(
        self,
        session: Session,
        reservation_id: int,
        indexes: Sequence[int] | None,
        *,
        durable: bool,
    ) -> CommitResult:
        """Copies and checksums the blocks (`indexes` count granted blocks; None = all that are
        open), then makes them readable. With `durable`: answers when they are on stable storage.

        Goes on to the end when the caller is cancelled: what was begun is committed.

        Raises:
            ReservationExpired: it ended; nothing was stored.
            TierFailed: durable was asked for and the SSD tier could not promise it; the blocks
                are readable from memory.
        """
        reservation = self._filling.get(reservation_id)
        if reservation.session_id != session.id:
            raise PermissionDenied(f"reservation {reservation_id} is another session's")
        entries = self._filling.begin_commit(reservation, indexes)
        return await asyncio.shield(self._run(self._commit(session, reservation, entries, durable)))

    async def _commit(
        self, session: Session, reservation: Reservation, entries: list[Entry], durable: bool
    ) -> CommitResult:
        session.copying += 1
        try:
            reach("commit.begin")
            checksums = await self._copy_in(session, reservation, entries)
        except KvTierError:
            self._filling.fail_commit(reservation, entries)
            self._return_room(reservation, session)
            self.keeper.wake()
            raise
        finally:
            session.copying -= 1
            if session.ended:
                self._close_room_when_quiet(session)
        reach("commit.copied")
        ended = reservation.ended
        filled = self._filling.finish_commit(reservation, entries, checksums)
        self._return_room(reservation, session)
        space = reservation.space
        if ended:
            self.keeper.wake()
            raise ReservationExpired(
                f"reservation {reservation.id} ended while its bytes were copied: nothing was "
                "stored; reserve again"
            )
        if reservation.epoch != space.epoch:
            raise EpochEnded(f"namespace {space.id} was cleared meanwhile: store again")
        if filled.ready:
            self.keeper.tally.stored_blocks += len(filled.ready)
            for parent, keys in stretches(entries, filled.ready):
                self.keeper.tell(EventKind.STORED, space, keys=keys, parent=parent)
        self.keeper.tally.written_bytes += len(entries) * space.shard_bytes
        self.keeper.wake()
        reach("commit.ready")
        if durable:
            every = [entry.key for entry in entries]
            await self.keeper.durability.make_durable(space, every, expected=filled.ready)
        return CommitResult(len(filled.ready), filled.duplicate_count, filled.partial_count)

    async def make_durable(self, session: Session, query: GroupQuery) -> None:
        """Blocks that were present already are on stable storage when this returns.

        Raises:
            BlocksGone: one of them is not there (any longer); store it.
            TierFailed: the SSD tier could not promise it.
        """
        space = self._space(session, query.namespace_id)
        await self.keeper.durability.make_durable(space, keys := query.keys.split(), expected=keys)

    async def _copy_in(
        self, session: Session, reservation: Reservation, entries: list[Entry]
    ) -> list[int]:
        """Write arena -> DRAM slots in worker threads; checksums of what was copied. Under
        single-tenant trust nothing is copied: checksum 0 = taken before the bytes leave DRAM.
        """
        if session.room is None or reservation.extent is None:
            return [0] * len(entries)
        space = reservation.space
        slot_bytes = space.slot_bytes[self._ledger.top]
        start = session.room.arena.data_address + reservation.extent
        index_of = {id(entry): index for index, entry in enumerate(reservation.entries)}
        items = [
            SlotIO(
                entry.slot,
                slot_bytes,
                start + index_of[id(entry)] * slot_bytes,
                self.keeper.label(space, entry, reservation.shard),
            )
            for entry in entries
        ]
        per_job = max(1, _COPY_JOB_BYTES // slot_bytes)
        jobs = [items[at : at + per_job] for at in range(0, len(items), per_job)]
        await asyncio.gather(*(self.keeper.copy_in(job) for job in jobs))
        for item in items:
            if item.error is not None:
                raise item.error
        return [item.label.checksum for item in items]

    def _return_room(self, reservation: Reservation, session: Session | None = None) -> None:
        """Gives the write arena's stretch back once the reservation is over and quiet."""
        if not reservation.ended or reservation.busy:
            return
        session = session or self._sessions.get(reservation.session_id)
        if session is None:
            return
        session.reservations.discard(reservation.id)
        if session.room is not None and reservation.extent is not None:
            session.room.give_back(reservation.extent)
            reservation.extent = None
        self.keeper.progress.notify()

    def abort(self, session: Session, reservation_id: int) -> None:
        """Gives reserved room back. An unknown reservation ended already: nothing to do."""
        reservation = self._filling.reservations.get(reservation_id)
        if reservation is None:
            return
        if reservation.session_id != session.id:
            raise PermissionDenied(f"reservation {reservation_id} is another session's")
        self._filling.abort(reservation)
        self._return_room(reservation, session)

    # --- promote, evict, pin

    def prefetch(self, session: Session, query: GroupQuery) -> int:
        """Starts promotions of the prefix that exists; returns how many blocks are on their way."""
        space = self._space(session, query.namespace_id)
        asked = [(space, query.keys)]
        if self.keeper.is_bypassed(asked):
            return 0
        found, spans, _ = self._ledger.lookup(asked)
        self.keeper.promote(space, spans[0])
        return self._moves.pending(space, query.keys, found[0].first_needed, found[0].block_count)

    async def evict(self, session: Session | None, query: GroupQuery) -> int:
        """Forgets the blocks and their descendants, durably before it returns; leased bytes stay
        readable, hidden, until their leases end. `session` None = the operator.
        """
        space = self._space(session, query.namespace_id)
        return await self.keeper.erasing.evict(space, query.keys, self.keeper.wake)

    async def clear_namespace(self, session: Session | None, namespace_id: int) -> tuple[int, int]:
        """(new epoch, blocks forgotten). Durable before it returns."""
        space = self._space(session, namespace_id)
        count = self._ledger.clear(space)
        self._filling.clear(space)
        self.keeper.tell(EventKind.CLEARED, space)
        await self.keeper.begin_epoch(space)
        return space.epoch, count

    async def purge(self, namespace_id: int, timeout_s: float) -> Purged:
        """Clears the namespace, off the disk, too, and destroys its key; waits that long for leases
        and moves. Raises BlocksHeld, TierFailed.
        """
        space = self._space(None, namespace_id)
        return await self.keeper.purging.purge(space, self._sessions, timeout_s)

    def pin(self, session: Session | None, query: GroupQuery) -> int:
        """These blocks are not forgotten until unpinned as often. Returns how many exist."""
        return self._ledger.pin(self._space(session, query.namespace_id), query.keys)

    def unpin(self, session: Session | None, query: GroupQuery) -> int:
        """Undoes one pin. Returns how many blocks were pinned."""
        return self._ledger.unpin(self._space(session, query.namespace_id), query.keys)

    def watch(
        self, session: Session, namespace_id: int, from_revision: int
    ) -> AsyncIterator[Event]:
        """Bounded: a watcher that does not keep up is told COMPACTED and goes on."""
        self._space(session, namespace_id)
        return self.keeper.events.watch(namespace_id, from_revision)

    # --- the operator

    def counts(self, namespaces_max: int) -> StoreCounts:
        """Everything `kvtier stat` shows."""
        return accounts(self.keeper, self._sessions.values(), namespaces_max)

    def namespaces(self) -> list[NamespaceUse]:
        """All namespaces."""
        return all_namespaces(self.keeper)

    def blocks(self, namespace_id: int, after_key: bytes, count_max: int) -> list[BlockUse]:
        """A page of blocks, in the order of the index, after the one with `after_key`."""
        return block_uses(self._ledger, self._ledger.space(namespace_id), after_key, count_max)

    async def flush(self, timeout_s: float) -> tuple[int, int]:
        """(blocks written below, blocks still only in memory)."""
        return await self.keeper.durability.flush(timeout_s)

    async def drain(self, timeout_s: float) -> tuple[int, int]:
        """Stops taking stores, then flushes."""
        self.keeper.draining = True
        self.keeper.progress.notify()
        return await self.keeper.durability.flush(timeout_s)

    def undrain(self) -> None:
        """Takes stores again."""
        self.keeper.draining = False

    def bypass(self, on: bool, namespace_id: int) -> None:
        """Whole daemon (0) or one namespace: every lookup misses, nothing is stored."""
        if namespace_id:
            self._ledger.space(namespace_id).bypassed = on
        else:
            self.keeper.bypassed = on

    def check(self) -> list[str]:
        """Runs every invariant check; the problems found, as sentences (empty = sound)."""
        return self.keeper.check(self._sessions.values())

    def _run(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._look_for_a_bug)
        return task

    def _look_for_a_bug(self, task: asyncio.Task[Any]) -> None:
        """Its caller may be gone: an error of operation is then nobody's, a bug is everybody's."""
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, KvTierError):
            self.keeper.stop_by(error)

    def __repr__(self) -> str:
        return f"<Store {len(self._sessions)} sessions, {self._ledger!r}, {self.keeper.mover!r}>"


def _check_shard(space: Namespace, shard: int) -> None:
    if not 0 <= shard < space.shards:
        raise InvalidRequest(f"shard {shard} of a format with {space.shards}")
