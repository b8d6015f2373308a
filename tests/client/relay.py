"""Relay: a man in the middle of a client and a real daemon, for faults a sound daemon never makes.

Another protocol version, malformed packets, an arena that is named but never sent, an answer that
is lost though the daemon did what it was asked. The daemon behind it and its books are real.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from daemons import Daemon

from kvtier.v1 import session_pb2

Alter = Callable[[session_pb2.SessionPacket], bytes | None]


class Relay:
    """Listens beside the daemon's sockets, at `path`.

    `alter` is given every packet of the session socket that the daemon sends and returns what the
    client gets (None: nothing). While `answering` is cleared, no byte of gRPC goes to the client.
    """

    def __init__(self, daemon: Daemon, alter: Alter | None = None) -> None:
        self.path = daemon.folder / "relay.sock"
        self.alter = alter or session_pb2.SessionPacket.SerializeToString
        self.handshakes = 0
        self.answering = threading.Event()
        self.answering.set()
        self._open: list[socket.socket] = []
        self._listen(socket.SOCK_STREAM, self.path, daemon.socket, self._pass_answers)
        session_path = Path(f"{self.path}.session")
        self._listen(socket.SOCK_SEQPACKET, session_path, daemon.session_socket, self._pass_packets)

    def _listen(
        self,
        kind: socket.SocketKind,
        path: Path,
        target: Path,
        back: Callable[[socket.socket, socket.socket], None],
    ) -> None:
        listener = socket.socket(socket.AF_UNIX, kind)
        listener.bind(str(path))
        listener.listen()
        self._open.append(listener)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    near, _ = listener.accept()
                    far = socket.socket(socket.AF_UNIX, kind)
                    far.connect(str(target))
                    self._open += [near, far]
                    self._start(near, far, self._pass)
                    self._start(far, near, back)

        threading.Thread(target=accept, daemon=True).start()

    def _start(
        self,
        source: socket.socket,
        target: socket.socket,
        work: Callable[[socket.socket, socket.socket], None],
    ) -> None:
        def run() -> None:
            with contextlib.suppress(OSError):
                work(source, target)
            for end in (source, target):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

        threading.Thread(target=run, daemon=True).start()

    @staticmethod
    def _pass(source: socket.socket, target: socket.socket) -> None:
        while data := source.recv(65_536):
            target.sendall(data)

    def _pass_answers(self, source: socket.socket, target: socket.socket) -> None:
        while data := source.recv(65_536):
            self.answering.wait()
            target.sendall(data)

    def _pass_packets(self, source: socket.socket, target: socket.socket) -> None:
        self.handshakes += 1
        while True:
            data, fds, _, _ = socket.recv_fds(source, 8192, 4)
            if not data:
                return
            altered = self.alter(session_pb2.SessionPacket.FromString(data))
            if altered is not None:
                socket.send_fds(target, [altered], fds)
            for fd in fds:
                os.close(fd)

    def close(self) -> None:
        """Nobody listens any longer; what was connected is not."""
        self.answering.set()
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self.path.unlink()
        Path(f"{self.path}.session").unlink()
