"""Session: the client's end of the session socket: handshake, arenas, and what is left to do.

    start() -> connect, Hello, Welcome -> alive --EOF, close(), fork--> ended

One daemon thread ("keeper") per session waits on the socket: it maps arenas as they are sent,
answers withdrawn ones once their last view is gone, notices the daemon's death, and starts the
background flows (`jobs`, releases of dropped leases) that finalizers may only note down.

Does not: make gRPC calls itself, or reconnect (`link.py`).
"""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import select
import socket
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final

from kvtier import wire
from kvtier.client import handshake
from kvtier.client.handshake import SessionOptions
from kvtier.client.steps import Flow
from kvtier.errors import DaemonUnavailable, KvTierError
from kvtier.tiers.arena import MappedArena
from kvtier.v1 import session_pb2

HANDSHAKE_TIMEOUT_S: Final = 5.0  # the daemon prefaults the write arena meanwhile
ARENA_WAIT_S: Final = 1.0
JOB_RETRY_S: Final = 1.0
JOBS_MAX: Final = 1024
_FDS_MAX: Final = 4

_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


class Session:
    """One attachment to one daemon. Any thread; flows that use it check `alive`.

    `jobs` are flows to run in the background, `dropped` leases to release; a finalizer may
    append to either and `wake` (nothing here takes a lock on that way).
    """

    def __init__(self, options: SessionOptions) -> None:
        self.options = options
        self.alive = False
        self.token = b""
        self.tenant = ""
        self.trust = ""
        self.daemon_version = ""
        self.jobs: deque[Callable[[], Flow[None]]] = deque()
        self.dropped: deque[int] = deque()
        self.run_background: Callable[[Session], None] | None = None
        self._closing = False
        self._holds: set[int] = set()
        self._hold_numbers = itertools.count()
        self._arenas: dict[int, MappedArena] = {}
        self._returned: deque[int] = deque()
        self._lock = threading.Lock()
        # Closed only with this object, which whoever wakes still refers to: never a reused number.
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        _sessions.add(self)

    # --- beginning

    def start(self) -> concurrent.futures.Future[Session]:
        """Connects in a thread of its own; the future gives this session, alive, or KvTierError."""
        future: concurrent.futures.Future[Session] = concurrent.futures.Future()
        keep = threading.Thread(
            target=_keep, args=(self, future), name="kvtier-session", daemon=True
        )
        keep.start()
        return future

    def _attach(self) -> None:
        options = self.options
        try:
            self._socket.settimeout(HANDSHAKE_TIMEOUT_S)
            self._socket.connect(str(options.path))
            self._socket.send(handshake.hello(options))
            packet = self._receive(0)
        except TimeoutError:
            raise DaemonUnavailable(
                f"{options.path}: no answer within {HANDSHAKE_TIMEOUT_S:g} s; is the daemon hung?"
            ) from None
        except OSError as error:
            raise DaemonUnavailable(
                f"{options.path}: {error.strerror or error}; is `kvtier serve` running?"
            ) from error
        welcome = handshake.welcome(options, packet)
        self.token, self.tenant = welcome.session_token, welcome.tenant
        self.trust, self.daemon_version = welcome.trust, welcome.daemon_version
        self._socket.setblocking(False)
        self.alive = not self._closing

    # --- arenas

    def arena(self, arena_id: int) -> MappedArena:
        """The mapped arena. Its packet was sent before the answer that names it, so this only
        waits (at most `ARENA_WAIT_S`) when something is wrong.

        Raises:
            DaemonUnavailable: the daemon named an arena that it did not send, or is gone.
        """
        arena = self._arenas.get(arena_id)
        until_s = time.monotonic() + ARENA_WAIT_S
        while arena is None:
            self.drain()
            arena = self._arenas.get(arena_id)
            remaining_s = until_s - time.monotonic()
            if arena is None and not (self.alive and remaining_s > 0):
                state = "did not send it" if self.alive else "is gone"
                raise DaemonUnavailable(f"the daemon named arena {arena_id:x} and {state}")
            if arena is None:
                poller = select.poll()
                poller.register(self._socket, select.POLLIN)
                poller.poll(remaining_s * 1000)
        return arena

    def drain(self) -> None:
        """Takes every packet that has arrived. Does not wait."""
        with self._lock:
            while self.alive:
                try:
                    if self._receive(socket.MSG_DONTWAIT) is None:
                        self._end()
                except BlockingIOError:
                    return
                except (OSError, KvTierError):
                    self._end()

    def probe(self) -> bool:
        """Whether the daemon still holds this session, asked of the socket. Microseconds."""
        with self._lock:
            if self.alive:
                try:
                    if not self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                        self._end()
                except BlockingIOError:
                    pass
                except OSError:
                    self._end()
            return self.alive

    def _receive(self, flags: int) -> session_pb2.SessionPacket | None:
        """One packet, its arena mapped; None at the end."""
        payload, fds, _, _ = socket.recv_fds(
            self._socket, wire.PACKET_BYTES_MAX, _FDS_MAX, flags | socket.MSG_CMSG_CLOEXEC
        )
        try:
            if not payload:
                return None
            packet = handshake.decode(payload)
            if packet.HasField("arena_withdrawn"):
                self._withdraw(packet.arena_withdrawn.arena_id)
            elif fds:
                announced = (
                    packet.welcome.write_arena
                    if packet.HasField("welcome")
                    else packet.arena_added.arena
                )
                self._arenas[announced.arena_id] = MappedArena(
                    fds[0], announced.size_bytes, writable=announced.writable
                )
            return packet
        finally:
            for fd in fds:
                os.close(fd)

    def _withdraw(self, arena_id: int) -> None:
        arena = self._arenas.pop(arena_id, None)
        if arena is None:
            self._returned.append(arena_id)
        else:
            # Not closed: leases refer to it, and the last of them unmaps it by letting go.
            arena.on_unmapped(partial(_note_unmapped, weakref.ref(self), arena_id))

    # --- what is held, and what is left to do

    def hold(self) -> int:
        """Notes that views of a lease may live; `close` waits for `let_go` of that number."""
        number = next(self._hold_numbers)
        self._holds.add(number)
        return number

    def let_go(self, hold: int) -> None:
        """Undoes `hold`. Safe in finalizers."""
        self._holds.discard(hold)
        if self._closing:
            self.wake()

    def drop(self, lease_id: int) -> None:
        """Has a lease released in the background. Safe in finalizers."""
        self.dropped.append(lease_id)
        self.wake()

    def later(self, job: Callable[[], Flow[None]]) -> None:
        """Has a flow run in the background. Safe in finalizers.

        With `JOBS_MAX` of them undone the session is ended instead: that returns everything.
        """
        if len(self.jobs) >= JOBS_MAX:
            self._closing = True
            self._holds.clear()
        self.jobs.append(job)
        self.wake()

    def wake(self) -> None:
        """Makes the keeper look at what is left to do. Safe in finalizers and after a fork."""
        try:
            os.eventfd_write(self._wake_fd, 1)
        except OSError:  # counter full (it is awake anyway), or the interpreter is going down
            return

    # --- the keeper

    def serve(self) -> None:
        """Until the session's end. In its own thread."""
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        poller.register(self._wake_fd, select.POLLIN)
        while self.alive:
            undone = self.dropped or self.jobs
            if any(
                fd == self._wake_fd for fd, _ in poller.poll(JOB_RETRY_S * 1000 if undone else None)
            ):
                os.eventfd_read(self._wake_fd)
            self.drain()
            self._send_returned()
            if self._closing and not self._holds:
                self.end()
            elif self.run_background and not self._closing and (self.dropped or self.jobs):
                self.run_background(self)

    def _send_returned(self) -> None:
        while self._returned and self.alive:
            packet = session_pb2.ClientPacket()
            packet.arena_returned.arena_id = self._returned.popleft()
            with self._lock:
                try:
                    self._socket.send(packet.SerializeToString())
                except OSError:  # also a full buffer: a daemon that reads nothing is dead to us
                    self._end()

    # --- the end

    def close(self) -> None:
        """Ends the session, once the last array derived from a view of it is gone."""
        self._closing = True
        if self._holds:
            self.wake()
        else:
            self.end()

    def end(self) -> None:
        """Ends the session now; the daemon returns all that it held. Idempotent."""
        if sys.is_finalizing():
            # Our thread is gone, maybe with the lock in its hands; the process's end closes all.
            return
        with self._lock:
            self._end()

    def _end(self) -> None:
        self._closing = True
        self.alive = False
        self._arenas = {}
        self._socket.close()
        self.wake()

    def leave_to_parent(self) -> None:
        """In a forked child: closes the copy of the socket, without a word to the daemon.

        Takes no lock: another thread of the parent may have held it at the fork.
        """
        self.alive = False
        self._socket.close()

    def __del__(self) -> None:
        os.close(self._wake_fd)

    def __repr__(self) -> str:
        state = "alive" if self.alive else "ended"
        return f"<Session {state}, {len(self._arenas)} arenas, {len(self._holds)} leases in views>"


def _keep(session: Session, future: concurrent.futures.Future[Session]) -> None:
    try:
        session._attach()  # noqa: SLF001 - the thread's half of the class
    except KvTierError as error:
        session.end()
        future.set_exception(error)
    else:
        future.set_result(session)
        del future
        session.serve()


def _note_unmapped(reference: weakref.ref[Session], arena_id: int) -> None:
    session = reference()
    if session is not None:
        session._returned.append(arena_id)  # noqa: SLF001 - a finalizer must not keep it alive
        session.wake()


def _leave_all_to_parent() -> None:
    for session in list(_sessions):
        session.leave_to_parent()


os.register_at_fork(after_in_child=_leave_all_to_parent)
