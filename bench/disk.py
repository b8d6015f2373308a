"""The plain limits of a disk: blocks of one size written and read with O_DIRECT, and kept in LMDB.

A file preallocated like a slab, one pwrite or pread a block, 1 to 32 at a time, then (writing) one
`fdatasync`; the best depth is the limit. LMDB: the same blocks as values, in transactions as large
as a batch of the mover, synced at the end; read by copying each value out of the map, from a cold
page cache. Does not: judge.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import lmdb

from bench.machine import wait_until_quiet
from kvtier import native
from kvtier.tiers.slots import SLOT_HEADER_BYTES
from kvtier.units import GIB, MIB

DEPTHS: Final = (1, 2, 4, 8, 16, 32)
_TRANSACTION_BYTES: Final = 64 * MIB


def slot_bytes(block_bytes: int) -> int:
    """What a block takes on disk, and so the distance of two of them."""
    return block_bytes + SLOT_HEADER_BYTES


def best_rate(work: Callable[[], object], size_bytes: int, repeats: int) -> float:
    """GB/s of the fastest of several runs, each begun in a quiet moment if one comes."""
    best = 0.0
    for _ in range(repeats):
        wait_until_quiet(0.3)
        start_s = time.perf_counter()
        work()
        best = max(best, size_bytes / (time.perf_counter() - start_s) / 1e9)
    return best


class Shared:
    """Memory as the daemon's arenas have it: of a memfd, shared, every page there. A device reads
    into it more slowly than into huge private pages, where the kernel gives memfds no huge ones.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        fd = os.memfd_create("kvtier-bench", os.MFD_CLOEXEC)
        os.ftruncate(fd, size_bytes)
        self._map = mmap.mmap(fd, size_bytes)
        os.close(fd)
        self.view = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        native.prefault(self.address, size_bytes)
        for at in range(0, size_bytes, MIB):
            part = self.view[at : at + MIB]
            part[:] = os.urandom(len(part))


class RawFile:
    """A preallocated file of blocks, and memory to write them from and read them into."""

    def __init__(self, path: Path, memory: Shared, block_bytes: int) -> None:
        self.memory, self.block_bytes = memory, block_bytes
        self.block_count = memory.size_bytes // block_bytes
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        os.posix_fallocate(self.fd, 0, self.block_count * slot_bytes(block_bytes))

    def write(self, index: int) -> None:
        """One block; whole."""
        view = self._view(index)
        done = os.pwrite(self.fd, view, index * slot_bytes(self.block_bytes))
        assert done == self.block_bytes

    def read(self, index: int) -> None:
        """One block; whole."""
        view = self._view(index)
        done = os.preadv(self.fd, [view], index * slot_bytes(self.block_bytes))
        assert done == self.block_bytes

    def _view(self, index: int) -> memoryview:
        return self.memory.view[index * self.block_bytes : (index + 1) * self.block_bytes]

    def rates(self, repeats: int) -> tuple[float, float]:
        """GB/s of writing all of it (synced) and of reading it; each the best depth's."""
        size_bytes = self.memory.size_bytes
        write = max(best_rate(self._all(self._synced, n), size_bytes, repeats) for n in DEPTHS)
        read = max(best_rate(self._all(self._read, n), size_bytes, repeats) for n in DEPTHS)
        return write, read

    def _all(self, verb: Callable[[ThreadPoolExecutor], None], depth: int) -> Callable[[], None]:
        def work() -> None:
            with ThreadPoolExecutor(depth) as pool:
                verb(pool)

        return work

    def _synced(self, pool: ThreadPoolExecutor) -> None:
        for _ in pool.map(self.write, range(self.block_count)):
            pass
        os.fdatasync(self.fd)

    def _read(self, pool: ThreadPoolExecutor) -> None:
        for _ in pool.map(self.read, range(self.block_count)):
            pass


@contextmanager
def raw_file(path: Path, memory: Shared, block_bytes: int) -> Iterator[RawFile]:
    """The file, which goes with the context."""
    file = RawFile(path, memory, block_bytes)
    try:
        yield file
    finally:
        os.close(file.fd)
        path.unlink()


def lmdb_rates(folder: Path, memory: Shared, block_bytes: int, repeats: int) -> tuple[float, float]:
    """GB/s of storing the blocks as LMDB values, and of reading them out of its map, cold.

    Every round writes over the last one's: a cache that is full does nothing else.
    """
    folder.mkdir()
    count, size_bytes = memory.size_bytes // block_bytes, memory.size_bytes
    spare = memory.view[:block_bytes]
    map_bytes = 4 * size_bytes + GIB
    with lmdb.open(str(folder), map_size=map_bytes, metasync=False, sync=False) as env:

        def write() -> None:
            for first in range(0, count, max(1, _TRANSACTION_BYTES // block_bytes)):
                last = min(count, first + max(1, _TRANSACTION_BYTES // block_bytes))
                with env.begin(write=True) as transaction:
                    for index in range(first, last):
                        at = index * block_bytes
                        value = memory.view[at : at + block_bytes]
                        transaction.put(index.to_bytes(8, "big"), bytes(value))
            env.sync(True)

        write()
        written = best_rate(write, size_bytes, repeats)
    rates = []
    for _ in range(repeats):
        _forget_pages(folder / "data.mdb")
        with lmdb.open(str(folder), map_size=map_bytes, readonly=True) as env:
            rates.append(best_rate(partial(_read_all, env, count, spare), size_bytes, 1))
    return written, max(rates)


def _read_all(env: lmdb.Environment, count: int, spare: memoryview) -> None:
    with env.begin(buffers=True) as transaction:
        for index in range(count):
            value = transaction.get(index.to_bytes(8, "big"))
            assert value is not None
            spare[:] = value


def _forget_pages(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
