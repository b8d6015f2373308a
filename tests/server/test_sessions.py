"""Who may attach, and that a dead, stopped or misbehaving client costs nobody but itself."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from daemons import HERE, Attached, Running, open_namespace, wait_until

from kvtier.tiers.arena import MappedArena
from kvtier.v1 import session_pb2

Start = Callable[..., Running]

CLIENT = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from daemons import Attached
attached = Attached(Path(sys.argv[2]))
if sys.argv[3] == "fork" and os.fork() == 0:
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(60)
os.write(1, attached.token.hex().encode() + b"\\n")
time.sleep(60)
"""


def spawn_client(daemon: Running, how: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, str(HERE), str(daemon.session_socket), how],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(HERE.parent.parent)},
    )


def line_of(client: subprocess.Popen[str]) -> str:
    assert client.stdout is not None
    return client.stdout.readline().strip()


def end(client: subprocess.Popen[str]) -> None:
    client.kill()
    client.wait()
    assert client.stdout is not None
    client.stdout.close()


def test_welcome_brings_a_token_and_the_write_arena(daemon: Running) -> None:
    attached = daemon.attach(group="engine")
    welcome = attached.packet.welcome
    assert len(welcome.session_token) == 16
    assert (welcome.tenant, welcome.trust, welcome.protocol) == ("default", "isolated", 1)
    arena = MappedArena(attached.fds[0], welcome.write_arena.size_bytes, writable=True)
    assert arena.id == welcome.write_arena.arena_id
    arena.close()
    session = daemon.stat().sessions[0]
    assert (session.client_name, session.group, session.pid) == ("test", "engine", os.getpid())


def test_a_reader_gets_no_write_arena(daemon: Running) -> None:
    attached = daemon.attach(writes=False)
    assert not attached.packet.welcome.HasField("write_arena")
    assert attached.fds == []


def test_a_uid_not_configured_is_refused(start: Start) -> None:
    daemon = start(allowed_uids=[os.getuid() + 1])
    attached = daemon.attach()
    refusal = attached.packet.refusal
    assert refusal.reason == "PERMISSION_DENIED"
    assert f"uid {os.getuid()}" in refusal.message
    assert "server.allowed_uids" in refusal.message
    assert attached.ended()


def test_the_mount_is_the_credential(start: Start, tmp_path: Path) -> None:
    own = tmp_path / "a b%c.sock"
    more = f"[[tenants]]\nname = 'team-a'\nsocket = '{own}'\n"
    more += f"[[tenants]]\nname = 'team-b'\nuids = [{os.getuid()}]\n"
    daemon = start(more=more)
    assert daemon.attach(Path(f"{own}.session")).packet.welcome.tenant == "team-a"
    assert daemon.attach().packet.welcome.tenant == "team-b"


@pytest.mark.parametrize("what", ["protocol", "memory_layout"])
def test_versions_that_do_not_meet(daemon: Running, what: str) -> None:
    attached = daemon.attach(**{f"{what}_min": 7, f"{what}_max": 9})
    refusal = attached.packet.refusal
    assert refusal.reason == "VERSION_MISMATCH"
    assert "7 to 9" in refusal.message
    assert attached.ended()
    assert daemon.attach(**{f"{what}_min": 0, f"{what}_max": 9}).token


@pytest.mark.parametrize("packet", [b"\xff" * 40, b"x" * 9000])
def test_a_bad_packet_ends_that_session_only(daemon: Running, packet: bytes) -> None:
    good, bad = daemon.attach(), daemon.attach()
    bad.socket.send(packet)
    assert bad.ended()
    assert wait_until(lambda: daemon.ended_sessions() == 1)
    assert open_namespace(daemon, good.token)


def test_a_first_packet_that_is_no_hello(daemon: Running) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.connect(str(daemon.session_socket))
        peer.send(b"\xff\xff\xff")
        refusal = session_pb2.SessionPacket.FromString(peer.recv(8192)).refusal
    assert refusal.reason == "INVALID_REQUEST"
    assert daemon.attach().token


def test_silence_is_no_hello(daemon: Running) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.connect(str(daemon.session_socket))
        peer.settimeout(8)
        began = time.monotonic()
        assert peer.recv(100) == b""
        assert 4 < time.monotonic() - began < 7


def test_sessions_have_a_limit(start: Start) -> None:
    daemon = start(sessions_max=2)
    first, _ = daemon.attach(), daemon.attach()
    refusal = daemon.attach().packet.refusal
    assert refusal.reason == "LIMIT_REACHED"
    assert "server.sessions_max" in refusal.message
    first.socket.close()
    assert wait_until(lambda: bool(daemon.attach().token))


def test_a_killed_client_is_gone_within_a_second(daemon: Running) -> None:
    client = spawn_client(daemon)
    assert line_of(client)
    client.kill()
    began = time.monotonic()
    assert wait_until(lambda: daemon.ended_sessions() == 1)
    assert time.monotonic() - began < 1
    end(client)


def test_a_forked_child_does_not_keep_the_session(daemon: Running) -> None:
    client = spawn_client(daemon, "fork")
    lines = {line_of(client), line_of(client)}
    child = int(min(lines, key=len))
    client.kill()
    try:
        assert wait_until(lambda: daemon.ended_sessions() == 1)
        os.kill(child, 0)  # it lives, and holds the socket
    finally:
        os.kill(child, signal.SIGKILL)
        end(client)


def test_a_stopped_client_that_reads_nothing(daemon: Running) -> None:
    client, good = spawn_client(daemon), daemon.attach()
    token = bytes.fromhex(line_of(client))
    client.send_signal(signal.SIGSTOP)
    open_namespace(daemon, token, "announce 200")
    assert daemon.ended_sessions() == 0
    open_namespace(daemon, token, "announce 2000")
    assert wait_until(lambda: daemon.ended_sessions() == 1)
    assert "packets unread" in daemon.log
    assert open_namespace(daemon, good.token)
    end(client)


def test_a_slow_client_gets_every_arena_in_order(daemon: Running) -> None:
    attached = daemon.attach(writes=False)
    open_namespace(daemon, attached.token, "announce 400")
    for _ in range(400):
        arena = attached.receive().arena_added.arena
        fd = attached.fds.pop()
        assert os.fstat(fd).st_size == arena.size_bytes
        with pytest.raises(PermissionError):
            mmap.mmap(fd, arena.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        os.close(fd)


def test_an_arena_returned_reaches_the_store(daemon: Running) -> None:
    attached = daemon.attach()
    packet = session_pb2.ClientPacket(arena_returned=session_pb2.ArenaReturned(arena_id=3))
    attached.socket.send(packet.SerializeToString())
    assert not attached.ended(within_s=0.2)


def test_many_clients_die_at_once(start: Start) -> None:
    daemon = start(sessions_max=64)
    clients = [Attached(daemon.session_socket) for _ in range(50)]
    assert len(daemon.stat().sessions) == 50
    descriptors = len(list(Path(f"/proc/{daemon.process.pid}/fd").iterdir()))
    for client in clients:
        client.close()
    assert wait_until(lambda: daemon.ended_sessions() == 50)
    left = len(list(Path(f"/proc/{daemon.process.pid}/fd").iterdir()))
    assert left <= descriptors - 3 * 50  # socket, pidfd, write arena


def test_the_accept_loop_survives_a_lack_of_descriptors(daemon: Running) -> None:
    pid = daemon.process.pid
    daemon.stat()  # its descriptors exist before the limit
    import resource

    used = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    old = resource.prlimit(pid, resource.RLIMIT_NOFILE, (used, 4096))
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    peer.connect(str(daemon.session_socket))
    daemon.wait_for_log("session.accept_failed")
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(old[0], 4096), 4096))
    peer.close()
    assert daemon.attach().token
