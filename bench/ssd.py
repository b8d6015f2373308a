"""The SSD tier with 2 MiB blocks, against the same pattern done raw with O_DIRECT.

Raw: files preallocated like slabs, every block one pwrite or pread of 2 MiB, 1 to 32 of them at a
time, then (writing) one fdatasync; the best depth is the limit. The tier: batches as the mover
makes them, with headers, checksums and catalogue. The store: a flush to SSD, and a lease that
promotes all of it, through a daemon's sockets.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from bench import synthetic
from bench.daemon import Daemon, Setup, attached
from bench.keys import chain
from bench.machine import wait_until_quiet
from bench.row import Row
from kvtier.block import SLOT_BITS, SlotIO, SlotLabel
from kvtier.client.admin import AdminClient
from kvtier.native import AlignedBuffer
from kvtier.tiers.slots import SLOT_HEADER_BYTES
from kvtier.tiers.ssd import SsdTier
from kvtier.units import GIB, MIB

NAME: Final = "ssd"
BLOCK_BYTES: Final = 2 * MIB
_SLOT_BYTES: Final = BLOCK_BYTES + SLOT_HEADER_BYTES
_DEPTHS: Final = (1, 2, 4, 8, 16, 32)
_BATCH: Final = 32  # blocks of one call: the mover's 64 MiB
_BATCHES_AT_ONCE: Final = (1, 2, 4)  # the mover runs two
_SEGMENT_BYTES: Final = GIB
_BAR: Final = "ratio >= 0.8"


def run(*, quick: bool) -> list[Row]:
    """GB/s of the tier alone and of demotion and promotion; raw limits of the same directory."""
    blocks, repeats = (16, 1) if quick else (384, 4)
    with _folder() as folder, AlignedBuffer(blocks * BLOCK_BYTES) as memory:
        for at in range(0, memory.size_bytes, MIB):
            memory.view[at : at + MIB] = os.urandom(MIB)
        raw_write, raw_read = _raw(folder / "raw", memory, blocks, repeats)
        tier_write, tier_read = _tier(folder / "tier", memory, blocks, repeats)
    down, up = _through_daemon(blocks, repeats)
    bar = None if quick else _BAR
    return [
        Row.of(NAME, f"{case}, {blocks} x 2 MiB", rate, "GB/s", limit=limit, bar=bar)
        for case, rate, limit in (
            ("SsdTier write", tier_write, raw_write),
            ("SsdTier read", tier_read, raw_read),
            ("demotion through a daemon", down, raw_write),
            ("promotion through a daemon", up, raw_read),
        )
    ]


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="kvtier-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _best_rate(
    work: Callable[[], object], size_bytes: int, repeats: int, before: Callable[[], object] | None
) -> float:
    best = 0.0
    for _ in range(repeats):
        if before is not None:
            before()
        wait_until_quiet(0.3)
        start_s = time.perf_counter()
        work()
        best = max(best, size_bytes / (time.perf_counter() - start_s) / 1e9)
    return best


# --- raw


def _raw(path: Path, memory: AlignedBuffer, blocks: int, repeats: int) -> tuple[float, float]:
    """The best depth's GB/s of writing (synced) and reading."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    try:
        os.posix_fallocate(fd, 0, blocks * _SLOT_BYTES)
        write = max(
            _best_rate(_raw_write(fd, memory, blocks, depth), memory.size_bytes, repeats, None)
            for depth in _DEPTHS
        )
        read = max(
            _best_rate(_raw_read(fd, memory, blocks, depth), memory.size_bytes, repeats, None)
            for depth in _DEPTHS
        )
    finally:
        os.close(fd)
        path.unlink()
    return write, read


def _raw_write(fd: int, memory: AlignedBuffer, blocks: int, depth: int) -> Callable[[], None]:
    def write(index: int) -> None:
        at = index * BLOCK_BYTES
        done = os.pwrite(fd, memory.view[at : at + BLOCK_BYTES], index * _SLOT_BYTES)
        assert done == BLOCK_BYTES

    def work() -> None:
        with ThreadPoolExecutor(depth) as pool:
            for _ in pool.map(write, range(blocks)):
                pass
        os.fdatasync(fd)

    return work


def _raw_read(fd: int, memory: AlignedBuffer, blocks: int, depth: int) -> Callable[[], None]:
    def read(index: int) -> None:
        at = index * BLOCK_BYTES
        done = os.preadv(fd, [memory.view[at : at + BLOCK_BYTES]], index * _SLOT_BYTES)
        assert done == BLOCK_BYTES

    def work() -> None:
        with ThreadPoolExecutor(depth) as pool:
            for _ in pool.map(read, range(blocks)):
                pass

    return work


# --- the tier alone


def _tier(folder: Path, memory: AlignedBuffer, blocks: int, repeats: int) -> tuple[float, float]:
    per_segment = _SEGMENT_BYTES // _SLOT_BYTES
    tier = SsdTier(folder, -(-blocks // per_segment), _SEGMENT_BYTES, min_free_bytes=0)
    tier.recover()
    space = synthetic.spec()
    tier.register_namespace(space.digest, space.to_json(), 1)
    items = [
        SlotIO(
            index // per_segment << SLOT_BITS | index % per_segment,
            _SLOT_BYTES,
            memory.address + index * BLOCK_BYTES,
            SlotLabel(space.digest, 1, key, b"", index, 0, BLOCK_BYTES),
        )
        for index, key in enumerate(chain(0, blocks).split())
    ]
    batches = [items[at : at + _BATCH] for at in range(0, blocks, _BATCH)]
    try:
        tier.write(items)  # makes the slabs: preallocation is not what is measured
        # The daemon's DRAM tier computed the checksums at commit: they are given from here on.
        write = max(
            _best_rate(_in_batches(tier.write, batches, n), memory.size_bytes, repeats, None)
            for n in _BATCHES_AT_ONCE
        )
        read = max(
            _best_rate(_in_batches(tier.read, batches, n), memory.size_bytes, repeats, None)
            for n in _BATCHES_AT_ONCE
        )
        assert all(item.error is None for item in items)
    finally:
        tier.close()
    return write, read


def _in_batches(
    verb: Callable[[list[SlotIO]], None], batches: list[list[SlotIO]], at_once: int
) -> Callable[[], None]:
    def work() -> None:
        with ThreadPoolExecutor(at_once) as pool:
            for _ in pool.map(verb, batches):
                pass

    return work


# --- through a daemon


def _through_daemon(blocks: int, repeats: int) -> tuple[float, float]:
    """GB/s of Flush of blocks that lie only in DRAM, and of a lease of them after a restart.

    The first flush makes the slabs; later rounds write into slots that were evicted again.
    """
    size_bytes = blocks * BLOCK_BYTES
    setup = Setup(
        dram_bytes=2 * size_bytes, ssd_bytes=max(4 * size_bytes, 64 * MIB),
        write_arena_bytes=min(size_bytes, 128 * MIB),
    )  # fmt: skip
    down = up = 0.0
    with Daemon(setup, start=False) as daemon:
        for number in range(repeats + 1):
            daemon.start()
            keys = chain(number, blocks, salt="ssd")
            with daemon.client() as client, _admin(daemon) as admin:
                space = attached(client, block_bytes=BLOCK_BYTES)
                space.store(keys, lambda block: block.view.__setitem__(0, 1), timeout_s=120)
                wait_until_quiet(0.3)
                start_s = time.perf_counter()
                admin.flush(60)
                seconds = time.perf_counter() - start_s
                if number:
                    down = max(down, size_bytes / seconds / 1e9)
            daemon.stop()
            daemon.start()
            with daemon.client() as client:
                space = attached(client, block_bytes=BLOCK_BYTES)
                wait_until_quiet(0.3)
                start_s = time.perf_counter()
                with space.lease(keys, timeout_s=60) as lease:
                    seconds = time.perf_counter() - start_s
                    assert lease.block_count == blocks, lease
                    up = max(up, size_bytes / seconds / 1e9)
                space.evict(keys)
            daemon.stop()
    return down, up


def _admin(daemon: Daemon) -> AdminClient:
    return AdminClient(daemon.directory / "run" / "admin.sock", timeout_s=60)
