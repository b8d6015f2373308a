"""The verbs of both clients against a daemon."""

from __future__ import annotations

import threading

import pytest
from daemons import FORMAT, Daemon, content, eventually, fill, holds, keys_of, read, stored

from kvtier.block import CommitResult, EventKind, Keys, Reason, TierId, TierRun
from kvtier.client import AsyncClient, Client, Space
from kvtier.errors import InvalidRequest, LeaseLost, ReservationExpired, TierFull


def test_readme_shape(daemon: Daemon, keys: list[bytes]) -> None:
    payload = {key: content(key) for key in keys}
    with Client(f"unix:{daemon.socket}", deadline_s=5) as client:
        space = client.open_namespace(model="my-model", format=FORMAT)
        with space.reserve(keys, parent=None) as reservation:
            for block in reservation.blocks:
                block.view[:] = payload[block.key]
            reservation.commit()
        found = space.lookup(keys)
        with space.lease(keys[: found.block_count]) as lease:
            payloads = [bytes(view) for view in lease.views]
        assert daemon.held() == (0, 0, 1)

    assert payloads == [payload[key] for key in keys]
    assert (found.block_count, found.runs) == (8, (TierRun(TierId.DRAM, 8),))
    assert 0 < found.load_ms < 1000


async def test_readme_shape_async(daemon: Daemon, keys: list[bytes]) -> None:
    async with AsyncClient(daemon.socket, deadline_s=5) as client:
        space = await client.open_namespace(model="my-async-model", format=FORMAT)
        before = daemon.stat().events_revision
        async with space.reserve(keys, parent=None) as reservation:
            for block in reservation.blocks:
                fill(block)
            await reservation.commit()
        found = await space.lookup(keys)
        async with space.lease(keys[: found.block_count]) as lease:
            payloads = [bytes(view) for view in lease.views]
        lease = await space.lease(keys[:2])
        assert len(lease) == 2
        await lease.release()
        assert await space.store(keys, fill) == CommitResult(0, 0, 0)
        assert await space.pin(keys) == await space.unpin(keys) == 8
        assert await space.prefetch(keys) == 0
        async for event in space.watch(before + 1):
            assert (event.revision, event.kind) == (before + 1, EventKind.STORED)
            assert event.keys == b"".join(keys)
            break
        assert await space.evict(keys[4:]) == 4
        assert await space.clear() == 4

    assert payloads == [content(key) for key in keys]


def test_present_keys_are_skipped(daemon: Daemon, space: Space, keys: list[bytes]) -> None:
    stored(space, keys[:3])
    with space.reserve(keys) as reservation:
        assert [block.index for block in reservation.blocks] == [3, 4, 5, 6, 7]
        assert reservation.present_count == 3
    with space.reserve(keys[:3]) as nothing:
        assert nothing.blocks == ()
        assert nothing.commit() == CommitResult(0, 0, 0)
    with space.reserve(keys, skip_save=True) as off:
        assert off.blocks == ()
    assert daemon.held() == (0, 0, 1)


def test_store_goes_on_over_partial_grants(start, keys: list[bytes]) -> None:  # type: ignore[no-untyped-def]
    daemon = start(limits={"write_arena_bytes": "48KiB", "block_bytes_max": "32KiB"})
    with Client(daemon.socket, deadline_s=5) as client:
        space = client.open_namespace(model="m", format=FORMAT)
        assert space.store(Keys.of(keys), fill) == CommitResult(8, 0, 0)
        assert holds(space, keys)
        with space.reserve(keys_of("all of the arena", 9)) as reservation:
            assert (len(reservation), reservation.covered_count) == (3, 3)
            with pytest.raises(TierFull):
                space.store(keys_of("more", 1), fill, timeout_s=0.2)


def test_store_aborts_what_fill_fails_at(daemon: Daemon, space: Space, keys: list[bytes]) -> None:
    with pytest.raises(ZeroDivisionError):
        space.store(keys, lambda _: 1 // 0)
    eventually(lambda: daemon.held() == (0, 0, 1))
    assert space.lookup(keys).reason is Reason.NEVER_STORED


def test_commit_of_a_part_then_of_the_rest(daemon: Daemon, space: Space, keys: list[bytes]) -> None:
    with space.reserve(keys) as reservation:
        for block in reservation.blocks:
            fill(block)
        first = reservation.blocks[0].view
        assert reservation.commit(reservation.blocks[:2]).stored_count == 2
        assert space.lookup(keys).block_count == 2
        with pytest.raises(ValueError, match="released"):
            first[0]
        with (
            space.reserve(keys_of("another reservation", 2)) as other,
            pytest.raises(InvalidRequest),
        ):
            reservation.commit(other.blocks)
    assert daemon.held() == (0, 0, 1)
    with pytest.raises(ReservationExpired):
        reservation.commit()
    assert holds(space, keys[:2])


def test_dropped_reservation_is_aborted(daemon: Daemon, space: Space, keys: list[bytes]) -> None:
    space.reserve(keys)
    eventually(lambda: daemon.held() == (0, 0, 1))


def test_the_other_verbs(daemon: Daemon, space: Space, keys: list[bytes]) -> None:
    revision = daemon.stat().events_revision
    stored(space, keys)
    assert space.prefetch(keys) == 0
    assert space.pin(keys) == space.unpin(keys) == 8
    assert space.evict(keys[6:]) == 2
    assert space.clear() == 6
    assert space.epoch == 2
    events = space.watch(revision + 1)
    kinds = [next(events).kind for _ in range(3)]
    assert kinds == [EventKind.STORED, EventKind.REMOVED, EventKind.CLEARED]
    events.close()  # type: ignore[attr-defined]


def test_lookup_with_a_lease_waits_for_what_lies_lower(start, keys: list[bytes]) -> None:  # type: ignore[no-untyped-def]
    daemon = start()
    with Client(daemon.socket, deadline_s=5) as client:
        stored(client.open_namespace(model="m", format=FORMAT), keys)
    daemon.restart()
    with Client(daemon.socket, deadline_s=5) as client:
        space = client.open_namespace(model="m", format=FORMAT)
        assert space.lookup(keys).runs == (TierRun(TierId.SSD, 8),)
        found = space.lookup(keys, lease=True)
        assert found.lease is not None
        assert not found.lease.ready
        with pytest.raises(InvalidRequest, match="wait"):
            _ = found.lease.views
        with found.lease as lease:
            assert [bytes(view) for view in lease.views] == [content(key) for key in keys]
        assert daemon.held() == (0, 0, 1)
        assert space.lookup(keys_of("never", 1), lease=True).lease is None
    daemon.restart()
    with Client(daemon.socket, deadline_s=5) as client:
        space = client.open_namespace(model="m", format=FORMAT)
        lease = space.lookup(keys, lease=True).lease  # never waited for: no views, no mapping
        assert lease is not None
        assert daemon.held() == (1, 0, 1)
        del lease
        eventually(lambda: daemon.held() == (0, 0, 1))
        assert space.prefetch(keys) <= 8
        eventually(lambda: space.lookup(keys).runs == (TierRun(TierId.DRAM, 8),))


def test_lookup_of_several_groups(daemon: Daemon, client: Client, keys: list[bytes]) -> None:
    full = client.open_namespace(model="groups", format=FORMAT, group_name="full")
    other = client.open_namespace(model="groups", format=FORMAT, group_name="other")
    stored(full, keys)
    stored(other, keys[:5])
    found = client.lookup_groups([(full, keys), (other, keys)], lease=True)
    assert found.token_count == 80
    for group in found.groups:
        assert group.lease is not None
        with group.lease as lease:
            assert bytes(lease.view(4)) == content(keys[4])
    assert daemon.held() == (0, 0, 1)


def test_lease_joined_by_another_session(daemon: Daemon, keys: list[bytes]) -> None:
    with (
        Client(daemon.socket, group="e") as one,
        Client(daemon.socket, group="e") as two,
        Client(daemon.socket, group="other") as three,
    ):
        space = stored(one.open_namespace(model="joined", format=FORMAT), keys)
        theirs = two.open_namespace(model="joined", format=FORMAT)
        lease = space.lease(keys)
        joined = theirs.join_lease(lease.lease_id)
        with theirs.join_lease(lease.lease_id):  # a session holds a lease once
            pass
        assert daemon.held() == (1, 0, 2)
        with pytest.raises(LeaseLost, match="look up again"):
            theirs.join_lease(999)
        lease.release()
        assert daemon.held() == (0, 0, 2)
        joined.release()

        # The last to let go ends it: here the member that joined.
        lease = space.lease(keys)
        joined = theirs.join_lease(lease.lease_id)
        lease.release()
        assert daemon.held() == (1, 0, 2)
        joined.check()
        assert bytes(joined.view(7)) == content(keys[7])
        joined.release()
        assert daemon.held() == (0, 0, 2)
        assert not three.linked


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
    ],
)
def test_bad_keys_are_refused_before_any_call(
    daemon: Daemon, client: Client, bad: list[bytes], message: str
) -> None:
    space = client.space(model="m", format=FORMAT)
    verbs = (space.lookup, space.lease, space.reserve, space.prefetch, space.evict, space.pin)
    for verb in verbs:
        with pytest.raises(InvalidRequest, match=message):
            verb(bad)
    assert not client.linked


def test_packed_keys_given_twice_are_refused_before_they_are_written(client: Client) -> None:
    # Packed keys are not taken apart on the way to a lookup, where a second one does no harm.
    with pytest.raises(InvalidRequest, match="twice"):
        client.space(model="m", format=FORMAT).reserve(Keys(b"a" * 64, 32))


def test_bad_options(daemon: Daemon, client: Client, keys: list[bytes]) -> None:
    with pytest.raises(InvalidRequest, match="deadline_s"):
        Client(daemon.socket, deadline_s=0)
    with pytest.raises(InvalidRequest, match="Unix socket"):
        Client("ipv4:127.0.0.1:1")
    with pytest.raises(InvalidRequest, match="parent"):
        client.space(model="m", format=FORMAT).reserve(keys, parent=b"short")


def test_unknown_namespace_is_opened_again(client: Client, space: Space, keys: list[bytes]) -> None:
    def forget() -> None:
        # As of a daemon that no longer knows the number it gave.
        link = client.linker.current()
        assert link is not None
        space.state.opened = (link, 999_999)

    number = space.namespace_id
    forget()
    assert space.lookup(keys).reason is Reason.NEVER_STORED
    assert space.namespace_id == number
    forget()
    stored(space, keys)
    assert read(space, keys[:1]) == [content(keys[0])]


def test_many_threads_share_a_client(daemon: Daemon, space: Space, keys: list[bytes]) -> None:
    stored(space, keys)
    wrong: list[int] = []

    def use() -> None:
        wrong.extend(turn for turn in range(20) if not holds(space, keys))

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    eventually(lambda: daemon.held() == (0, 0, 1))


def test_a_durable_store_keeps_what_others_stored_before(
    client: Client, daemon: Daemon, keys: list[bytes]
) -> None:
    space = client.open_namespace(model="durable-present", format=FORMAT)
    stored(space, keys)
    in_ssd = daemon.stat().tiers[-1].block_count
    result = space.store(keys, fill, durable=True)
    assert result == CommitResult(0, 0, 0)  # nothing was left to write
    assert daemon.stat().tiers[-1].block_count == in_ssd + len(keys)
