"""Start, stop, reload and the ways a daemon dies, each with a process of its own."""

from __future__ import annotations

import signal
import socket
import stat
import urllib.request
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from daemons import Running, config_text, open_namespace, wait_until
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvtier.v1 import admin_pb2, cache_pb2

Start = Callable[..., Running]


def health(daemon: Running, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(daemon.channel())
    return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5).status


def test_modes_health_and_clean_stop(daemon: Running) -> None:
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
        assert health(daemon, service) == health_pb2.HealthCheckResponse.SERVING
    attached = daemon.attach()
    assert daemon.stop() == 0
    assert attached.ended()
    assert "daemon.stopped" in daemon.log
    left = {path.name for path in daemon.folder.iterdir()}
    assert left == {"state", "config.toml", "log"}


def test_a_watch_does_not_delay_the_stop(daemon: Running) -> None:
    token = daemon.attach().token
    space = open_namespace(daemon, token)
    request = cache_pb2.WatchRequest(session_token=token, namespace_id=space)
    next(daemon.cache().Watch(request))
    assert daemon.stop() == 0


def test_a_second_daemon_disturbs_nothing(start: Start) -> None:
    first = start()
    token = first.attach().token
    second = start(folder=first.folder, ready=False)
    assert second.process.wait(10) == 6
    assert f"pid {first.process.pid}" in second.log
    assert open_namespace(first, token)
    assert first.attach().token


def test_a_second_daemon_on_the_same_socket(start: Start, tmp_path: Path) -> None:
    first = start()
    other = start(ready=False, socket=str(first.socket))
    assert other.process.wait(10) == 6
    assert f"listens on {first.socket}" in other.log
    assert open_namespace(first, first.attach().token)


def test_a_start_after_a_kill(start: Start) -> None:
    first = start()
    first.process.kill()
    first.process.wait()
    assert first.socket.exists()
    second = start(folder=first.folder)
    assert wait_until(lambda: second.log.count("daemon.ready") == 2, 10)
    assert open_namespace(second, second.attach().token)


def test_a_second_sigterm_ends_it_at_once(start: Start) -> None:
    daemon = start("60")
    daemon.process.send_signal(signal.SIGTERM)
    daemon.wait_for_log("daemon.stopping")
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait(5) == 128 + signal.SIGTERM


def test_stopping_is_not_serving(start: Start) -> None:
    daemon = start("1")
    channel = daemon.channel()
    statuses = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
    assert next(statuses).status == health_pb2.HealthCheckResponse.SERVING
    daemon.process.send_signal(signal.SIGTERM)
    assert next(statuses).status == health_pb2.HealthCheckResponse.NOT_SERVING
    statuses.cancel()
    assert daemon.process.wait(10) == 0


def test_reload(daemon: Running) -> None:
    good = config_text(daemon.folder)
    daemon.config_path.write_text(good.replace("[server]", "[server]\nsocketz = 3"))
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_for_log("config.refused")
    assert "socketz" in daemon.log
    assert daemon.stat().state == "serving"

    changed = good.replace("[server]", "[server]\nbypass = true\ncopy_threads = 7")
    daemon.config_path.write_text(changed)
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_for_log("config.reloaded")
    assert "config.changed server.copy_threads: needs a restart" in daemon.log
    assert daemon.stat().state == "bypassed"
    assert daemon.stat().events_revision == 1  # the store was told, once


@pytest.mark.parametrize("model", ["invariant", "die", "stray"])
def test_a_bug_in_the_books_stops_the_daemon(daemon: Running, model: str) -> None:
    token = daemon.attach().token
    if model != "invariant":
        open_namespace(daemon, token, model)
    else:
        with pytest.raises(grpc.RpcError):
            open_namespace(daemon, token, model)
    assert daemon.process.wait(5) == 70
    assert "a dump of the books" in daemon.log
    assert "Traceback" in daemon.log
    assert ("task died" if model == "die" else "the books disagree") in daemon.log


def test_too_little_memory(start: Start) -> None:
    daemon = start(ready=False, more="[tiers.cxl]\n")
    assert daemon.process.wait(10) == 1  # the configuration is read before the daemon runs
    text = daemon.config_path.read_text().replace("[tiers.cxl]\n", "").replace("16MiB", "100TiB")
    daemon.config_path.write_text(text)
    again = Running(daemon.folder, text)
    assert again.process.wait(10) == 5
    assert "make tiers.dram.size_bytes smaller" in again.log


def test_ready_is_told_to_the_service_manager(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        daemon = start()
        assert manager.recv(100) == b"READY=1"
        daemon.stop()
        assert manager.recv(100) == b"STOPPING=1"


def test_metrics(start: Start) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    daemon = start(more=f"[metrics]\nport = {port}\n")
    daemon.attach()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    assert 'kvtier_tier_capacity_bytes{tier="dram"} 0.0' in text
    assert 'kvtier_lookup_reasons_total{reason="evicted"} 3.0' in text
    assert 'kvtier_sessions{tenant="default"} 1.0' in text
    assert 'kvtier_state{state="serving"} 1.0' in text


def test_admin(daemon: Running) -> None:
    token = daemon.attach().token
    space = open_namespace(daemon, token)
    admin = daemon.admin()
    entry = admin.ListNamespaces(admin_pb2.ListNamespacesRequest(), timeout=5).namespaces[0]
    assert (entry.spec.model, entry.fields["tenant"], entry.stat.block_tokens) == (
        "m",
        "default",
        16,
    )
    assert len(entry.digest) == 32

    keys, page_token = [], ""
    while True:
        page = admin.ListBlocks(
            admin_pb2.ListBlocksRequest(namespace_id=space, page_token=page_token), timeout=5
        )
        keys += [block.key for block in page.blocks]
        page_token = page.next_page_token
        if not page_token:
            break
    assert len(keys) == len(set(keys)) == 250

    assert admin.Flush(admin_pb2.FlushRequest(), timeout=5).flushed_blocks == 5
    assert admin.Drain(admin_pb2.DrainRequest(), timeout=5).flushed_blocks == 5
    assert daemon.stat().state == "draining"
    admin.Drain(admin_pb2.DrainRequest(undo=True), timeout=5)
    admin.Bypass(admin_pb2.BypassRequest(on=True), timeout=5)
    stat_answer = daemon.stat()
    assert (stat_answer.state, stat_answer.pid) == ("bypassed", daemon.process.pid)
    evict = admin_pb2.AdminEvictRequest(namespace_id=space)
    assert admin.AdminEvict(evict, timeout=5).evicted_count == 7
    evict = admin_pb2.AdminEvictRequest(namespace_id=space, keys=b"k" * 32, key_bytes=16)
    assert admin.AdminEvict(evict, timeout=5).evicted_count == 2
    pin = admin_pb2.AdminPinRequest(namespace_id=space, keys=b"k" * 32, key_bytes=16)
    assert admin.AdminPin(pin, timeout=5).block_count == 1
    assert admin.Check(admin_pb2.CheckRequest(), timeout=5).ok
    for bad in (admin_pb2.FlushRequest(timeout_s=-1), admin_pb2.FlushRequest(timeout_s=1e9)):
        with pytest.raises(grpc.RpcError) as caught:
            admin.Flush(bad, timeout=5)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
