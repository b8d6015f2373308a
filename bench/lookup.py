"""Looking up a 512-block prefix with a million blocks held; with a lease; while blocks demote, and
while the SSD tier is scrubbed.

In DRAM lie real blocks, but of 4 KiB, stored through the socket like any others. For the case of
demotion the million lies on SSD (`synthetic.py`) while a second process stores 2 MiB blocks as fast
as it can into a small DRAM tier, so that all of them go down to the same SSD.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Final

import uvloop

from bench import synthetic
from bench.daemon import ROOT, Daemon, Setup, attached
from bench.keys import CHAIN_BLOCKS, chain, chains
from bench.latency import Spread, histogram, measure, measure_async, spread
from bench.row import Row
from bench.rpc import empty_call, empty_request
from kvtier.block import BlockFormat, Keys
from kvtier.client import AsyncClient, AsyncSpace, Client, Lease, Space
from kvtier.client.admin import AdminClient
from kvtier.units import GIB, KIB, MIB, align_up

NAME: Final = "lookup"
BLOCK_BYTES: Final = 4 * KIB
_ASKED: Final = 64  # chains that are looked up, spread over all
_PRESSURE_BLOCK_BYTES: Final = 2 * MIB
_PRESSURE_BATCH: Final = 32


def run(*, quick: bool) -> list[Row]:
    """p50 and p99 with both clients; then p99 under demotion and under a scrub."""
    held = 16 * CHAIN_BLOCKS if quick else 1 << 20
    rows = [*_held_in_dram(held, quick), *_during_demotion(held, quick)]
    return [*rows, *_during_scrub(held // 8, quick)]


def _held_in_dram(held: int, quick: bool) -> list[Row]:
    rounds, calls = (2, 50) if quick else (30, 150)
    room = align_up(held * BLOCK_BYTES * 8 // 7, 64 * MIB)
    with Daemon(Setup(dram_bytes=room)) as daemon:
        with daemon.client() as client:
            space = attached(client, block_bytes=BLOCK_BYTES)
            store_chains(space, held)
            asked = _asked(held)
            blocking = _blocking(client, space, asked, rounds, calls)
        aio = uvloop.run(_aio(daemon, asked, rounds, calls))
    rows = []
    for name, found in (("aio client", aio), ("blocking client", blocking)):
        floor = found["empty"]
        for case, bar_us, bar_ratio in (("lookup", 150, 1.6), ("lookup with lease", 240, 2.5)):
            judged = name == "aio client" and not quick
            text = f"{name}, {case}, {held} blocks in DRAM"
            one = found[case]
            rows += [
                Row.of(
                    NAME, f"{text}, p50", one.p50_us, "us", limit=floor.p50_us,
                    bar=f"value <= {bar_us}" if judged else None,
                ),
                Row.of(
                    NAME, f"{text}, p50 over an empty RPC's", one.p50_us, "us", limit=floor.p50_us,
                    bar=f"ratio <= {bar_ratio}" if judged else None,
                ),
                Row.of(NAME, f"{text}, p99", one.p99_us, "us", limit=floor.p99_us),
            ]  # fmt: skip
        again = found["same lookup again"].p50_us
        text = f"{name}, same lookup again, {held} blocks in DRAM, p50"
        rows.append(Row.of(NAME, text, again, "us", limit=floor.p50_us))
    return rows


def store_chains(space: Space, block_count: int, *, salt: str = "") -> None:
    """Stores `keys.chains(block_count)` with whatever bytes lie in the write arena."""
    for keys in chains(block_count, salt=salt):
        done = 0
        while done < len(keys):
            rest = Keys(keys.packed[done * keys.size :], keys.size)
            parent = keys[done - 1] if done else None
            with space.reserve(rest, parent, position=done) as reservation:
                reservation.commit()
                done += reservation.covered_count


def _asked(held: int) -> list[Keys]:
    count = held // CHAIN_BLOCKS
    return [chain(number) for number in range(0, count, max(1, count // _ASKED))]


def _blocking(
    client: Client, space: Space, asked: list[Keys], rounds: int, calls: int
) -> dict[str, Spread]:
    link = client.linker.current()
    assert link is not None
    request, release = empty_request(client), link.stub.Release
    leases: list[Lease] = []

    def lease(number: int) -> None:
        found = space.lookup(asked[number % len(asked)], lease=True)
        assert found.lease is not None
        leases.append(found.lease)

    def find(number: int) -> None:
        assert space.lookup(asked[number % len(asked)]).block_count == CHAIN_BLOCKS

    def find_again(_: int) -> None:
        assert space.lookup(asked[0]).block_count == CHAIN_BLOCKS

    return measure(
        {
            "empty": lambda _: release(request),
            "lookup": find,
            "same lookup again": find_again,
            "lookup with lease": lease,
        },
        {"lookup with lease": lambda: leases.pop().release()},
        rounds=rounds,
        calls=calls,
    )


async def _aio(daemon: Daemon, asked: list[Keys], rounds: int, calls: int) -> dict[str, Spread]:
    async with AsyncClient(daemon.socket, deadline_s=10, timeout_s=60) as client:
        empty = await empty_call(client)
        space = await _opened(client)
        leases = []

        async def find(number: int) -> None:
            found = await space.lookup(asked[number % len(asked)])
            assert found.block_count == CHAIN_BLOCKS, found

        async def find_again(_: int) -> None:
            found = await space.lookup(asked[0])
            assert found.block_count == CHAIN_BLOCKS, found

        async def lease(number: int) -> None:
            found = await space.lookup(asked[number % len(asked)], lease=True)
            assert found.lease is not None
            leases.append(found.lease)

        async def release() -> None:
            await leases.pop().release()

        return await measure_async(
            {
                "empty": empty,
                "lookup": find,
                "same lookup again": find_again,
                "lookup with lease": lease,
            },
            {"lookup with lease": release},
            rounds=rounds,
            calls=calls,
        )


async def _opened(client: AsyncClient) -> AsyncSpace:
    shape = BlockFormat(1, 1, 1, "bfloat16", 16, opaque_bytes=BLOCK_BYTES)
    return await client.open_namespace(model="bench", format=shape)


# --- while blocks demote


def _during_demotion(held: int, quick: bool) -> list[Row]:
    setup = Setup(
        dram_bytes=(128 if quick else 512) * MIB,
        ssd_bytes=synthetic.ssd_bytes(held) + (1 if quick else 24) * GIB,
        ssd_segment_bytes=synthetic.SEGMENT_BYTES,
        write_arena_bytes=128 * MIB,
    )
    with Daemon(setup, start=False) as daemon:
        synthetic.write_state(daemon.state, held, tier_bytes=setup.ssd_bytes)
        daemon.start()
        with daemon.client() as client:
            attached(client, block_bytes=BLOCK_BYTES)
        quiet = spread([uvloop.run(timed(daemon, _asked(held), 0.3 if quick else 3.0))])
        pressure = subprocess.Popen(
            [sys.executable, "-m", "bench.lookup", str(daemon.socket)], cwd=ROOT
        )
        try:
            before = _demoted_bytes(daemon)
            while _demoted_bytes(daemon) < before + 64 * MIB and pressure.poll() is None:
                time.sleep(0.05)
            before, start_s = _demoted_bytes(daemon), time.monotonic()
            times = uvloop.run(timed(daemon, _asked(held), 0.5 if quick else 6.0))
            rate = (_demoted_bytes(daemon) - before) / (time.monotonic() - start_s) / 1e9
        finally:
            pressure.kill()
            pressure.wait()
    text = f"aio client, lookup, {held} blocks on SSD"
    return [
        Row.of(NAME, f"{text}, undisturbed, p99", quiet.p99_us, "us"),
        *disturbed(f"{text}, during demotion", times, quiet, quick=quick),
        Row.of(NAME, "demotion meanwhile", rate, "GB/s"),
    ]


def disturbed(text: str, times: list[int], quiet: Spread, *, quick: bool) -> list[Row]:
    """The rows of lookups (ns each, nothing left out) while something else was done."""
    busy = spread([times])
    bar = None if quick else "value <= 5000"
    return [
        Row.of(NAME, f"{text}, p99", busy.p99_us, "us", limit=quiet.p99_us, bar=bar),
        Row.of(NAME, f"{text}, p50", busy.p50_us, "us", limit=quiet.p50_us),
        Row.of(NAME, f"{text}, longest", busy.max_us, "us", limit=quiet.max_us),
        *(Row.of(NAME, f"{text}, {name}", count, "calls") for name, count in histogram(times)),
    ]


def _during_scrub(held: int, quick: bool) -> list[Row]:
    """Real blocks, which lie in memory and on SSD; the scrub as fast as it goes."""
    setup = Setup(
        dram_bytes=align_up(held * BLOCK_BYTES * 8 // 7, 64 * MIB),
        ssd_bytes=align_up(held * 3 * BLOCK_BYTES, 64 * MIB),
    )
    with (
        Daemon(setup) as daemon,
        AdminClient(daemon.directory / "run" / "admin.sock", timeout_s=300) as admin,
    ):
        with daemon.client() as client:
            store_chains(attached(client, block_bytes=BLOCK_BYTES), held)
        admin.flush(240)
        quiet = spread([uvloop.run(timed(daemon, _asked(held), 0.3 if quick else 3.0))])
        admin.start_scrub(1 << 30)
        start_s = time.monotonic()
        times = uvloop.run(timed(daemon, _asked(held), 0.3 if quick else 4.0))
        seconds = time.monotonic() - start_s
        scrub = admin.scrub()
        assert quick or scrub.state == "running", f"it ended meanwhile: {scrub}"
        assert not scrub.damaged, scrub
    text = f"aio client, lookup, {held} blocks on SSD"
    return [
        Row.of(NAME, f"{text}, before the scrub, p99", quiet.p99_us, "us"),
        *disturbed(f"{text}, during a scrub", times, quiet, quick=quick),
        Row.of(NAME, "scrub meanwhile", scrub.read_bytes / seconds / 1e9, "GB/s"),
    ]


async def timed(daemon: Daemon, asked: list[Keys], seconds: float) -> list[int]:
    """Nanoseconds of each of all lookups in that time: one round, nothing left out."""
    async with AsyncClient(daemon.socket, deadline_s=10, timeout_s=60) as client:
        space = await _opened(client)
        taken: list[int] = []
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            start = time.perf_counter_ns()
            found = await space.lookup(asked[len(taken) % len(asked)])
            taken.append(time.perf_counter_ns() - start)
            assert found.block_count == CHAIN_BLOCKS, found
        return taken


def _demoted_bytes(daemon: Daemon) -> int:
    with AdminClient(daemon.directory / "run" / "admin.sock") as admin:
        return sum(route.size_bytes for route in admin.stat().routes)


def press(socket: str) -> None:
    """Stores new 2 MiB blocks without end, filling nothing: the daemon's work, not the client's."""
    with Client(socket, deadline_s=10, timeout_s=120) as client:
        space = attached(client, block_bytes=_PRESSURE_BLOCK_BYTES)
        number = 0
        while True:
            keys = chain(number, _PRESSURE_BATCH, salt="pressure")
            space.store(keys, lambda block: None, timeout_s=120)
            number += 1


if __name__ == "__main__":
    press(sys.argv[1])
