"""The daemon away, hung, restarted, of another version; forked children; lost answers."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from daemons import (
    FORMAT,
    Daemon,
    content,
    end,
    eventually,
    eventually_async,
    fill,
    holds,
    keys_of,
    line_of,
    spawn,
    stored,
    tell,
)
from relay import Alter, Relay

from kvtier.block import Reason
from kvtier.client import AsyncClient, Client, Space
from kvtier.client.admin import AdminClient
from kvtier.errors import (
    DaemonUnavailable,
    DeadlineExceeded,
    LeaseLost,
    ReservationExpired,
    VersionMismatch,
)
from kvtier.v1 import session_pb2

Start = Callable[..., Daemon]
SLACK_S = 0.4  # of a deadline, on a busy machine


@contextmanager
def through(daemon: Daemon, alter: Alter | None = None) -> Iterator[Relay]:
    """A relay in front of the daemon."""
    relay = Relay(daemon, alter)
    try:
        yield relay
    finally:
        relay.close()


def opened(client: Client, keys: list[bytes], model: str = "m") -> Space:
    return stored(client.open_namespace(model=model, format=FORMAT), keys)


def timed_lookup(space: Space, keys: list[bytes], deadline_s: float) -> tuple[Reason, float]:
    began_s = time.monotonic()
    found = space.lookup(keys, deadline_s=deadline_s)
    assert found.block_count == 0
    return found.reason, time.monotonic() - began_s


# --- the daemon away


def test_nobody_there(tmp_path: Path, keys: list[bytes]) -> None:
    with Client(tmp_path / "kvtier.sock") as client:
        space = client.space(model="m", format=FORMAT)
        for _ in range(3):
            reason, took_s = timed_lookup(space, keys, 0.05)
            assert reason is Reason.DAEMON_DOWN
            assert took_s < 0.05 + SLACK_S
        with pytest.raises(DaemonUnavailable, match="kvtier serve"):
            space.reserve(keys)
        with pytest.raises(DaemonUnavailable):
            client.open_namespace(model="m", format=FORMAT)


def test_killed_and_restarted(start: Start, keys: list[bytes]) -> None:
    daemon = start()
    with Client(daemon.socket, deadline_s=5) as client:
        space = opened(client, keys[:4])
        assert space.store(keys[4:], fill, parent=keys[3], durable=True).stored_count == 4
        lease, other, third = space.lease(keys), space.lease(keys), space.lease(keys)
        view = lease.view(0)
        reservation = space.reserve([b"x" * 32])

        daemon.kill()
        reason, took_s = timed_lookup(space, keys, 0.05)
        assert reason is Reason.DAEMON_DOWN
        assert took_s < 0.05 + SLACK_S
        with pytest.raises(LeaseLost, match="gone"):
            lease.check()
        assert bytes(view) == content(keys[0])  # the memory is still ours to look at
        with pytest.raises(ReservationExpired, match="gone"):
            reservation.commit()
        with pytest.raises(DaemonUnavailable):
            space.lease(keys)
        with pytest.raises(LeaseLost), other:
            pass
        with pytest.raises(ZeroDivisionError), third:  # the error of the body is not hidden
            _ = 1 // 0

        daemon.start()
        eventually(lambda: client.open_namespace(model="m", format=FORMAT))
        # What was answered as durable is back, whatever else is.
        assert holds(space, keys[4:]) or holds(space, keys)
        space.store(keys, fill)
        assert holds(space, keys)
        with pytest.raises(LeaseLost):
            lease.check()
        lease.release()


def test_restart_between_calls_is_not_noticed(start: Start, keys: list[bytes]) -> None:
    daemon = start()
    with Client(daemon.socket, deadline_s=5) as client:
        space = opened(client, keys)
        daemon.restart()
        assert space.lookup(keys).block_count == 8
        daemon.restart()
        stored(space, keys_of("after", 3))
        assert holds(space, keys)


async def test_asyncio_killed_and_restarted(start: Start, keys: list[bytes]) -> None:
    daemon = start()
    async with AsyncClient(daemon.socket) as client:
        space = await client.open_namespace(model="m", format=FORMAT)
        await space.store(keys, fill, durable=True)
        lease = await space.lease(keys)
        daemon.kill()
        began_s = time.monotonic()
        assert (await space.lookup(keys)).reason is Reason.DAEMON_DOWN
        assert time.monotonic() - began_s < 0.05 + SLACK_S
        with pytest.raises(LeaseLost):
            lease.check()
        with pytest.raises(DaemonUnavailable):
            await space.reserve(keys)
        await asyncio.to_thread(daemon.start)
        until_s = time.monotonic() + 10
        while (await space.lookup(keys, deadline_s=1)).block_count < 8:
            assert time.monotonic() < until_s
            await asyncio.sleep(0.02)
        await space.store(keys_of("more", 1), fill)


# --- the daemon hung


def test_stopped_daemon_is_a_miss_in_time(daemon: Daemon, client: Client, space: Space) -> None:
    keys = keys_of("hung", 8)
    stored(space, keys)
    with daemon.stopped():
        for deadline_s in (0.02, 0.05, 0.1):
            reason, took_s = timed_lookup(space, keys, deadline_s)
            assert reason is Reason.DEADLINE
            assert deadline_s <= took_s + 0.005
            assert took_s < deadline_s + SLACK_S
        with pytest.raises(DeadlineExceeded):
            space.lease(keys, timeout_s=0.05)
        with pytest.raises(DeadlineExceeded):
            space.reserve(keys_of("hung too", 1), timeout_s=0.05)
        with Client(daemon.socket) as other:  # accepts, but nobody answers Hello
            theirs = other.space(model="m", format=FORMAT)
            assert timed_lookup(theirs, keys, 0.05)[1] < 0.05 + SLACK_S
            assert timed_lookup(theirs, keys, 0.05)[1] < SLACK_S
    assert holds(space, keys)
    # What it granted late, to callers who had gone, is given back.
    eventually(lambda: daemon.held() == (0, 0, 1))


def test_lost_answers_are_settled(daemon: Daemon, keys: list[bytes]) -> None:
    with through(daemon) as relay, Client(relay.path) as client:
        space = opened(client, keys, "lost answers")
        for ask in (
            lambda: space.lookup(keys, lease=True, deadline_s=0.1),
            lambda: space.lease(keys, timeout_s=0.1),
            lambda: space.reserve(keys_of("lost", 3), timeout_s=0.1),
        ):
            relay.answering.clear()
            with suppress(DeadlineExceeded):
                assert ask().reason is Reason.DEADLINE  # type: ignore[union-attr]
            eventually(lambda: sum(daemon.held()) == 2)  # granted, and nobody was told
            relay.answering.set()
            eventually(lambda: daemon.held() == (0, 0, 1))
        assert space.lookup(keys, deadline_s=5).block_count == 8


async def test_cancelled_reserve_is_settled(daemon: Daemon, keys: list[bytes]) -> None:
    with through(daemon) as relay:
        async with AsyncClient(relay.path) as client:
            space = await client.open_namespace(model="cancelled", format=FORMAT)
            relay.answering.clear()
            task = asyncio.ensure_future(space.reserve(keys).__aenter__())
            await eventually_async(lambda: daemon.held() == (0, 1, 1))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            relay.answering.set()
            await eventually_async(lambda: daemon.held() == (0, 0, 1))


# --- a daemon that speaks otherwise (no sound one does: the relay makes it so)


@pytest.mark.parametrize("protocol", [2, 0])
def test_version_mismatch_is_misses_and_one_line(
    daemon: Daemon, keys: list[bytes], caplog: pytest.LogCaptureFixture, protocol: int
) -> None:
    def alter(packet: session_pb2.SessionPacket) -> bytes:
        packet.welcome.protocol = protocol
        return packet.SerializeToString()

    with through(daemon, alter) as relay, Client(relay.path) as client:
        with caplog.at_level(logging.WARNING, "kvtier.client"):
            space = client.space(model="m", format=FORMAT)
            eventually(
                lambda: (
                    space.lookup(keys, deadline_s=1).reason is Reason.DAEMON_DOWN
                    and relay.handshakes >= 3
                )
            )
            with pytest.raises(VersionMismatch, match="install the kvtier of the daemon's version"):
                space.reserve(keys)
        assert len([r for r in caplog.records if r.name == "kvtier.client"]) == 1


@pytest.mark.parametrize(
    ("packet", "error"),
    [(b"\xff" * 40, VersionMismatch), (b"", DaemonUnavailable), (None, DeadlineExceeded)],
    ids=["malformed", "end", "silence"],
)
def test_no_welcome(
    daemon: Daemon, keys: list[bytes], packet: bytes | None, error: type[Exception]
) -> None:
    with through(daemon, lambda _: packet) as relay, Client(relay.path, timeout_s=0.3) as client:
        space = client.space(model="m", format=FORMAT)
        assert timed_lookup(space, keys, 0.05)[1] < 0.05 + SLACK_S
        with pytest.raises(error):
            space.reserve(keys)


def test_a_malformed_packet_later_ends_the_session(daemon: Daemon, keys: list[bytes]) -> None:
    def alter(packet: session_pb2.SessionPacket) -> bytes:
        return packet.SerializeToString() if packet.HasField("welcome") else b"\xff" * 40

    with through(daemon, alter) as relay, Client(relay.path, deadline_s=5) as client:
        space = opened(client, keys, "malformed")
        with pytest.raises(DaemonUnavailable):
            space.lease(keys)
        relay.alter = session_pb2.SessionPacket.SerializeToString
        eventually(lambda: holds(space, keys))


def test_arena_that_never_comes(daemon: Daemon, keys: list[bytes]) -> None:
    def alter(packet: session_pb2.SessionPacket) -> bytes | None:
        return None if packet.HasField("arena_added") else packet.SerializeToString()

    with through(daemon, alter) as relay, Client(relay.path, deadline_s=5) as client:
        space = opened(client, keys, "no arena")
        found = space.lookup(keys, lease=True)
        assert found.lease is None
        assert found.reason is Reason.DAEMON_DOWN
        eventually(lambda: daemon.held() == (0, 0, 1))


def test_a_path_that_is_no_plain_uri(start: Start, keys: list[bytes]) -> None:
    odd = {"socket": "FOLDER/a b%20c.sock", "admin_socket": "FOLDER/d%41.sock"}
    daemon = start(server=odd)
    daemon.admin.close()
    daemon.admin = AdminClient(daemon.folder / "d%41.sock")
    with Client(daemon.folder / "a b%20c.sock", deadline_s=5) as client:
        assert holds(opened(client, keys), keys)
    assert daemon.stat().stored_blocks == 8


# --- this process

FORK = """
import os, signal, sys
from daemons import FORMAT, keys_of, stored
from kvtier.client import Client
from kvtier.errors import KvTierError
client = Client(sys.argv[1], deadline_s=5)
keys = keys_of("forked", 8)
space = stored(client.open_namespace(model="forked", format=FORMAT), keys)
lease = space.lease(keys)
pid = os.fork()
if pid == 0:
    try:
        space.lookup(keys)
    except KvTierError as error:
        print(error, client.linker.current().session._socket.fileno(), flush=True)
    signal.pause()
print(pid, flush=True)
sys.stdin.readline()
assert lease.view(0)[:4] == keys[0][:4]
lease.check()
assert space.lookup(keys).block_count == 8
lease.release()
client.close()
print("closed", flush=True)
sys.stdin.readline()
"""


def test_forked_child(daemon: Daemon) -> None:
    parent = spawn(FORK, daemon.socket)
    child, said = sorted((line_of(parent), line_of(parent)), key=len)
    try:
        assert "make a new Client in the child" in said
        assert said.endswith(" -1")  # it holds no socket of the parent's
        assert daemon.held() == (1, 0, 1)
        tell(parent)
        assert line_of(parent) == "closed"  # the child had not disturbed its session
        eventually(lambda: daemon.held() == (0, 0, 0))  # though parent and child live
    finally:
        os.kill(int(child), signal.SIGKILL)
        end(parent)


def test_closed_client(daemon: Daemon, keys: list[bytes]) -> None:
    client = Client(daemon.socket)
    space = opened(client, keys, "closed")
    client.close()
    client.close()
    eventually(lambda: daemon.held() == (0, 0, 0))
    with pytest.raises(DaemonUnavailable, match="closed"):
        space.reserve(keys)
    assert space.lookup(keys).reason is Reason.DAEMON_DOWN


def test_dropped_client_ends_its_session(daemon: Daemon, keys: list[bytes]) -> None:
    client = Client(daemon.socket)
    space = opened(client, keys, "dropped")
    assert daemon.held() == (0, 0, 1)
    del client, space
    eventually(lambda: daemon.held() == (0, 0, 0))
