"""Blocks of namespaces with a greatest age: gone in time, from every tier and off the disk."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from stores import Clock, Node, chain

from kvtier.sections import NamespaceConfig

Start = Callable[..., Awaitable[Node]]

HOUR_S = 3600.0
AGED = (NamespaceConfig(model="m", max_age_s=HOUR_S),)


async def gone(node: Node, count: int) -> None:
    """So many blocks are left, and nothing is to be erased any longer."""
    await node.until(lambda: node.blocks_in("ssd") + node.blocks_in("dram") == count)
    await node.quiet()


async def test_old_blocks_go_and_young_ones_stay(start: Start) -> None:
    node = await start(namespaces=AGED)
    who = node.attach()
    mine, other = node.space(who), node.space(who, "n")
    old, young, kept = chain("k", 8), chain("k", 12)[8:], chain("o", 8)
    await node.put(who, mine, old, durable=True)
    await node.put(who, other, kept, durable=True)
    node.clock.ahead_s += HOUR_S / 2
    # The clock is read four times a second.
    await node.until(lambda: node.ledger.chains.now_s >= node.store.keeper.ageing.now_s() - 2)
    await node.put(who, mine, young, parent=old[-1], durable=True)
    await node.put(who, mine, chain("memory", 3))
    assert node.plaintext_of(old) == 8
    node.clock.ahead_s += HOUR_S / 2
    await node.until(lambda: node.found(who, mine, old[:1]) == 0)
    await node.until(lambda: node.plaintext_of(old) == 0)
    await node.quiet()
    assert node.plaintext_of(young) == 4
    assert await node.read(who, other, kept) == 8
    assert await node.read(who, mine, chain("memory", 3)) == 3
    await node.put(who, mine, old, durable=True)
    assert await node.read(who, mine, old + young) == 12, "what hung on it counts again"
    node.clock.ahead_s += HOUR_S
    await gone(node, 16)
    assert node.plaintext_of([*old, *young]) == 0
    assert node.plaintext_of(kept) == 8
    await node.assert_nothing_held()


async def test_a_restart_makes_nothing_younger(start: Start) -> None:
    node = await start(namespaces=AGED)
    who = node.attach()
    await node.put(who, node.space(who), chain("a", 8), durable=True)
    await node.put(who, node.space(who, "n"), chain("a", 8), durable=True)
    await node.close()
    place = node.config.state.dir.parent
    for passed_s, left in ((HOUR_S / 2, 8), (HOUR_S, 0)):
        clock = Clock(wall_ahead_s=passed_s)
        node = await start(within=place, namespaces=AGED, clock=clock)
        who = node.attach()
        if left:
            assert await node.read(who, node.space(who), chain("a", 8)) == left
        else:
            await gone(node, 8)
        assert await node.read(who, node.space(who, "n"), chain("a", 8)) == 8
        await node.close()
    assert node.plaintext_of(chain("a", 8)) == 8  # the neighbour's are the same bytes


async def test_a_clock_that_jumps_back_keeps_nothing_for_ever(start: Start) -> None:
    clock = Clock()
    node = await start(namespaces=AGED, clock=clock)
    who = node.attach()
    await node.put(who, node.space(who), chain("a", 8), durable=True)
    clock.wall_ahead_s -= 1000 * HOUR_S
    clock.ahead_s += HOUR_S
    await gone(node, 0)
    await node.put(who, node.space(who), chain("b", 8), durable=True)
    await node.close()
    # What lies there is of the future now: nobody knows how old it is.
    clock = Clock(wall_ahead_s=-1000 * HOUR_S)
    node = await start(within=node.config.state.dir.parent, namespaces=AGED, clock=clock)
    await gone(node, 0)
    assert node.plaintext_of(chain("b", 8)) == 0


async def test_what_is_displaced_leaves_no_bytes_either(start: Start) -> None:
    node = await start(namespaces=AGED, ssd_blocks=48, dram_blocks=48)
    who = node.attach()
    space = node.space(who)
    for n in range(12):
        await node.put(who, space, chain(n, 16))
    await node.store.flush(10)
    await node.quiet()
    held = node.blocks_in("ssd")
    every = [key for n in range(12) for key in chain(n, 16)]
    assert 0 < held < len(every)
    assert node.plaintext_of(every) <= held


async def test_rules_change_while_it_runs(start: Start) -> None:
    node = await start()
    who = node.attach()
    await node.put(who, node.space(who), chain("a", 8), durable=True)
    node.clock.ahead_s += HOUR_S
    import dataclasses

    node.store.reconfigure(dataclasses.replace(node.config, namespaces=AGED))
    await gone(node, 0)


@pytest.mark.parametrize("count", [1, 700])
async def test_leases_end_first(start: Start, count: int) -> None:
    node = await start(namespaces=AGED, dram_blocks=1024)
    who = node.attach()
    space = node.space(who)
    await node.put(who, space, chain("a", count))
    grant = await node.lease(who, space, chain("a", count))
    node.clock.ahead_s += HOUR_S
    await node.until(lambda: node.blocks_in("dram") == 0)
    assert grant.table is not None
    assert len(who.contents(grant.table)) == count, "who reads goes on reading"
    node.store.release(who.session, [grant.lease_id])
    await node.assert_nothing_held()
