r"""Sessions: who may attach, and which session a token stands for.

    accept --Hello--> open (Welcome: token, write arena) --EOF, pidfd, bad packet--> ended
       \--- uid, version or limit says no: Refusal ---------------------------------/

A SOCK_SEQPACKET connection a session. A tenant's own socket may be its credential: the mount.

Does not: speak to one client (connection) or hold anything of the store's.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import Callable, Iterable

from kvtier.config import Config, TenantConfig
from kvtier.errors import LimitReached, PermissionDenied, Unauthenticated
from kvtier.server.answers import Answers
from kvtier.server.connection import Connection
from kvtier.session import Session
from kvtier.store import Store
from kvtier.v1 import session_pb2
from kvtier.wire import SESSION_TOKEN_BYTES

log = logging.getLogger("kvtier.sessions")

NEWCOMERS_MAX = 64  # connections without a Hello
_ACCEPTS_PER_WAKEUP = 16
_RETRY_S = 0.05  # after a lack of descriptors or of kernel memory


class Tenants:
    """Who may use one socket. With a socket of its own and no uids, a tenant is the mount."""

    def __init__(self, tenants: Iterable[TenantConfig]) -> None:
        self._open: TenantConfig | None = None
        self._by_uid: dict[int, TenantConfig] = {}
        for tenant in tenants:
            self._by_uid.update(dict.fromkeys(tenant.uids, tenant))
            if tenant.socket is not None and not tenant.uids:
                self._open = tenant

    def of(self, uid: int) -> TenantConfig:
        """The tenant of this user. Raises PermissionDenied, naming the setting to change."""
        tenant = self._by_uid.get(uid, self._open)
        if tenant is None:
            raise PermissionDenied(
                f"uid {uid} may not use this socket; "
                "add it to server.allowed_uids, or to uids of a [[tenants]] entry"
            )
        return tenant


class SessionServer:
    """All connections of all session sockets. Event loop only."""

    def __init__(
        self, store: Store, config: Config, *, fatal: Callable[[BaseException], object]
    ) -> None:
        self.store = store
        self.request_ids_max = config.limits.request_ids_max  # may change live
        self._fatal = fatal
        self._trust = config.server.trust
        self._sessions_max = config.server.sessions_max
        self._listeners: list[socket.socket] = []
        self._connections: set[Connection] = set()
        self._attached: dict[bytes, Connection] = {}

    def listen(self, listener: socket.socket, tenants: Tenants) -> None:
        """Accepts from a bound, listening, non-blocking socket, which is ours from now on."""
        self._listeners.append(listener)
        loop = asyncio.get_running_loop()
        loop.add_reader(listener.fileno(), self._on_connection, listener, tenants)

    def _on_connection(self, listener: socket.socket, tenants: Tenants) -> None:
        for _ in range(_ACCEPTS_PER_WAKEUP):
            try:
                peer, _ = listener.accept()
            except BlockingIOError:
                return
            except ConnectionError:
                continue
            except OSError as error:  # EMFILE, ENFILE, ENOBUFS: leave it waiting, come back
                self._pause(listener, tenants, error)
                return
            peer.setblocking(False)
            if len(self._connections) - len(self._attached) >= NEWCOMERS_MAX:
                peer.close()
                continue
            try:
                self._connections.add(Connection(self, peer, tenants))
            except OSError as error:
                peer.close()
                self._pause(listener, tenants, error)
                return

    def _pause(self, listener: socket.socket, tenants: Tenants, error: OSError) -> None:
        log.warning("session.accept_failed: %s", error.strerror)
        loop = asyncio.get_running_loop()
        loop.remove_reader(listener.fileno())
        loop.call_later(_RETRY_S, self._resume, listener, tenants)

    def _resume(self, listener: socket.socket, tenants: Tenants) -> None:
        if listener in self._listeners:
            asyncio.get_running_loop().add_reader(
                listener.fileno(), self._on_connection, listener, tenants
            )

    def admit(self, connection: Connection, hello: session_pb2.Hello, tenant: TenantConfig) -> None:
        """Makes the session of an accepted Hello. Raises LimitReached or the store's."""
        if len(self._attached) >= self._sessions_max:
            raise LimitReached(
                f"{self._sessions_max} sessions are attached; raise server.sessions_max"
            )
        session = self.store.open_session(
            tenant=tenant.name,
            group=hello.group,
            client_name=hello.client_name,
            pid=connection.pid,
            writes=hello.writes,
            announce=connection.announce,
            withdraw=connection.withdraw,
        )
        token = secrets.token_bytes(SESSION_TOKEN_BYTES)
        self._attached[token] = connection
        log.info(
            "session.opened pid=%d uid=%d tenant=%s", connection.pid, connection.uid, tenant.name
        )
        connection.welcome(session, token, self._trust)

    def new_answers(self) -> Answers:
        """An empty memory for a new connection's calls."""
        return Answers(lambda: self.request_ids_max, self._fatal)

    def by_token(self, token: bytes) -> Session:
        """The session with this token. Raises Unauthenticated when there is none (any more)."""
        session = self.connection(token).session
        assert session is not None
        return session

    def connection(self, token: bytes) -> Connection:
        """As `by_token`, with what belongs to the session's calls."""
        connection = self._attached.get(token)
        if connection is None:
            raise Unauthenticated("no session has this token; attach to the session socket again")
        return connection

    def forget(self, connection: Connection) -> None:
        """The connection ended: its token is nobody's."""
        self._connections.discard(connection)
        self._attached.pop(connection.token, None)

    def end_watches(self) -> None:
        """Ends the Watch calls of all sessions."""
        for connection in self._connections:
            connection.end_watches()

    def stop(self) -> None:
        """Accepts no more and ends every session. Idempotent."""
        loop = asyncio.get_running_loop()
        while self._listeners:
            listener = self._listeners.pop()
            loop.remove_reader(listener.fileno())
            listener.close()
        for connection in tuple(self._connections):
            connection.end("the daemon stops")

    def __repr__(self) -> str:
        return f"<SessionServer {len(self._attached)} attached of {self._sessions_max}>"
