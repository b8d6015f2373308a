"""Who may attach, and that a dead, stopped or misbehaving client costs nobody but itself."""

from __future__ import annotations

import mmap
import os
import resource
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from daemons import (
    FORMAT,
    Attached,
    Daemon,
    end,
    eventually,
    holds,
    keys_of,
    line_of,
    spawn,
    stored,
)

from kvtier.block import BlockFormat
from kvtier.client import Client
from kvtier.errors import PermissionDenied
from kvtier.tiers.arena import MappedArena
from kvtier.v1 import cache_pb2, session_pb2

Start = Callable[..., Daemon]
PAGES = BlockFormat(1, 1, 1, "float16", 16, opaque_bytes=4096)
# One arena for every five blocks of a page: so that a few blocks are hundreds of arenas.
MANY_ARENAS = {"size_bytes": 700 * 20 * 1024, "segment_bytes": 20 * 1024, "huge_pages": "off"}

HOLDER = """
import os, signal, sys
from daemons import FORMAT, keys_of, stored
from kvtier.client import Client
client = Client(sys.argv[1], deadline_s=5)
space = stored(client.open_namespace(model=sys.argv[2], format=FORMAT), keys_of("held", 4))
lease = space.lease(keys_of("held", 4))
reservation = space.reserve(keys_of("reserved", 4))
if sys.argv[3:] == ["fork"] and os.fork() == 0:
    signal.pause()
print(os.getpid(), flush=True)
sys.stdin.readline()
"""

# As a client that forks without our library's knowledge: its child keeps the session socket.
RAW_FORK = """
import os, signal, sys
from pathlib import Path
from daemons import Attached
attached = Attached(Path(sys.argv[1]))
child = os.fork()
if child == 0:
    signal.pause()
print(child, flush=True)
sys.stdin.readline()
"""


def test_welcome_brings_a_token_and_the_write_arena(daemon: Daemon) -> None:
    attached = daemon.attach(group="engine")
    welcome = attached.packet.welcome
    assert len(welcome.session_token) == 16
    assert (welcome.tenant, welcome.trust, welcome.protocol) == ("default", "isolated", 1)
    arena = MappedArena(attached.fds[0], welcome.write_arena.size_bytes, writable=True)
    assert arena.id == welcome.write_arena.arena_id
    arena.close()
    session = daemon.stat().sessions[0]
    assert (session.client_name, session.group, session.pid) == ("test", "engine", os.getpid())


def test_a_reader_gets_no_write_arena(daemon: Daemon) -> None:
    attached = daemon.attach(writes=False)
    assert not attached.packet.welcome.HasField("write_arena")
    assert attached.fds == []
    with Client(daemon.socket, writes=False) as client:
        space = client.open_namespace(model="reader", format=FORMAT)
        with pytest.raises(PermissionDenied, match="does not write"):
            space.reserve(keys_of("reader", 1))


def test_a_uid_not_configured_is_refused(start: Start) -> None:
    daemon = start(server={"allowed_uids": [os.getuid() + 1]})
    attached = daemon.attach()
    refusal = attached.packet.refusal
    assert refusal.reason == "PERMISSION_DENIED"
    assert f"uid {os.getuid()}" in refusal.message
    assert "server.allowed_uids" in refusal.message
    assert attached.ended()
    with Client(daemon.socket) as client:
        for _ in range(2):  # also when it does not try again yet
            with pytest.raises(PermissionDenied, match=r"server\.allowed_uids"):
                client.open_namespace(model="m", format=FORMAT)
        assert client.space(model="m", format=FORMAT).lookup(keys_of("m", 1)).block_count == 0


def test_the_mount_is_the_credential(start: Start) -> None:
    """A tenant with a socket of its own is known by it, and sees nothing of the others."""
    daemon = start(
        more='[[tenants]]\nname = "team-a"\nsocket = "FOLDER/a.sock"\n'
        f'[[tenants]]\nname = "team-b"\nuids = [{os.getuid()}]\n'
    )
    keys = keys_of("mount", 4)
    with (
        Client(daemon.folder / "a.sock", deadline_s=5) as a,
        Client(daemon.socket, deadline_s=5) as b,
    ):
        theirs = stored(a.open_namespace(model="m", format=FORMAT), keys)
        ours = b.open_namespace(model="m", format=FORMAT)
        assert (a.tenant, b.tenant) == ("team-a", "team-b")
        assert ours.namespace_id != theirs.namespace_id
        assert ours.lookup(keys).block_count == 0
        # Not by its number, and not by its lease either.
        link = b.linker.current()
        assert link is not None
        ours.state.opened = (link, theirs.namespace_id)
        with pytest.raises(PermissionDenied, match="another tenant"):
            ours.lease(keys)
        with theirs.lease(keys) as lease, pytest.raises(PermissionDenied):
            ours.join_lease(lease.lease_id)
        assert holds(theirs, keys)


@pytest.mark.parametrize("what", ["protocol", "memory_layout"])
def test_versions_that_do_not_meet(daemon: Daemon, what: str) -> None:
    attached = daemon.attach(**{f"{what}_min": 7, f"{what}_max": 9})
    refusal = attached.packet.refusal
    assert refusal.reason == "VERSION_MISMATCH"
    assert "7 to 9" in refusal.message
    assert attached.ended()
    assert daemon.attach(**{f"{what}_min": 0, f"{what}_max": 9}).token


@pytest.mark.parametrize("packet", [b"\xff" * 40, b"x" * 9000], ids=["malformed", "too long"])
def test_a_bad_packet_ends_that_session_only(daemon: Daemon, packet: bytes) -> None:
    good, bad = daemon.attach(), daemon.attach()
    bad.socket.send(packet)
    assert bad.ended()
    eventually(lambda: daemon.held()[2] == 1)
    assert daemon.open_namespace(good.token)


def test_a_first_packet_that_is_no_hello(daemon: Daemon) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.connect(str(daemon.session_socket))
        peer.send(b"\xff\xff\xff")
        refusal = session_pb2.SessionPacket.FromString(peer.recv(8192)).refusal
    assert refusal.reason == "INVALID_REQUEST"
    assert daemon.attach().token


def test_silence_is_no_hello(daemon: Daemon) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.connect(str(daemon.session_socket))
        peer.settimeout(8)
        began = time.monotonic()
        assert peer.recv(100) == b""
        assert 4 < time.monotonic() - began < 7


def test_sessions_have_a_limit(start: Start) -> None:
    daemon = start(server={"sessions_max": 2})
    first, _ = daemon.attach(), daemon.attach()
    refusal = daemon.attach().packet.refusal
    assert refusal.reason == "LIMIT_REACHED"
    assert "server.sessions_max" in refusal.message
    first.close()
    eventually(lambda: daemon.attach().token)


def test_a_killed_client_is_gone_within_a_second(daemon: Daemon) -> None:
    client = spawn(HOLDER, daemon.socket, "killed")
    line_of(client)
    assert daemon.held() == (1, 1, 1)
    client.kill()
    eventually(lambda: daemon.held() == (0, 0, 0), within_s=1)
    end(client)


def test_a_stopped_client_keeps_what_it_holds_and_nothing_else(daemon: Daemon) -> None:
    client = spawn(HOLDER, daemon.socket, "stopped")
    line_of(client)
    client.send_signal(signal.SIGSTOP)
    with Client(daemon.socket, deadline_s=5) as other:
        space = other.open_namespace(model="stopped", format=FORMAT)
        assert holds(space, keys_of("held", 4))
        space.store(keys_of("reserved", 4), lambda block: block.view.__setitem__(0, 1))
        assert daemon.held() == (1, 1, 2)
        assert space.evict(keys_of("reserved", 4)) == 4
    end(client)  # also a stopped process can be killed
    eventually(lambda: daemon.held() == (0, 0, 0), within_s=1)


@pytest.mark.parametrize("how", ["library", "raw"])
def test_a_forked_child_does_not_keep_the_session(daemon: Daemon, how: str) -> None:
    if how == "raw":
        client = spawn(RAW_FORK, daemon.session_socket)
        child = int(line_of(client))
        assert daemon.held() == (0, 0, 1)
    else:
        client = spawn(HOLDER, daemon.socket, "forked", "fork")
        line_of(client)
        tasks = Path(f"/proc/{client.pid}/task/{client.pid}/children")
        child = int(tasks.read_text().split()[0])
        assert daemon.held() == (1, 1, 1)
    client.kill()
    try:
        eventually(lambda: daemon.held() == (0, 0, 0), within_s=1)
        os.kill(child, 0)  # it lives
    finally:
        os.kill(child, signal.SIGKILL)
        end(client)


def leased(daemon: Daemon, attached: Attached, keys: list[bytes]) -> None:
    """Has the daemon tell a client of all arenas that these blocks lie in."""
    spec = cache_pb2.OpenNamespaceRequest(session_token=attached.token)
    spec.spec.model = "arenas"
    spec.spec.format.layers = spec.spec.format.kv_heads = spec.spec.format.head_dim = 1
    spec.spec.format.dtype, spec.spec.format.block_tokens = "float16", 16
    spec.spec.format.opaque_bytes = 4096
    cache = daemon.cache()
    number = cache.OpenNamespace(spec, timeout=5).namespace_id
    group = cache_pb2.GroupQuery(namespace_id=number, keys=b"".join(keys), key_bytes=32)
    lookup = cache_pb2.LookupRequest(session_token=attached.token, groups=[group], lease=True)
    assert cache.Lookup(lookup, timeout=5).leases[0].block_count == len(keys)


def test_hundreds_of_arenas(start: Start) -> None:
    """A slow client gets every one in order; one that reads nothing loses its session, alone."""
    daemon = start(dram=MANY_ARENAS, limits={"block_bytes_max": "32KiB"})
    keys = keys_of("arenas", 3000)
    with Client(daemon.socket, deadline_s=5) as client:
        stored(client.open_namespace(model="arenas", format=PAGES), keys)
    slow = daemon.attach(writes=False)
    leased(daemon, slow, keys[:2000])
    seen = set()
    for _ in range(400):
        arena = slow.receive().arena_added.arena
        seen.add(arena.arena_id)
        fd = slow.fds.pop()
        assert os.fstat(fd).st_size == arena.size_bytes
        with pytest.raises(PermissionError):
            mmap.mmap(fd, arena.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        os.close(fd)
    assert len(seen) == 400

    deaf, good = daemon.attach(writes=False), daemon.attach()
    assert daemon.held() == (1, 0, 3)
    leased(daemon, deaf, keys)
    daemon.wait_for_log("packets unread")
    eventually(lambda: daemon.held() == (1, 0, 2))
    assert daemon.open_namespace(good.token)


def test_an_arena_returned_that_was_never_sent(daemon: Daemon) -> None:
    attached = daemon.attach()
    packet = session_pb2.ClientPacket(arena_returned=session_pb2.ArenaReturned(arena_id=3))
    attached.socket.send(packet.SerializeToString())
    assert daemon.attach().token  # taken after it
    assert not attached.ended(within_s=0.05)
    assert daemon.open_namespace(attached.token)


def test_many_clients_die_at_once(start: Start) -> None:
    daemon = start(limits={"write_arena_bytes": "1MiB", "block_bytes_max": "1MiB"})
    clients = [Attached(daemon.session_socket) for _ in range(50)]
    assert daemon.held() == (0, 0, 50)
    descriptors = daemon.descriptors()
    for client in clients:
        client.close()
    eventually(lambda: daemon.held() == (0, 0, 0))
    # Socket, pidfd and write arena of each.
    eventually(lambda: daemon.descriptors() <= descriptors - 3 * 50)


def test_the_accept_loop_survives_a_lack_of_descriptors(start: Start) -> None:
    daemon = start()
    pid = daemon.process.pid
    daemon.stat()  # its descriptors exist before the limit
    old = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (daemon.descriptors(), old[1]))
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    peer.connect(str(daemon.session_socket))
    daemon.wait_for_log("session.accept_failed")
    resource.prlimit(pid, resource.RLIMIT_NOFILE, old)
    peer.close()
    assert daemon.attach().token
