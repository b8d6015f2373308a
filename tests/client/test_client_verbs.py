"""The verbs of both clients against a daemon in threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import FORMAT
from fake_daemon import FakeDaemon

from kvtier.block import CommitResult, EventKind, Keys, Reason, TierId, TierRun
from kvtier.client import AsyncClient, Client, Space
from kvtier.errors import InvalidRequest, NotFound, ReservationExpired, TierFull

Eventually = Callable[[Callable[[], object]], None]


def fill_from(payload: dict[bytes, bytes]) -> Callable[..., None]:
    def fill(block) -> None:  # type: ignore[no-untyped-def]
        block.view[:] = payload[block.key]

    return fill


def test_readme_shape(daemon: FakeDaemon, keys: list[bytes], payload: dict[bytes, bytes]) -> None:
    with Client(f"unix:{daemon.path}", deadline_s=2) as client:
        space = client.open_namespace(model="my-model", format=FORMAT)
        with space.reserve(keys, parent=None) as reservation:
            for block in reservation.blocks:
                block.view[:] = payload[block.key]
            reservation.commit()
        found = space.lookup(keys)
        with space.lease(keys[: found.block_count]) as lease:
            payloads = [bytes(view) for view in lease.views]

    assert payloads == [payload[key] for key in keys]
    assert (found.block_count, found.runs) == (8, (TierRun(TierId.DRAM, 8),))
    assert found.load_ms == 0.5
    assert not daemon.leases
    assert not daemon.reservations


async def test_readme_shape_async(
    daemon: FakeDaemon, keys: list[bytes], payload: dict[bytes, bytes]
) -> None:
    async with AsyncClient(daemon.path, deadline_s=2) as client:
        space = await client.open_namespace(model="my-model", format=FORMAT)
        async with space.reserve(keys, parent=None) as reservation:
            for block in reservation.blocks:
                block.view[:] = payload[block.key]
            await reservation.commit()
        found = await space.lookup(keys)
        async with space.lease(keys[: found.block_count]) as lease:
            payloads = [bytes(view) for view in lease.views]
        lease = await space.lease(keys[:2])
        assert len(lease) == 2
        await lease.release()
        assert await space.store(keys, fill_from(payload)) == CommitResult(0, 0, 0)
        assert await space.pin(keys) == await space.unpin(keys) == 8
        assert await space.prefetch(keys) == 0
        assert [e.revision async for e in space.watch(5)] == [5, 6, 7]
        assert await space.evict(keys[4:]) == 4
        assert await space.clear() == 4

    assert payloads == [payload[key] for key in keys]
    assert not daemon.leases


def test_present_keys_are_skipped(
    daemon: FakeDaemon, keys: list[bytes], payload: dict[bytes, bytes]
) -> None:
    with Client(daemon.path, deadline_s=2) as client:
        space = client.open_namespace(model="m", format=FORMAT)
        space.store(keys[:3], fill_from(payload))
        with space.reserve(keys) as reservation:
            assert [block.index for block in reservation.blocks] == [3, 4, 5, 6, 7]
            assert reservation.present_count == 3
        with space.reserve(keys[:3]) as nothing:
            assert nothing.blocks == ()
            assert nothing.commit() == CommitResult(0, 0, 0)
        with space.reserve(keys, skip_save=True) as off:
            assert off.blocks == ()
    assert not daemon.reservations


def test_store_goes_on_over_partial_grants(
    daemon: FakeDaemon, keys: list[bytes], payload: dict[bytes, bytes]
) -> None:
    daemon.room = 3
    with Client(daemon.path, deadline_s=2) as client:
        space = client.open_namespace(model="m", format=FORMAT)
        assert space.store(Keys.of(keys), fill_from(payload)) == CommitResult(8, 0, 0)
        assert space.lookup(keys).block_count == 8
        daemon.room = 0
        with pytest.raises(TierFull):
            space.store([b"x" * 32], fill_from(payload))


def test_store_aborts_what_fill_fails_at(daemon: FakeDaemon, keys: list[bytes]) -> None:
    with Client(daemon.path, deadline_s=2) as client:
        space = client.open_namespace(model="m", format=FORMAT)
        with pytest.raises(ZeroDivisionError):
            space.store(keys, lambda _: 1 // 0)
        wait_for_nothing_reserved(daemon)
        assert space.lookup(keys).reason is Reason.NEVER_STORED


def wait_for_nothing_reserved(daemon: FakeDaemon) -> None:
    import time

    until_s = time.monotonic() + 5
    while daemon.reservations and time.monotonic() < until_s:
        time.sleep(0.005)
    assert not daemon.reservations


def test_commit_of_a_part_then_of_the_rest(daemon: FakeDaemon, keys: list[bytes]) -> None:
    with Client(daemon.path, deadline_s=2) as client:
        space = client.open_namespace(model="m", format=FORMAT)
        with space.reserve(keys) as reservation:
            first = reservation.blocks[0].view
            assert reservation.commit(reservation.blocks[:2]).stored_count == 2
            assert space.lookup(keys).block_count == 2
            with pytest.raises(ValueError, match="released"):
                first[0]
            with space.reserve(keys[4:]) as other, pytest.raises(InvalidRequest):
                reservation.commit(other.blocks)
        assert not daemon.reservations
        with pytest.raises(ReservationExpired):
            reservation.commit()


def test_dropped_reservation_is_aborted(
    daemon: FakeDaemon, keys: list[bytes], eventually: Eventually
) -> None:
    with Client(daemon.path, deadline_s=2) as client:
        space = client.open_namespace(model="m", format=FORMAT)
        space.reserve(keys)
        eventually(lambda: not daemon.reservations)


def test_the_other_verbs(
    daemon: FakeDaemon, keys: list[bytes], payload: dict[bytes, bytes]
) -> None:
    with Client(daemon.path, deadline_s=2) as client:
        space = client.open_namespace(model="m", format=FORMAT)
        space.store(keys, fill_from(payload))
        daemon.below = set(keys[4:])
        assert space.prefetch(keys) == 4
        assert space.pin(keys) == space.unpin(keys) == 8
        events = list(space.watch(5))
        assert [(event.revision, event.kind) for event in events] == [
            (5, EventKind.STORED),
            (6, EventKind.STORED),
            (7, EventKind.STORED),
        ]
        assert space.evict(keys[6:]) == 2
        assert space.clear() == 6
        assert space.epoch == 2


def test_lookup_with_a_lease_waits_for_what_lies_lower(
    daemon: FakeDaemon, keys: list[bytes], payload: dict[bytes, bytes]
) -> None:
    with Client(daemon.path, deadline_s=2) as client:
        space = client.open_namespace(model="m", format=FORMAT)
        space.store(keys, fill_from(payload))
        daemon.below = {keys[3]}
        lease = space.lookup(keys, lease=True).lease
        assert lease is not None
        assert not lease.ready
        with pytest.raises(InvalidRequest, match="wait"):
            _ = lease.views
        with lease:
            assert bytes(lease.view(3)) == payload[keys[3]]
        assert not daemon.leases
        assert space.lookup([b"z" * 32], lease=True).lease is None


def test_lookup_of_several_groups(
    daemon: FakeDaemon, keys: list[bytes], payload: dict[bytes, bytes]
) -> None:
    with Client(daemon.path, deadline_s=2) as client:
        full = client.open_namespace(model="m", format=FORMAT, group_name="full")
        other = client.open_namespace(model="m", format=FORMAT, group_name="other")
        full.store(keys, fill_from(payload))
        other.store(keys[:5], fill_from(payload))
        found = client.lookup_groups([(full, keys), (other, keys)], lease=True)
        assert [group.block_count for group in found.groups] == [8, 5]
        assert found.token_count == 80
        for group in found.groups:
            assert group.lease is not None
            group.lease.release()
        assert not daemon.leases


def test_lease_joined_by_another_session(
    daemon: FakeDaemon, keys: list[bytes], payload: dict[bytes, bytes]
) -> None:
    with Client(daemon.path, group="e") as one, Client(daemon.path, group="e") as two:
        space = one.open_namespace(model="m", format=FORMAT)
        space.store(keys, fill_from(payload))
        with space.lease(keys) as lease:
            joined_space = two.open_namespace(model="m", format=FORMAT)
            with joined_space.join_lease(lease.lease_id) as joined:
                assert bytes(joined.view(7)) == payload[keys[7]]
            assert lease.lease_id in daemon.leases  # the taker releases it
            with pytest.raises(NotFound):
                joined_space.join_lease(999)
        assert not daemon.leases


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "number of keys is 0"),
        ([b"a" * 32, b"b" * 16], "one length"),
        ([b"a" * 32, b"a" * 32], "twice"),
        ([b"a" * 8], "key length"),
        ([b"a" * 65], "key length"),
        (b"a" * 32, "sequence"),
        (["a" * 32], "must be bytes"),
        ([1, 2], "must be bytes"),
        ([index.to_bytes(16) for index in range(65_537)], "number of keys"),
        (Keys(b"a" * 64, 32), "twice"),
    ],
)
def test_bad_keys_are_refused_before_any_call(
    daemon: FakeDaemon, bad: list[bytes], message: str
) -> None:
    with Client(daemon.path, deadline_s=2) as client:
        space = client.space(model="m", format=FORMAT)
        verbs = (space.lookup, space.lease, space.reserve, space.prefetch, space.evict, space.pin)
        for verb in verbs:
            with pytest.raises(InvalidRequest, match=message):
                verb(bad)
    assert daemon.handshakes == 0


def test_bad_options(daemon: FakeDaemon, keys: list[bytes]) -> None:
    with pytest.raises(InvalidRequest, match="deadline_s"):
        Client(daemon.path, deadline_s=0)
    with pytest.raises(InvalidRequest, match="Unix socket"):
        Client("ipv4:127.0.0.1:1")
    with Client(daemon.path, deadline_s=2) as client:
        space = client.space(model="m", format=FORMAT)
        with pytest.raises(InvalidRequest, match="parent"):
            space.reserve(keys, parent=b"short")


def test_unknown_namespace_is_opened_again(
    daemon: FakeDaemon, keys: list[bytes], payload: dict[bytes, bytes]
) -> None:
    with Client(daemon.path, deadline_s=2) as client:
        space = client.open_namespace(model="m", format=FORMAT)
        before = space.namespace_id
        daemon.forget_namespaces()
        assert space.lookup(keys).reason is Reason.NEVER_STORED
        assert space.namespace_id == before + 100
        daemon.forget_namespaces()
        assert space.store(keys, fill_from(payload)).stored_count == 8


def test_many_threads_share_a_client(
    daemon: FakeDaemon, keys: list[bytes], payload: dict[bytes, bytes], eventually: Eventually
) -> None:
    import threading

    wrong: list[str] = []

    def use(space: Space) -> None:
        for _ in range(20):
            with space.lease(keys) as lease:
                wrong.extend(
                    "bytes"
                    for key, view in zip(keys, lease.views, strict=True)
                    if bytes(view) != payload[key]
                )

    with Client(daemon.path, deadline_s=2) as client:
        space = client.open_namespace(model="m", format=FORMAT)
        space.store(keys, fill_from(payload))
        threads = [threading.Thread(target=use, args=(space,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert daemon.handshakes == 1
        eventually(lambda: not daemon.leases)
