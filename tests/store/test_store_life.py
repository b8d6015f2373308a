"""Stories: blocks are stored, found, moved down and up, and come back after a restart or a kill."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from stores import BLOCK_BYTES, FORMAT, Node, chain, payload, reached

from kvtier.block import BlockFormat, GroupKind, GroupQuery, Keys, Reason
from kvtier.errors import (
    InvalidRequest,
    NotFound,
    PermissionDenied,
    ReservationExpired,
    TierFull,
)

Start = Callable[..., Awaitable[Node]]


async def test_put_lookup_lease_release(node: Node) -> None:
    who = node.attach()
    space = node.space(who)
    keys = chain("a", 20)

    assert node.why(who, space, keys) == (0, Reason.NEVER_STORED)
    await node.put(who, space, keys)
    assert node.why(who, space, keys) == (20, Reason.NONE)
    assert node.why(who, space, [*keys, b"x" * 32]) == (20, Reason.NEVER_STORED)

    grant = await node.lease(who, space, keys)
    assert grant.block_count == grant.ready_count == 20
    assert grant.table is not None
    assert who.contents(grant.table) == [payload(key) for key in keys]
    assert node.store.release(who.session, [grant.lease_id]) == 1
    assert node.store.release(who.session, [grant.lease_id]) == 0
    await node.assert_nothing_held()


async def test_a_burst_larger_than_dram_loses_nothing(node: Node) -> None:
    clients = [node.attach() for _ in range(4)]
    space = node.space(clients[0])
    chains = [chain(n, 64) for n in range(4)]  # 256 blocks, 64 in DRAM

    await asyncio.gather(
        *(node.put(who, space, keys) for who, keys in zip(clients, chains, strict=True))
    )
    node.assert_sound()
    for who, keys in zip(clients, chains, strict=True):
        assert node.found(who, space, keys) == 64
        assert await node.read_pieces(who, space, keys[:32]) == 32
        # Reading one chain pushes others down again: each is promoted from disk.
    assert node.blocks_in("ssd") >= 256 - 64
    await node.assert_nothing_held()


async def test_reading_while_others_store(node: Node) -> None:
    writer, reader = node.attach(), node.attach()
    space = node.space(writer)
    mine = chain("mine", 16)
    await node.put(reader, space, mine)

    async def read() -> None:
        for _ in range(30):
            assert await node.read(reader, space, mine) == 16

    async def write() -> None:
        for n in range(10):
            await node.put(writer, space, chain(("w", n), 32))

    await asyncio.gather(read(), write())
    await node.assert_nothing_held()


async def test_restart_brings_back_all(start: Start) -> None:
    node = await start()
    who = node.attach()
    space = node.space(who)
    chains = [chain(n, 50) for n in range(5)]
    for keys in chains:
        await node.put(who, space, keys)
    await node.close()

    node = await start(within=node.config.state.dir.parent)
    assert node.store.counts(1).recovered_blocks == 250
    who = node.attach()
    space = node.space(who)
    for keys in chains:
        assert node.found(who, space, keys) == 50
        assert await node.read(who, space, keys) == 50
    await node.assert_nothing_held()


def copied(node: Node, tmp_path: Path, name: str = "after-kill") -> Path:
    """What a kill would leave: everything written, no clean marker."""
    shutil.copytree(node.config.state.dir, tmp_path / name / "state")
    assert not (tmp_path / name / "state" / "clean").exists()
    return tmp_path / name


async def test_durable_commit_survives_a_kill(start: Start, tmp_path: Path) -> None:
    node = await start()
    who = node.attach()
    space = node.space(who)
    await node.put(who, space, chain("kept", 10), durable=True)
    place = copied(node, tmp_path)

    after = await start(within=place)
    who = after.attach()
    assert await after.read(who, after.space(who), chain("kept", 10)) == 10


async def test_durable_commits_while_others_make_noise(node: Node) -> None:
    """Progress of others (64 wake-ups are nothing) must not look like a tier that fails."""
    noisy, who = node.attach(), node.attach()
    space = node.space(who)
    gate = node.ssd.hold("write")
    task = asyncio.create_task(node.put(who, space, chain("kept", 4), durable=True))
    await reached(gate)
    for n in range(200):
        grant = await node.reserve(noisy, space, chain(("n", n), 1))
        node.store.abort(noisy.session, grant.reservation_id)
        await asyncio.sleep(0)
    assert not task.done()
    node.ssd.heal()
    await task
    assert node.blocks_in("ssd") == 4


async def test_flush_writes_what_is_only_in_memory(node: Node) -> None:
    who = node.attach()
    space = node.space(who)
    await node.put(who, space, chain("a", 20))
    assert await node.store.flush(10) == (20, 0)
    assert await node.store.flush(10) == (0, 0)
    assert node.blocks_in("ssd") == node.blocks_in("dram") == 20


async def test_drain_takes_no_stores(node: Node) -> None:
    who = node.attach()
    space = node.space(who)
    await node.put(who, space, chain("a", 5))
    assert await node.store.drain(10) == (5, 0)
    with pytest.raises(Exception, match="draining"):
        await node.reserve(who, space, chain("b", 1))
    assert await node.read(who, space, chain("a", 5)) == 5
    node.store.undrain()
    await node.put(who, space, chain("b", 1))


async def test_promotion_then_demotion_keeps_every_copy_right(node: Node) -> None:
    who = node.attach()
    space = node.space(who)
    old = chain("old", 32)
    await node.put(who, space, old)
    for n in range(4):
        await node.put(who, space, chain(n, 32))
    assert await node.read(who, space, old) == 32
    assert node.store.prefetch(who.session, node.query(space, chain(1, 32))) >= 0
    await node.quiet()
    for n in range(4):
        assert await node.read(who, space, chain(n, 32)) == 32
    await node.assert_nothing_held()


# --- bad input


async def test_bad_input_changes_nothing(node: Node) -> None:
    who, other = node.attach(), node.attach()
    space = node.space(who)
    keys = chain("a", 3)
    with pytest.raises(NotFound):
        await node.reserve(who, 99, keys)
    with pytest.raises(InvalidRequest):
        await node.reserve(who, space, [keys[0], keys[0]])
    with pytest.raises(InvalidRequest):
        await node.reserve(who, space, keys, shard=1)
    with pytest.raises(InvalidRequest):
        await node.reserve(who, space, keys, parent=b"p" * 16)
    with pytest.raises(InvalidRequest):
        node.store.lookup(who.session, [], lease=False, prefetch=False, touch=False, shard=0)
    with pytest.raises(InvalidRequest):
        await node.lease(who, space, keys, shard=3)
    await node.put(who, space, keys)
    with pytest.raises(InvalidRequest):
        node.found(who, space, [b"k" * 16])
    with pytest.raises(InvalidRequest):
        await node.evict(who, space, [b"k" * 16])

    grant = await node.reserve(who, space, chain("b", 2))
    with pytest.raises(PermissionDenied):
        await node.store.commit(other.session, grant.reservation_id, None, durable=False)
    with pytest.raises(PermissionDenied):
        node.store.abort(other.session, grant.reservation_id)
    with pytest.raises(InvalidRequest):
        await node.store.commit(who.session, grant.reservation_id, [0, 0], durable=False)
    with pytest.raises(InvalidRequest):
        await node.store.commit(who.session, grant.reservation_id, [2], durable=False)
    node.fill(who, grant, chain("b", 2))
    result = await node.store.commit(who.session, grant.reservation_id, [1], durable=False)
    assert result.stored_count == 1
    with pytest.raises(ReservationExpired):
        await node.store.commit(who.session, grant.reservation_id, [1], durable=False)
    result = await node.store.commit(who.session, grant.reservation_id, None, durable=False)
    assert result.stored_count == 1
    with pytest.raises(ReservationExpired):
        await node.store.commit(who.session, grant.reservation_id, None, durable=False)
    node.store.abort(who.session, grant.reservation_id)
    assert await node.read(who, space, chain("b", 2)) == 2
    await node.assert_nothing_held()


async def test_commit_after_expiry(node: Node) -> None:
    who = node.attach()
    space = node.space(who)
    grant = await node.reserve(who, space, chain("a", 3))
    node.clock.ahead_s += 61
    node.store.keeper.wake()
    await node.until(lambda: not node.filling.reservations)
    with pytest.raises(ReservationExpired):
        await node.store.commit(who.session, grant.reservation_id, None, durable=False)
    assert node.found(who, space, chain("a", 3)) == 0
    await node.assert_nothing_held()


async def test_expiry_in_the_middle_of_a_commit_is_told(node: Node) -> None:
    """A commit that stores nothing because its reservation ended must not look like a success."""
    who = node.attach()
    space = node.space(who)
    grant = await node.reserve(who, space, chain("a", 3))
    gate = node.dram.hold("write")
    task = asyncio.create_task(
        node.store.commit(who.session, grant.reservation_id, None, durable=True)
    )
    await reached(gate)
    node.clock.ahead_s += 61
    node.store.keeper.wake()
    [reservation] = node.filling.reservations.values()
    await node.until(lambda: reservation.ended)
    node.dram.heal()
    with pytest.raises(ReservationExpired):
        await task
    assert node.found(who, space, chain("a", 3)) == 0
    await node.assert_nothing_held()


async def test_a_failed_copy_gives_everything_back(node: Node) -> None:
    who = node.attach()
    space = node.space(who)
    node.dram.fail_write(2)
    grant = await node.reserve(who, space, chain("a", 3))
    with pytest.raises(Exception, match="planned"):
        await node.store.commit(who.session, grant.reservation_id, None, durable=False)
    await node.assert_nothing_held()
    await node.put(who, space, chain("a", 3))
    assert await node.read(who, space, chain("a", 3)) == 3


async def test_child_before_parent_and_a_gap(node: Node) -> None:
    who = node.attach()
    space = node.space(who)
    keys = chain("a", 9)
    for start in (6, 3, 0):
        part = keys[start : start + 3]
        await node.put(who, space, part, parent=keys[start - 1] if start else b"")
        node.assert_sound()
        assert node.found(who, space, keys) == (9 if start == 0 else 0)
    assert await node.read(who, space, keys) == 9


async def test_write_after_commit_changes_nothing_stored(node: Node) -> None:
    who = node.attach()
    space = node.space(who)
    keys = chain("a", 4)
    grant = await node.reserve(who, space, keys)
    assert grant.table is not None
    node.fill(who, grant, keys)
    await node.store.commit(who.session, grant.reservation_id, None, durable=True)
    for at in range(4):
        who.write(grant.table, at, b"\xff" * BLOCK_BYTES)
    assert await node.read(who, space, keys) == 4
    with pytest.raises(TypeError):  # the read arena cannot be written by its readers
        next(iter(who.arenas.values())).view(who.arenas.popitem()[1].layout.base_offset, 1)[0] = 1


async def test_room_of_the_write_arena_is_waited_for(start: Start) -> None:
    """DRAM has room, the write arena has none: two waiters must not keep each other awake."""
    node = await start(write_arena_bytes=4 * BLOCK_BYTES, dram_blocks=64)
    who = node.attach()
    space = node.space(who)
    first = await node.reserve(who, space, chain("a", 4))
    assert first.covered_count == 4
    wakes = 0
    wait = node.store.keeper.progress.wait

    async def counting(timeout_s: float) -> bool:
        nonlocal wakes
        wakes += 1
        return await wait(timeout_s)

    node.store.keeper.progress.wait = counting  # type: ignore[method-assign]
    waiting = [
        asyncio.create_task(node.reserve(who, space, chain(n, 2), deadline_s=0.5)) for n in range(3)
    ]
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(result, TierFull) for result in results)
    assert wakes < 50, "a hot loop"
    node.store.abort(who.session, first.reservation_id)
    await node.put(who, space, chain("b", 9))
    assert await node.read(who, space, chain("b", 9)) == 9
    await node.assert_nothing_held()


async def test_a_block_larger_than_the_write_arena(start: Start) -> None:
    node = await start(write_arena_bytes=BLOCK_BYTES, dram_blocks=64)
    who = node.attach()
    big = BlockFormat(2, 1, 64, "bfloat16", 16)
    with pytest.raises((InvalidRequest, TierFull)):
        await node.put(who, node.space(who, "big", big), chain("a", 1), deadline_s=0.1)


# --- shards, groups, trust


async def test_two_shards(node: Node) -> None:
    scheduler = node.attach(group="g")
    workers = [node.attach(group="g"), node.attach(group="g")]
    form = BlockFormat(1, 2, 64, "bfloat16", 16, shards=2)
    space = node.space(scheduler, "tp", form)
    keys = chain("a", 5)

    await node.put(workers[0], space, keys, shard=0)
    assert node.found(scheduler, space, keys) == 0
    assert node.store.check() == []
    await node.put(workers[1], space, keys, shard=1)
    assert node.found(scheduler, space, keys) == 5
    assert node.store.check() == []

    for n in range(6):  # pushed out of DRAM
        for shard, worker in enumerate(workers):
            await node.put(worker, space, chain(n, 10), shard=shard)
    answer = node.store.lookup(
        scheduler.session, [GroupQuery(space, Keys.of(keys))],
        lease=True, prefetch=False, touch=False, shard=0,
    )  # fmt: skip
    lease_id = answer.leases[0].lease_id
    for shard, worker in enumerate(workers):
        grant, _ = await node.store.lease(
            worker.session, None, lease_id, shard=shard, deadline_s=10
        )
        assert grant.table is not None
        assert worker.contents(grant.table) == [payload(k, 4096, shard) for k in keys]
    # Everybody who joined holds it: the last one to let go ends it.
    for who in (*workers, scheduler):
        assert lease_id in node.ledger.leases
        assert node.store.release(who.session, [lease_id]) == 1
    await node.assert_nothing_held()


async def test_many_multi_shard_blocks_through_a_small_dram(node: Node) -> None:
    workers = [node.attach(), node.attach()]
    form = BlockFormat(1, 2, 64, "bfloat16", 16, shards=2)
    space = node.space(workers[0], "tp", form)
    chains = [chain(n, 20) for n in range(6)]  # 240 slots, DRAM has 64
    for keys in chains:
        await asyncio.gather(
            *(node.put(who, space, keys, shard=shard) for shard, who in enumerate(workers))
        )
        node.assert_sound()
    for keys in chains:
        for shard, who in enumerate(workers):
            assert await node.read(who, space, keys, shard=shard) == 20
    await node.assert_nothing_held()


async def test_half_of_the_shards_is_nothing(node: Node) -> None:
    who = node.attach()
    form = BlockFormat(1, 2, 64, "bfloat16", 16, shards=2)
    space = node.space(who, "tp", form)
    grant = await node.reserve(who, space, chain("a", 3), shard=1)
    node.fill(who, grant, chain("a", 3), 1)
    result = await node.store.commit(who.session, grant.reservation_id, None, durable=False)
    assert (result.stored_count, result.partial_count) == (0, 3)
    assert node.found(who, space, chain("a", 3)) == 0
    node.clock.ahead_s += 61
    node.store.keeper.wake()
    await node.until(lambda: not node.filling.partials)
    await node.assert_nothing_held()


async def test_sliding_window_group(node: Node) -> None:
    who = node.attach()
    sliding = BlockFormat(1, 1, 64, "bfloat16", 16, group=GroupKind.SLIDING, window_tokens=40)
    full, window = node.space(who, "f"), node.space(who, "w", sliding)
    keys = chain("a", 12)
    await node.put(who, full, keys)
    await node.put(who, window, keys[6:], parent=keys[5])
    answer = node.store.lookup(
        who.session, [GroupQuery(full, Keys.of(keys)), GroupQuery(window, Keys.of(keys))],
        lease=True, prefetch=False, touch=False, shard=0,
    )  # fmt: skip
    assert answer.token_count == 12 * 16
    assert [g.first_needed for g in answer.groups] == [0, 9]
    for lease in answer.leases:
        assert lease.table is not None
        assert who.contents(lease.table) == [payload(k) for k in keys[lease.first_needed :]]
    node.store.release(who.session, [lease.lease_id for lease in answer.leases])
    await node.assert_nothing_held()


async def test_predicted_cut_of_one_group_cuts_no_lease_of_several(node: Node) -> None:
    """Loading that is slower than prefill: what a lease holds is what the answer says."""
    who = node.attach()
    spec_full, spec_window = node.space(who, "f"), node.space(who, "w")
    keys = chain("a", 6)
    await node.put(who, spec_full, keys)
    await node.put(who, spec_window, keys)
    for space in (spec_full, spec_window):
        node.ledger.space(space).prefill_tokens_per_s = 1e12
    answer = node.store.lookup(
        who.session,
        [GroupQuery(s, Keys.of(keys)) for s in (spec_full, spec_window)],
        lease=True, prefetch=False, touch=False, shard=0,
    )  # fmt: skip
    for one, lease in zip(answer.groups, answer.leases, strict=False):
        assert lease.block_count == one.block_count
        assert lease.table is not None
        assert len(lease.table.slots) // 4 == lease.block_count - lease.first_needed
        assert answer.token_count == one.block_count * FORMAT.block_tokens
    node.store.release(who.session, [lease.lease_id for lease in answer.leases])


async def test_single_tenant_trust_end_to_end(start: Start) -> None:
    node = await start(trust="single-tenant")
    who = node.attach()
    assert who.session.room is None
    space = node.space(who)
    chains = [chain(n, 32) for n in range(6)]
    for keys in chains:
        await node.put(who, space, keys)
    for keys in chains:
        assert await node.read(who, space, keys) == 32
    await node.close()
    node = await start(within=node.config.state.dir.parent, trust="single-tenant")
    who = node.attach()
    space = node.space(who)
    for keys in chains:
        assert await node.read(who, space, keys) == 32
    # A slot whose writer did not commit comes back when that process is gone, not before.
    await node.reserve(who, space, chain("open", 4))
    node.clock.ahead_s += 1000
    node.store.keeper.wake()
    await node.store.flush(5)
    assert len(node.filling.reservations) == 1
    node.store.end_session(who.session)
    await node.assert_nothing_held()
