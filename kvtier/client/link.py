"""Link: how a client stays attached: one session and channel at a time, replaced when they die.

Nothing reconnects in the background: the next call does, at most once per `RETRY_MIN_S`, growing
to `RETRY_MAX_S` while the daemon stays away. A namespace id belongs to one link.

Does not: know verbs (`calls.py`), or wait: it is written as flows (`steps.py`).
"""

from __future__ import annotations

import concurrent.futures
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import quote

from kvtier import wire
from kvtier.block import NamespaceSpec
from kvtier.client.handshake import SessionOptions
from kvtier.client.session import Session
from kvtier.client.steps import Arrival, Flow, Rpc
from kvtier.config import default_socket
from kvtier.errors import (
    DaemonUnavailable,
    InvalidRequest,
    KvTierError,
    NotFound,
    Unauthenticated,
    VersionMismatch,
)
from kvtier.sections import session_socket
from kvtier.units import KIB, MIB
from kvtier.v1 import cache_pb2

RETRY_MIN_S: Final = 0.25
RETRY_MAX_S: Final = 1.0
LOG_INTERVAL_S: Final = 60.0
MESSAGE_BYTES_MAX: Final = 4 * MIB + 256 * KIB  # keys, and slack for what surrounds them
# Our own subchannels: a fresh channel does not inherit the back-off of the dead one's.
CHANNEL_OPTIONS: Final = (
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    # How long one attempt may take, whatever its name says: a busy daemon is no missing one.
    ("grpc.min_reconnect_backoff_ms", 5000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)

T = TypeVar("T")
Build = Callable[[bytes, Sequence[int]], Any]  # session token, namespace ids
_log = logging.getLogger("kvtier.client")


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """What a client is made with. `deadline_s` is of lookups, `timeout_s` of everything else."""

    socket: Path
    deadline_s: float = 0.05
    timeout_s: float = 10.0
    group: str = ""
    client_name: str = ""
    writes: bool = True


class Link:
    """A session that stands and the channel beside it."""

    __slots__ = ("channel", "session", "stub")

    def __init__(self, session: Session, channel: Any, stub: Any) -> None:
        self.session = session
        self.channel = channel
        self.stub = stub

    def call(self, method: str, request: Any, until_s: float) -> Flow[Any]:
        """One call on this link, repeated once when gRPC failed though the daemon lives.

        Raises: what the daemon says; DaemonUnavailable when the session ended.
        """
        step = Rpc(getattr(self.stub, method), request, until_s)
        try:
            return (yield step)
        except DaemonUnavailable:
            if not self.session.probe() or time.monotonic() >= until_s:
                raise
            return (yield step)
        except Unauthenticated as error:
            self.session.end()
            raise DaemonUnavailable(f"the session ended: {error}") from error


class SpaceState:
    """A namespace as a client knows it: the spec, and its id on the link it was opened on.

    `epoch` and `shard_bytes` are of the last time it was opened; 0 before.
    """

    def __init__(self, spec: NamespaceSpec, prefill_tokens_per_s: float) -> None:
        self.spec = spec
        self.prefill_tokens_per_s = prefill_tokens_per_s
        self.epoch = 0
        self.shard_bytes = 0
        self.opened: tuple[Link, int] | None = None

    @property
    def id(self) -> int:
        """The namespace's number while this daemon lives; 0 when not open."""
        return self.opened[1] if self.opened else 0


class Linker:
    """Keeps a client linked. Any thread for the blocking client, one loop for the other."""

    def __init__(
        self,
        options: ClientOptions,
        open_channel: Callable[[str], tuple[Any, Any]],
        run_background: Callable[[Session], None],
    ) -> None:
        self.options = options
        self._open_channel = open_channel
        self._run_background = run_background
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._closed = False
        self._link: Link | None = None
        self._attempt: tuple[Session, concurrent.futures.Future[Session], float] | None = None
        self._failure: KvTierError | None = None
        self._delay_s = RETRY_MIN_S
        self._not_before_s = 0.0
        self._logged_s: dict[str, float] = {}

    # --- calls

    def call(
        self,
        method: str,
        build: Build,
        spaces: Sequence[SpaceState],
        until_s: float,
        *,
        patience_s: float | None = None,
    ) -> Flow[tuple[Link, Any]]:
        """Links if needed, opens the spaces if needed, and calls.

        `build(token, namespace ids)` makes the request, with a request id of its own. A namespace
        that the daemon no longer knows is opened again, once. `patience_s`: see `link`.
        """
        link = yield from self.link(until_s, patience_s)
        ids = yield from self._ids(link, spaces, until_s)
        request = build(link.session.token, ids)
        try:
            return link, (yield from link.call(method, request, until_s))
        except NotFound:
            if not spaces:
                raise
        for space in spaces:
            space.opened = None
        ids = yield from self._ids(link, spaces, until_s)
        request = build(link.session.token, ids)
        return link, (yield from link.call(method, request, until_s))

    def open(self, space: SpaceState, until_s: float) -> Flow[int]:
        """Links if needed and opens the namespace; returns its id."""
        link = yield from self.link(until_s)
        return (yield from self._open_on(link, space, until_s))

    def _ids(self, link: Link, spaces: Sequence[SpaceState], until_s: float) -> Flow[list[int]]:
        ids = []
        for space in spaces:
            opened = space.opened
            if opened is not None and opened[0] is link:
                ids.append(opened[1])
            else:
                ids.append((yield from self._open_on(link, space, until_s)))
        return ids

    def _open_on(self, link: Link, space: SpaceState, until_s: float) -> Flow[int]:
        request = cache_pb2.OpenNamespaceRequest(
            session_token=link.session.token,
            spec=wire.encode_spec(space.spec),
            prefill_tokens_per_s=space.prefill_tokens_per_s,
        )
        answer = yield from link.call("OpenNamespace", request, until_s)
        if answer.shard_bytes != space.spec.format.shard_bytes:
            raise VersionMismatch(
                f"the daemon says a shard has {answer.shard_bytes} bytes, this library "
                f"{space.spec.format.shard_bytes}; install the kvtier of the daemon's version"
            )
        space.epoch, space.shard_bytes = answer.epoch, answer.shard_bytes
        space.opened = (link, answer.namespace_id)
        return int(answer.namespace_id)

    # --- linking

    def link(self, until_s: float, patience_s: float | None = None) -> Flow[Link]:
        """The link that stands, else a new one, waited for until `until_s`.

        With `patience_s`, an attempt that began longer ago than that is not waited for.

        Raises:
            DaemonUnavailable, VersionMismatch, PermissionDenied: why not; also, at once, until
                the next attempt is due. DeadlineExceeded. KvTierError: closed, or forked.
        """
        if self._pid != os.getpid():
            raise KvTierError(
                f"this Client belongs to process {self._pid}, which forked: "
                "make a new Client in the child, after the fork"
            )
        link = self._link
        if link is not None and link.session.alive:
            return link
        session, future, started_s = self._attempt_now()
        if patience_s is not None and not future.done():
            until_s = min(until_s, started_s + patience_s)
            if until_s <= time.monotonic():
                raise DaemonUnavailable("the daemon has not answered the handshake yet")
        try:
            yield Arrival(future, until_s)
        except KvTierError as error:
            self._note_failure(future, error)
            raise
        return self._adopt(session)

    def _attempt_now(self) -> tuple[Session, concurrent.futures.Future[Session], float]:
        with self._lock:
            if self._closed:
                raise DaemonUnavailable("this Client is closed; make a new one")
            attempt, now_s = self._attempt, time.monotonic()
            if attempt is not None and self._still_good(attempt):
                return attempt
            if now_s < self._not_before_s:
                failure = self._failure or DaemonUnavailable("the daemon went away")
                raise type(failure)(f"{failure} (next attempt within {RETRY_MAX_S:g} s)")
            options = self.options
            session = Session(
                SessionOptions(
                    path=session_socket(options.socket),
                    group=options.group,
                    client_name=options.client_name,
                    writes=options.writes,
                )
            )
            self._not_before_s = now_s + RETRY_MIN_S
            self._attempt = (session, session.start(), now_s)
            return self._attempt

    @staticmethod
    def _still_good(
        attempt: tuple[Session, concurrent.futures.Future[Session], float],
    ) -> bool:
        session, future, _ = attempt
        return not future.done() or (future.exception() is None and session.alive)

    def _note_failure(self, future: concurrent.futures.Future[Session], error: KvTierError) -> None:
        """Every waiter of one attempt reports it; the first counts. A late one counts not."""
        with self._lock:
            if self._attempt is not None and self._attempt[1] is future and future.done():
                self._attempt = None
                self._failure = error
                self._not_before_s = time.monotonic() + self._delay_s
                self._delay_s = min(self._delay_s * 2, RETRY_MAX_S)

    def _adopt(self, session: Session) -> Link:
        with self._lock:
            if self._closed:
                session.end()
                raise DaemonUnavailable("this Client was closed meanwhile")
            link = self._link
            if link is None or link.session is not session:
                session.run_background = self._run_background
                link = Link(session, *self._open_channel(channel_target(self.options.socket)))
                self._link, self._failure, self._delay_s = link, None, RETRY_MIN_S
            return link

    def current(self) -> Link | None:
        """The link of last time, alive or not."""
        return self._link

    # --- the end

    def close(self) -> Link | None:
        """No link any more; what is held is returned. The caller closes the channel."""
        with self._lock:
            self._closed = True
            if self._attempt is not None:
                self._attempt[0].close()
            if self._link is not None:
                self._link.session.close()
            return self._link

    def log_miss(self, error: KvTierError) -> None:
        """One line for a lookup that became a miss: a minute apart; once for a mismatch."""
        now_s = time.monotonic()
        before_s = self._logged_s.get(error.reason)
        once = isinstance(error, VersionMismatch)
        if before_s is None or (not once and now_s - before_s >= LOG_INTERVAL_S):
            self._logged_s[error.reason] = now_s
            _log.warning("kvtier lookups miss: %s: %s", error.reason, error)


def channel_target(socket: Path) -> str:
    """The socket as gRPC wants it: it decodes percent signs."""
    return f"unix:{quote(str(socket))}"


def socket_path(address: str | os.PathLike[str] | None) -> Path:
    """`unix:PATH`, `unix://PATH`, a bare path, or None for the default. Raises InvalidRequest."""
    if address is None:
        return default_socket(os.environ)
    text = os.fspath(address)
    if re.match(r"^(?!unix:)[a-z0-9+.-]+:", text):
        raise InvalidRequest(f"{text!r} is not a Unix socket; write unix:/path or a path")
    path = re.sub(r"^unix:(//(?=/))?", "", text)
    if not path:
        raise InvalidRequest(f"{text!r} names no socket")
    return Path(path).expanduser()
