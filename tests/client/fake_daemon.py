"""FakeDaemon: a daemon of real sockets, memfds and gRPC with books in dicts, to test the client.

Every key has one slot of one read arena per namespace. Keys in `below` lie lower: a lease of them
is ready only after a Lease call that names its id. Run as a script it serves until killed.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from kvtier import wire
from kvtier.block import (
    CommitResult,
    Found,
    LeaseGrant,
    LookupAnswer,
    NamespaceSpec,
    Reason,
    ReserveGrant,
    SegmentView,
    SlotTable,
    TierId,
    TierRun,
)
from kvtier.errors import KvTierError, NotFound, ReservationExpired, Unauthenticated
from kvtier.tiers.arena import Arena
from kvtier.units import MIB, align_up
from kvtier.v1 import cache_pb2, cache_pb2_grpc, session_pb2

ROOM_BYTES = 8 * MIB


class Attached:
    """One session: its socket, token, write arena, and which arenas it was sent."""

    def __init__(self, peer: socket.socket) -> None:
        self.peer = peer
        self.token = secrets.token_bytes(16)
        self.arena = Arena("fake-write", ROOM_BYTES, writable=True, huge_pages="off")
        self.sent: set[int] = set()
        self.returned: list[int] = []


class FakeDaemon(cache_pb2_grpc.CacheServiceServicer):
    """Serves in threads. `leases` and `reservations` are what a test looks at."""

    def __init__(self, path: Path, *, protocol: int = 1, refusal: str = "", room: int = 64) -> None:
        self.path = path
        self.protocol = protocol
        self.refusal = refusal
        self.room = room  # blocks a reserve grants at most
        self.sessions: dict[bytes, Attached] = {}
        self.handshakes = 0
        self.namespaces: dict[int, NamespaceSpec] = {}
        self.first_namespace = 1
        self.arenas: dict[int, Arena] = {}
        self.blocks: dict[tuple[int, bytes], int] = {}
        self.below: set[bytes] = set()
        self.leases: dict[int, tuple[bytes, int, tuple[bytes, ...]]] = {}
        self.reservations: dict[int, tuple[bytes, int, list[bytes]]] = {}
        self.generations: dict[int, dict[int, int]] = {}
        self.answers: dict[str, Any] = {}
        self.requests: list[tuple[str, str]] = []
        self.delay_s = 0.0  # before a Lookup or Reserve is answered, once
        self.silent_arenas = False
        self.lock = threading.RLock()
        self.numbers = itertools.count(1)
        self._serve()

    def _serve(self) -> None:
        for path in (self.path, Path(f"{self.path}.session")):
            path.unlink(missing_ok=True)
        self.grpc = grpc.server(ThreadPoolExecutor(8))
        cache_pb2_grpc.add_CacheServiceServicer_to_server(self, self.grpc)
        self.grpc.add_insecure_port(f"unix:{self.path}")
        self.grpc.start()
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(f"{self.path}.session")
        self.listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for session in list(self.sessions.values()):
            with contextlib.suppress(OSError):
                session.peer.shutdown(socket.SHUT_RDWR)
        self.grpc.stop(None).wait()

    # --- the session socket

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._attend, args=(peer,), daemon=True).start()

    def _attend(self, peer: socket.socket) -> None:
        self.handshakes += 1
        with peer:
            session_pb2.Hello.FromString(peer.recv(8192))
            if self.refusal:
                refusal = session_pb2.Refusal(reason=self.refusal, message="not you")
                peer.send(session_pb2.SessionPacket(refusal=refusal).SerializeToString())
                return
            session = Attached(peer)
            self.sessions[session.token] = session
            welcome = session_pb2.Welcome(
                protocol=self.protocol,
                memory_layout=1,
                session_token=session.token,
                tenant="default",
                trust="isolated",
                write_arena=_describe(session.arena),
            )
            packet = session_pb2.SessionPacket(welcome=welcome).SerializeToString()
            socket.send_fds(peer, [packet], [session.arena.fd])
            while payload := _take(peer):
                packet_in = session_pb2.ClientPacket.FromString(payload)
                session.returned.append(packet_in.arena_returned.arena_id)
            self._end(session)

    def _end(self, session: Attached) -> None:
        with self.lock:
            self.sessions.pop(session.token, None)
            for held in (self.leases, self.reservations):
                for number in [n for n, entry in held.items() if entry[0] == session.token]:
                    del held[number]

    def _announce(self, session: Attached, arena: Arena) -> None:
        if arena.id not in session.sent and not self.silent_arenas:
            session.sent.add(arena.id)
            added = session_pb2.ArenaAdded(arena=_describe(arena))
            packet = session_pb2.SessionPacket(arena_added=added).SerializeToString()
            socket.send_fds(session.peer, [packet], [arena.fd])

    # --- what tests do to it

    def withdraw(self, namespace_id: int) -> int:
        """Replaces a namespace's arena (its blocks are lost); returns the old one's id."""
        arena = self.arenas.pop(namespace_id)
        for session in self.sessions.values():
            withdrawn = session_pb2.ArenaWithdrawn(arena_id=arena.id)
            packet = session_pb2.SessionPacket(arena_withdrawn=withdrawn)
            session.peer.send(packet.SerializeToString())
        self.blocks = {k: v for k, v in self.blocks.items() if k[0] != namespace_id}
        return arena.id

    def take_back(self, namespace_id: int, key: bytes) -> None:
        """Revokes the slot of a key: its readers must notice."""
        arena, slot_bytes = self.arenas[namespace_id], self._slot_bytes(namespace_id)
        slot = self.blocks[namespace_id, key]
        offset = arena.base_offset + slot * slot_bytes
        words = self.generations.setdefault(namespace_id, {})
        words[slot] = arena.revoke(offset, slot_bytes)

    def forget_namespaces(self) -> None:
        """As after a restart that kept the session: ids change."""
        self.first_namespace += 100
        self.namespaces.clear()

    # --- the service

    def _session(self, request: Any) -> Attached:
        session = self.sessions.get(request.session_token)
        if session is None:
            raise Unauthenticated("no such session")
        return session

    def _arena(self, namespace_id: int) -> Arena:
        if namespace_id not in self.namespaces:
            raise NotFound(f"namespace {namespace_id} is not known")
        if namespace_id not in self.arenas:
            self.arenas[namespace_id] = Arena("fake", ROOM_BYTES, writable=False, huge_pages="off")
        return self.arenas[namespace_id]

    def _slot_bytes(self, namespace_id: int) -> int:
        return align_up(self.namespaces[namespace_id].format.shard_bytes, 4096)

    def OpenNamespace(self, request: Any, context: Any) -> Any:  # noqa: N802
        with _border(context):
            self._session(request)
            spec = wire.decode_spec(request.spec)
            known = {s: i for i, s in self.namespaces.items()}
            number = known.get(spec, self.first_namespace + len(known))
            self.namespaces[number] = spec
            return cache_pb2.OpenNamespaceResponse(
                namespace_id=number, epoch=1, shard_bytes=spec.format.shard_bytes
            )

    def Lookup(self, request: Any, context: Any) -> Any:  # noqa: N802
        with _border(context), self.lock:
            self.requests.append(("Lookup", request.request_id))
            session = self._session(request)
            if request.request_id and request.request_id in self.answers:
                return self.answers[request.request_id]
            founds, grants = [], []
            for group in request.groups:
                query = wire.decode_query(group)
                arena = self._arena(query.namespace_id)
                keys = query.keys.split()
                count = self._prefix(query.namespace_id, keys)
                runs = (TierRun(TierId.DRAM, count),) if count else ()
                reason = Reason.NONE if count == len(keys) else Reason.NEVER_STORED
                founds.append(Found(count, runs, 0.5, reason))
                if request.lease and count:
                    self._announce(session, arena)
                    grants.append(self._grant(session, query.namespace_id, keys[:count]))
            tokens = min(f.block_count for f in founds) * 16
            answer = wire.encode_answer(LookupAnswer(tuple(founds), tokens, tuple(grants)))
            self.answers[request.request_id] = answer
            delay_s, self.delay_s = self.delay_s, 0.0
        time.sleep(delay_s)
        return answer

    def _prefix(self, namespace_id: int, keys: list[bytes]) -> int:
        count = 0
        while count < len(keys) and (namespace_id, keys[count]) in self.blocks:
            count += 1
        return count

    def _grant(self, session: Attached, namespace_id: int, keys: list[bytes]) -> LeaseGrant:
        lease_id = next(self.numbers)
        self.leases[lease_id] = (session.token, namespace_id, tuple(keys))
        return self._lease(lease_id, ready=not self.below.intersection(keys))

    def _lease(self, lease_id: int, *, ready: bool) -> LeaseGrant:
        _, namespace_id, keys = self.leases[lease_id]
        arena = self.arenas[namespace_id]
        slots = [self.blocks[namespace_id, key] for key in keys]
        table = SlotTable(
            slots=wire.pack_u32(slots),
            slot_bytes=self._slot_bytes(namespace_id),
            size_bytes=self.namespaces[namespace_id].format.shard_bytes,
            views=(SegmentView(0, arena.id, arena.base_offset),),
            generations=self.generations.get(namespace_id, {}),
            revocations={arena.id: arena.revocations} if arena.revocations else {},
        )
        count = len(keys)
        return LeaseGrant(lease_id, count, 0, count if ready else 0, table if ready else None)

    def Lease(self, request: Any, context: Any) -> Any:  # noqa: N802
        with _border(context), self.lock:
            session = self._session(request)
            if request.lease_id:
                if request.lease_id not in self.leases:
                    raise NotFound(f"lease {request.lease_id} is not known")
                self._announce(session, self.arenas[self.leases[request.lease_id][1]])
                grant = self._lease(request.lease_id, ready=True)
                return cache_pb2.LeaseResponse(grant=wire.encode_lease(grant))
            query = wire.decode_query(request.group)
            self._announce(session, self._arena(query.namespace_id))
            keys = query.keys.split()
            count = self._prefix(query.namespace_id, keys)
            grant = LeaseGrant(0, 0, 0, 0, None)
            if count:
                grant = self._grant(session, query.namespace_id, keys[:count])
                grant = self._lease(grant.lease_id, ready=True)
            reason = Reason.NONE if count == len(keys) else Reason.NEVER_STORED
            return cache_pb2.LeaseResponse(
                grant=wire.encode_lease(grant), reason=wire.REASON_NUMBERS[reason]
            )

    def Release(self, request: Any, context: Any) -> Any:  # noqa: N802
        with _border(context), self.lock:
            self._session(request)
            gone = [self.leases.pop(i, None) for i in request.lease_ids]
            return cache_pb2.ReleaseResponse(released=sum(g is not None for g in gone))

    def Reserve(self, request: Any, context: Any) -> Any:  # noqa: N802
        with _border(context), self.lock:
            self.requests.append(("Reserve", request.request_id))
            session = self._session(request)
            if request.request_id in self.answers:
                return self.answers[request.request_id]
            self._arena(request.namespace_id)
            keys = wire.decode_query(
                cache_pb2.GroupQuery(keys=request.keys, key_bytes=request.key_bytes)
            ).keys.split()
            if request.skip_save:
                return cache_pb2.ReserveResponse(covered_count=len(keys))
            covered = keys[: self.room]
            granted = [
                i for i, key in enumerate(covered) if (request.namespace_id, key) not in self.blocks
            ]
            number = next(self.numbers) if granted else 0
            if granted:
                names = [keys[i] for i in granted]
                self.reservations[number] = (session.token, request.namespace_id, names)
            table = SlotTable(
                slots=wire.pack_u32(range(len(granted))),
                slot_bytes=self._slot_bytes(request.namespace_id),
                size_bytes=self.namespaces[request.namespace_id].format.shard_bytes,
                views=(SegmentView(0, session.arena.id, session.arena.base_offset),),
            )
            present = len(covered) - len(granted)
            grant = ReserveGrant(
                number, tuple(granted), len(covered), present, table if granted else None
            )
            answer = self.answers[request.request_id] = wire.encode_reserve(grant)
            delay_s, self.delay_s = self.delay_s, 0.0
        time.sleep(delay_s)
        return answer

    def Commit(self, request: Any, context: Any) -> Any:  # noqa: N802
        with _border(context), self.lock:
            session = self._session(request)
            entry = self.reservations.get(request.reservation_id)
            if entry is None:
                raise ReservationExpired(f"reservation {request.reservation_id} is not known")
            _, namespace_id, keys = entry
            arena, slot_bytes = self._arena(namespace_id), self._slot_bytes(namespace_id)
            indexes = wire.unpack_u32(request.indexes) or range(len(keys))
            for index in indexes:
                slot = len(self.blocks)
                self.blocks[namespace_id, keys[index]] = slot
                source = session.arena.base_offset + index * slot_bytes
                target = arena.base_offset + slot * slot_bytes
                payload = session.arena._map[source : source + slot_bytes]
                arena._map[target : target + slot_bytes] = payload
            if not request.indexes:
                del self.reservations[request.reservation_id]
            return wire.encode_commit(CommitResult(len(indexes), 0, 0))

    def Abort(self, request: Any, context: Any) -> Any:  # noqa: N802
        with _border(context), self.lock:
            self._session(request)
            self.reservations.pop(request.reservation_id, None)
            return cache_pb2.AbortResponse()

    def _chain(self, request: Any, context: Any) -> tuple[int, list[bytes]]:
        with _border(context):
            self._session(request)
            query = wire.decode_query(request.group)
            self._arena(query.namespace_id)
            return query.namespace_id, query.keys.split()

    def Prefetch(self, request: Any, context: Any) -> Any:  # noqa: N802
        _, keys = self._chain(request, context)
        return cache_pb2.PrefetchResponse(moving_count=len(self.below.intersection(keys)))

    def Evict(self, request: Any, context: Any) -> Any:  # noqa: N802
        namespace_id, keys = self._chain(request, context)
        gone = [self.blocks.pop((namespace_id, key), None) for key in keys]
        return cache_pb2.EvictResponse(evicted_count=sum(slot is not None for slot in gone))

    def Pin(self, request: Any, context: Any) -> Any:  # noqa: N802
        return cache_pb2.PinResponse(pinned_count=len(self._chain(request, context)[1]))

    def Unpin(self, request: Any, context: Any) -> Any:  # noqa: N802
        return cache_pb2.UnpinResponse(unpinned_count=len(self._chain(request, context)[1]))

    def ClearNamespace(self, request: Any, context: Any) -> Any:  # noqa: N802
        with _border(context), self.lock:
            self._arena(request.namespace_id)
            before = len(self.blocks)
            self.blocks = {k: v for k, v in self.blocks.items() if k[0] != request.namespace_id}
            return cache_pb2.ClearNamespaceResponse(
                epoch=2, evicted_count=before - len(self.blocks)
            )

    def Watch(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        with _border(context):
            self._session(request)
            self._arena(request.namespace_id)
        for revision in range(request.from_revision, request.from_revision + 3):
            yield cache_pb2.WatchResponse(
                revision=revision, kind=cache_pb2.EVENT_KIND_STORED, keys=b"k" * 16, key_bytes=16
            )


@contextlib.contextmanager
def _border(context: Any) -> Iterator[None]:
    try:
        yield
    except KvTierError as error:
        status = wire.abort_status(error)
        context.set_trailing_metadata(status.trailing_metadata)
        context.abort(status.code, status.details)


def _describe(arena: Arena) -> session_pb2.Arena:
    return session_pb2.Arena(
        arena_id=arena.id, size_bytes=arena.layout.size, writable=arena.writable
    )


def _take(peer: socket.socket) -> bytes:
    try:
        return peer.recv(8192)
    except OSError:
        return b""


if __name__ == "__main__":
    daemon = FakeDaemon(Path(sys.argv[1]))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    threading.Event().wait()
