"""Durable commits of 128 KiB blocks by 1, 8 and 64 askers at a time, with and without groups.

Each commit is answered once its block is on stable storage. The limit is a raw O_DIRECT write of
the same size and one `fdatasync` for each, one after the other, and no catalogue.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from pathlib import Path
from typing import Final

import uvloop

from bench.daemon import Daemon, Setup
from bench.disk import Shared, raw_file
from bench.keys import chain
from bench.machine import wait_until_quiet
from bench.row import Row
from kvtier.block import BlockFormat
from kvtier.client import AsyncClient
from kvtier.units import GIB, KIB, MIB

NAME: Final = "durable"
BLOCK_BYTES: Final = 128 * KIB
_ASKERS: Final = (1, 8, 64)
_WAYS: Final = (("groups", 0.005, 128 * MIB), ("no waiting", 0.0, 128 * MIB), ("alone", 0.0, 1))


def run(*, quick: bool) -> list[Row]:
    """Commits a second."""
    seconds = 0.5 if quick else 4.0
    limit = _raw(16 if quick else 256)
    rows = []
    for text, wait_s, bytes_max in _WAYS:
        setup = Setup(
            dram_bytes=512 * MIB, ssd_bytes=2 * GIB, write_arena_bytes=64 * MIB,
            group_commit_s=wait_s, group_commit_bytes_max=bytes_max,
        )  # fmt: skip
        with Daemon(setup) as daemon:
            for askers in (1, 2) if quick else _ASKERS:
                wait_until_quiet(1.0)
                rate = uvloop.run(_commits(daemon, askers, seconds))
                case = f"{text}: {askers} at a time, 128 KiB"
                rows.append(Row.of(NAME, case, rate, "commits/s", limit=limit))
    return rows


def _raw(count: int) -> float:
    with tempfile.TemporaryDirectory(prefix="kvtier-bench-") as folder:
        memory = Shared(count * BLOCK_BYTES)
        with raw_file(Path(folder) / "raw", memory, BLOCK_BYTES) as file:
            start_s = time.perf_counter()
            for index in range(count):
                file.write(index)
                os.fdatasync(file.fd)
            return count / (time.perf_counter() - start_s)


async def _commits(daemon: Daemon, askers: int, seconds: float) -> float:
    shape = BlockFormat(1, 1, 1, "bfloat16", 16, opaque_bytes=BLOCK_BYTES)
    async with AsyncClient(daemon.socket, deadline_s=30, timeout_s=120) as client:
        space = await client.open_namespace(model="durable", format=shape)
        until_s = time.monotonic() + seconds

        async def ask(number: int) -> int:
            done = 0
            while time.monotonic() < until_s:
                keys = chain(done, 1, salt=f"{askers}/{number}")
                await space.store(keys, lambda block: None, durable=True)
                done += 1
            return done

        start_s = time.monotonic()
        counts = await asyncio.gather(*(ask(number) for number in range(askers)))
        return sum(counts) / (time.monotonic() - start_s)
