"""Bad input, each item of the list in the order it was written down, through client and daemon.

Every one: a clear error that says what to do, nothing changed, nothing lost.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from daemons import (
    FORMAT,
    LARGE,
    SMALL_DRAM,
    Daemon,
    content,
    end,
    error_of,
    eventually,
    fill,
    holds,
    keys_of,
    line_of,
    spawn,
    stored,
    tell,
)

from kvtier.block import BlockFormat, CommitResult, Reason
from kvtier.client import Client, Space
from kvtier.errors import (
    AlreadyRunning,
    ConfigError,
    InvalidRequest,
    KvTierError,
    LimitReached,
    NotFound,
    PermissionDenied,
    ReservationExpired,
    TierFull,
    Unauthenticated,
)
from kvtier.v1 import cache_pb2

Start = Callable[..., Daemon]
KEPT = keys_of("kept", 6)


class Raw:
    """The stub and token of a client's session: for what the library refuses to send."""

    def __init__(self, client: Client) -> None:
        link = client.linker.current()
        assert link is not None
        self.stub, self.token = link.stub, link.session.token

    def refuses(self, method: str, kind: type[KvTierError], *words: str, **request: Any) -> None:
        """The call fails with this error, whose gRPC code fits, and whose message has the words."""
        message = getattr(cache_pb2, f"{method}Request")(
            **({"session_token": self.token} | request)
        )
        error = error_of(getattr(self.stub, method), message)
        assert type(error) is kind, repr(error)
        for word in words:
            assert word in str(error)


@pytest.fixture
def space(client: Client, request: pytest.FixtureRequest) -> Space:
    """A namespace of this test that keeps six blocks, which must survive it."""
    return stored(client.open_namespace(model=request.node.name, format=FORMAT), KEPT)


@pytest.fixture
def raw(client: Client, space: Space) -> Raw:
    return Raw(client)


def books(daemon: Daemon) -> tuple[object, ...]:
    """All that a refused call must leave as it was."""
    stat = daemon.stat()
    blocks = tuple((use.namespace_id, use.epoch, use.block_count) for use in stat.namespaces)
    used = tuple((tier.block_count, tier.used_bytes) for tier in stat.tiers)
    held = (stat.lease_count, stat.reservation_count)
    return stat.stored_blocks, stat.evicted_blocks, stat.corrupt_count, sorted(blocks), used, held


@contextmanager
def unharmed(daemon: Daemon, space: Space) -> Iterator[None]:
    """Nothing changed and nothing was lost."""
    before = books(daemon)
    yield
    assert books(daemon) == before
    assert holds(space, KEPT)
    check = daemon.admin.check()
    assert check.ok, check.problems


def group(space: Space, keys: bytes, key_bytes: int = 32) -> cache_pb2.GroupQuery:
    return cache_pb2.GroupQuery(namespace_id=space.namespace_id, keys=keys, key_bytes=key_bytes)


def chain_calls(raw: Raw, space: Space, kind: type[KvTierError], *words: str, **keys: Any) -> None:
    """Every verb that takes a chain refuses this one."""
    query = group(space, **keys)
    raw.refuses("Lookup", kind, *words, groups=[query], lease=True)
    for method in ("Lease", "Prefetch", "Evict", "Pin", "Unpin"):
        raw.refuses(method, kind, *words, group=query)
    raw.refuses(
        "Reserve", kind, *words, namespace_id=query.namespace_id,
        keys=query.keys, key_bytes=query.key_bytes,
    )  # fmt: skip


# --- what a call says


def test_unknown_namespace(daemon: Daemon, space: Space, raw: Raw) -> None:
    class Nowhere:
        namespace_id = 99_999

    with unharmed(daemon, space):
        chain_calls(raw, Nowhere, NotFound, "namespace 99999", keys=KEPT[0])  # type: ignore[arg-type]
        raw.refuses("ClearNamespace", NotFound, "namespace 99999", namespace_id=99_999)


@pytest.mark.parametrize(("size", "length"), [(15, 15), (65, 65), (32, 33), (0, 32), (16, 16)])
def test_wrong_key_length(daemon: Daemon, space: Space, raw: Raw, size: int, length: int) -> None:
    """Impossible ones, bytes left over, and (16) not the length of this namespace's keys."""
    if size == 16:
        with unharmed(daemon, space):
            raw.refuses(
                "Reserve", InvalidRequest, "32", namespace_id=space.namespace_id,
                keys=b"k" * 16, key_bytes=16,
            )  # fmt: skip
        return
    with unharmed(daemon, space):
        chain_calls(raw, space, InvalidRequest, keys=b"k" * length, key_bytes=size)
    with pytest.raises(InvalidRequest, match="16"), unharmed(daemon, space):
        space.lookup([b"k" * 8])


@pytest.mark.parametrize("count", [0, 65_537])
def test_0_or_too_many_keys(daemon: Daemon, space: Space, raw: Raw, count: int) -> None:
    keys = b"".join(index.to_bytes(16) for index in range(count))
    with unharmed(daemon, space):
        words = "number of keys", str(count), "65536" if count else "at least 1"
        chain_calls(raw, space, InvalidRequest, *words[:2], keys=keys, key_bytes=16)
        split = [keys[at : at + 16] for at in range(0, len(keys), 16)]
        with pytest.raises(InvalidRequest, match=words[2]):
            space.reserve(split)


def test_duplicate_keys_in_one_call(daemon: Daemon, space: Space, raw: Raw) -> None:
    twice = KEPT[0] + b"n" * 32 + b"n" * 32
    with unharmed(daemon, space):
        raw.refuses(
            "Reserve", InvalidRequest, "same key", namespace_id=space.namespace_id,
            keys=twice, key_bytes=32,
        )  # fmt: skip
        with pytest.raises(InvalidRequest, match="twice"):
            space.reserve([b"n" * 32, b"n" * 32])


def test_a_key_committed_twice(daemon: Daemon, client: Client, space: Space, raw: Raw) -> None:
    keys = keys_of("twice", 2)
    with space.reserve(keys) as reservation:
        for block in reservation.blocks:
            fill(block)
        number = reservation.reservation_id
        assert reservation.commit(reservation.blocks[:1]) == CommitResult(1, 0, 0)
        with unharmed(daemon, space):  # the same block of one reservation
            raw.refuses(
                "Commit",
                ReservationExpired,
                "committed already",
                reservation_id=number,
                indexes=bytes(4),
            )
            bad = (1).to_bytes(4, "little") * 2
            raw.refuses("Commit", InvalidRequest, "distinct", reservation_id=number, indexes=bad)
        reservation.commit(reservation.blocks[1:])
    with unharmed(daemon, space):
        raw.refuses("Commit", ReservationExpired, "reserve again", reservation_id=number)
        assert space.store(keys, fill) == CommitResult(0, 0, 0)
    assert holds(space, keys)


def test_commit_after_expiry(start: Start) -> None:
    daemon = start(limits={"reservation_ttl_s": 0.05})
    with Client(daemon.socket, deadline_s=5) as client:
        space = client.open_namespace(model="m", format=FORMAT)
        reservation = space.reserve(keys_of("late", 2))
        eventually(lambda: daemon.held() == (0, 0, 1))
        before = books(daemon)
        with pytest.raises(ReservationExpired, match="reserve again"):
            reservation.commit()
        assert books(daemon) == before
        assert space.lookup(keys_of("late", 2)).reason is Reason.NEVER_STORED


def test_commit_of_half_the_shards(daemon: Daemon, client: Client, space: Space) -> None:
    keys = keys_of("shards", 3)
    shape = BlockFormat(2, 2, 64, "bfloat16", 16, shards=2)
    whole = client.open_namespace(model="half the shards", format=shape)
    with unharmed(daemon, space), whole.reserve(keys, shard=0):
        pass
    assert whole.store(keys, fill, shard=0) == CommitResult(0, 0, 3)
    found = whole.lookup(keys, lease=True)
    assert (found.block_count, found.lease) == (0, None)
    assert len(whole.lease(keys)) == 0
    assert whole.store(keys, fill, shard=1) == CommitResult(3, 0, 0)
    for shard in (0, 1):
        with whole.lease(keys, shard=shard) as lease:
            assert bytes(lease.view(2)) == content(keys[2], shape.shard_bytes)
    with pytest.raises(InvalidRequest, match="shard 2"):
        whole.reserve(keys_of("no such shard", 1), shard=2)


def test_a_token_of_another_session(daemon: Daemon, space: Space, raw: Raw) -> None:
    """A session cannot use what another one holds; a token that is nobody's is of no use."""
    with Client(daemon.socket, deadline_s=5) as other:
        theirs = other.open_namespace(model=space.spec.model, format=FORMAT)
        with theirs.reserve(keys_of("theirs", 2)) as reservation, theirs.lease(KEPT) as lease:
            number, lease_id = reservation.reservation_id, lease.lease_id
            before = books(daemon)
            raw.refuses("Commit", PermissionDenied, "another session", reservation_id=number)
            raw.refuses("Abort", PermissionDenied, "another session", reservation_id=number)
            raw.refuses("Lease", PermissionDenied, "not of its group", lease_id=lease_id)
            request = cache_pb2.ReleaseRequest(session_token=raw.token, lease_ids=[lease_id])
            assert raw.stub.Release(request, timeout=5).released == 0
            assert books(daemon) == before
            lease.check()
            for block in reservation.blocks:
                fill(block)
            assert reservation.commit().stored_count == 2
    with unharmed(daemon, space):
        raw.refuses("Release", Unauthenticated, "attach", session_token=b"n" * 16, lease_ids=[1])


def test_a_message_over_the_limit(start: Start) -> None:
    daemon = start(server={"rpc_message_bytes_max": 65_536})
    with Client(daemon.socket, deadline_s=5) as client:
        space = stored(client.open_namespace(model="m", format=FORMAT), KEPT)
        with unharmed(daemon, space):
            Raw(client).refuses(
                "Lookup", LimitReached, "65536", groups=[group(space, b"k" * 70_016)]
            )
            with pytest.raises(LimitReached):
                space.reserve(keys_of("many", 3000))
            assert space.lookup(keys_of("many", 3000)).block_count == 0  # a miss, as of any fault


def test_a_format_whose_size_overflows(daemon: Daemon, client: Client, space: Space) -> None:
    largest = {"layers": 1024, "kv_heads": 4096, "head_dim": 65_536, "block_tokens": 65_536}
    with pytest.raises(InvalidRequest, match="block size in bytes"):
        BlockFormat(dtype="float32", **largest)
    request = cache_pb2.OpenNamespaceRequest(session_token=Raw(client).token)
    request.spec.model = "overflow"
    for name, value in (largest | {"dtype": "float32"}).items():
        setattr(request.spec.format, name, value)
    with unharmed(daemon, space):
        error = error_of(Raw(client).stub.OpenNamespace, request)
        assert type(error) is InvalidRequest
        assert "block size in bytes" in str(error)
        over = BlockFormat(1, 1, 1, "float16", 16, opaque_bytes=8 << 20)  # 4 MiB are configured
        with pytest.raises(InvalidRequest, match=r"limits\.block_bytes_max"):
            client.open_namespace(model="overflow", format=over)


# --- what a client does


def test_a_client_that_writes_after_commit(daemon: Daemon, space: Space) -> None:
    numpy = pytest.importorskip("numpy")
    keys = keys_of("after commit", 2)
    reservation = space.reserve(keys)
    arrays = [numpy.frombuffer(block.view, numpy.uint8) for block in reservation.blocks]
    for block, array in zip(reservation.blocks, arrays, strict=True):
        array[:] = numpy.frombuffer(content(block.key), numpy.uint8)
    reservation.commit()
    for array in arrays:  # no longer a view of ours: the write arena is still mapped
        array[:] = 0xEE
    with unharmed(daemon, space):
        assert holds(space, keys)


WRITER = """
import sys
from daemons import FORMAT, fill, keys_of
from kvtier.client import Client
client = Client(sys.argv[1], deadline_s=5)
space = client.open_namespace(model=sys.argv[2], format=FORMAT)
reservation = space.reserve(keys_of("half written", 4))
for block in reservation.blocks[:2]:
    fill(block)
print("writing", flush=True)
if sys.argv[3] == "lease":
    lease = space.lease(keys_of("kept", 6))
    print("leased", flush=True)
sys.stdin.readline()
for block in reservation.blocks[2:]:
    fill(block)
print(reservation.commit().stored_count, flush=True)
"""


def test_a_client_killed_while_writing(daemon: Daemon, space: Space) -> None:
    with unharmed(daemon, space):
        writer = spawn(WRITER, daemon.socket, space.spec.model, "")
        assert line_of(writer) == "writing"
        assert daemon.held() == (0, 1, 2)
        writer.kill()
        eventually(lambda: daemon.held() == (0, 0, 1), within_s=1)
        end(writer)
        assert space.lookup(keys_of("half written", 4)).reason is Reason.NEVER_STORED


def test_a_client_stopped_while_writing(daemon: Daemon, space: Space) -> None:
    writer = spawn(WRITER, daemon.socket, space.spec.model, "")
    assert line_of(writer) == "writing"
    writer.send_signal(signal.SIGSTOP)
    with Client(daemon.socket, deadline_s=5) as other:  # everybody else goes on
        theirs = other.open_namespace(model=space.spec.model, format=FORMAT)
        assert theirs.lookup(keys_of("half written", 4)).block_count == 0
        stored(theirs, keys_of("half written", 1))
    writer.send_signal(signal.SIGCONT)
    tell(writer)
    assert line_of(writer) == "3"  # the one that was stored meanwhile is a success, too
    assert writer.wait(10) == 0
    end(writer)
    assert holds(space, keys_of("half written", 4))
    assert holds(space, KEPT)


FORKER = """
import os, sys
from daemons import FORMAT, fill, keys_of
from kvtier.client import Client
from kvtier.errors import KvTierError
client = Client(sys.argv[1], deadline_s=5)
space = client.open_namespace(model=sys.argv[2], format=FORMAT)
reservation = space.reserve(keys_of("fork", 4))
for block in reservation.blocks:
    fill(block)
ready, tell = os.pipe()
if os.fork() == 0:
    for verb in (lambda: space.reserve(keys_of("child", 1)), lambda: space.lease(keys_of("k", 1))):
        try:
            verb()
        except KvTierError as error:
            os.write(tell, str(error).encode() + b". ")
    try:
        reservation.commit()
    except KvTierError as error:
        os.write(tell, type(error).__name__.encode())
    os._exit(0)
os.close(tell)
os.wait()
print(os.read(ready, 4096).decode(), flush=True)
print(reservation.commit().stored_count, flush=True)
sys.stdin.readline()
"""


def test_a_forked_child_of_a_client(daemon: Daemon, space: Space) -> None:
    parent = spawn(FORKER, daemon.socket, space.spec.model)
    said = line_of(parent)
    assert said.count("make a new Client in the child") == 2
    assert said.endswith("ReservationExpired")
    assert line_of(parent) == "4"  # the parent's reservation was not touched by the child
    assert holds(space, keys_of("fork", 4))
    assert holds(space, KEPT)
    end(parent)


def test_two_clients_committing_the_same_key_at_once(daemon: Daemon, space: Space) -> None:
    keys = keys_of("at once", 4)
    with Client(daemon.socket, deadline_s=5) as other:
        theirs = other.open_namespace(model=space.spec.model, format=FORMAT)
        reservations = [space.reserve(keys), theirs.reserve(keys)]
        assert [len(reservation) for reservation in reservations] == [4, 4]
        for reservation in reservations:
            for block in reservation.blocks:
                fill(block)
        results: list[CommitResult] = []
        together = threading.Barrier(2)

        def commit(which: int) -> None:
            together.wait()
            results.append(reservations[which].commit())

        threads = [threading.Thread(target=commit, args=(which,)) for which in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(result.stored_count for result in results) == 4
        assert sum(result.duplicate_count for result in results) == 4
        assert holds(theirs, keys)
    assert holds(space, KEPT)


def test_a_child_committed_before_its_parent(daemon: Daemon, space: Space) -> None:
    keys = keys_of("family", 4)
    stored(space, keys[2:], parent=keys[1], position=2)
    assert space.lookup(keys).block_count == 0
    assert holds(space, keys[2:])  # a chain may start in the middle
    stored(space, keys[:2])
    assert holds(space, keys)
    assert holds(space, KEPT)


def test_a_gap(daemon: Daemon, space: Space) -> None:
    keys = keys_of("gap", 6)
    stored(space, keys[:2])
    stored(space, keys[3:], parent=keys[2], position=3)
    assert space.lookup(keys).block_count == 2
    assert holds(space, keys[3:])
    with space.reserve(keys) as reservation:
        assert [block.index for block in reservation.blocks] == [2]
        fill(reservation.blocks[0])
        reservation.commit()
    assert holds(space, keys)
    assert holds(space, KEPT)


def test_a_lease_that_outlives_its_client(daemon: Daemon, space: Space) -> None:
    """Of a process that is killed, within a second; of a client that is closed, with its views."""
    with unharmed(daemon, space):
        holder = spawn(WRITER, daemon.socket, space.spec.model, "lease")
        assert [line_of(holder), line_of(holder)] == ["writing", "leased"]
        assert daemon.held() == (1, 1, 2)
        holder.kill()
        eventually(lambda: daemon.held() == (0, 0, 1), within_s=1)
        end(holder)
        with Client(daemon.socket, deadline_s=5) as other:
            theirs = other.open_namespace(model=space.spec.model, format=FORMAT)
            view = theirs.lease(KEPT).view(5)
        assert daemon.held() == (1, 0, 2)
        assert bytes(view) == content(KEPT[5])
        del view
        eventually(lambda: daemon.held() == (0, 0, 1))


# --- no room


def test_dram_full_with_everything_leased(start: Start) -> None:
    daemon = start(dram=SMALL_DRAM, limits={"block_bytes_max": "1MiB"})
    keys = keys_of("full", 16)
    with Client(daemon.socket, deadline_s=5) as client:
        space = stored(client.open_namespace(model="m", format=LARGE), keys)
        lease = space.lease(keys)
        assert len(lease) == 16
        before = books(daemon)
        with pytest.raises(TierFull, match=r"1 leases.*release some.*tiers.dram.size_bytes"):
            space.reserve(keys_of("no room", 1), timeout_s=0.5)
        request = cache_pb2.ReserveRequest(
            session_token=Raw(client).token, namespace_id=space.namespace_id,
            keys=b"n" * 32, key_bytes=32,
        )  # fmt: skip
        full = error_of(Raw(client).stub.Reserve, request, timeout_s=0.5)
        assert (full.grpc_code, full.retryable) == ("RESOURCE_EXHAUSTED", True)
        assert books(daemon) == before
        lease.check()
        assert [bytes(view) for view in lease.views] == [content(k, 256 << 10) for k in keys]
        lease.release()
        stored(space, keys_of("room again", 4))
        assert holds(space, keys)  # what made room for them lies on SSD


def test_ssd_full(start: Start) -> None:
    """More than both tiers hold: the oldest go, in order; all that is found is right."""
    ssd = {"size_bytes": "8MiB", "segment_bytes": "2MiB"}
    daemon = start(dram=SMALL_DRAM, ssd=ssd, limits={"block_bytes_max": "1MiB"})
    with Client(daemon.socket, deadline_s=5) as client:
        space = client.open_namespace(model="m", format=LARGE)
        chains = [keys_of(f"chain {number}", 8) for number in range(12)]
        for chain in chains:
            stored(space, chain)
        stat = daemon.stat()
        assert (stat.stored_blocks, stat.corrupt_count) == (96, 0)
        assert stat.evicted_blocks > 0
        # 16 slots of DRAM, 28 of SSD: as much goes as room is wanted for, and no more.
        eventually(lambda: sum(use.block_count for use in daemon.stat().namespaces) >= 40)
        assert holds(space, chains[-1])
        for chain in chains:
            found = space.lookup(chain)
            assert holds(space, chain[: found.block_count] or chains[-1])
            assert found.reason in {Reason.NONE, Reason.EVICTED}
        pinned = chains[-1]
        assert space.pin(pinned) == 8
        for number in range(12):
            stored(space, keys_of(f"more {number}", 8))
        assert holds(space, pinned)
        assert space.unpin(pinned) == 8


# --- the daemon's own input


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"server": {"trsut": "isolated"}}, ("server.trsut", "trust")),
        ({"dram": {"high_water": 0.5, "low_water": 0.6}}, ("high_water", "low_water")),
        ({"dram": {"size_bytes": "1MiB", "segment_bytes": "2MiB"}}, ("segment_bytes", "size_byt")),
        ({"server": {"sessions_max": "many"}}, ("sessions_max",)),
        (
            {"limits": {"write_arena_bytes": "1MiB", "block_bytes_max": "2MiB"}},
            ("limits.write_arena_bytes", "limits.block_bytes_max"),
        ),
    ],
    ids=["unknown", "water", "segment", "type", "arena"],
)
def test_config_with_unknown_or_contradictory_keys(
    start: Start, sections: dict[str, Any], words: tuple[str, ...]
) -> None:
    daemon = start(ready=False, **sections)
    assert daemon.process.wait(20) == ConfigError.exit_status
    for word in words:
        assert word in daemon.log
    assert "Traceback" not in daemon.log
    assert not (daemon.folder / "state").exists()


def test_socket_path_too_long(start: Start) -> None:
    daemon = start(ready=False, server={"socket": "FOLDER/" + "x" * 100})
    assert daemon.process.wait(20) == ConfigError.exit_status
    assert "set a shorter path or server.runtime_dir" in daemon.log
    with pytest.raises(OSError, match="AF_UNIX path too long"), socket.socket(socket.AF_UNIX) as s:
        s.connect("/tmp/" + "x" * 110)
    with Client("/tmp/" + "x" * 110) as client:  # the client says so, and a lookup misses
        space = client.space(model="m", format=FORMAT)
        assert space.lookup(KEPT).reason is Reason.DAEMON_DOWN
        with pytest.raises(KvTierError, match="too long"):
            space.reserve(KEPT)


def test_two_daemons_on_one_directory(start: Start) -> None:
    first = start()
    with Client(first.socket, deadline_s=5) as client:
        space = stored(client.open_namespace(model="m", format=FORMAT), KEPT)
        with unharmed(first, space):
            second = start(
                ready=False,
                state={"dir": str(first.folder / "state")},
            )
            assert second.process.wait(20) == AlreadyRunning.exit_status
            assert f"pid {first.process.pid} uses" in second.log
            assert "set another state.dir" in second.log
            assert not second.socket.exists()
        assert client.linked
