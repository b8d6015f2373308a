"""Storing 64 blocks of 2 MiB: reserve, fill by the client from its own buffer, commit.

Isolated: the daemon copies what the client wrote and checksums it in the same pass. Single-tenant:
the client writes where the blocks stay. Both against one memcpy of the same bytes.
"""

from __future__ import annotations

import time
from typing import Final

import numpy as np

from bench.daemon import Daemon, Setup, attached
from bench.keys import chain
from bench.machine import Buffer, memcpy_gb_per_s, wait_until_quiet
from bench.row import Row
from kvtier import native
from kvtier.client import Space
from kvtier.units import MIB

NAME: Final = "store"
BLOCK_BYTES: Final = 2 * MIB
BLOCKS: Final = 64
_BARS: Final = {"isolated": "ratio >= 0.45", "single-tenant": "ratio >= 0.85"}


def run(*, quick: bool) -> list[Row]:
    """GB/s of whole batches, and where their time goes."""
    repeats, blocks = (2, 4) if quick else (20, BLOCKS)
    size_bytes = blocks * BLOCK_BYTES
    target, source = Buffer(size_bytes), Buffer(size_bytes)
    rows = []
    for trust, bar in _BARS.items():
        setup = Setup(dram_bytes=10 * size_bytes, trust=trust, write_arena_bytes=2 * size_bytes)
        with Daemon(setup) as daemon, daemon.client() as client:
            space = attached(client, block_bytes=BLOCK_BYTES)
            parts = [_batch(space, source, blocks, number) for number in range(repeats)]
            limit = memcpy_gb_per_s(target, source, BLOCK_BYTES, repeats=max(5, repeats // 2))
        best = min(parts, key=sum)
        rows.append(
            Row.of(
                NAME, f"{trust}, {blocks} x 2 MiB", size_bytes / sum(best) / 1e9, "GB/s",
                limit=limit, bar=None if quick else bar,
            )
        )  # fmt: skip
        rows += [
            Row.of(NAME, f"{trust}, of it {part}", seconds * 1e3, "ms")
            for part, seconds in zip(("reserve", "fill", "commit"), best, strict=True)
        ]
    return rows


def _batch(space: Space, source: Buffer, blocks: int, number: int) -> tuple[float, float, float]:
    """Seconds of reserve, fill and commit of a chain nobody stored before."""
    keys = chain(number, blocks, salt="store")
    wait_until_quiet(0.2)
    start_s = time.perf_counter()
    with space.reserve(keys) as reservation:
        reserved_s = time.perf_counter()
        assert len(reservation.blocks) == blocks, "DRAM is too small for one batch"
        targets = [int(np.frombuffer(b.view, np.uint8).ctypes.data) for b in reservation.blocks]
        sources = [source.address + i * BLOCK_BYTES for i in range(blocks)]
        native.copy(targets, sources, [BLOCK_BYTES] * blocks)
        filled_s = time.perf_counter()
        reservation.commit()
        end_s = time.perf_counter()
    return reserved_s - start_s, filled_s - reserved_s, end_s - filled_s
