"""Evict, clear, full tiers: what is gone stays gone, what is read stays readable."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from stores import Node, chain, payload, reached

from kvtier.block import Reason
from kvtier.errors import EpochEnded, LeaseLost, TierFailed, TierFull

Start = Callable[..., Awaitable[Node]]


async def reopened_after_kill(start: Start, node: Node, tmp_path: Path, name: str) -> Node:
    shutil.copytree(node.config.state.dir, tmp_path / name / "state")
    return await start(within=tmp_path / name)


async def test_evict_under_a_lease(node: Node) -> None:
    who, other = node.attach(), node.attach()
    space = node.space(who)
    keys = chain("a", 8)
    await node.put(who, space, keys, durable=True)
    grant = await node.lease(who, space, keys)
    assert grant.table is not None

    assert await node.evict(other, space, keys[4:5]) == 4  # and its descendants
    assert node.why(other, space, keys) == (4, Reason.EVICTED)
    assert who.contents(grant.table) == [payload(key) for key in keys]
    node.assert_sound()
    # Stored again while the old bytes are still leased; they must not be overwritten.
    await node.put(other, space, keys)
    for n in range(4):
        await node.put(other, space, chain(n, 32))
    assert who.contents(grant.table) == [payload(key) for key in keys]
    assert node.ledger._doomed
    node.store.release(who.session, [grant.lease_id])
    assert not node.ledger._doomed
    assert await node.read(who, space, keys) == 8
    await node.assert_nothing_held()


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("direction", ["down", "up"])
async def test_evict_while_a_move_is_in_flight(
    start: Start, tmp_path: Path, direction: str, restored: bool
) -> None:
    node = await start()
    who = node.attach()
    space = node.space(who)
    keys = chain("a", 4)
    await node.put(who, space, keys, durable=direction == "up")
    if direction == "down":
        gate = node.ssd.hold("write")
        moving = asyncio.create_task(node.store.flush(10))
    else:
        for n in range(4):
            await node.put(who, space, chain(n, 20))
        await node.quiet()
        gate = node.ssd.hold("read")
        moving = asyncio.create_task(node.lease(who, space, keys))
    await reached(gate)

    evicting = asyncio.create_task(node.evict(who, space, keys[1:]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert node.found(who, space, keys) == 1
    assert not evicting.done(), "the move may still bring it back"
    if restored:
        await node.put(who, space, keys[1:], parent=keys[0])
    node.assert_sound()
    node.ssd.heal()
    assert await evicting == 3
    await moving
    if direction == "up":
        node.store.release(who.session, [moving.result().lease_id])
    await node.assert_nothing_held()
    assert await node.read(who, space, keys) == (4 if restored else 1)
    if restored:
        await node.store.flush(10)
    after = await reopened_after_kill(start, node, tmp_path, "kill")
    who = after.attach()
    assert await after.read(who, after.space(who), keys) == (4 if restored else 1)


async def test_evicted_stays_gone_after_restart_and_kill(start: Start, tmp_path: Path) -> None:
    node = await start()
    who = node.attach()
    space = node.space(who)
    await node.put(who, space, chain("a", 8), durable=True)
    await node.put(who, space, chain("b", 8), durable=True)
    await node.evict(who, space, chain("a", 8)[3:4])
    killed = await reopened_after_kill(start, node, tmp_path, "kill")
    await node.close()
    for after in (killed, await start(within=node.config.state.dir.parent)):
        who = after.attach()
        space = after.space(who)
        assert after.found(who, space, chain("a", 8)) == 3
        assert await after.read(who, space, chain("b", 8)) == 8


async def test_an_evict_that_could_not_be_made_durable_is_repeated(
    start: Start, tmp_path: Path
) -> None:
    """The tier fails the wipe: the caller is told, and the block must not come back after all."""
    node = await start()
    who = node.attach()
    space = node.space(who)
    keys = chain("a", 4)
    await node.put(who, space, keys, durable=True)
    node.ssd.fail_erase(for_ever=True)
    with pytest.raises(TierFailed):
        await node.evict(who, space, keys)
    assert node.found(who, space, keys) == 0
    node.assert_sound()
    with pytest.raises(TierFailed):  # "evict them again": still not possible, and said so
        await node.evict(who, space, keys)
    node.ssd.heal()
    assert await node.evict(who, space, keys) == 0
    await node.assert_nothing_held()
    after = await reopened_after_kill(start, node, tmp_path, "kill")
    who = after.attach()
    assert after.found(who, after.space(who), keys) == 0


async def test_failed_erasures_leak_no_slots(node: Node) -> None:
    who = node.attach()
    space = node.space(who)
    for n in range(40):
        await node.put(who, space, chain(n, 32), durable=True)
    node.ssd.fail_erase(for_ever=True)
    for n in (38, 39):
        with pytest.raises(TierFailed):
            await node.evict(who, space, chain(n, 32)[:1])
    node.ssd.heal()
    for n in range(40):
        await node.evict(who, space, chain(n, 32)[:1])
    await node.assert_nothing_held()
    assert node.blocks_in("ssd") == 0


@pytest.mark.parametrize("stored", [True, False])
async def test_clear_stays_done(start: Start, tmp_path: Path, stored: bool) -> None:
    node = await start()
    who = node.attach()
    space, other = node.space(who), node.space(who, "other")
    keys = chain("a", 8)
    await node.put(who, other, keys, durable=True)
    if stored:
        await node.put(who, space, keys, durable=True)
    assert await node.store.clear_namespace(who.session, space) == (2, 8 if stored else 0)
    assert node.found(who, space, keys) == 0
    killed = await reopened_after_kill(start, node, tmp_path, "kill")
    # The new epoch's blocks come back, the old one's do not.
    await node.put(who, space, keys[:5], durable=True)
    again = await reopened_after_kill(start, node, tmp_path, "again")
    await node.assert_nothing_held()
    await node.close()
    for after, count in (
        (killed, 0),
        (again, 5),
        (await start(within=node.config.state.dir.parent), 5),
    ):
        who = after.attach()
        assert await after.read(who, after.space(who), keys) == count
        assert await after.read(who, after.space(who, "other"), keys) == 8


async def test_clear_while_the_first_batch_registers_the_namespace(
    start: Start, tmp_path: Path
) -> None:
    """The old epoch must not be what the disk remembers: new blocks would die at a restart."""
    node = await start()
    who = node.attach()
    space = node.space(who)
    await node.put(who, space, chain("old", 4))
    gate = node.ssd.hold("write")  # after register_namespace(epoch 1), before bytes
    flushing = asyncio.create_task(node.store.flush(10))
    await reached(gate)
    await node.store.clear_namespace(who.session, space)
    node.ssd.heal()
    await flushing
    await node.put(who, space, chain("new", 4), durable=True)
    await node.assert_nothing_held()
    after = await reopened_after_kill(start, node, tmp_path, "kill")
    who = after.attach()
    space = after.space(who)
    assert after.found(who, space, chain("old", 4)) == 0
    assert await after.read(who, space, chain("new", 4)) == 4


async def test_clears_at_once(start: Start, tmp_path: Path) -> None:
    node = await start()
    who = node.attach()
    space = node.space(who)
    await node.put(who, space, chain("a", 4), durable=True)
    await asyncio.gather(*(node.store.clear_namespace(who.session, space) for _ in range(20)))
    await node.put(who, space, chain("b", 4), durable=True)
    after = await reopened_after_kill(start, node, tmp_path, "kill")
    who = after.attach()
    space = after.space(who)
    assert after.found(who, space, chain("a", 4)) == 0
    assert await after.read(who, space, chain("b", 4)) == 4


async def test_clear_with_everything_in_flight(node: Node) -> None:
    who = node.attach()
    space = node.space(who)
    held, moving, open_keys, copying = (chain(n, 4) for n in "lmoc")
    await node.put(who, space, held, durable=True)
    lease = await node.lease(who, space, held)
    assert lease.table is not None
    await node.put(who, space, moving)
    opened = await node.reserve(who, space, open_keys)
    committing = await node.reserve(who, space, copying)
    node.fill(who, committing, copying)
    node.fill(who, opened, open_keys)
    ssd_gate, dram_gate = node.ssd.hold("write"), node.dram.hold("write")
    flushing = asyncio.create_task(node.store.flush(10))
    commit = asyncio.create_task(
        node.store.commit(who.session, committing.reservation_id, None, durable=False)
    )
    await reached(ssd_gate)
    await reached(dram_gate)

    epoch, count = await node.store.clear_namespace(who.session, space)
    assert (epoch, count) == (2, 8)
    assert who.contents(lease.table) == [payload(key) for key in held]
    node.assert_sound()
    node.ssd.heal()
    node.dram.heal()
    with pytest.raises(EpochEnded):
        await commit
    with pytest.raises(EpochEnded):
        await node.store.commit(who.session, opened.reservation_id, None, durable=False)
    await flushing
    for keys in (held, moving, open_keys, copying):
        assert node.found(who, space, keys) == 0
    assert who.contents(lease.table) == [payload(key) for key in held]
    node.store.release(who.session, [lease.lease_id])
    await node.assert_nothing_held()
    assert node.blocks_in("ssd") == node.blocks_in("dram") == 0
    await node.put(who, space, copying)
    assert await node.read(who, space, copying) == 4


async def test_a_waiting_lease_learns_of_evict_and_clear(node: Node) -> None:
    who = node.attach()
    space = node.space(who)
    keys = chain("a", 8)
    await node.put(who, space, keys, durable=True)
    for n in range(4):
        await node.put(who, space, chain(n, 32))
    await node.quiet()
    gate = node.ssd.hold("read")
    waiting = asyncio.create_task(node.lease(who, space, keys))
    await reached(gate)
    evicting = asyncio.create_task(node.evict(who, space, keys[5:]))
    await asyncio.sleep(0)
    node.ssd.heal()
    grant = await waiting
    await evicting
    assert grant.block_count == 5
    assert grant.table is not None
    assert who.contents(grant.table) == [payload(key) for key in keys[:5]]
    node.store.release(who.session, [grant.lease_id])
    await node.assert_nothing_held()


# --- full


async def test_dram_full_and_all_leased(node: Node) -> None:
    who, other = node.attach(), node.attach()
    space = node.space(who)
    keys = chain("a", 64)
    leases = []
    for start in range(0, 64, 16):
        await node.put(
            who, space, keys[start : start + 16], parent=keys[start - 1] if start else b""
        )
        leases.append(await node.lease(who, space, keys[: start + 16]))
    assert node.ledger.slots[node.ledger.top].counts().used_slots == 64
    with pytest.raises(TierFull, match="leases") as caught:
        await node.reserve(other, space, chain("b", 1), deadline_s=0.6)
    assert caught.value.grpc_code == "RESOURCE_EXHAUSTED"
    node.assert_sound()
    assert node.found(who, space, keys) == 64
    assert leases[-1].table is not None
    assert who.contents(leases[-1].table) == [payload(key) for key in keys]

    waiting = asyncio.create_task(node.put(other, space, chain("b", 4)))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    node.store.release(who.session, [lease.lease_id for lease in leases])
    await waiting
    assert await node.read(other, space, chain("b", 4)) == 4
    assert await node.read(other, space, keys[:48]) == 48
    await node.assert_nothing_held()


async def test_room_from_copies_that_are_below_too_is_taken_at_once(start: Start) -> None:
    """Nothing has to move: the reserve must not sleep until somebody else makes noise."""
    node = await start(dram_high_water=1.0)
    who = node.attach()
    space = node.space(who)
    for n in range(4):
        await node.put(who, space, chain(n, 16), durable=True)
    await node.quiet()
    assert node.blocks_in("dram") == 64
    async with asyncio.timeout(0.2):
        await node.reserve(who, space, chain("b", 8))


@pytest.mark.parametrize("how", ["evict", "clear", "release", "abort", "end"])
@pytest.mark.parametrize("ssd_enabled", [True, False])
async def test_whoever_frees_room_wakes_the_waiting(
    start: Start, how: str, ssd_enabled: bool
) -> None:
    node = await start(ssd_enabled=ssd_enabled, dram_high_water=1.0)
    who, other = node.attach(), node.attach()
    space = node.space(who)
    keys = chain("a", 64)
    if how in ("release", "end", "abort"):
        if how == "abort":
            held = await node.reserve(who, space, keys)
        else:
            await node.put(who, space, keys)
            lease = await node.lease(who, space, keys)
    else:
        await node.put(who, space, keys)
        # Pinned blocks are not given up where there is no tier below, and no tier below is fast.
        if node.ssd is not None:
            node.ssd.hold("write")
        node.store.pin(who.session, node.query(space, keys))
    waiting = asyncio.create_task(node.reserve(other, space, chain("b", 8)))
    await asyncio.sleep(0.02)
    assert not waiting.done()
    async with asyncio.timeout(0.5 if how != "evict" or node.ssd is None else 5):
        if how == "evict":
            evicting = asyncio.create_task(node.evict(who, space, keys[40:]))
            await asyncio.sleep(0)
            if node.ssd is not None:
                node.ssd.heal()
            await evicting
        elif how == "clear":
            clearing = asyncio.create_task(node.store.clear_namespace(who.session, space))
            await asyncio.sleep(0)
            if node.ssd is not None:
                node.ssd.heal()
            await clearing
        elif how == "release":
            node.store.release(who.session, [lease.lease_id])
        elif how == "abort":
            node.store.abort(who.session, held.reservation_id)
        else:
            node.store.end_session(who.session)
        grant = await waiting
    node.store.abort(other.session, grant.reservation_id)
    await node.assert_nothing_held()


async def test_ssd_full_forgets_the_oldest(start: Start) -> None:
    node = await start(ssd_blocks=128)
    who = node.attach()
    space = node.space(who)
    for n in range(20):
        await node.put(who, space, chain(n, 16))
        node.assert_sound()
    await node.quiet()
    assert await node.read(who, space, chain(19, 16)) == 16
    assert node.found(who, space, chain(0, 16)) < 16
    assert node.why(who, space, chain(0, 16))[1] is Reason.EVICTED
    total = sum([await node.read(who, space, chain(n, 16)) for n in range(20)])
    assert total >= 80
    assert node.store.counts(1).evicted_blocks > 0
    await node.assert_nothing_held()


# --- a tier that fails


async def test_failing_writes_degrade_and_heal(node: Node) -> None:
    who = node.attach()
    space = node.space(who)
    node.ssd.fail_write(for_ever=True, error=TierFailed("No space left on device"))
    for n in range(8):
        await node.put(who, space, chain(n, 16))  # stores go on
        node.assert_sound()
    assert node.tier_state("ssd") == "degraded"
    assert await node.read(who, space, chain(7, 16)) == 16
    with pytest.raises(TierFailed):
        await node.put(who, space, chain("d", 1), durable=True)
    assert node.found(who, space, chain("d", 1)) == 1
    node.ssd.heal()
    node.clock.ahead_s += 6
    node.store.keeper.wake()
    await node.until(lambda: node.tier_state("ssd") == "serving")
    await node.put(who, space, chain("e", 8), durable=True)
    await node.assert_nothing_held()


async def test_failing_reads_are_misses(node: Node) -> None:
    who = node.attach()
    space = node.space(who)
    keys = chain("a", 8)
    await node.put(who, space, keys, durable=True)
    for n in range(4):
        await node.put(who, space, chain(n, 32))
    await node.quiet()
    node.ssd.fail_read(4)
    assert await node.read(who, space, keys) in range(8)
    node.ssd.heal()
    count = await node.read(who, space, keys)
    assert count < 8
    await node.put(who, space, keys)
    assert await node.read(who, space, keys) == 8
    await node.assert_nothing_held()


async def test_damage_on_disk_is_a_miss_and_counted(node: Node) -> None:
    who = node.attach()
    space = node.space(who)
    keys = chain("a", 8)
    node.ssd.corrupt_write(4)
    await node.put(who, space, keys, durable=True)
    for n in range(4):
        await node.put(who, space, chain(n, 32))
    await node.quiet()
    assert node.found(who, space, keys) == 8
    good = await node.read(who, space, keys)
    assert good < 8  # which of the batches was the first to be written is not said
    assert node.why(who, space, keys) == (good, Reason.CORRUPT)
    assert node.store.counts(1).corrupt_count == 1
    await node.put(who, space, keys)  # refilled
    assert await node.read(who, space, keys) == 8
    await node.assert_nothing_held()


async def test_a_bug_in_a_worker_thread_stops_the_daemon_and_loses_nothing(start: Start) -> None:
    """A batch that ended by an exception no tier may raise must not count as written."""
    node = await start()
    who = node.attach()
    space = node.space(who)
    await node.put(who, space, chain("a", 4))

    def broken(batch: object) -> None:
        raise AssertionError("a bug")

    node.ssd.tier.write = broken
    await node.store.flush(1)
    assert node.blocks_in("ssd") == 0
    tending = node.store.tending
    assert tending is not None
    await asyncio.wait([tending], timeout=5)
    with pytest.raises(AssertionError, match="a bug"):
        tending.result()
    assert node.blocks_in("dram") == 4
    await node.close()


async def test_close_with_a_failing_tier(start: Start) -> None:
    node = await start()
    who = node.attach()
    space = node.space(who)
    await node.put(who, space, chain("a", 4))
    heal, node.ssd.heal = node.ssd.heal, lambda: None
    node.ssd.fail_sync(for_ever=True)
    node.ssd.fail_erase(for_ever=True)
    with pytest.raises(TierFailed):
        await node.store.flush(5)
    await node.close()
    node.ssd.heal = heal
    again = await start(within=node.config.state.dir.parent)
    assert again.store.counts(1).recovered_blocks == 4


async def test_revoked_leases_change_generations_before_reuse(start: Start) -> None:
    node = await start(lease_ttl_s=30.0)
    who, other = node.attach(), node.attach()
    space = node.space(who)
    keys = chain("a", 64)
    await node.put(who, space, keys)
    lease = await node.lease(who, space, keys)
    assert lease.table is not None
    arenas = list(who.arenas.values())
    before = [arena.revocations() for arena in arenas]
    node.clock.ahead_s += 31
    assert set(node.ledger.leases) == {lease.lease_id}, "nobody starves: it stands"
    contents_seen = []
    write = node.dram.tier.write

    def watching(batch: object) -> None:
        contents_seen.append([arena.revocations() for arena in arenas])
        write(batch)

    node.dram.tier.write = watching
    await node.put(other, space, chain("b", 16))
    assert not node.ledger.leases
    assert node.store.counts(1).leases_revoked == 1
    assert all(now > then for seen in contents_seen for now, then in zip(seen, before, strict=True))
    with pytest.raises(LeaseLost):
        await node.store.lease(who.session, None, lease.lease_id, shard=0, deadline_s=1)
    fresh = await node.lease(other, space, chain("b", 16))
    assert fresh.table is not None
    assert fresh.table.generations
    node.store.release(other.session, [fresh.lease_id])
    await node.assert_nothing_held()


async def test_a_lease_keeps_only_what_it_reads(node: Node) -> None:
    """A lease of a prefix must not hold what the chain has behind it, or a shared system prompt
    under lease would keep every conversation that follows it in memory.
    """
    who = node.attach()
    space = node.space(who)
    keys = chain("a", 64)  # as many as DRAM holds
    for start in range(0, 64, 16):
        await node.put(
            who, space, keys[start : start + 16], parent=keys[start - 1] if start else b""
        )
    grant = await node.lease(who, space, keys[:3])
    assert grant.table is not None
    other = chain("b", 16)
    await node.put(who, space, other)
    assert node.found(who, space, other) == len(other)
    assert who.contents(grant.table) == [payload(key) for key in keys[:3]]
    node.store.release(who.session, [grant.lease_id])
    assert await node.read_pieces(who, space, keys) == len(keys)


async def test_a_row_of_failures_asks_for_a_probe(node: Node) -> None:
    who = node.attach()
    space = node.space(who)
    health = node.store.keeper.health
    node.ssd.fail_write(for_ever=True, error=TierFailed("planned: Input/output error"))
    for n in range(health.errors_max):
        await node.put(who, space, chain(n, 1))
        with pytest.raises(TierFailed):
            await node.put(who, space, chain(("d", n), 1), durable=True)
        assert node.tier_state("ssd") == "degraded"
        assert "planned" in health.error
        if n + 1 < health.errors_max:
            node.clock.ahead_s += 400
            node.store.keeper.wake()
            await node.until(lambda: node.tier_state("ssd") == "serving")
    # Writes would succeed again, but the probe does not: it stays out of service.
    node.ssd.heal()
    obstacle = node.config.state.dir / "probe.new"  # a directory: no file can be written there
    obstacle.mkdir()
    node.clock.ahead_s += 400
    node.store.keeper.wake()
    await node.until(lambda: "probe" in health.error)
    assert node.tier_state("ssd") == "degraded"
    with pytest.raises(TierFailed, match="probe"):
        await node.store.keeper.heal()
    assert await node.read(who, space, chain(0, 1)) == 1  # memory goes on serving
    obstacle.rmdir()
    assert await node.store.keeper.heal() == "degraded"
    assert node.tier_state("ssd") == "serving"
    await node.put(who, space, chain("e", 8), durable=True)
    assert await node.store.keeper.heal() == "serving"
