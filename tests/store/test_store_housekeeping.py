"""The day's budget of writes, timed syncs, and what is not written at all."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from stores import BLOCK_BYTES, Node, chain, reached

from kvtier.block import SlotIO, TierId

Start = Callable[..., Awaitable[Node]]


def set_up(node: Node, **changes: Any) -> None:
    """A reload of the configuration."""
    config = node.store.keeper.config
    ssd = replace(config.tiers.ssd, **changes)
    node.store.keeper.reconfigure(replace(config, tiers=replace(config.tiers, ssd=ssd)))


def written(node: Node) -> int:
    slots: int = node.ssd.counts().written_slots
    return slots


async def test_a_spent_budget_drops_instead_of_demoting_and_a_larger_one_ends_that(
    start: Start,
) -> None:
    node = await start(dram_blocks=32)
    who = node.attach()
    space = node.space(who)
    housekeeping = node.store.keeper.housekeeping
    set_up(node, write_bytes_per_day_max=8 * 2 * BLOCK_BYTES)
    for number in range(8):
        await node.put(who, space, chain(f"a{number}", 8))
    await node.until(lambda: node.ledger.spent_tiers == {TierId.SSD})
    await node.quiet()
    before = written(node)
    assert before * BLOCK_BYTES < housekeeping.day_bytes
    assert "within a day" in housekeeping.problem
    [_, ssd] = node.store.counts(0).tiers
    assert (ssd.state, ssd.written_day_bytes) == ("serving", housekeeping.day_bytes)
    assert ssd.detail == housekeeping.problem

    for number in range(8):
        await node.put(who, space, chain(f"b{number}", 8))
    await node.quiet()
    assert written(node) == before, "demoted beyond the budget"
    await node.put(who, space, chain("asked for", 4), durable=True)
    assert written(node) == before + 4, "what was asked for is written all the same"
    assert await node.read(who, space, chain("asked for", 4)) == 4

    set_up(node, write_bytes_per_day_max=1 << 40)
    await node.until(lambda: not node.ledger.spent_tiers)
    assert not housekeeping.problem
    for number in range(8):
        await node.put(who, space, chain(f"c{number}", 8))
    await node.quiet()
    assert written(node) > before + 4


async def test_what_was_written_today_is_known_after_a_restart(start: Start) -> None:
    node = await start()
    who = node.attach()
    await node.put(who, node.space(who), chain("a", 4), durable=True)
    known = node.store.keeper.housekeeping.day_bytes
    assert known >= 4 * BLOCK_BYTES
    await node.close()
    again = await start(within=node.config.state.dir.parent)
    assert again.store.keeper.housekeeping.day_bytes == known


async def test_a_block_that_is_on_the_ssd_is_never_written_again(start: Start) -> None:
    node = await start(dram_blocks=32)
    who = node.attach()
    space = node.space(who)
    keys = chain("kept", 8)
    write, count = node.ssd.write, Counter[bytes]()

    def counted(batch: Sequence[SlotIO]) -> None:
        count.update(item.label.key for item in batch)
        write(batch)

    node.ssd.write = counted
    await node.put(who, space, keys, durable=True)
    for number in range(3):
        for other in range(4):
            await node.put(who, space, chain(f"{number}-{other}", 8))  # they go from memory
        await node.quiet()
        assert await node.read(who, space, keys) == 8  # and come back
        await node.store.make_durable(who.session, node.query(space, keys))
        await node.put(who, space, keys, durable=True)  # computed anew
    assert [count[key] for key in keys] == [1] * 8
    assert len(count) > 8


async def test_what_was_cleared_while_it_waited_is_not_written(start: Start) -> None:
    node = await start(dram_blocks=128)
    who = node.attach()
    space = node.space(who)
    gate = node.ssd.hold("write")
    for number in range(14):
        await node.put(who, space, chain(f"a{number}", 8))
    flush = asyncio.create_task(node.store.flush(20))
    await reached(gate)
    await node.until(lambda: len(node.moves.moves) >= 64)
    await node.store.clear_namespace(who.session, space)
    node.ssd.heal()
    await flush
    await node.quiet()
    assert written(node) < 64, "of all that was planned only what was under way"
    assert node.ledger.slots[TierId.SSD].used_bytes == 0


async def test_what_was_demoted_is_synced_within_the_time_set(start: Start) -> None:
    node = await start(dram_blocks=32)
    who = node.attach()
    space = node.space(who)
    set_up(node, sync_every_s=0.0)
    for number in range(8):
        await node.put(who, space, chain(f"a{number}", 8))
    await node.quiet()
    assert written(node)
    assert node.ssd.has_unsynced
    set_up(node, sync_every_s=0.01)
    await node.until(lambda: not node.ssd.has_unsynced)


async def test_a_reload_reaches_the_group_commit(start: Start) -> None:
    node = await start()
    set_up(node, group_commit_s=0.5, group_commit_bytes_max=123)
    group = node.ssd.writer.group
    assert (group.wait_s, group.bytes_max) == (0.5, 123)
