"""Sessions, groups, tenants, races, watchers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from stores import Attached, Node, chain, payload, reached

from kvtier.block import Event, EventKind
from kvtier.errors import (
    DaemonUnavailable,
    LeaseLost,
    LimitReached,
    PermissionDenied,
    ReservationExpired,
)
from kvtier.sections import TenantConfig

Start = Callable[..., Awaitable[Node]]


async def pushed_out(node: Node, who: Attached, space: int) -> None:
    for n in range(4):
        await node.put(who, space, chain(("push", n), 32))
    await node.quiet()


async def test_end_while_reserve_waits(node: Node) -> None:
    holder, who = node.attach(), node.attach()
    space = node.space(who)
    held = await node.reserve(holder, space, chain("h", 64))
    assert held.covered_count == 64
    waiting = asyncio.create_task(node.reserve(who, space, chain("a", 4)))
    await asyncio.sleep(0.01)
    node.store.end_session(who.session)
    with pytest.raises(DaemonUnavailable):
        await waiting
    node.store.end_session(holder.session)
    assert not node.filling.reservations
    await node.assert_nothing_held()


async def test_end_while_commit_copies(node: Node) -> None:
    who, other = node.attach(), node.attach()
    space = node.space(who)
    grant = await node.reserve(who, space, chain("a", 4))
    spare = await node.reserve(who, space, chain("b", 4))
    node.fill(who, grant, chain("a", 4))
    gate = node.dram.hold("write")
    committing = asyncio.create_task(
        node.store.commit(who.session, grant.reservation_id, [0, 1], durable=False)
    )
    await reached(gate)
    room = who.session.room
    node.store.end_session(who.session)
    node.assert_sound()
    assert who.session.room is room, "still being read"
    assert spare.reservation_id not in node.filling.reservations
    node.dram.heal()
    with pytest.raises(ReservationExpired):
        await committing
    assert who.session.room is None
    assert node.found(other, space, chain("a", 4)) == 0
    await node.assert_nothing_held()


async def test_end_right_after_commit_began(node: Node) -> None:
    who, other = node.attach(), node.attach()
    space = node.space(who)
    grant = await node.reserve(who, space, chain("a", 4))
    committing = asyncio.create_task(
        node.store.commit(who.session, grant.reservation_id, None, durable=False)
    )
    await asyncio.sleep(0)  # the commit's own task has not run yet
    node.store.end_session(who.session)
    with pytest.raises(ReservationExpired):
        await committing
    assert node.found(other, space, chain("a", 4)) == 0
    await node.assert_nothing_held()


async def test_end_while_lease_waits(node: Node) -> None:
    who, other = node.attach(), node.attach()
    space = node.space(who)
    keys = chain("a", 8)
    await node.put(other, space, keys, durable=True)
    await pushed_out(node, other, space)
    gate = node.ssd.hold("read")
    waiting = asyncio.create_task(node.lease(who, space, keys))
    await reached(gate)
    node.store.end_session(who.session)
    assert not node.ledger.leases
    with pytest.raises(LeaseLost):
        await waiting
    node.ssd.heal()
    await node.assert_nothing_held()
    assert await node.read(other, space, keys) == 8


async def test_an_ended_session_gets_nothing(node: Node) -> None:
    who, other = node.attach(group="g"), node.attach(group="g")
    space = node.space(who)
    await node.put(who, space, chain("a", 2))
    kept = await node.lease(other, space, chain("a", 2))
    node.store.end_session(who.session)
    node.store.end_session(who.session)
    for verb in (node.reserve(who, space, chain("b", 1)), node.lease(who, space, chain("a", 2))):
        with pytest.raises(DaemonUnavailable):
            await verb
    with pytest.raises(LeaseLost):
        await node.store.lease(who.session, None, kept.lease_id, shard=0, deadline_s=1)
    node.store.end_session(other.session)
    await node.assert_nothing_held()


async def test_groups_share_leases_others_do_not(node: Node) -> None:
    taker, member = node.attach(group="g"), node.attach(group="g")
    stranger, loner = node.attach(group="h"), node.attach()
    space = node.space(taker)
    keys = chain("a", 4)
    await node.put(taker, space, keys)
    lease = await node.lease(taker, space, keys)
    for who in (stranger, loner):
        with pytest.raises(PermissionDenied):
            await node.store.lease(who.session, None, lease.lease_id, shard=0, deadline_s=1)
        assert node.store.release(who.session, [lease.lease_id]) == 0
    joined, _ = await node.store.lease(member.session, None, lease.lease_id, shard=0, deadline_s=1)
    assert joined.table is not None
    node.store.end_session(taker.session)
    assert member.contents(joined.table) == [payload(key) for key in keys]
    assert lease.lease_id in node.ledger.leases, "a member still reads"
    node.store.release(member.session, [lease.lease_id])
    await node.assert_nothing_held()


async def test_cancelled_wait_for_a_standing_lease_leaves_it_standing(node: Node) -> None:
    who = node.attach()
    space = node.space(who)
    keys = chain("a", 8)
    await node.put(who, space, keys, durable=True)
    await pushed_out(node, who, space)
    gate = node.ssd.hold("read")
    [held] = node.store.lookup(
        who.session, [node.query(space, keys)], lease=True, prefetch=False, touch=False, shard=0
    ).leases
    assert held.table is None
    waiting = asyncio.create_task(
        node.store.lease(who.session, None, held.lease_id, shard=0, deadline_s=10)
    )
    await reached(gate)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert held.lease_id in node.ledger.leases
    node.ssd.heal()
    grant, _ = await node.store.lease(who.session, None, held.lease_id, shard=0, deadline_s=10)
    assert grant.block_count == 8
    node.store.release(who.session, [held.lease_id])
    await node.assert_nothing_held()


TENANTS = (TenantConfig("a", uids=(1,)), TenantConfig("b", uids=(2,)))


async def test_tenants_do_not_meet(start: Start) -> None:
    node = await start(tenants=TENANTS)
    one, two = node.attach("a"), node.attach("b")
    space, other = node.space(one), node.space(two)
    assert space != other
    keys = chain("x", 4)
    await node.put(one, space, keys)
    assert node.found(two, other, keys) == 0
    query = node.query(space, keys)
    for verb in (
        lambda: node.found(two, space, keys),
        lambda: node.store.prefetch(two.session, query),
        lambda: node.store.pin(two.session, query),
        lambda: node.store.unpin(two.session, query),
    ):
        with pytest.raises(PermissionDenied):
            verb()
    for call in (
        lambda: node.lease(two, space, keys),
        lambda: node.reserve(two, space, keys),
        lambda: node.evict(two, space, keys),
        lambda: node.store.clear_namespace(two.session, space),
    ):
        with pytest.raises(PermissionDenied):
            await call()
    lease = await node.lease(one, space, keys)
    with pytest.raises(PermissionDenied):
        await node.store.lease(two.session, None, lease.lease_id, shard=0, deadline_s=1)
    node.store.release(one.session, [lease.lease_id])
    await node.assert_nothing_held()


def _hand_back(node: Node, who: Attached) -> None:
    """The client unmaps what it was asked to."""
    for arena_id in list(who.withdrawn):
        who.withdrawn.remove(arena_id)
        who.arenas.pop(arena_id).close()
        node.store.arena_returned(who.session, arena_id)


async def test_a_starving_tenant_gets_recycled_arenas(start: Start) -> None:
    node = await start(tenants=TENANTS)
    one, two = node.attach("a"), node.attach("b")
    space, other = node.space(one), node.space(two)
    for n in range(4):
        await node.put(one, space, chain(n, 16))
        assert await node.read(one, space, chain(n, 16)) == 16  # maps the arenas
    old = set(one.arenas)

    waiting = asyncio.create_task(node.put(two, other, chain("b", 24)))
    for _ in range(8):
        await node.until(lambda: waiting.done() or one.withdrawn)
        if waiting.done():
            break
        # Until the client has unmapped, nobody may own the segment: not even its old tenant.
        [segment] = [s for s, _ in node.store.keeper.recycling._waiting.values()]
        assert node.ledger.slots[node.ledger.top].segments[segment].slot_class is None
        await node.put(one, space, chain("more", 2))
        assert node.ledger.slots[node.ledger.top].segments[segment].slot_class is None
        _hand_back(node, one)
    await waiting
    assert not set(two.arenas) & old
    # Its first blocks may have made room for its last ones: then reading all needs an arena more.
    reading = asyncio.create_task(node.read(two, other, chain("b", 24)))
    while not reading.done():
        await node.until(lambda: reading.done() or one.withdrawn)
        _hand_back(node, one)
    assert await reading == 24
    assert not set(two.arenas) & old, "an arena of another tenant"
    # The first tenant still has all of its own, and takes arenas back the same way when it ends.
    node.store.end_session(two.session)
    for n in range(4):
        assert await node.read(one, space, chain(n, 16)) == 16
    await node.assert_nothing_held()


async def test_a_dead_client_returns_its_arenas(start: Start) -> None:
    node = await start(tenants=TENANTS)
    one, two = node.attach("a"), node.attach("b")
    space, other = node.space(one), node.space(two)
    for n in range(4):
        await node.put(one, space, chain(n, 16))
        await node.read(one, space, chain(n, 16))
    waiting = asyncio.create_task(node.put(two, other, chain("b", 8)))
    await node.until(lambda: one.withdrawn)
    assert not waiting.done()
    node.store.end_session(one.session)
    await waiting
    assert await node.read(two, other, chain("b", 8)) == 8
    await node.assert_nothing_held()


async def test_limits_change_nothing(start: Start) -> None:
    node = await start(leases_per_session_max=3, reservations_per_session_max=2)
    who = node.attach()
    spaces = [node.space(who, "a"), node.space(who, "b")]
    keys = chain("a", 2)
    for space in spaces:
        await node.put(who, space, keys)
    leases = [await node.lease(who, spaces[0], keys) for _ in range(2)]
    with pytest.raises(LimitReached):  # two groups, one lease left: none is taken
        node.store.lookup(
            who.session, [node.query(space, keys) for space in spaces],
            lease=True, prefetch=False, touch=False, shard=0,
        )  # fmt: skip
    assert len(node.ledger.leases) == 2
    leases.append(await node.lease(who, spaces[0], keys))
    with pytest.raises(LimitReached):
        await node.lease(who, spaces[0], keys)
    node.store.release(who.session, [lease.lease_id for lease in leases])
    for n in range(2):
        await node.reserve(who, spaces[0], chain(n, 2))
    with pytest.raises(LimitReached):
        await node.reserve(who, spaces[0], chain("c", 2))
    node.store.end_session(who.session)
    await node.assert_nothing_held()


# --- forced races


async def test_two_commit_the_same_key(node: Node) -> None:
    one, two = node.attach(), node.attach()
    space = node.space(one)
    keys = chain("a", 4)
    grants = [await node.reserve(who, space, keys) for who in (one, two)]
    for who, grant in zip((one, two), grants, strict=True):
        assert len(grant.granted) == 4
        node.fill(who, grant, keys)
    gate = node.dram.hold("write")
    tasks = [
        asyncio.create_task(node.store.commit(who.session, g.reservation_id, None, durable=False))
        for who, g in zip((one, two), grants, strict=True)
    ]
    await reached(gate)
    node.dram.heal()
    results = await asyncio.gather(*tasks)
    assert sorted((r.stored_count, r.duplicate_count) for r in results) == [(0, 4), (4, 0)]
    assert await node.read(one, space, keys) == 4
    await node.assert_nothing_held()


async def test_a_lease_taken_during_demotion_keeps_the_copy(node: Node) -> None:
    who = node.attach()
    space = node.space(who)
    keys = chain("a", 16)
    await node.put(who, space, keys)
    gate = node.ssd.hold("write")
    for n in range(3):
        await node.put(who, space, chain(n, 15))
    await reached(gate)
    demoted = [m for m in node.moves.moves.values() if m.drop_source]
    assert demoted
    lease = await node.lease(who, space, keys)
    assert lease.table is not None
    node.ssd.heal()
    await node.until(lambda: not node.moves.moves)
    for n in range(3):
        await node.put(who, space, chain(("more", n), 12))
    assert who.contents(lease.table) == [payload(key) for key in keys]
    node.store.release(who.session, [lease.lease_id])
    await node.assert_nothing_held()


async def test_release_while_the_promotion_runs(node: Node) -> None:
    who = node.attach()
    space = node.space(who)
    keys = chain("a", 8)
    await node.put(who, space, keys, durable=True)
    await pushed_out(node, who, space)
    gate = node.ssd.hold("read")
    [held] = node.store.lookup(
        who.session, [node.query(space, keys)], lease=True, prefetch=False, touch=False, shard=0
    ).leases
    await reached(gate)
    node.store.release(who.session, [held.lease_id])
    node.assert_sound()
    node.ssd.heal()
    await node.assert_nothing_held()
    assert await node.read(who, space, keys) == 8


async def test_lease_deadline_grants_the_readable_prefix(node: Node) -> None:
    who = node.attach()
    space = node.space(who)
    keys = chain("a", 12)
    await node.put(who, space, keys, durable=True)
    await pushed_out(node, who, space)
    assert await node.read(who, space, keys[:5]) == 5
    node.ssd.hold("read")
    grant = await node.lease(who, space, keys, deadline_s=0.05)
    assert grant.table is not None
    assert grant.block_count >= 5
    assert who.contents(grant.table) == [payload(key) for key in keys[: grant.block_count]]
    node.store.release(who.session, [grant.lease_id])
    node.ssd.heal()
    await node.assert_nothing_held()


# --- close


async def test_close_with_everything_in_flight(start: Start) -> None:
    node = await start()
    who = node.attach()
    space = node.space(who)
    await node.put(who, space, chain("a", 8), durable=True)
    await pushed_out(node, who, space)
    ssd_gate = node.ssd.hold("write")
    tasks = [
        asyncio.create_task(node.put(who, space, chain("d", 4), durable=True)),
        asyncio.create_task(node.lease(who, space, chain("a", 8))),
        asyncio.create_task(node.evict(who, space, chain(("push", 1), 4))),
        asyncio.create_task(node.reserve(who, space, chain("r", 64))),
    ]
    await reached(ssd_gate)
    closing = asyncio.create_task(node.store.close(grace_s=0.2))
    await asyncio.sleep(0.4)
    node.ssd.heal()
    async with asyncio.timeout(5):
        await closing
        results = await asyncio.gather(*tasks, return_exceptions=True)
    node.closed = True
    assert not [r for r in results if isinstance(r, RuntimeError)], results
    again = await start(within=node.config.state.dir.parent)
    who = again.attach()
    assert await again.read(who, again.space(who), chain("a", 8)) == 8


async def test_close_does_not_lose_its_cancellation(start: Start) -> None:
    """Python 3.11's wait_for swallows a cancellation that meets a wake-up."""
    for n in range(20):
        node = await start()
        who = node.attach()
        await node.put(who, node.space(who), chain(n, 4))
        tending = node.store.tending
        assert tending is not None
        await asyncio.sleep(0.002 if n % 2 else 0)
        node.store.keeper.wake()
        node.store.keeper.wake()
        await node.close(grace_s=0.0)
        assert tending.done()


async def test_cancelling_a_waiter_that_was_just_woken(node: Node) -> None:
    progress = node.store.keeper.progress
    task = asyncio.create_task(progress.wait(10))
    await asyncio.sleep(0)
    progress.notify()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# --- watch


async def events(node: Node, who: Attached, space: int, start: int, count: int) -> list[Event]:
    found = []
    watcher = node.store.watch(who.session, space, start)
    async with asyncio.timeout(5):
        async for event in watcher:
            found.append(event)
            if len(found) == count:
                break
    return found


async def test_watch_in_order_and_resumed(node: Node) -> None:
    who = node.attach()
    space, other = node.space(who), node.space(who, "other")
    keys = chain("a", 3)
    before = node.store.keeper.events.revision
    watching = asyncio.create_task(events(node, who, space, 0, 3))
    await asyncio.sleep(0)
    await node.put(who, space, keys)
    await node.put(who, other, keys)
    await node.evict(who, space, keys[1:])
    await node.store.clear_namespace(who.session, space)
    seen = await watching
    assert [e.kind for e in seen] == [EventKind.STORED, EventKind.REMOVED, EventKind.CLEARED]
    assert seen[0].keys == b"".join(keys)
    assert sorted(seen[1].keys[i : i + 32] for i in (0, 32)) == sorted(keys[1:])
    assert [e.revision - before for e in seen] == [1, 3, 4]
    assert await events(node, who, space, before + 2, 2) == seen[1:]
    assert await events(node, who, space, before + 1, 3) == seen


async def test_a_lagging_watcher_is_told(start: Start) -> None:
    node = await start(watch_events_max=16)
    who = node.attach()
    space = node.space(who)
    before = node.store.keeper.events.revision
    watcher = node.store.watch(who.session, space, before + 1)
    for n in range(4):
        await node.put(who, space, chain(n, 1))
    async with asyncio.timeout(5):
        assert (await anext(watcher)).revision == before + 1
        for n in range(4, 40):
            await node.put(who, space, chain(n, 1))
        seen = [await anext(watcher) for _ in range(3 + 1 + 16)]
    kinds = [event.kind for event in seen]
    assert kinds.count(EventKind.COMPACTED) == 1
    assert seen[-1].revision == before + 40
    revisions = [event.revision for event in seen]
    assert revisions == sorted(revisions)
    await watcher.aclose()


@pytest.mark.parametrize("behind", [-1000, 1000], ids=["later", "earlier"])
async def test_a_watcher_of_an_earlier_life_is_told(node: Node, behind: int) -> None:
    who = node.attach()
    space = node.space(who)
    await node.put(who, space, chain("a", 1))
    watcher = node.store.watch(who.session, space, node.store.keeper.events.revision - behind)
    async with asyncio.timeout(5):
        assert (await anext(watcher)).kind is EventKind.COMPACTED
        await node.put(who, space, chain("b", 1))
        held = [chain("a", 1)[0]] if behind > 0 else []
        seen = [(await anext(watcher)).keys for _ in range(len(held) + 1)]
    assert seen == [*held, chain("b", 1)[0]]
    await watcher.aclose()


async def test_stored_events_name_consecutive_blocks(node: Node) -> None:
    who = node.attach()
    space = node.space(who)
    keys = chain("a", 6)
    before = node.store.keeper.events.revision
    grant = await node.reserve(who, space, keys)
    node.fill(who, grant, keys)
    await node.store.commit(who.session, grant.reservation_id, [0, 1, 4, 5], durable=False)
    first, second = await events(node, who, space, before + 1, 2)
    assert (first.parent, first.keys) == (b"", b"".join(keys[:2]))
    assert (second.parent, second.keys) == (keys[3], b"".join(keys[4:]))
    node.store.abort(who.session, grant.reservation_id)
