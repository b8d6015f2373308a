"""The engine's RPCs over a real socket: tokens, limits, errors with reasons, repeats, deadlines."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from daemons import Daemon, error_of, eventually, keys_of

from kvtier import errors, wire
from kvtier.block import Reason
from kvtier.ledger.filling import RESERVE_KEYS_MAX
from kvtier.v1 import cache_pb2, types_pb2

Start = Callable[..., Daemon]
KEYS = b"".join(keys_of("cache service", 16))


@pytest.fixture
def token(daemon: Daemon) -> bytes:
    return daemon.attach().token


@pytest.fixture
def space(daemon: Daemon, token: bytes, request: pytest.FixtureRequest) -> int:
    """An empty namespace of this test."""
    return daemon.open_namespace(token, request.node.name)


@pytest.fixture
def delta(daemon: Daemon) -> Callable[[str], int]:
    """How much a count of Stat grew in this test."""
    before = daemon.stat()
    return lambda name: getattr(daemon.stat(), name) - getattr(before, name)


def group(space: int, keys: bytes = KEYS, key_bytes: int = 32) -> cache_pb2.GroupQuery:
    return cache_pb2.GroupQuery(namespace_id=space, keys=keys, key_bytes=key_bytes)


def asking(token: bytes, space: int, keys: bytes = KEYS, **more: Any) -> cache_pb2.ReserveRequest:
    """A request for room."""
    return cache_pb2.ReserveRequest(
        session_token=token, namespace_id=space, keys=keys, key_bytes=32, **more
    )


def reserved(daemon: Daemon, token: bytes, space: int, keys: bytes = KEYS, **more: Any) -> int:
    """The id of a new reservation."""
    request = asking(token, space, keys, **more)
    return int(daemon.cache().Reserve(request, timeout=5).reservation_id)


def all_reserved(daemon: Daemon, token: bytes, space: int) -> list[int]:
    """Reservations of all of the session's write arena: a further one waits."""
    keys = keys_of("the whole write arena", 1024)
    return [
        reserved(daemon, token, space, b"".join(keys[at : at + RESERVE_KEYS_MAX]))
        for at in range(0, len(keys), RESERVE_KEYS_MAX)
    ]


def put(daemon: Daemon, token: bytes, space: int) -> None:
    """Commits KEYS with whatever the write arena has."""
    request = cache_pb2.CommitRequest(
        session_token=token, reservation_id=reserved(daemon, token, space)
    )
    assert daemon.cache().Commit(request, timeout=5).stored_count == 16


def found(daemon: Daemon, token: bytes, space: int) -> int:
    request = cache_pb2.LookupRequest(session_token=token, groups=[group(space)])
    return wire.decode_answer(daemon.cache().Lookup(request, timeout=5)).groups[0].block_count


def test_lookup(daemon: Daemon, token: bytes, space: int) -> None:
    put(daemon, token, space)
    request = cache_pb2.LookupRequest(session_token=token, groups=[group(space)])
    answer = wire.decode_answer(daemon.cache().Lookup(request, timeout=5))
    assert (answer.groups[0].block_count, answer.token_count, answer.leases) == (16, 256, ())


@pytest.mark.parametrize("token", [b"", b"x" * 16, b"y" * 1000])
def test_a_token_of_nobody(daemon: Daemon, token: bytes) -> None:
    request = cache_pb2.LookupRequest(session_token=token, groups=[group(1)])
    assert type(error_of(daemon.cache().Lookup, request)) is errors.Unauthenticated


def test_a_token_ends_with_its_session(daemon: Daemon) -> None:
    attached = daemon.attach()
    space = daemon.open_namespace(attached.token)
    reserved(daemon, attached.token, space)
    attached.close()
    eventually(lambda: daemon.held() == (0, 0, 0), within_s=1)
    request = cache_pb2.ReleaseRequest(session_token=attached.token, lease_ids=[1])
    assert type(error_of(daemon.cache().Release, request)) is errors.Unauthenticated


@pytest.mark.parametrize(
    "groups",
    [
        [],
        [group(1)] * 17,
        [group(1, b"", 32)],
        [group(1, KEYS, 15)],
        [group(1, KEYS, 65)],
        [group(1, KEYS, 0)],
        [group(1, KEYS[:-1], 32)],
        [group(1, b"k" * 16 * 65_537, 16)],
    ],
    ids=["none", "many", "no keys", "short", "long", "zero", "left over", "too many keys"],
)
def test_bad_lookups_change_nothing(
    daemon: Daemon,
    token: bytes,
    delta: Callable[[str], int],
    groups: list[cache_pb2.GroupQuery],
) -> None:
    request = cache_pb2.LookupRequest(session_token=token, groups=groups, lease=True)
    assert type(error_of(daemon.cache().Lookup, request)) is errors.InvalidRequest
    assert delta("lookup_count") == 0


def test_errors_carry_their_reason(daemon: Daemon, token: bytes, space: int) -> None:
    all_reserved(daemon, token, space)
    request = asking(token, space)
    full = error_of(daemon.cache().Reserve, request, timeout_s=0.3)
    assert type(full) is errors.TierFull
    assert full.retryable
    commit = cache_pb2.CommitRequest(session_token=token, reservation_id=404)
    assert type(error_of(daemon.cache().Commit, commit)) is errors.ReservationExpired
    lookup = cache_pb2.LookupRequest(session_token=token, groups=[group(99_999)])
    assert type(error_of(daemon.cache().Lookup, lookup)) is errors.NotFound


def test_limits_of_other_fields(daemon: Daemon, token: bytes, space: int) -> None:
    cache = daemon.cache()
    huge = types_pb2.BlockFormat(
        layers=1024, kv_heads=4096, head_dim=65_536, dtype="float32", block_tokens=65_536
    )
    bad: list[tuple[Callable[..., Any], Any]] = [
        (cache.Lookup, cache_pb2.LookupRequest(groups=[group(space)], shard=64)),
        (
            cache.Lookup,
            cache_pb2.LookupRequest(groups=[group(space)], lease=True, request_id="i" * 65),
        ),
        (cache.Release, cache_pb2.ReleaseRequest(lease_ids=range(65_537))),
        (cache.Lease, cache_pb2.LeaseRequest()),
        (cache.Lease, cache_pb2.LeaseRequest(lease_id=1, group=group(space))),
        (cache.Reserve, cache_pb2.ReserveRequest(keys=KEYS, key_bytes=32, parent=b"p")),
        (cache.Commit, cache_pb2.CommitRequest(reservation_id=1, indexes=b"123")),
        (
            cache.Commit,
            cache_pb2.CommitRequest(
                present=cache_pb2.GroupQuery(namespace_id=1, keys=b"k" * 32, key_bytes=32)
            ),
        ),
        (cache.OpenNamespace, cache_pb2.OpenNamespaceRequest()),
        (
            cache.OpenNamespace,
            cache_pb2.OpenNamespaceRequest(spec=types_pb2.NamespaceSpec(model="m", format=huge)),
        ),
    ]
    for call, request in bad:
        request.session_token = token
        assert type(error_of(call, request)) is errors.InvalidRequest, request


def test_too_many_calls_at_once(start: Start) -> None:
    daemon = start(server={"rpc_concurrency_max": 2})
    token = daemon.attach().token
    space = daemon.open_namespace(token)
    all_reserved(daemon, token, space)
    cache = daemon.cache()
    wait = asking(token, space)
    waiting = [cache.Reserve.future(wait, timeout=20) for _ in range(2)]
    release = cache_pb2.ReleaseRequest(session_token=token)

    def refused() -> bool:
        try:
            cache.Release(release, timeout=5)
        except grpc.RpcError as error:
            return type(wire.error_from(error)) is errors.LimitReached
        return False

    eventually(refused)
    for call in waiting:
        call.cancel()
    eventually(lambda: not refused())


def test_the_same_request_id_gets_the_same_answer(
    daemon: Daemon, token: bytes, space: int, delta: Callable[[str], int]
) -> None:
    cache = daemon.cache()
    reserve = asking(token, space, request_id="one")
    grant = cache.Reserve(reserve, timeout=5)
    assert cache.Reserve(reserve, timeout=5) == grant
    assert daemon.held() == (0, 1, 1)
    commit = cache_pb2.CommitRequest(
        session_token=token, reservation_id=grant.reservation_id, request_id="one"
    )
    first = cache.Commit(commit, timeout=5)
    assert first.stored_count == 16
    assert cache.Commit(commit, timeout=5) == first
    assert delta("stored_blocks") == 16
    lookup = cache_pb2.LookupRequest(
        session_token=token, groups=[group(space)], lease=True, request_id="one"
    )
    leased = cache.Lookup(lookup, timeout=5)
    assert cache.Lookup(lookup, timeout=5) == leased
    assert delta("lookup_count") == 1
    assert daemon.held() == (1, 0, 1)
    pin = cache_pb2.PinRequest(session_token=token, group=group(space), request_id="one")
    assert {cache.Pin(pin, timeout=5).pinned_count for _ in range(3)} == {16}
    assert daemon.admin.blocks(space).blocks[0].pin_count == 1
    # Another session's ids are its own.
    lookup.session_token = daemon.attach().token
    other = cache.Lookup(lookup, timeout=5)
    assert other.leases[0].lease_id != leased.leases[0].lease_id
    assert daemon.held() == (2, 0, 2)


def test_a_repeat_waits_for_the_call_that_runs(
    daemon: Daemon, token: bytes, space: int, delta: Callable[[str], int]
) -> None:
    commit = cache_pb2.CommitRequest(
        session_token=token,
        reservation_id=reserved(daemon, token, space),
        request_id="c",
        durable=True,
    )
    cache = daemon.cache()
    calls = [cache.Commit.future(commit, timeout=10) for _ in range(4)]
    assert {call.result().stored_count for call in calls} == {16}
    assert delta("stored_blocks") == 16


def test_a_commit_goes_on_when_its_caller_gave_up(
    daemon: Daemon, token: bytes, space: int, delta: Callable[[str], int]
) -> None:
    commit = cache_pb2.CommitRequest(
        session_token=token,
        reservation_id=reserved(daemon, token, space),
        request_id="c",
        durable=True,
    )
    call = daemon.cache().Commit.future(commit, timeout=10)
    eventually(lambda: delta("stored_blocks") == 16)  # begun, if not done
    call.cancel()
    assert daemon.cache().Commit(commit, timeout=10).stored_count == 16
    assert delta("stored_blocks") == 16
    assert found(daemon, token, space) == 16


def test_a_reserve_that_nobody_waits_for_is_given_up(
    daemon: Daemon, token: bytes, space: int
) -> None:
    """It waits for room; its caller goes; then there is room: nobody is given it."""
    whole = all_reserved(daemon, token, space)
    request = asking(token, space, request_id="r")
    cache = daemon.cache()
    call = cache.Reserve.future(request, timeout=20)
    cache.Release(cache_pb2.ReleaseRequest(session_token=token), timeout=5)  # later on one channel
    call.cancel()
    cache.Release(cache_pb2.ReleaseRequest(session_token=token), timeout=5)
    for part in whole:
        cache.Abort(cache_pb2.AbortRequest(session_token=token, reservation_id=part), timeout=5)
    assert daemon.held() == (0, 0, 1)
    assert reserved(daemon, token, space, request_id="r")


def test_waiting_ends_before_the_callers_deadline(daemon: Daemon, token: bytes, space: int) -> None:
    all_reserved(daemon, token, space)
    request = asking(token, space)
    began_s = time.monotonic()
    full = error_of(daemon.cache().Reserve, request, timeout_s=1)
    assert type(full) is errors.TierFull  # it says why, and not only that it was late
    assert 0.9 < time.monotonic() - began_s < 1


def test_failures_are_not_remembered(daemon: Daemon, token: bytes, space: int) -> None:
    commit = cache_pb2.CommitRequest(session_token=token, reservation_id=404, request_id="c")
    assert type(error_of(daemon.cache().Commit, commit)) is errors.ReservationExpired
    commit.reservation_id = reserved(daemon, token, space)
    assert daemon.cache().Commit(commit, timeout=5).stored_count == 16


def test_old_request_ids_are_forgotten(start: Start) -> None:
    daemon = start(limits={"request_ids_max": 2})
    token = daemon.attach().token
    space = daemon.open_namespace(token)
    put(daemon, token, space)
    cache = daemon.cache()
    pins = []
    for request_id in ("a", "b", "a", "c", "a", "b"):
        pin = cache_pb2.PinRequest(session_token=token, group=group(space), request_id=request_id)
        cache.Pin(pin, timeout=5)
        pins.append(daemon.admin.blocks(space).blocks[0].pin_count)
    assert pins == [1, 2, 2, 3, 3, 4]


def test_reading_and_saving_can_be_off(
    daemon: Daemon, token: bytes, space: int, delta: Callable[[str], int]
) -> None:
    lookup = cache_pb2.LookupRequest(session_token=token, groups=[group(space)], skip_read=True)
    answer = wire.decode_answer(daemon.cache().Lookup(lookup, timeout=5))
    assert (answer.groups[0].block_count, answer.groups[0].reason) == (0, Reason.BYPASSED)
    reserve = cache_pb2.ReserveRequest(session_token=token, keys=KEYS, key_bytes=32, skip_save=True)
    grant = wire.decode_reserve(daemon.cache().Reserve(reserve, timeout=5))
    assert (grant.reservation_id, grant.granted, grant.covered_count) == (0, (), 16)
    assert delta("lookup_count") == 0


def test_watch_ends_with_its_session(daemon: Daemon) -> None:
    attached = daemon.attach()
    space = daemon.open_namespace(attached.token, "watched")
    revision = daemon.stat().events_revision
    put(daemon, attached.token, space)
    events = daemon.cache().Watch(
        cache_pb2.WatchRequest(
            session_token=attached.token, namespace_id=space, from_revision=revision + 1
        ),
        timeout=10,
    )
    event = wire.decode_event(next(events), space)
    assert (event.revision, event.keys) == (revision + 1, KEYS)
    threading.Timer(0.1, attached.socket.close).start()
    began = time.monotonic()
    with pytest.raises(grpc.RpcError):
        next(events)
    assert time.monotonic() - began < 2


def test_a_watch_of_nothing(daemon: Daemon, token: bytes) -> None:
    events = daemon.cache().Watch(
        cache_pb2.WatchRequest(session_token=token, namespace_id=99_999), timeout=5
    )
    with pytest.raises(grpc.RpcError) as caught:
        next(events)
    assert type(wire.error_from(caught.value)) is errors.NotFound
