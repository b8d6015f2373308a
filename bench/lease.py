"""Leasing one 2 MiB block and reading it where it lies: the round trip, and no byte copied."""

from __future__ import annotations

from typing import Final

import uvloop

from bench.daemon import Daemon, Setup, attached
from bench.keys import chain
from bench.latency import Spread, measure, measure_async
from bench.row import Row
from bench.rpc import empty_call, empty_request
from kvtier.block import BlockFormat, Keys
from kvtier.client import AsyncClient, Client, Lease, Space
from kvtier.units import MIB

NAME: Final = "lease"
BLOCK_BYTES: Final = 2 * MIB


def run(*, quick: bool) -> list[Row]:
    """Lease of one block against an empty RPC; bytes of the view that are not the daemon's own."""
    rounds, calls = (2, 50) if quick else (30, 150)
    keys = chain(0, 1)
    with Daemon(Setup(dram_bytes=64 * MIB)) as daemon:
        with daemon.client() as client:
            space = attached(client, block_bytes=BLOCK_BYTES)
            content = bytes(range(256)) * (BLOCK_BYTES // 256)
            space.store(keys, lambda block: block.view.__setitem__(slice(None), content))
            copied = _copied_bytes(daemon, space, keys, content)
            blocking = _blocking(client, space, keys, rounds, calls)
        aio = uvloop.run(_aio(daemon, keys, rounds, calls))
    bar = None if quick else "ratio <= 1.5"
    rows = [Row.of(NAME, "bytes copied per 2 MiB block", copied, "B", bar="value <= 0")]
    for name, found in (("aio client", aio), ("blocking client", blocking)):
        floor = found["empty"]
        for case in ("lease", "lookup with lease"):
            judged = bar if name == "aio client" and case == "lease" else None
            rows.append(
                Row.of(
                    NAME, f"{name}, {case} of one 2 MiB block, p50", found[case].p50_us, "us",
                    limit=floor.p50_us, bar=judged,
                )
            )  # fmt: skip
        rows.append(
            Row.of(NAME, f"{name}, lease, view and first byte, p50", found["read"].p50_us, "us")
        )
    return rows


def _copied_bytes(daemon: Daemon, space: Space, keys: Keys, content: bytes) -> int:
    """2 MiB unless the view's memory is the very file that the daemon has mapped."""
    with space.lease(keys) as lease:
        view = lease.views[0]
        assert view.readonly
        assert bytes(view) == content
        start = _address(view)
        ours = _mapped_file("/proc/self/maps", start, start + len(view))
        with open(f"/proc/{daemon.pid}/maps") as maps:  # noqa: PTH123
            theirs = {
                line.split()[4] for line in maps if "/memfd:kvtier-" in line and "-dram-" in line
            }
        return 0 if ours in theirs else len(view)


def _mapped_file(maps: str, start: int, end: int) -> str:
    with open(maps) as lines:  # noqa: PTH123
        for line in lines:
            span, _, _, _, inode, *_ = line.split()
            low, high = (int(bound, 16) for bound in span.split("-"))
            if low <= start and end <= high:
                return inode
    return "0"


def _address(view: memoryview) -> int:
    import numpy as np

    return int(np.frombuffer(view, np.uint8).ctypes.data)


def _blocking(
    client: Client, space: Space, keys: Keys, rounds: int, calls: int
) -> dict[str, Spread]:
    link = client.linker.current()
    assert link is not None
    request, release = empty_request(client), link.stub.Release
    leases: list[Lease] = []

    def lease(_: int) -> None:
        leases.append(space.lease(keys))

    def look(_: int) -> None:
        found = space.lookup(keys, lease=True)
        assert found.lease is not None
        leases.append(found.lease)

    def read(_: int) -> None:
        lease = space.lease(keys)
        assert lease.views[0][0] == 0
        leases.append(lease)

    def give_back() -> None:
        leases.pop().release()

    return measure(
        {
            "empty": lambda _: release(request),
            "lease": lease,
            "lookup with lease": look,
            "read": read,
        },
        {"lease": give_back, "lookup with lease": give_back, "read": give_back},
        rounds=rounds,
        calls=calls,
    )


async def _aio(daemon: Daemon, keys: Keys, rounds: int, calls: int) -> dict[str, Spread]:
    async with AsyncClient(daemon.socket, deadline_s=10, timeout_s=60) as client:
        empty = await empty_call(client)
        shape = BlockFormat(1, 1, 1, "bfloat16", 16, opaque_bytes=BLOCK_BYTES)
        space = await client.open_namespace(model="bench", format=shape)
        leases = []

        async def lease(_: int) -> None:
            leases.append(await space.lease(keys))

        async def look(_: int) -> None:
            found = await space.lookup(keys, lease=True)
            assert found.lease is not None
            leases.append(found.lease)

        async def read(_: int) -> None:
            lease = await space.lease(keys)
            assert lease.views[0][0] == 0
            leases.append(lease)

        async def give_back() -> None:
            await leases.pop().release()

        return await measure_async(
            {"empty": empty, "lease": lease, "lookup with lease": look, "read": read},
            {"lease": give_back, "lookup with lease": give_back, "read": give_back},
            rounds=rounds,
            calls=calls,
        )
