"""What a daemon needs before it may bind anything: directories, the lock, enough memory.

Does not: allocate or bind.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Iterable
from pathlib import Path

from kvtier import machine
from kvtier.config import Config
from kvtier.errors import AlreadyRunning, DeviceUnavailable
from kvtier.units import format_bytes

log = logging.getLogger("kvtier.daemon")


def make_directories(state_dir: Path, sockets: Iterable[Path]) -> None:
    """The state directory (0700) and those of sockets (0750) exist; existing ones are left alone.

    Raises:
        DeviceUnavailable: one of them cannot be made; says which and why.
    """
    for directory, mode in [(state_dir, 0o700), *((path.parent, 0o750) for path in sockets)]:
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            directory.mkdir(mode=mode, exist_ok=True)
        except OSError as error:
            raise DeviceUnavailable(f"directory {directory}: {error.strerror}") from error


class StateLock:
    """The right to use a state directory, until the process ends. Holds `lock` in it open.

    Raises:
        AlreadyRunning: names the holder's pid; nothing of the holder was touched.
        DeviceUnavailable: the file cannot be opened.
    """

    def __init__(self, state_dir: Path) -> None:
        path = state_dir / "lock"
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DeviceUnavailable(f"{path}: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise AlreadyRunning(
                f"a kvtier daemon with pid {holder} uses {state_dir}; "
                "stop it, or set another state.dir"
            ) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """The directory is free for another daemon. The file stays: removing it would race."""
        os.close(self._fd)


def check_memory(config: Config) -> int:
    """Bytes of old arenas that others still hold, such as clients of a daemon that died.

    Raises:
        DeviceUnavailable: the machine cannot give the DRAM tier's size; names who holds old memory.
    """
    prefix = f"kvtier-{config.state.memory_name}-"
    held = machine.memfd_bytes_held_by_others(prefix, os.getpid())
    held_bytes = sum(size_bytes for _, size_bytes in held)
    if held:
        pids = ", ".join(str(pid) for pid, _ in held)
        log.warning("memory.predecessor %s held by pid %s", format_bytes(held_bytes), pids)
    wanted_bytes = config.tiers.dram.size_bytes
    room_bytes = machine.memory_available_bytes()
    if config.tiers.dram.huge_pages != "off":
        room_bytes += machine.huge_pages().free_bytes
    if room_bytes < wanted_bytes:
        holders = ", ".join(f"pid {pid}: {format_bytes(size)}" for pid, size in held)
        raise DeviceUnavailable(
            f"the DRAM tier wants {format_bytes(wanted_bytes)}, "
            f"{format_bytes(room_bytes)} are free; "
            + (f"end the processes that hold an old daemon's memory ({holders}), or " * bool(held))
            + "make tiers.dram.size_bytes smaller"
        )
    return held_bytes


def notify_service_manager(state: str) -> None:
    """Tells systemd (`NOTIFY_SOCKET`) a state like READY=1; does nothing when nobody asked."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as target:
        target.connect("\0" + address[1:] if address.startswith("@") else address)
        target.sendall(state.encode())
