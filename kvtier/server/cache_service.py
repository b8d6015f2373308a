"""CacheService: one handler per RPC of the engine's side: decode, one call of the store, encode.

Handlers return serialized answers: those of mutating calls are kept by request id (answers).
Lookup and Release are on an engine's critical path and do nothing else.

Does not: decide anything, or see exceptions (borders).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

import grpc

from kvtier.block import SHARDS_MAX, CommitResult, Found, Keys, LookupAnswer, Reason
from kvtier.errors import DaemonUnavailable, InvalidRequest, LimitReached
from kvtier.server.borders import Border, Context, stream, unary
from kvtier.server.sessions import SessionServer
from kvtier.store import Store
from kvtier.v1 import cache_pb2
from kvtier.wire import (
    GROUPS_PER_CALL_MAX,
    LEASES_PER_CALL_MAX,
    REASON_NUMBERS,
    decode_query,
    decode_spec,
    encode_answer,
    encode_commit,
    encode_event,
    encode_lease,
    encode_reserve,
    unpack_u32,
)

SERVICE = "kvtier.v1.CacheService"
WAIT_S_MAX = 30.0  # of a call that waits, also without a deadline
WATCHES_PER_SESSION_MAX = 64
_ANSWER_MARGIN = 0.05  # share of a call's time (at most 50 ms) that is left for the answer


class CacheService:
    """The handlers. Event loop only. Raises from each: Unauthenticated, InvalidRequest, store's."""

    def __init__(self, store: Store, sessions: SessionServer, border: Border) -> None:
        self._store = store
        self._sessions = sessions
        self._border = border

    def handlers(self) -> Any:
        """What a server is given: every RPC of the service, behind the border."""
        plain, waiting = self._border.plain, self._border.waiting
        methods = {
            "OpenNamespace": unary(
                plain("OpenNamespace", self.open_namespace), cache_pb2.OpenNamespaceRequest
            ),
            "Lookup": unary(plain("Lookup", self.lookup), cache_pb2.LookupRequest),
            "Lease": unary(waiting("Lease", self.lease), cache_pb2.LeaseRequest),
            "Release": unary(plain("Release", self.release), cache_pb2.ReleaseRequest),
            "Reserve": unary(waiting("Reserve", self.reserve), cache_pb2.ReserveRequest),
            "Commit": unary(waiting("Commit", self.commit), cache_pb2.CommitRequest),
            "Abort": unary(plain("Abort", self.abort), cache_pb2.AbortRequest),
            "Prefetch": unary(plain("Prefetch", self.prefetch), cache_pb2.PrefetchRequest),
            "Evict": unary(waiting("Evict", self.evict), cache_pb2.EvictRequest),
            "ClearNamespace": unary(
                waiting("ClearNamespace", self.clear_namespace), cache_pb2.ClearNamespaceRequest
            ),
            "Pin": unary(plain("Pin", self.pin), cache_pb2.PinRequest),
            "Unpin": unary(plain("Unpin", self.unpin), cache_pb2.UnpinRequest),
            "Watch": stream(self._border.streaming("Watch", self.watch), cache_pb2.WatchRequest),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def open_namespace(self, request: cache_pb2.OpenNamespaceRequest, _: Context) -> bytes:
        """Names a namespace of the session's tenant."""
        session = self._sessions.by_token(request.session_token)
        speed = request.prefill_tokens_per_s
        if not (math.isfinite(speed) and speed >= 0):
            raise InvalidRequest(f"prefill_tokens_per_s is {speed}; it must be 0 or more")
        spec = decode_spec(request.spec, session.tenant)
        namespace_id, epoch, shard_bytes = self._store.open_namespace(session, spec, speed)
        return cache_pb2.OpenNamespaceResponse(
            namespace_id=namespace_id, epoch=epoch, shard_bytes=shard_bytes
        ).SerializeToString()

    def lookup(self, request: cache_pb2.LookupRequest, context: Context) -> bytes:
        """What is restorable; past the caller's deadline, a miss."""
        connection = self._sessions.connection(request.session_token)
        groups = request.groups
        if not 1 <= len(groups) <= GROUPS_PER_CALL_MAX:
            raise InvalidRequest(f"{len(groups)} groups; there must be 1 to {GROUPS_PER_CALL_MAX}")
        queries = [decode_query(group) for group in groups]
        shard = _shard(request.shard)
        if request.skip_read:
            return _miss(len(queries), Reason.BYPASSED)
        lease, request_id = request.lease, request.request_id
        if lease:
            answered = connection.answers.find("Lookup", request_id)
            if answered is not None:
                return answered
        remaining_s = context.time_remaining()
        if remaining_s is not None and remaining_s <= 0:
            return _miss(len(queries), Reason.DEADLINE)
        assert connection.session is not None
        answer = encode_answer(
            self._store.lookup(
                connection.session,
                queries,
                lease=lease,
                prefetch=request.prefetch,
                touch=request.touch,
                shard=shard,
            )
        ).SerializeToString()
        return connection.answers.keep("Lookup", request_id, answer) if lease else answer

    async def lease(self, request: cache_pb2.LeaseRequest, context: Context) -> bytes:
        """Waits for promotions, until shortly before the caller's deadline."""
        connection = self._sessions.connection(request.session_token)
        if request.HasField("group") == bool(request.lease_id):
            raise InvalidRequest("a lease needs either lease_id or group")
        query = decode_query(request.group) if request.HasField("group") else None
        shard = _shard(request.shard)
        deadline_s = _wait_s(context)

        async def work() -> bytes:
            assert connection.session is not None
            grant, reason = await self._store.lease(
                connection.session, query, request.lease_id, shard=shard, deadline_s=deadline_s
            )
            return cache_pb2.LeaseResponse(
                grant=encode_lease(grant), reason=REASON_NUMBERS[reason]
            ).SerializeToString()

        return await connection.answers.once("Lease", request.request_id, work, abandon=True)

    def release(self, request: cache_pb2.ReleaseRequest, _: Context) -> bytes:
        """Ends leases; by itself repeatable."""
        session = self._sessions.by_token(request.session_token)
        if len(request.lease_ids) > LEASES_PER_CALL_MAX:
            raise InvalidRequest(f"more than {LEASES_PER_CALL_MAX} leases in one call")
        released = self._store.release(session, request.lease_ids)
        return cache_pb2.ReleaseResponse(released=released).SerializeToString()

    async def reserve(self, request: cache_pb2.ReserveRequest, context: Context) -> bytes:
        """Waits for room, until shortly before the caller's deadline."""
        connection = self._sessions.connection(request.session_token)
        keys = Keys(request.keys, request.key_bytes)
        parent = request.parent
        if parent and len(parent) != keys.size:
            raise InvalidRequest(f"parent has {len(parent)} bytes, the keys {keys.size}")
        shard = _shard(request.shard)
        if request.skip_save:
            return cache_pb2.ReserveResponse(covered_count=len(keys)).SerializeToString()
        deadline_s = _wait_s(context)

        async def work() -> bytes:
            assert connection.session is not None
            grant = await self._store.reserve(
                connection.session,
                request.namespace_id,
                keys,
                parent=parent,
                position=request.position,
                shard=shard,
                deadline_s=deadline_s,
            )
            return encode_reserve(grant).SerializeToString()

        return await connection.answers.once("Reserve", request.request_id, work, abandon=True)

    async def commit(self, request: cache_pb2.CommitRequest, _: Context) -> bytes:
        """Finishes, and is remembered, even if the caller goes away meanwhile."""
        connection = self._sessions.connection(request.session_token)
        indexes = unpack_u32(request.indexes) if request.indexes else None
        present = decode_query(request.present) if request.HasField("present") else None
        if present is not None and not request.durable:
            raise InvalidRequest("present blocks are named only to be made durable")

        async def work() -> bytes:
            assert connection.session is not None
            result = CommitResult(0, 0, 0)
            if request.reservation_id or present is None:
                result = await self._store.commit(
                    connection.session, request.reservation_id, indexes, durable=request.durable
                )
            if present is not None:
                await self._store.make_durable(connection.session, present)
            return encode_commit(result).SerializeToString()

        return await connection.answers.once("Commit", request.request_id, work, abandon=False)

    def abort(self, request: cache_pb2.AbortRequest, _: Context) -> bytes:
        """Gives reserved room back; by itself repeatable."""
        session = self._sessions.by_token(request.session_token)
        self._store.abort(session, request.reservation_id)
        return b""

    def prefetch(self, request: cache_pb2.PrefetchRequest, _: Context) -> bytes:
        """Starts moves up."""
        session = self._sessions.by_token(request.session_token)
        moving = self._store.prefetch(session, decode_query(request.group))
        return cache_pb2.PrefetchResponse(moving_count=moving).SerializeToString()

    async def evict(self, request: cache_pb2.EvictRequest, _: Context) -> bytes:
        """Finishes even if the caller goes away meanwhile."""
        connection = self._sessions.connection(request.session_token)
        query = decode_query(request.group)

        async def work() -> bytes:
            count = await self._store.evict(connection.session, query)
            return cache_pb2.EvictResponse(evicted_count=count).SerializeToString()

        return await connection.answers.once("Evict", request.request_id, work, abandon=False)

    async def clear_namespace(self, request: cache_pb2.ClearNamespaceRequest, _: Context) -> bytes:
        """Finishes even if the caller goes away meanwhile."""
        connection = self._sessions.connection(request.session_token)

        async def work() -> bytes:
            epoch, count = await self._store.clear_namespace(
                connection.session, request.namespace_id
            )
            return cache_pb2.ClearNamespaceResponse(
                epoch=epoch, evicted_count=count
            ).SerializeToString()

        answers = connection.answers
        return await answers.once("ClearNamespace", request.request_id, work, abandon=False)

    def pin(self, request: cache_pb2.PinRequest, _: Context) -> bytes:
        """Pins count, so a repeat by id must not."""
        connection = self._sessions.connection(request.session_token)
        answered = connection.answers.find("Pin", request.request_id)
        if answered is not None:
            return answered
        count = self._store.pin(connection.session, decode_query(request.group))
        answer = cache_pb2.PinResponse(pinned_count=count).SerializeToString()
        return connection.answers.keep("Pin", request.request_id, answer)

    def unpin(self, request: cache_pb2.UnpinRequest, _: Context) -> bytes:
        """As `pin`."""
        connection = self._sessions.connection(request.session_token)
        answered = connection.answers.find("Unpin", request.request_id)
        if answered is not None:
            return answered
        count = self._store.unpin(connection.session, decode_query(request.group))
        answer = cache_pb2.UnpinResponse(unpinned_count=count).SerializeToString()
        return connection.answers.keep("Unpin", request.request_id, answer)

    async def watch(self, request: cache_pb2.WatchRequest, _: Context) -> AsyncIterator[bytes]:
        """Events until the caller or the session ends. A slow caller is told what it missed."""
        connection = self._sessions.connection(request.session_token)
        assert connection.session is not None
        if len(connection.watches) >= WATCHES_PER_SESSION_MAX:
            raise LimitReached(f"{WATCHES_PER_SESSION_MAX} watches run in this session already")
        events = self._store.watch(connection.session, request.namespace_id, request.from_revision)
        while True:
            # A task of its own, which the end of the session cancels: gRPC sends no status to the
            # client when the handler's task is cancelled.
            pull = asyncio.ensure_future(anext(events, None))
            connection.watches.add(pull)
            try:
                event = await pull
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None and task.cancelling():  # the caller went away
                    raise
                raise DaemonUnavailable("the session ended, or the daemon stops") from None
            finally:
                connection.watches.discard(pull)
            if event is None:
                return
            yield encode_event(event).SerializeToString()


def _miss(group_count: int, reason: Reason) -> bytes:
    answer = LookupAnswer((Found(0, reason=reason),) * group_count, 0)
    return encode_answer(answer).SerializeToString()


def _shard(number: int) -> int:
    if number >= SHARDS_MAX:
        raise InvalidRequest(f"shard is {number}; it must be below {SHARDS_MAX}")
    return number


def _wait_s(context: Context) -> float:
    """How long a call may wait so that its answer still arrives before its deadline."""
    remaining_s = context.time_remaining()
    if remaining_s is None:
        return WAIT_S_MAX
    return min(remaining_s - min(remaining_s * _ANSWER_MARGIN, 0.05), WAIT_S_MAX)
