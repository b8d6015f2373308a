"""Start, stop, reload and the ways a daemon dies, each with a process of its own."""

from __future__ import annotations

import signal
import socket
import stat
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from daemons import FORMAT, Daemon, eventually, holds, keys_of, stored
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvtier.block import TierId, TierRun
from kvtier.client import Client, Space
from kvtier.errors import AlreadyRunning, DeviceUnavailable, InvalidRequest

Start = Callable[..., Daemon]
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
KEYS = keys_of("daemon", 8)
ODD = (str(Path(__file__).with_name("odd_daemon.py")),)


def health(daemon: Daemon, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(daemon.channel())
    return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5).status


def opened(client: Client, model: str = "m") -> Space:
    return client.open_namespace(model=model, format=FORMAT)


def test_modes_health_and_clean_stop(start: Start) -> None:
    daemon = start()
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode)
        for path in daemon.folder.iterdir()
        if path.suffix in (".sock", ".session") or path.name == "state"
    }
    assert modes == {
        "kvtier.sock": 0o660,
        "kvtier.sock.session": 0o660,
        "admin.sock": 0o600,
        "state": 0o700,
    }
    for service in ("", "kvtier.v1.CacheService", "kvtier.v1.AdminService"):
        assert health(daemon, service) == SERVING
    attached = daemon.attach()
    assert daemon.stop() == 0
    assert attached.ended()
    assert "daemon.stopped" in daemon.log
    left = {path.name for path in daemon.folder.iterdir()}
    assert left == {"state", "config.toml", "log"}


def test_a_clean_stop_keeps_everything(start: Start) -> None:
    """SIGTERM with a lease, a reservation and a watch open: 0, not serving, all of it on SSD."""
    daemon = start()
    statuses = health_pb2_grpc.HealthStub(daemon.channel()).Watch(health_pb2.HealthCheckRequest())
    assert next(statuses).status == SERVING
    with Client(daemon.socket, deadline_s=5) as client:
        space = stored(opened(client), KEYS)
        lease = space.lease(KEYS)
        reservation = space.reserve(keys_of("never committed", 2))
        events = space.watch(1)
        next(events)
        daemon.signal(signal.SIGTERM)
        assert next(statuses).status == NOT_SERVING
        statuses.cancel()
        assert daemon.process.wait(20) == 0
        events.close()  # type: ignore[attr-defined]
        assert not client.linked
        del lease, reservation
    daemon.start()
    assert daemon.stat().recovered_blocks == len(KEYS)
    with Client(daemon.socket, deadline_s=5) as client:
        space = opened(client)
        assert space.lookup(KEYS).runs == (TierRun(TierId.SSD, len(KEYS)),)
        assert holds(space, KEYS)
        assert space.lookup(keys_of("never committed", 2)).block_count == 0


def test_a_second_daemon_on_the_same_socket(start: Start) -> None:
    first = start()
    other = start(ready=False, server={"socket": str(first.socket)})
    assert other.process.wait(20) == AlreadyRunning.exit_status
    assert f"listens on {first.socket}" in other.log
    assert first.open_namespace(first.attach().token)


def test_a_start_after_a_kill(start: Start) -> None:
    daemon = start()
    with Client(daemon.socket, deadline_s=5) as client:
        stored(opened(client), KEYS, durable=True)
        daemon.kill()
        assert daemon.socket.exists()
        daemon.start()
        eventually(lambda: holds(opened(client), KEYS))


def test_a_second_sigterm_ends_it_at_once(start: Start) -> None:
    daemon = start(server={"grace_s": 60.0})
    # Somebody who watches its health keeps a stop from ending before half of the grace is over.
    statuses = health_pb2_grpc.HealthStub(daemon.channel()).Watch(health_pb2.HealthCheckRequest())
    assert next(statuses).status == SERVING
    daemon.signal(signal.SIGTERM)
    assert next(statuses).status == NOT_SERVING
    daemon.signal(signal.SIGTERM)
    assert daemon.process.wait(5) == 128 + signal.SIGTERM
    statuses.cancel()


def test_reload(start: Start) -> None:
    daemon = start()
    with Client(daemon.socket, deadline_s=5) as client:
        space = stored(opened(client), KEYS)
        daemon.configure(server={"socketz": 3})
        daemon.signal(signal.SIGHUP)
        daemon.wait_for_log("config.refused")
        assert "socketz" in daemon.log
        assert daemon.stat().state == "serving"
        assert holds(space, KEYS)

        daemon.configure(server={"bypass": True, "copy_threads": 7}, limits={"namespaces_max": 1})
        daemon.signal(signal.SIGHUP)
        daemon.wait_for_log("config.reloaded")
        assert "config.changed server.copy_threads: needs a restart" in daemon.log
        assert daemon.stat().state == "bypassed"
        assert space.lookup(KEYS).reason == "bypassed"

        daemon.configure(limits={"block_bytes_max": "8KiB", "namespaces_max": 5})
        daemon.signal(signal.SIGHUP)
        eventually(lambda: daemon.log.count("config.reloaded") == 2)
        with pytest.raises(InvalidRequest, match=r"limits\.block_bytes_max"):
            opened(client, "another")
        assert holds(space, KEYS)


@pytest.mark.parametrize("model", ["invariant", "die", "stray"])
def test_a_bug_in_the_books_stops_the_daemon(start: Start, model: str) -> None:
    daemon = start(command=ODD)
    token = daemon.attach().token
    if model == "stray":  # what is just a bug does not
        with pytest.raises(grpc.RpcError) as caught:
            daemon.open_namespace(token, "bug")
        assert caught.value.code() is grpc.StatusCode.INTERNAL  # type: ignore[attr-defined]
        assert "RuntimeError: a bug" in daemon.log
        assert token.hex() not in daemon.log
        assert daemon.open_namespace(token)
    with suppress(grpc.RpcError):  # it may end before it has answered
        daemon.open_namespace(token, model)
    assert daemon.process.wait(10) == 70
    assert "daemon.books <Store" in daemon.log
    assert "Traceback" in daemon.log
    assert ("task died" if model == "die" else "the books disagree") in daemon.log


def test_too_little_memory(start: Start) -> None:
    daemon = start(ready=False, dram={"size_bytes": "100TiB", "segment_bytes": "1TiB"})
    assert daemon.process.wait(20) == DeviceUnavailable.exit_status
    assert "make tiers.dram.size_bytes smaller" in daemon.log
    assert not daemon.socket.exists()


def test_the_service_manager_is_told(start: Start) -> None:
    daemon = start()
    assert daemon.stop() == 0
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(daemon.folder / "notify"))
        manager.settimeout(20)
        daemon.launch(NOTIFY_SOCKET=str(daemon.folder / "notify"))
        assert manager.recv(100) == b"READY=1"
        assert daemon.stop() == 0
        assert manager.recv(100) == b"STOPPING=1"


def test_metrics(start: Start) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    daemon = start(more=f"[metrics]\nport = {port}\n")
    with Client(daemon.socket, deadline_s=5) as client:
        stored(opened(client), KEYS).lookup(keys_of("a miss", 1))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    assert 'kvtier_tier_capacity_bytes{tier="dram"} 6.7108864e+07' in text
    assert 'kvtier_lookup_reasons_total{reason="never_stored"} 1.0' in text
    assert 'kvtier_sessions{tenant="default"} 1.0' in text
    assert 'kvtier_state{state="serving"} 1.0' in text


def test_a_drained_daemon_takes_no_stores_until_undrained(daemon: Daemon, client: Client) -> None:
    space = stored(opened(client, "drain"), KEYS)
    answer = daemon.admin.drain(5)
    assert (answer.flushed_blocks, answer.remaining_blocks) == (8, 0)
    assert daemon.stat().state == "draining"
    with pytest.raises(Exception, match="draining"):
        space.reserve(keys_of("drained", 1))
    assert holds(space, KEYS)
    daemon.admin.undrain()
    stored(space, keys_of("drained", 1))
    assert daemon.admin.flush().flushed_blocks == 1


def test_admin(daemon: Daemon, client: Client) -> None:
    keys = keys_of("admin", 250)
    space = stored(opened(client, "admin"), keys)
    admin, number = daemon.admin, space.namespace_id
    (entry,) = [e for e in admin.namespaces().namespaces if e.stat.namespace_id == number]
    assert (entry.spec.model, entry.fields["tenant"], entry.stat.block_tokens) == (
        "admin",
        "default",
        16,
    )
    assert (len(entry.digest), entry.stat.block_count) == (32, 250)

    page = admin.blocks(number)
    assert len(page.blocks) == 100
    listed, page_token = list(page.blocks), page.next_page_token
    while page_token:
        page = admin.blocks(number, page_token=page_token)
        listed += page.blocks
        page_token = page.next_page_token
    assert [block.key for block in listed] == keys
    assert [block.position for block in listed] == list(range(250))
    assert sorted(block.key for block in admin.all_blocks(number)) == sorted(keys)

    admin.bypass(on=True, namespace_id=number)
    assert space.lookup(keys).reason == "bypassed"
    admin.bypass(on=False, namespace_id=number)
    assert daemon.stat().pid == daemon.process.pid
    assert admin.pin(number, keys[:4]).block_count == 4
    assert admin.blocks(number, page_size=1).blocks[0].pin_count == 1
    assert admin.unpin(number, keys[:4]).block_count == 4
    assert admin.evict(number, keys[200:]).evicted_count == 50
    assert admin.evict(number).evicted_count == 200
    assert space.lookup(keys).block_count == 0
    for bad in (-1.0, 1e9):
        with pytest.raises(InvalidRequest, match="timeout_s"):
            admin.flush(bad)


def test_it_answers_while_its_ssd_tier_comes_back(start: Start) -> None:
    """Stopped in the middle of it: the next start has everything all the same."""
    keys = keys_of("many", 4000)
    daemon = start(ssd={"size_bytes": "1GiB"}, dram={"size_bytes": "256MiB"})
    with Client(daemon.socket, deadline_s=30) as client:
        stored(opened(client, "early"), keys)
        assert daemon.admin.flush(60).remaining_blocks == 0
    for harm in (daemon.stop, daemon.kill):
        harm()
        daemon.start(recovered=False)
        with Client(daemon.socket, deadline_s=30) as client:
            space = opened(client, "early")
            assert space.lookup(keys).block_count in range(len(keys) + 1)  # whatever is there yet
            stored(opened(client, f"new-{harm.__name__}"), KEYS, durable=True)
            eventually(lambda: daemon.tier_states() == ["serving", "serving"], 30)
            assert space.lookup(keys).block_count == len(keys)
            assert holds(space, keys[:50])
    assert daemon.stop() == 0
    daemon.start(recovered=False)
    assert daemon.stop() == 0
    daemon.start()
    with Client(daemon.socket, deadline_s=30) as client:
        assert opened(client, "early").lookup(keys).block_count == len(keys)
        assert holds(opened(client, "new-kill"), KEYS)
