"""SocketPath: Unix sockets that appear whole or not at all, and are removed only by their owner.

A socket is bound under a temporary name and renamed: what is at the final path always listens, and
a daemon that runs is never robbed of its path. Does not: accept anything.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
from pathlib import Path
from urllib.parse import quote

from kvtier.errors import AlreadyRunning, DeviceUnavailable

SESSION_BACKLOG = 128
CLIENT_SOCKET_MODE = 0o660
ADMIN_SOCKET_MODE = 0o600


class SocketPath:
    """One socket's final path and the temporary one to bind first. `publish`, later `remove`.

    Raises:
        AlreadyRunning: somebody listens at the final path; it was not touched.
    """

    def __init__(self, path: Path, mode: int) -> None:
        self.path = path
        self._mode = mode
        self._inode: int | None = None
        # Nine characters: never longer than any name with the session suffix.
        self.temporary = path.parent / f".{secrets.token_hex(4)}"
        if _somebody_listens(path):
            raise AlreadyRunning(
                f"another process listens on {path}; stop it, or set another socket"
            )

    @property
    def address(self) -> str:
        """The temporary path as gRPC wants it: it decodes percent signs."""
        return f"unix:{quote(str(self.temporary))}"

    def bind_session_socket(self) -> socket.socket:
        """A listening SEQPACKET socket at the temporary path. Raises DeviceUnavailable."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listener.bind(str(self.temporary))
            listener.listen(SESSION_BACKLOG)
        except OSError as error:
            listener.close()
            raise DeviceUnavailable(f"socket {self.path}: {error.strerror}") from error
        listener.setblocking(False)
        return listener

    def publish(self) -> None:
        """What listens at the temporary path is at the final one now, with its mode.

        The group is that of the directory, if we may give it: so a directory of the clients'
        group opens the socket to them. Raises DeviceUnavailable.
        """
        try:
            self.temporary.chmod(self._mode)
            with contextlib.suppress(PermissionError):
                os.chown(self.temporary, -1, self.path.parent.stat().st_gid)
            self._inode = self.temporary.stat().st_ino
            self.temporary.rename(self.path)
        except OSError as error:
            raise DeviceUnavailable(f"socket {self.path}: {error.strerror}") from error

    def remove(self) -> None:
        """Neither path is ours any more; what somebody else put there stays. Idempotent."""
        self.temporary.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if self._inode is not None and self.path.stat().st_ino == self._inode:
                self.path.unlink()
        self._inode = None


def _somebody_listens(path: Path) -> bool:
    """Whether a connection to `path` is accepted, as a stream or as packets."""
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
        with socket.socket(socket.AF_UNIX, kind) as probe:
            probe.setblocking(False)
            problem = probe.connect_ex(str(path))
        if problem != errno.EPROTOTYPE:
            return problem in (0, errno.EAGAIN)  # EAGAIN: its backlog is full
    return False
