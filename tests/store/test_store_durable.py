"""Durable commits of blocks that were there before, and what happens when they go meanwhile."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from stores import Node, chain, reached

from kvtier.errors import BlocksGone, EpochEnded, TierFailed

Start = Callable[..., Awaitable[Node]]


async def test_blocks_that_were_present_survive_a_kill_once_made_durable(
    start: Start, tmp_path: Path
) -> None:
    node = await start()
    who = node.attach()
    space = node.space(who)
    keys = chain("a", 10)
    await node.put(who, space, keys)
    assert node.blocks_in("ssd") == 0
    await node.store.make_durable(who.session, node.query(space, keys))
    assert node.blocks_in("ssd") == 10
    shutil.copytree(node.config.state.dir, tmp_path / "after" / "state")

    after = await start(within=tmp_path / "after")
    who = after.attach()
    assert await after.read(who, after.space(who), keys) == 10


async def test_blocks_evicted_meanwhile_are_not_promised(node: Node) -> None:
    who = node.attach()
    space = node.space(who)
    keys = chain("a", 4)
    await node.put(who, space, keys)
    gate = node.ssd.hold("write")
    task = asyncio.create_task(node.store.make_durable(who.session, node.query(space, keys)))
    await reached(gate)
    evict = asyncio.create_task(node.evict(who, space, keys[2:3]))
    await node.until(lambda: node.found(who, space, keys) == 2)
    node.ssd.heal()
    assert await evict == 2
    with pytest.raises(BlocksGone, match="2 of 4 blocks were evicted"):
        await task
    await node.store.make_durable(who.session, node.query(space, keys[:2]))


async def test_blocks_that_nobody_stored_are_gone(node: Node) -> None:
    who = node.attach()
    with pytest.raises(BlocksGone, match="store them again"):
        await node.store.make_durable(who.session, node.query(node.space(who), chain("never", 3)))


async def test_no_promise_without_a_tier_that_keeps_it(start: Start) -> None:
    node = await start(ssd_enabled=False)
    who = node.attach()
    space = node.space(who)
    await node.put(who, space, chain("a", 2))
    with pytest.raises(TierFailed, match="need the SSD tier"):
        await node.store.make_durable(who.session, node.query(space, chain("a", 2)))


async def test_no_promise_when_the_sync_fails(node: Node) -> None:
    who = node.attach()
    space = node.space(who)
    keys = chain("a", 2)
    await node.put(who, space, keys)
    node.ssd.fail_sync()
    with pytest.raises(TierFailed):
        await node.store.make_durable(who.session, node.query(space, keys))
    assert await node.read(who, space, keys) == 2


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("when", ["reserved", "copying"])
async def test_a_commit_that_a_clear_overtook_is_told(node: Node, when: str, durable: bool) -> None:
    who = node.attach()
    space = node.space(who)
    keys = chain("a", 4)
    grant = await node.reserve(who, space, keys)
    node.fill(who, grant, keys)
    gate = node.dram.hold("write") if when == "copying" else None
    if gate is None:
        await node.store.clear_namespace(who.session, space)
    commit = asyncio.create_task(
        node.store.commit(who.session, grant.reservation_id, None, durable=durable)
    )
    if gate is not None:
        await reached(gate)
        await node.store.clear_namespace(who.session, space)
        node.dram.heal()
    with pytest.raises(EpochEnded, match="cleared meanwhile: store again"):
        await commit
    assert node.found(who, space, keys) == 0
    await node.put(who, space, keys, durable=durable)
    assert await node.read(who, space, keys) == 4
