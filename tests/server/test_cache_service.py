"""The engine's RPCs over a real socket: tokens, limits, errors with reasons, repeats, deadlines."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from daemons import Running, open_namespace, wait_until

from kvtier import errors, wire
from kvtier.block import Reason
from kvtier.v1 import cache_pb2, types_pb2

KEYS = bytes(range(256)) * 2  # 16 keys of 32 bytes


@pytest.fixture
def token(daemon: Running) -> bytes:
    return daemon.attach().token


@pytest.fixture
def space(daemon: Running, token: bytes) -> int:
    return open_namespace(daemon, token)


def group(space: int, keys: bytes = KEYS, key_bytes: int = 32) -> cache_pb2.GroupQuery:
    return cache_pb2.GroupQuery(namespace_id=space, keys=keys, key_bytes=key_bytes)


def error_of(call: Callable[..., Any], request: Any, timeout_s: float = 5) -> errors.KvTierError:
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=timeout_s)
    return wire.error_from(caught.value)


def test_lookup(daemon: Running, token: bytes, space: int) -> None:
    request = cache_pb2.LookupRequest(session_token=token, groups=[group(space)])
    answer = wire.decode_answer(daemon.cache().Lookup(request, timeout=5))
    assert (answer.groups[0].block_count, answer.token_count, answer.leases) == (16, 256, ())


@pytest.mark.parametrize("token", [b"", b"x" * 16, b"y" * 1000])
def test_a_token_of_nobody(daemon: Running, token: bytes) -> None:
    request = cache_pb2.LookupRequest(session_token=token, groups=[group(1)])
    assert type(error_of(daemon.cache().Lookup, request)) is errors.Unauthenticated


def test_a_token_ends_with_its_session(daemon: Running) -> None:
    attached = daemon.attach()
    open_namespace(daemon, attached.token)
    attached.socket.close()
    assert wait_until(lambda: daemon.ended_sessions() == 1)
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
    daemon: Running, token: bytes, groups: list[cache_pb2.GroupQuery]
) -> None:
    request = cache_pb2.LookupRequest(session_token=token, groups=groups, lease=True)
    assert type(error_of(daemon.cache().Lookup, request)) is errors.InvalidRequest
    assert daemon.stat().lookup_count == 0


def test_errors_carry_reason_and_retryable(daemon: Running, token: bytes, space: int) -> None:
    request = cache_pb2.ReserveRequest(
        session_token=token, namespace_id=space, keys=KEYS, key_bytes=32
    )
    full = error_of(daemon.cache().Reserve, request)
    assert type(full) is errors.TierFull
    assert str(full) == "everything is leased"
    commit = cache_pb2.CommitRequest(session_token=token, reservation_id=404)
    assert type(error_of(daemon.cache().Commit, commit)) is errors.ReservationExpired
    lookup = cache_pb2.LookupRequest(session_token=token, groups=[group(99)])
    assert type(error_of(daemon.cache().Lookup, lookup)) is errors.NotFound


def test_limits_of_other_fields(daemon: Running, token: bytes, space: int) -> None:
    cache = daemon.cache()
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
        (cache.OpenNamespace, cache_pb2.OpenNamespaceRequest()),
        (
            cache.OpenNamespace,
            cache_pb2.OpenNamespaceRequest(
                spec=types_pb2.NamespaceSpec(
                    model="m",
                    format=types_pb2.BlockFormat(
                        layers=1024,
                        kv_heads=4096,
                        head_dim=65_536,
                        dtype="float32",
                        block_tokens=65_536,
                    ),
                )
            ),
        ),
    ]
    for call, request in bad:
        request.session_token = token
        assert type(error_of(call, request)) is errors.InvalidRequest, request


def test_a_message_over_the_limit(start: Callable[..., Running]) -> None:
    daemon = start(rpc_message_bytes_max=65_536)
    token = daemon.attach().token
    request = cache_pb2.LookupRequest(session_token=token, groups=[group(1, b"k" * 70_000, 32)])
    with pytest.raises(grpc.RpcError) as caught:
        daemon.cache().Lookup(request, timeout=5)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert type(wire.error_from(caught.value)) is errors.LimitReached
    assert open_namespace(daemon, token)


def test_too_many_calls_at_once(start: Callable[..., Running]) -> None:
    daemon = start(rpc_concurrency_max=2)
    token = daemon.attach().token
    cache = daemon.cache()
    lease = cache_pb2.LeaseRequest(session_token=token, lease_id=1)
    waiting = [cache.Lease.future(lease, timeout=3) for _ in range(2)]
    time.sleep(0.3)
    assert type(error_of(cache.Release, cache_pb2.ReleaseRequest())) is errors.LimitReached
    for call in waiting:
        call.cancel()


def test_the_same_request_id_gets_the_same_answer(
    daemon: Running, token: bytes, space: int
) -> None:
    lookup = cache_pb2.LookupRequest(
        session_token=token, groups=[group(space)], lease=True, request_id="one"
    )
    first = daemon.cache().Lookup(lookup, timeout=5)
    assert daemon.cache().Lookup(lookup, timeout=5) == first
    assert daemon.stat().lookup_count == 1
    pin = cache_pb2.PinRequest(session_token=token, group=group(space), request_id="one")
    answers = {daemon.cache().Pin(pin, timeout=5).pinned_count for _ in range(3)}
    assert answers == {1}
    # Another session's ids are its own.
    lookup.session_token = daemon.attach().token
    assert daemon.cache().Lookup(lookup, timeout=5).leases[0].lease_id == 2


def test_a_repeat_waits_for_the_call_that_runs(daemon: Running, token: bytes) -> None:
    commit = cache_pb2.CommitRequest(session_token=token, reservation_id=1, request_id="c")
    cache = daemon.cache()
    calls = [cache.Commit.future(commit, timeout=5) for _ in range(4)]
    assert {call.result().stored_count for call in calls} == {1}
    assert daemon.stat().stored_blocks == 1


def test_a_commit_goes_on_when_its_caller_gave_up(daemon: Running, token: bytes) -> None:
    commit = cache_pb2.CommitRequest(session_token=token, reservation_id=1, request_id="c")
    failed = error_of(daemon.cache().Commit, commit, timeout_s=0.1)
    assert type(failed) is errors.DeadlineExceeded
    assert daemon.cache().Commit(commit, timeout=5).stored_count == 1
    assert daemon.stat().stored_blocks == 1


def test_a_lease_that_nobody_waits_for_is_given_up(daemon: Running, token: bytes) -> None:
    lease = cache_pb2.LeaseRequest(session_token=token, lease_id=1, request_id="l")
    call = daemon.cache().Lease.future(lease, timeout=1)
    time.sleep(0.2)
    call.cancel()
    time.sleep(1.2)
    assert daemon.stat().lease_count == 0


def test_waiting_ends_before_the_callers_deadline(daemon: Running, token: bytes) -> None:
    lease = cache_pb2.LeaseRequest(session_token=token, lease_id=1)
    answer = daemon.cache().Lease(lease, timeout=1)
    assert wire.decode_reason(answer.reason) is Reason.DEADLINE


def test_failures_are_not_remembered(daemon: Running, token: bytes) -> None:
    commit = cache_pb2.CommitRequest(session_token=token, reservation_id=404, request_id="c")
    assert type(error_of(daemon.cache().Commit, commit)) is errors.ReservationExpired
    commit.reservation_id = 1
    assert daemon.cache().Commit(commit, timeout=5).stored_count == 1


def test_old_request_ids_are_forgotten(start: Callable[..., Running]) -> None:
    daemon = start(more="[limits]\nrequest_ids_max = 2\n")
    token = daemon.attach().token
    space = open_namespace(daemon, token)
    cache = daemon.cache()
    pins = [
        cache.Pin(
            cache_pb2.PinRequest(session_token=token, group=group(space), request_id=request_id),
            timeout=5,
        ).pinned_count
        for request_id in ("a", "b", "a", "c", "a", "b")
    ]
    assert pins == [1, 2, 1, 3, 1, 4]


def test_reading_and_saving_can_be_off(daemon: Running, token: bytes, space: int) -> None:
    lookup = cache_pb2.LookupRequest(session_token=token, groups=[group(space)], skip_read=True)
    answer = wire.decode_answer(daemon.cache().Lookup(lookup, timeout=5))
    assert (answer.groups[0].block_count, answer.groups[0].reason) == (0, Reason.BYPASSED)
    reserve = cache_pb2.ReserveRequest(session_token=token, keys=KEYS, key_bytes=32, skip_save=True)
    grant = wire.decode_reserve(daemon.cache().Reserve(reserve, timeout=5))
    assert (grant.reservation_id, grant.granted, grant.covered_count) == (0, (), 16)
    assert daemon.stat().lookup_count == 0


def test_watch_ends_with_its_session(daemon: Running) -> None:
    attached = daemon.attach()
    space = open_namespace(daemon, attached.token)
    events = daemon.cache().Watch(
        cache_pb2.WatchRequest(session_token=attached.token, namespace_id=space), timeout=10
    )
    event = wire.decode_event(next(events), space)
    assert (event.revision, event.keys) == (1, b"k" * 32)
    threading.Timer(0.1, attached.socket.close).start()
    began = time.monotonic()
    with pytest.raises(grpc.RpcError):
        next(events)
    assert time.monotonic() - began < 2


def test_a_watch_of_nothing(daemon: Running, token: bytes) -> None:
    events = daemon.cache().Watch(
        cache_pb2.WatchRequest(session_token=token, namespace_id=9), timeout=5
    )
    with pytest.raises(grpc.RpcError) as caught:
        next(events)
    assert type(wire.error_from(caught.value)) is errors.NotFound


def test_a_bug_is_internal_and_logged(daemon: Running, token: bytes) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        open_namespace(daemon, token, "bug")
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "RuntimeError: a bug" in daemon.log
    assert token.hex() not in daemon.log
    assert open_namespace(daemon, token)


def test_the_daemon_away(daemon: Running, token: bytes) -> None:
    cache = daemon.cache()
    daemon.stop()
    request = cache_pb2.ReleaseRequest(session_token=token)
    assert type(error_of(cache.Release, request)) is errors.DaemonUnavailable
