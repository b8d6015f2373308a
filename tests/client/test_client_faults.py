"""The daemon away, hung, restarted, of another version; forked children; lost answers."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable

import pytest
from conftest import FORMAT, DaemonProcess
from fake_daemon import FakeDaemon

from kvtier.block import Reason
from kvtier.client import AsyncClient, Client, ReservedBlock, Space
from kvtier.errors import (
    DaemonUnavailable,
    DeadlineExceeded,
    KvTierError,
    LeaseLost,
    PermissionDenied,
    ReservationExpired,
    VersionMismatch,
)

Eventually = Callable[[Callable[[], object]], None]
SLACK_S = 0.4  # of a deadline, on a busy machine


def fill(block: ReservedBlock) -> None:
    block.view[:] = block.key[:1] * len(block.view)


def stored(client: Client, keys: list[bytes]) -> Space:
    space = client.open_namespace(model="m", format=FORMAT)
    space.store(keys, fill)
    return space


def timed_lookup(space: Space, keys: list[bytes], deadline_s: float) -> tuple[Reason, float]:
    began_s = time.monotonic()
    found = space.lookup(keys, deadline_s=deadline_s)
    assert found.block_count == 0
    return found.reason, time.monotonic() - began_s


def test_nobody_there(socket_path, keys: list[bytes]) -> None:  # type: ignore[no-untyped-def]
    with Client(socket_path) as client:
        space = client.space(model="m", format=FORMAT)
        for _ in range(3):
            reason, took_s = timed_lookup(space, keys, 0.05)
            assert reason is Reason.DAEMON_DOWN
            assert took_s < 0.05 + SLACK_S
        with pytest.raises(DaemonUnavailable, match="kvtier serve"):
            space.reserve(keys)
        with pytest.raises(DaemonUnavailable):
            client.open_namespace(model="m", format=FORMAT)


def test_killed_and_restarted(
    daemon_process: DaemonProcess, keys: list[bytes], eventually: Eventually
) -> None:
    with Client(daemon_process.path) as client:
        space = stored(client, keys)
        lease = space.lease(keys)
        view = lease.view(0)
        reservation = space.reserve([b"x" * 32])

        daemon_process.kill()
        reason, took_s = timed_lookup(space, keys, 0.05)
        assert reason is Reason.DAEMON_DOWN
        assert took_s < 0.05 + SLACK_S
        with pytest.raises(LeaseLost, match="gone"):
            lease.check()
        assert view[0] == 1  # the memory is still ours to look at
        with pytest.raises(ReservationExpired, match="gone"):
            reservation.commit()
        with pytest.raises(DaemonUnavailable):
            space.lease(keys)

        daemon_process.start()
        eventually(lambda: space.lookup(keys, deadline_s=1).reason is Reason.NEVER_STORED)
        assert space.store(keys, fill).stored_count == 8
        assert space.lookup(keys, deadline_s=2).block_count == 8
        with pytest.raises(LeaseLost):
            lease.check()
        lease.release()


def test_leaving_a_lease_of_a_killed_daemon(
    daemon_process: DaemonProcess, keys: list[bytes]
) -> None:
    with Client(daemon_process.path) as client:
        space = stored(client, keys)
        with pytest.raises(LeaseLost), space.lease(keys):
            daemon_process.kill()


def test_restart_between_calls_is_not_noticed(
    daemon_process: DaemonProcess, keys: list[bytes]
) -> None:
    with Client(daemon_process.path) as client:
        space = stored(client, keys)
        time.sleep(0.3)
        daemon_process.kill()
        daemon_process.start()
        assert space.store(keys, fill).stored_count == 8


def test_stopped_daemon_is_a_miss_in_time(daemon_process: DaemonProcess, keys: list[bytes]) -> None:
    assert daemon_process.process is not None
    with Client(daemon_process.path) as client:
        space = stored(client, keys)
        daemon_process.process.send_signal(signal.SIGSTOP)
        try:
            for deadline_s in (0.02, 0.05, 0.1):
                reason, took_s = timed_lookup(space, keys, deadline_s)
                assert reason is Reason.DEADLINE
                assert deadline_s <= took_s + 0.005
                assert took_s < deadline_s + SLACK_S
            with pytest.raises(DeadlineExceeded):
                space.lease(keys, timeout_s=0.05)
            with Client(daemon_process.path) as other:  # accepts, but nobody answers Hello
                theirs = other.space(model="m", format=FORMAT)
                assert timed_lookup(theirs, keys, 0.05)[1] < 0.05 + SLACK_S
                assert timed_lookup(theirs, keys, 0.05)[1] < SLACK_S
        finally:
            daemon_process.process.send_signal(signal.SIGCONT)
        for _ in range(100):
            if space.lookup(keys, deadline_s=2).block_count == 8:
                break
            time.sleep(0.02)
        assert space.lookup(keys, deadline_s=2).block_count == 8


async def test_asyncio_killed_and_restarted(
    daemon_process: DaemonProcess, keys: list[bytes]
) -> None:
    async with AsyncClient(daemon_process.path) as client:
        space = await client.open_namespace(model="m", format=FORMAT)
        await space.store(keys, fill)
        lease = await space.lease(keys)
        daemon_process.kill()
        began_s = time.monotonic()
        assert (await space.lookup(keys)).reason is Reason.DAEMON_DOWN
        assert time.monotonic() - began_s < 0.05 + SLACK_S
        with pytest.raises(LeaseLost):
            lease.check()
        with pytest.raises(DaemonUnavailable):
            await space.reserve(keys)
        daemon_process.start()
        for _ in range(100):
            if (await space.lookup(keys, deadline_s=1)).reason is Reason.NEVER_STORED:
                break
            await asyncio.sleep(0.05)
        assert (await space.store(keys, fill)).stored_count == 8


@pytest.mark.parametrize("protocol", [2, 0])
def test_version_mismatch_is_misses_and_one_line(
    daemon: FakeDaemon, keys: list[bytes], caplog: pytest.LogCaptureFixture, protocol: int
) -> None:
    daemon.protocol = protocol
    with Client(daemon.path) as client, caplog.at_level(logging.WARNING, "kvtier.client"):
        space = client.space(model="m", format=FORMAT)
        for _ in range(3):
            assert space.lookup(keys, deadline_s=1).reason is Reason.DAEMON_DOWN
            time.sleep(0.3)
        with pytest.raises(VersionMismatch, match="protocol"):
            space.reserve(keys)
        assert daemon.handshakes > 1
    assert len(caplog.records) == 1


def test_refused(daemon: FakeDaemon, keys: list[bytes]) -> None:
    daemon.refusal = "PERMISSION_DENIED"
    with Client(daemon.path) as client:
        for _ in range(2):
            with pytest.raises(PermissionDenied, match="not you"):
                client.open_namespace(model="m", format=FORMAT)
        assert client.space(model="m", format=FORMAT).lookup(keys).block_count == 0


def test_forked_child(daemon: FakeDaemon, keys: list[bytes], eventually: Eventually) -> None:
    client = Client(daemon.path)
    space = stored(client, keys)
    lease = space.lease(keys)
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:  # pragma: no cover - another process
        said = b""
        try:
            space.lookup(keys)
        except KvTierError as error:
            said = str(error).encode()
        os.write(write_end, said + b"|%d" % client.linker.current().session._socket.fileno())  # type: ignore[union-attr]
        os.close(write_end)
        time.sleep(30)
        os._exit(0)
    os.close(write_end)
    try:
        with os.fdopen(read_end, "rb") as pipe:
            text, _, fd = pipe.read().decode().rpartition("|")
        assert "make a new Client in the child" in text
        assert fd == "-1"
        assert bytes(lease.view(0)[:1]) == b"\1"
        assert (
            space.lookup(keys, deadline_s=2).block_count == 8
        )  # the parent's session was not disturbed
        lease.release()
        client.close()
        eventually(lambda: not daemon.sessions)  # though the child lives
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_lost_answers_are_settled(
    daemon: FakeDaemon, keys: list[bytes], eventually: Eventually
) -> None:
    with Client(daemon.path) as client:
        space = stored(client, keys)
        daemon.delay_s = 0.3
        assert space.lookup(keys, lease=True).reason is Reason.DEADLINE
        eventually(lambda: not daemon.leases and daemon.requests[-1][0] == "Lookup")
        ids = [request_id for method, request_id in daemon.requests if request_id]
        assert len(ids) - len(set(ids)) == 1  # asked again by the same id
        daemon.delay_s = 0.3
        with pytest.raises(DeadlineExceeded):
            space.reserve([b"y" * 32], timeout_s=0.05)
        assert daemon.reservations
        eventually(lambda: not daemon.reservations)


async def test_cancelled_reserve_is_settled(daemon: FakeDaemon, keys: list[bytes]) -> None:
    async with AsyncClient(daemon.path) as client:
        space = await client.open_namespace(model="m", format=FORMAT)
        daemon.delay_s = 0.2
        task = asyncio.ensure_future(space.reserve(keys).__aenter__())
        await asyncio.sleep(0.1)
        assert daemon.reservations
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for _ in range(200):
            await asyncio.sleep(0.01)
            if not daemon.reservations:
                break
        assert not daemon.reservations


def test_closed_client(daemon: FakeDaemon, keys: list[bytes], eventually: Eventually) -> None:
    client = Client(daemon.path)
    space = stored(client, keys)
    client.close()
    client.close()
    eventually(lambda: not daemon.sessions)
    with pytest.raises(DaemonUnavailable, match="closed"):
        space.reserve(keys)
    assert space.lookup(keys).reason is Reason.DAEMON_DOWN


def test_dropped_client_ends_its_session(
    daemon: FakeDaemon, keys: list[bytes], eventually: Eventually
) -> None:
    client = Client(daemon.path)
    space = stored(client, keys)
    assert len(daemon.sessions) == 1
    del client, space
    eventually(lambda: not daemon.sessions)
