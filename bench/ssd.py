"""The SSD tier, against the same pattern done raw with O_DIRECT, and against values kept in LMDB.

Blocks of 2 MiB and of 128 KiB. Raw and LMDB: see disk.py. The tier: batches as the mover makes
them, with headers, checksums and catalogue. The store: a flush to SSD, and a lease that promotes
all of it, through a daemon's sockets; and leases of one block each, against one raw read each.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from bench import synthetic
from bench.daemon import Daemon, Setup, attached
from bench.disk import Shared, best_rate, lmdb_rates, raw_file, slot_bytes
from bench.keys import chain
from bench.latency import Spread, spread
from bench.machine import wait_until_quiet
from bench.row import Row
from kvtier.block import SLOT_BITS, SLOTS_PER_SEGMENT_MAX, Keys, SlotIO, SlotLabel
from kvtier.client.admin import AdminClient
from kvtier.tiers.ssd import SsdTier
from kvtier.units import GIB, KIB, MIB, format_bytes

NAME: Final = "ssd"
_BATCH_BYTES: Final = 64 * MIB  # of one call: the mover's
_BATCHES_AT_ONCE: Final = (1, 2)  # the mover runs two
_SEGMENT_BYTES: Final = GIB
_PROMOTED: Final = 64  # blocks leased one by one


class _Case(NamedTuple):
    """A size of blocks, how many bytes of them are measured, and what of raw must be reached."""

    block_bytes: int
    size_bytes: int
    bar: float


_CASES: Final = (_Case(2 * MIB, 768 * MIB, 0.8), _Case(128 * KIB, 384 * MIB, 0.6))


def run(*, quick: bool) -> list[Row]:
    """GB/s of the tier alone and of demotion and promotion; raw limits of the same directory."""
    rows = []
    for block_bytes, size_bytes, bar in _CASES:
        blocks, repeats = (16, 1) if quick else (size_bytes // block_bytes, 4)
        memory = Shared(blocks * block_bytes)
        with _folder() as folder:
            with raw_file(folder / "raw", memory, block_bytes) as raw:
                raw_write, raw_read = raw.rates(repeats)
                one = _one_by_one(raw.read, min(_PROMOTED, blocks), 1 if quick else 5)
            kept = lmdb_rates(folder / "lmdb", memory, block_bytes, repeats)
            tier, alone = _tier(folder / "tier", memory, block_bytes, repeats)
        moved = _through_daemon(block_bytes, blocks, repeats)
        text = f"{blocks} x {format_bytes(block_bytes)}"
        judged = None if quick else f"ratio >= {bar}"
        for case, rates, held in (
            ("LMDB with values in it, {}", kept, None),
            ("SsdTier {}", tier, judged),
            ("daemon, {} (flush or lease)", moved.rates, judged),
        ):
            for verb, rate, limit in zip(
                ("write", "read"), rates, (raw_write, raw_read), strict=True
            ):
                rows.append(
                    Row.of(
                        NAME, f"{case.format(verb)}, {text}", rate, "GB/s", limit=limit, bar=held
                    )
                )
        rows += _promotions(block_bytes, alone, moved, one, quick=quick)
    return rows


def _promotions(
    block_bytes: int, alone: Spread, moved: _Moved, raw: Spread, *, quick: bool
) -> list[Row]:
    """Through a daemon the limit is a raw read, and a lease of as many blocks that are in memory:
    what the call itself costs is `lease`'s affair.
    """
    size = format_bytes(block_bytes)
    bar = "ratio <= 1.3" if block_bytes == 2 * MIB and not quick else None
    limits_us = raw.p50_us + moved.held.p50_us, raw.p99_us + moved.held.p99_us
    text = f"promotion of one block of {size} through a daemon, lease included"
    return [
        Row.of(
            NAME, f"SsdTier read of one block of {size}, p50", alone.p50_us, "us",
            limit=raw.p50_us, bar=bar,
        ),
        Row.of(
            NAME, f"SsdTier read of one block of {size}, p99", alone.p99_us, "us", limit=raw.p99_us
        ),
        Row.of(NAME, f"{text}, p50", moved.one.p50_us, "us", limit=limits_us[0], bar=bar),
        Row.of(NAME, f"{text}, p99", moved.one.p99_us, "us", limit=limits_us[1]),
    ]  # fmt: skip


def _one_by_one(verb: Callable[[int], object], count: int, rounds: int) -> Spread:
    """Microseconds of `verb(0)` to `verb(count - 1)`, one after the other."""
    taken = []
    for _ in range(rounds):
        wait_until_quiet(0.3)
        times = []
        for number in range(count):
            start = time.perf_counter_ns()
            verb(number)
            times.append(time.perf_counter_ns() - start)
        taken.append(times)
    return spread(taken)


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="kvtier-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


# --- the tier alone


def _tier(
    folder: Path, memory: Shared, block_bytes: int, repeats: int
) -> tuple[tuple[float, float], Spread]:
    slot, blocks = slot_bytes(block_bytes), memory.size_bytes // block_bytes
    per_segment = min(_SEGMENT_BYTES // slot, SLOTS_PER_SEGMENT_MAX)
    tier = SsdTier(folder, -(-blocks // per_segment), _SEGMENT_BYTES, min_free_bytes=0)
    tier.recover()
    space = synthetic.spec()
    tier.register_namespace(space.digest, space.to_json(), 1)
    items = [
        SlotIO(
            index // per_segment << SLOT_BITS | index % per_segment,
            slot,
            memory.address + index * block_bytes,
            SlotLabel(space.digest, 1, key, b"", index, 0, block_bytes),
        )
        for index, key in enumerate(chain(0, blocks).split())
    ]
    batch = max(1, _BATCH_BYTES // block_bytes)
    batches = [items[at : at + batch] for at in range(0, blocks, batch)]
    try:
        tier.write(items)  # makes the slabs: preallocation is not what is measured
        # The daemon's DRAM tier computed the checksums at commit: they are given from here on.
        write, read = (
            max(
                best_rate(_in_batches(verb, batches, n), memory.size_bytes, repeats)
                for n in _BATCHES_AT_ONCE
            )
            for verb in (tier.write, tier.read)
        )
        one = _one_by_one(lambda i: tier.read([items[i]]), min(_PROMOTED, blocks), repeats)
        assert all(item.error is None for item in items)
    finally:
        tier.close()
    return (write, read), one


def _in_batches(
    verb: Callable[[list[SlotIO]], None], batches: list[list[SlotIO]], at_once: int
) -> Callable[[], None]:
    def work() -> None:
        with ThreadPoolExecutor(at_once) as pool:
            for _ in pool.map(verb, batches):
                pass

    return work


# --- through a daemon


class _Moved(NamedTuple):
    """GB/s down and up; microseconds of leases that promote one block each, and of none."""

    rates: tuple[float, float]
    one: Spread
    held: Spread


def _through_daemon(block_bytes: int, blocks: int, repeats: int) -> _Moved:
    """GB/s of Flush of blocks that lie only in DRAM, and of a lease of them after a restart.

    The first flush makes the slabs; later rounds write into slots that were evicted again.
    """
    size_bytes = blocks * block_bytes
    setup = Setup(
        dram_bytes=max(2 * size_bytes, 32 * MIB), ssd_bytes=max(4 * size_bytes, 64 * MIB),
        write_arena_bytes=max(block_bytes, min(size_bytes, 128 * MIB)),
    )  # fmt: skip
    down = up = 0.0
    alone: list[list[int]] = []
    held: list[list[int]] = []
    with Daemon(setup, start=False) as daemon:
        for number in range(repeats + 1):
            keys = chain(number, blocks, salt="ssd")
            seconds = _flushed(daemon, block_bytes, keys)
            if number:
                down = max(down, size_bytes / seconds / 1e9)
            up = max(up, size_bytes / _leased(daemon, block_bytes, keys) / 1e9)
            alone.append(_leased_singly(daemon, block_bytes, keys, restart=True))
            held.append(_leased_singly(daemon, block_bytes, keys, restart=False))
            with daemon.client() as client:
                attached(client, block_bytes=block_bytes).evict(keys)
            daemon.stop()
    return _Moved((down, up), spread(alone), spread(held))


def _flushed(daemon: Daemon, block_bytes: int, keys: Keys) -> float:
    """Seconds of a flush of these, just stored; the daemon is stopped then."""
    daemon.start()
    with daemon.client() as client, _admin(daemon) as admin:
        space = attached(client, block_bytes=block_bytes)
        space.store(keys, lambda block: block.view.__setitem__(0, 1), timeout_s=120)
        wait_until_quiet(0.3)
        start_s = time.perf_counter()
        admin.flush(60)
        seconds = time.perf_counter() - start_s
    daemon.stop()
    return seconds


def _leased(daemon: Daemon, block_bytes: int, keys: Keys) -> float:
    """Seconds of one lease of all of them, after a start; then the daemon is stopped."""
    daemon.start()
    with daemon.client() as client:
        space = attached(client, block_bytes=block_bytes)
        wait_until_quiet(0.3)
        start_s = time.perf_counter()
        with space.lease(keys, timeout_s=60) as lease:
            seconds = time.perf_counter() - start_s
            assert lease.block_count == len(keys), lease
    daemon.stop()
    return seconds


def _leased_singly(daemon: Daemon, block_bytes: int, keys: Keys, *, restart: bool) -> list[int]:
    """Nanoseconds of leases of one block more each; after a start, it has to be promoted."""
    if restart:
        daemon.start()
    taken = []
    with daemon.client() as client:
        space = attached(client, block_bytes=block_bytes)
        wait_until_quiet(0.3)
        for number in range(min(_PROMOTED, len(keys))):
            # All before it are in memory by now.
            asked = Keys(keys.packed[: (number + 1) * keys.size], keys.size)
            start = time.perf_counter_ns()
            lease = space.lease(asked, timeout_s=60)
            taken.append(time.perf_counter_ns() - start)
            assert lease.block_count == number + 1, lease
            lease.release()
    return taken


def _admin(daemon: Daemon) -> AdminClient:
    return AdminClient(daemon.directory / "run" / "admin.sock", timeout_s=60)
