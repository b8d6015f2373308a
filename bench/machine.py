"""What the figures were measured on, the plain limits of its memory, and whether it is quiet now.

Does not: measure kvtier.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from kvtier import machine, native
from kvtier.units import HUGE_PAGE_BYTES, MIB, align_up

_QUIET_SHARE: Final = 0.5  # of all cores idle: then the two or three processes of a bench fit
_QUIET_SAMPLE_S: Final = 0.1


def describe() -> dict[str, Any]:
    """Everything that a reader needs to compare these figures with those of another machine."""
    here = native.capabilities()
    huge = machine.huge_pages()
    disk = machine.file_system(Path.cwd())
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": machine.memory_limit_bytes(),
        "kernel": platform.release(),
        "virtualised": "hypervisor" in Path("/proc/cpuinfo").read_text(),
        "huge_pages_free": huge.free,
        "shmem_huge_pages": huge.shmem,
        "disk": _disk(Path.cwd()),
        "file_system": disk.type,
        "python": sys.version.split()[0],
        "versions": {
            name: metadata.version(name) for name in ("grpcio", "protobuf", "uvloop", "lmdb")
        },
        "native": here.native,
        "isa": here.isa,
        "load_1m": os.getloadavg()[0],
        "python_loop_ms": round(min(_loop_ms() for _ in range(5)), 1),
    }


def _loop_ms() -> float:
    """CPU time of a million additions: how fast this machine runs Python now (40 is usual)."""
    start = time.thread_time_ns()
    total = 0
    for number in range(1_000_000):
        total += number
    return (time.thread_time_ns() - start) / 1e6


def _cpu_model() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found[1].strip() if found else platform.processor()


def _disk(path: Path) -> str:
    """The block device below `path`, and whether the kernel says that it turns."""
    device = path.stat().st_dev
    folder = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if not folder.exists():
        return "not a block device"
    name = folder.resolve().name
    queue = next(p / "queue" for p in (folder, folder.resolve().parent) if (p / "queue").exists())
    turns = (queue / "rotational").read_text().strip() == "1"
    return f"{name}, {'rotational' if turns else 'not rotational'}"


# --- other people's work


def wait_until_quiet(patience_s: float) -> bool:
    """Waits for half of the cores to be idle; False when they were not within `patience_s`."""
    until_s = time.monotonic() + patience_s
    while True:
        if idle_share(_QUIET_SAMPLE_S) >= _QUIET_SHARE:
            return True
        if time.monotonic() >= until_s:
            return False


def idle_share(sample_s: float) -> float:
    """Of all cores' time in the next `sample_s` seconds, how much was idle; 0..1."""
    before = _ticks()
    time.sleep(sample_s)
    busy, idle = (now - then for now, then in zip(_ticks(), before, strict=True))
    return idle / max(busy + idle, 1)


def _ticks() -> tuple[int, int]:
    numbers = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle = numbers[3] + numbers[4]
    return sum(numbers) - idle, idle


# --- memory


class Buffer:
    """Private memory on huge pages where the kernel gives them, every page touched."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = align_up(size_bytes, HUGE_PAGE_BYTES)
        room = self.size_bytes + HUGE_PAGE_BYTES
        self._map = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map.madvise(mmap.MADV_HUGEPAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.address = align_up(start, HUGE_PAGE_BYTES)
        before = self.address - start
        self.view = memoryview(self._map)[before : before + self.size_bytes]
        native.prefault(self.address, self.size_bytes)
        pattern = os.urandom(MIB)
        for offset in range(0, self.size_bytes, MIB):
            ctypes.memmove(self.address + offset, pattern, MIB)


def best_seconds(work: Callable[[], object], *, repeats: int, patience_s: float = 0.2) -> float:
    """The shortest of several runs of `work`, each begun in a quiet moment if one comes."""
    best_s = float("inf")
    for _ in range(repeats):
        wait_until_quiet(patience_s)
        start_s = time.perf_counter()
        work()
        best_s = min(best_s, time.perf_counter() - start_s)
    return best_s


def memcpy_gb_per_s(target: Buffer, source: Buffer, part_bytes: int, *, repeats: int) -> float:
    """Libc memcpy of one buffer into another, hot: in parts or at once, whichever is faster."""
    size_bytes = min(target.size_bytes, source.size_bytes)

    def in_parts() -> None:
        for at in range(0, size_bytes, part_bytes):
            ctypes.memmove(target.address + at, source.address + at, part_bytes)

    def at_once() -> None:
        ctypes.memmove(target.address, source.address, size_bytes)

    best_s = min(best_seconds(way, repeats=repeats) for way in (in_parts, at_once))
    return size_bytes / best_s / 1e9
