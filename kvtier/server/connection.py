"""Connection: one client's session socket, from its first packet to the news of its death.

The kernel says who connected (SO_PEERCRED, SO_PEERPIDFD). Of EOF and pidfd the first decides: a
forked child that keeps the socket does not keep the session.

Does not: know what a session holds; `Store.end_session` returns it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.message import DecodeError

import kvtier
from kvtier.block import MEMORY_LAYOUT_VERSION, PROTOCOL_VERSION, TEXT_BYTES_MAX
from kvtier.errors import InvalidRequest, KvTierError, VersionMismatch
from kvtier.session import Session
from kvtier.tiers.arena import Arena
from kvtier.v1 import session_pb2
from kvtier.wire import PACKET_BYTES_MAX

if TYPE_CHECKING:
    from kvtier.server.sessions import SessionServer, Tenants

log = logging.getLogger("kvtier.sessions")

HELLO_TIMEOUT_S = 5.0
OUTBOX_MAX = 256  # packets a client has not taken, beyond what its socket's buffer holds
_RETRY_S = 0.05  # after a lack of descriptors or of kernel memory
_SO_PEERPIDFD: Final = 77  # Linux 6.5; not in socket of Python 3.11
_PEERCRED: Final = struct.Struct("iII")  # pid, uid, gid


class Connection:
    """One client's session socket, from accept to its end. Event loop only.

    `session` is there once the Hello was accepted. `answers` (by request id) and
    `watches` (what Watch calls wait for) belong to `cache_service` and end with the connection.
    """

    def __init__(self, server: SessionServer, peer: socket.socket, tenants: Tenants) -> None:
        self.session: Session | None = None
        self.token = b""
        self.answers = server.new_answers()
        self.watches: set[asyncio.Future[Any]] = set()
        self.ended = False
        self._server = server
        self._tenants = tenants
        self._socket = peer
        self._loop = asyncio.get_running_loop()
        self._outbox: deque[tuple[bytes, int]] = deque()
        self._blocked = True  # until Welcome went out: nothing may overtake it
        self.pid, self.uid, _ = _PEERCRED.unpack(
            peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
        )
        self._pidfd = _open_pidfd(peer, self.pid)
        self._timer = self._loop.call_later(HELLO_TIMEOUT_S, self.end, "no Hello in time")
        self._loop.add_reader(peer.fileno(), self._on_readable)
        if self._pidfd >= 0:
            self._loop.add_reader(self._pidfd, self.end, "its process is gone")

    # --- what the client sends

    def _on_readable(self) -> None:
        """Takes one packet; whatever is wrong with it ends this session and no other."""
        try:
            packet, _, flags, _ = self._socket.recvmsg(PACKET_BYTES_MAX)
        except BlockingIOError:
            return
        except OSError as error:
            self.end(f"its socket failed: {error.strerror}")
            return
        if not packet:
            self.end("it closed the socket")
        elif flags & socket.MSG_TRUNC:
            self.end(f"it sent a packet over {PACKET_BYTES_MAX} bytes")
        elif self.session is None:
            self._on_hello(packet)
        else:
            self._on_packet(self.session, packet)

    def _on_hello(self, packet: bytes) -> None:
        try:
            try:
                hello = session_pb2.Hello.FromString(packet)
            except DecodeError:
                raise InvalidRequest("the first packet is not a Hello") from None
            tenant = self._tenants.of(self.uid)
            _check_hello(hello)
            self._server.admit(self, hello, tenant)
        except KvTierError as error:
            log.warning("session.refused uid=%d pid=%d %s", self.uid, self.pid, error)
            refusal = session_pb2.Refusal(reason=error.reason, message=str(error))
            with contextlib.suppress(OSError):
                self._socket.send(session_pb2.SessionPacket(refusal=refusal).SerializeToString())
            self.end("it was refused")

    def _on_packet(self, session: Session, packet: bytes) -> None:
        try:
            message = session_pb2.ClientPacket.FromString(packet)
            if message.WhichOneof("packet") == "arena_returned":
                self._server.store.arena_returned(session, message.arena_returned.arena_id)
        except (DecodeError, KvTierError) as error:
            self.end(f"it sent a malformed packet: {type(error).__name__}")

    # --- what the client is told

    def welcome(self, session: Session, token: bytes, trust: str) -> None:
        """The session stands: sends the token and the write arena, then what waited for that."""
        self.session, self.token = session, token
        self._timer.cancel()
        room = session.room
        packet = session_pb2.SessionPacket(
            welcome=session_pb2.Welcome(
                protocol=PROTOCOL_VERSION,
                memory_layout=MEMORY_LAYOUT_VERSION,
                session_token=token,
                tenant=session.tenant,
                write_arena=None if room is None else _describe(room.arena),
                daemon_version=kvtier.__version__,
                trust=trust,
            )
        )
        try:
            descriptor = -1 if room is None else os.dup(room.arena.fd)
        except OSError as error:
            self._loop.call_soon(self.end, f"no descriptor to send: {error.strerror}")
            return
        self._outbox.appendleft((packet.SerializeToString(), descriptor))
        self._blocked = False
        self._flush()

    def announce(self, arena: Arena) -> None:
        """The client learns of an arena, with its descriptor, before any answer names it."""
        added = session_pb2.ArenaAdded(arena=_describe(arena))
        self._send(session_pb2.SessionPacket(arena_added=added), arena.fd)

    def withdraw(self, arena_id: int) -> None:
        """The client is asked to unmap an arena."""
        withdrawn = session_pb2.ArenaWithdrawn(arena_id=arena_id)
        self._send(session_pb2.SessionPacket(arena_withdrawn=withdrawn), -1)

    def _send(self, packet: session_pb2.SessionPacket, fd: int) -> None:
        """Queues and sends what the socket takes. A client that takes nothing loses its session:
        later, not within the store's call that told it something.
        """
        if self.ended:
            return
        try:
            # A copy of the descriptor: the arena may be closed before the packet is sent.
            self._outbox.append((packet.SerializeToString(), os.dup(fd) if fd >= 0 else -1))
        except OSError as error:
            self._loop.call_soon(self.end, f"no descriptor to send: {error.strerror}")
            return
        if not self._blocked:
            self._flush()
        if len(self._outbox) > OUTBOX_MAX:
            self._loop.call_soon(self.end, f"it left {OUTBOX_MAX} packets unread")

    def _flush(self) -> None:
        self._loop.remove_writer(self._socket.fileno())
        while self._outbox:
            data, fd = self._outbox[0]
            try:
                if fd >= 0:
                    socket.send_fds(self._socket, [data], [fd])
                else:
                    self._socket.send(data)
            except BlockingIOError:
                self._blocked = True
                self._loop.add_writer(self._socket.fileno(), self._on_writable)
                return
            except (BrokenPipeError, ConnectionError):
                self._loop.call_soon(self.end, "it closed the socket")
                return
            except OSError:  # ETOOMANYREFS, ENOBUFS: writable, and yet not now
                self._blocked = True
                self._loop.call_later(_RETRY_S, self._on_writable)
                return
            self._outbox.popleft()
            if fd >= 0:
                os.close(fd)

    def _on_writable(self) -> None:
        if not self.ended:
            self._blocked = False
            self._flush()

    def end_watches(self) -> None:
        """Ends the session's Watch calls: they have no end of their own."""
        for pull in self.watches:
            pull.cancel()

    def end(self, why: str) -> None:
        """Everything the client held is returned, its calls are cancelled. Idempotent."""
        if self.ended:
            return
        self.ended = True
        self._timer.cancel()
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
        for _, fd in self._outbox:
            if fd >= 0:
                os.close(fd)
        self._outbox.clear()
        self.end_watches()
        self.answers.clear()
        self._server.forget(self)
        if self.session is not None:
            log.info("session.ended pid=%d tenant=%s: %s", self.pid, self.session.tenant, why)
            self._server.store.end_session(self.session)


def _check_hello(hello: session_pb2.Hello) -> None:
    """Raises VersionMismatch, InvalidRequest."""
    ranges = (
        ("protocol", PROTOCOL_VERSION, hello.protocol_min, hello.protocol_max),
        ("memory layout", MEMORY_LAYOUT_VERSION, hello.memory_layout_min, hello.memory_layout_max),
    )
    for what, ours, least, most in ranges:
        if not least <= ours <= most:
            raise VersionMismatch(
                f"the daemon ({kvtier.__version__}) speaks {what} {ours}, the client {least} to "
                f"{most}; install matching versions"
            )
    for name, text in (("group", hello.group), ("client_name", hello.client_name)):
        if len(text.encode()) > TEXT_BYTES_MAX:
            raise InvalidRequest(f"{name} is longer than {TEXT_BYTES_MAX} bytes")


def _describe(arena: Arena) -> session_pb2.Arena:
    return session_pb2.Arena(
        arena_id=arena.id, size_bytes=arena.layout.size, writable=arena.writable
    )


def _open_pidfd(peer: socket.socket, pid: int) -> int:
    """A descriptor that is readable once the peer's process is gone; -1 when there is none to have.

    Before Linux 6.5 the pid is asked for; 0 is a process of a namespace that we do not see.
    """
    openers: tuple[Callable[[], int], ...] = (
        lambda: peer.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD),
        lambda: os.pidfd_open(pid) if pid > 0 else -1,
    )
    for opener in openers:
        with contextlib.suppress(OSError):
            return opener()
    return -1
