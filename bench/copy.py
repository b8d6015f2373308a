"""Copying 64 leased 2 MiB blocks into a client's own buffer, against memcpy of the same bytes."""

from __future__ import annotations

import time
from typing import Final

import numpy as np

from bench.daemon import Daemon, Setup, attached
from bench.keys import chain
from bench.machine import Buffer, best_seconds, memcpy_gb_per_s
from bench.row import Row
from kvtier import native
from kvtier.block import Keys
from kvtier.client import Lease, Space
from kvtier.units import MIB

NAME: Final = "copy"
BLOCK_BYTES: Final = 2 * MIB
BLOCKS: Final = 64


def run(*, quick: bool) -> list[Row]:
    """GB/s from leased views; the first time (page faults of the mapping included) and hot."""
    repeats, blocks = (2, 4) if quick else (12, BLOCKS)
    size_bytes = blocks * BLOCK_BYTES
    keys = chain(0, blocks)
    target, source = Buffer(size_bytes), Buffer(size_bytes)
    with Daemon(Setup(dram_bytes=4 * size_bytes, write_arena_bytes=size_bytes)) as daemon:
        with daemon.client() as client:
            space = attached(client, block_bytes=BLOCK_BYTES)
            space.store(keys, lambda block: block.view.__setitem__(0, 1))
        with daemon.client() as client:
            space = attached(client, block_bytes=BLOCK_BYTES)
            first_s = _first(space, keys, target)
            with space.lease(keys) as lease:
                assert lease.block_count == blocks
                batch_s = best_seconds(lambda: copy_out(lease, target), repeats=repeats)
                slices_s = best_seconds(lambda: _by_slices(lease, target), repeats=repeats)
                limit = memcpy_gb_per_s(target, source, BLOCK_BYTES, repeats=repeats)
    return [
        Row.of(
            NAME, f"{case}, {blocks} x 2 MiB", size_bytes / seconds / 1e9, "GB/s", limit=limit,
            bar=bar if not quick else None,
        )
        for case, seconds, bar in (
            ("one native.copy of the batch", batch_s, "ratio >= 0.9"),
            ("slice by slice in Python", slices_s, None),
            ("lease, map and copy for the first time", first_s, None),
        )
    ]  # fmt: skip


def copy_out(lease: Lease, target: Buffer) -> None:
    """All of the lease into the buffer, in one call of the native library."""
    views = list(lease.views)
    sources = [int(np.frombuffer(view, np.uint8).ctypes.data) for view in views]
    sizes = [len(view) for view in views]
    native.copy([target.address + i * BLOCK_BYTES for i in range(len(views))], sources, sizes)


def _by_slices(lease: Lease, target: Buffer) -> None:
    for index, view in enumerate(lease.views):
        at = index * BLOCK_BYTES
        target.view[at : at + BLOCK_BYTES] = view


def _first(space: Space, keys: Keys, target: Buffer) -> float:
    start_s = time.perf_counter()
    with space.lease(keys) as lease:
        copy_out(lease, target)
    return time.perf_counter() - start_s
