"""Eight client processes at once: cycles of lookup, lease and release of 512 blocks.

One cycle is two calls: the lookup leases what it finds, as an engine's scheduler does it, then the
release. The cycle of three calls (lookup, lease, release) is measured beside it.
"""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.synchronize import Barrier
from typing import Any, Final

from bench.daemon import Daemon, Setup, attached
from bench.keys import CHAIN_BLOCKS, chain
from bench.lookup import BLOCK_BYTES, store_chains
from bench.machine import wait_until_quiet
from bench.row import Row
from kvtier.client import Client, Space
from kvtier.units import MIB

NAME: Final = "load"
CLIENTS: Final = 8
_CHAINS: Final = 8  # of each client
_START_S: Final = 120.0
_P99_BAR: Final = "value <= 20000"


def run(*, quick: bool) -> list[Row]:
    """Cycles a second of all clients together, and p99 of a cycle."""
    repeats, seconds = (1, 0.3) if quick else (3, 4.0)
    clients = 2 if quick else CLIENTS
    with Daemon(Setup(dram_bytes=align(clients))) as daemon:
        with daemon.client() as client:
            space = attached(client, block_bytes=BLOCK_BYTES)
            store_chains(space, clients * _CHAINS * CHAIN_BLOCKS)
        rows = []
        for case, calls in (("two calls", 2), ("three calls", 3)):
            runs = [_together(daemon, clients, seconds, calls) for _ in range(repeats)]
            rate, p99_us = max(runs)
            judged = calls == 2 and not quick
            text = f"{clients} clients, 512 blocks, {case} a cycle"
            rows += [
                Row.of(NAME, text, rate, "cycles/s", bar="value >= 1500" if judged else None),
                Row.of(NAME, f"{text}, p99", p99_us, "us", bar=_P99_BAR if judged else None),
            ]
    return rows


def align(clients: int) -> int:
    """DRAM for all chains with room to spare. Bytes."""
    return max(64 * MIB, clients * _CHAINS * CHAIN_BLOCKS * BLOCK_BYTES * 2)


def _together(daemon: Daemon, clients: int, seconds: float, calls: int) -> tuple[float, float]:
    wait_until_quiet(5.0)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(clients), context.Queue()
    workers = [
        context.Process(
            target=_work, args=(str(daemon.socket), number, seconds, calls, barrier, results)
        )
        for number in range(clients)
    ]
    for worker in workers:
        worker.start()
    taken: list[int] = []
    rate = 0.0
    for _ in workers:
        one, seconds_really = results.get(timeout=_START_S + 10 * seconds)
        taken += one
        rate += len(one) / seconds_really
    for worker in workers:
        worker.join()
    taken.sort()
    return rate, taken[len(taken) * 99 // 100] / 1e3


def _work(
    socket: str, number: int, seconds: float, calls: int, barrier: Barrier, results: Any
) -> None:
    with Client(socket, deadline_s=10, timeout_s=60, writes=False) as client:
        space = attached(client, block_bytes=BLOCK_BYTES)
        mine = [chain(number * _CHAINS + i) for i in range(_CHAINS)]
        cycle = _two_calls if calls == 2 else _three_calls
        cycle(space, mine[0])
        barrier.wait(_START_S)
        taken: list[int] = []
        start_s = time.monotonic()
        while time.monotonic() < start_s + seconds:
            start = time.perf_counter_ns()
            cycle(space, mine[len(taken) % _CHAINS])
            taken.append(time.perf_counter_ns() - start)
        results.put((taken, time.monotonic() - start_s))


def _two_calls(space: Space, keys: Any) -> None:
    found = space.lookup(keys, lease=True)
    assert found.lease is not None
    assert found.block_count == CHAIN_BLOCKS
    found.lease.release()


def _three_calls(space: Space, keys: Any) -> None:
    found = space.lookup(keys)
    assert found.block_count == CHAIN_BLOCKS
    space.lease(keys).release()
