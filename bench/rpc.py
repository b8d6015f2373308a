"""An empty RPC: the floor under every verb; against a bare gRPC server that knows nothing of us."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import grpc
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.daemon import ROOT, Daemon, Setup, attached
from bench.latency import Spread, measure, measure_async
from bench.row import Row
from kvtier.client import AsyncClient, Client
from kvtier.client.link import CHANNEL_OPTIONS
from kvtier.units import KIB, MIB
from kvtier.v1 import cache_pb2

NAME: Final = "rpc"
_BARE: Final = "/bare.Bare/Nothing"


def run(*, quick: bool) -> list[Row]:
    """p50 and p99 of Release of no leases and of the health check, both kinds of client."""
    rounds, calls = (2, 100) if quick else (30, 150)
    with Daemon(Setup(dram_bytes=32 * MIB)) as daemon:
        bare = daemon.directory / "bare.sock"
        server = _start_bare(bare)
        try:
            blocking = _blocking(daemon, bare, rounds, calls)
            aio = uvloop.run(_aio(daemon, bare, rounds, calls))
        finally:
            server.kill()
            server.wait()
    return _rows("aio client", aio) + _rows("blocking client", blocking)


def _rows(client: str, found: dict[str, Spread]) -> list[Row]:
    bare = found.pop("bare")
    rows = []
    for name, one in found.items():
        rows.append(Row.of(NAME, f"{client}, {name}, p50", one.p50_us, "us", limit=bare.p50_us))
        rows.append(Row.of(NAME, f"{client}, {name}, p99", one.p99_us, "us", limit=bare.p99_us))
    return rows


def _blocking(daemon: Daemon, bare: Path, rounds: int, calls: int) -> dict[str, Spread]:
    with daemon.client() as client, grpc.insecure_channel(f"unix:{bare}") as bare_channel:
        attached(client, block_bytes=4 * KIB)
        link = client.linker.current()
        assert link is not None
        health = health_pb2_grpc.HealthStub(link.channel)
        nothing = bare_channel.unary_unary(_BARE, None, None)
        check, request = health_pb2.HealthCheckRequest(), empty_request(client)
        return measure(
            {
                "bare": lambda _: nothing(b""),
                "health Check": lambda _: health.Check(check),
                "Release of nothing": lambda _: link.stub.Release(request),
            },
            {},
            rounds=rounds,
            calls=calls,
        )


async def _aio(daemon: Daemon, bare: Path, rounds: int, calls: int) -> dict[str, Spread]:
    async with (
        AsyncClient(daemon.socket, deadline_s=10, timeout_s=60) as client,
        grpc.aio.insecure_channel(f"unix:{bare}", options=CHANNEL_OPTIONS) as bare_channel,
    ):
        empty = await empty_call(client)
        link = client.linker.current()
        assert link is not None
        health = health_pb2_grpc.HealthStub(link.channel)
        nothing = bare_channel.unary_unary(_BARE, None, None)
        check = health_pb2.HealthCheckRequest()
        return await measure_async(
            {
                "bare": lambda _: nothing(b""),
                "health Check": lambda _: health.Check(check),
                "Release of nothing": empty,
            },
            {},
            rounds=rounds,
            calls=calls,
        )


def empty_request(client: Client | AsyncClient) -> cache_pb2.ReleaseRequest:
    """The smallest request of CacheService that is answered like any other: token and all."""
    link = client.linker.current()
    assert link is not None
    return cache_pb2.ReleaseRequest(session_token=link.session.token)


async def empty_call(client: AsyncClient) -> Callable[[int], Awaitable[Any]]:
    """The empty RPC of an asyncio client, attached if it was not."""
    from kvtier.block import BlockFormat

    await client.open_namespace(
        model="empty", format=BlockFormat(1, 1, 1, "bfloat16", 16, opaque_bytes=4 * KIB)
    )
    link = client.linker.current()
    assert link is not None
    request = empty_request(client)
    release = link.stub.Release
    return lambda _: release(request)


# --- the bare server, in a process of its own: python -m bench.rpc SOCKET


def _start_bare(socket: Path) -> subprocess.Popen[bytes]:
    server = subprocess.Popen([sys.executable, "-m", "bench.rpc", str(socket)], cwd=ROOT)
    until_s = time.monotonic() + 30
    while not socket.exists() and time.monotonic() < until_s:
        time.sleep(0.01)
    return server


async def _serve_bare(socket: str) -> None:
    async def nothing(request: bytes, context: Any) -> bytes:
        return b""

    server = grpc.aio.server()
    handlers = {"Nothing": grpc.unary_unary_rpc_method_handler(nothing)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare.Bare", handlers),))
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(_serve_bare(sys.argv[1]))
