"""A store serves while its SSD tier comes back; what clients do meanwhile wins."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from stores import Node, chain, reached

from kvtier import recovering
from kvtier.errors import DaemonUnavailable, TierFailed
from kvtier.testing.faults import Gate

Start = Callable[..., Awaitable[Node]]


async def left(start: Start, *, seed: str = "a", count: int = 40, clean: bool = True) -> Node:
    """A closed store whose SSD tier has a chain of so many blocks."""
    node = await start()
    who = node.attach()
    await node.put(who, node.space(who), chain(seed, count))
    assert (await node.store.flush(20))[1] == 0
    await node.close()
    if not clean:
        (node.config.state.dir / "clean").unlink()
    return node


async def held(node: Node) -> tuple[Node, Gate]:
    """Started on the same directory, and held before it reads what is there."""
    again = Node(node.config.state.dir.parent)
    again.prepare()
    gate = again.ssd.hold("find")
    await again.open(recovered=False)
    await reached(gate)
    return again, gate


async def freed(node: Node, gate: Gate) -> None:
    gate.open()
    await node.recovered()
    await node.quiet()
    node.assert_sound()


async def test_it_serves_while_it_recovers(start: Start) -> None:
    node, gate = await held(await left(start))
    who = node.attach()
    space = node.space(who)
    assert node.tier_state("ssd") == "recovering"
    assert node.store.counts(1).state == "serving"
    assert node.found(who, space, chain("a", 40)) == 0
    await node.put(who, space, chain("new", 20))
    assert await node.read(who, space, chain("new", 20)) == 20
    node.assert_sound()
    await freed(node, gate)
    assert node.tier_state("ssd") == "serving"
    assert node.found(who, space, chain("a", 40)) == 40
    assert await node.read(who, space, chain("a", 40)) == 40
    assert node.store.counts(1).recovered_blocks == 40
    await node.store.flush(20)
    await node.close()


async def test_what_is_stored_meanwhile_is_merged(start: Start) -> None:
    node, gate = await held(await left(start))
    who = node.attach()
    space = node.space(who)
    await node.put(who, space, chain("a", 10))  # the same bytes
    end = chain("end", 4)
    await node.put(who, space, end, parent=chain("a", 40)[-1])
    await freed(node, gate)
    assert node.found(who, space, [*chain("a", 40), *end]) == 44
    assert node.ledger.slots[node.ledger.top].counts().used_slots == 14
    assert node.blocks_in("ssd") == 40
    assert node.ledger.dirty_blocks() == 4
    assert await node.read(who, space, [*chain("a", 40), *end]) == 44
    await node.close()


async def test_an_evict_waits_and_takes_what_came_back(start: Start) -> None:
    node, gate = await held(await left(start))
    who = node.attach()
    space = node.space(who)
    evicting = asyncio.create_task(node.evict(who, space, chain("a", 40)[30:31]))
    await asyncio.sleep(0)
    assert not evicting.done(), "nothing was evicted yet: it cannot promise that"
    await freed(node, gate)
    assert await evicting == 10
    assert node.found(who, space, chain("a", 40)) == 30
    kept = node.config.state.dir
    await node.close()
    for lost in (False, True):
        if lost:
            for file in (kept / "catalogue").iterdir():
                file.unlink()
        again = Node(kept.parent)
        await again.open()
        one = again.attach()
        assert again.found(one, again.space(one), chain("a", 40)) == 30
        again.assert_sound()
        await again.close()


async def test_an_evict_of_new_and_old_blocks_of_one_chain(start: Start) -> None:
    node, gate = await held(await left(start))
    who = node.attach()
    space = node.space(who)
    await node.put(who, space, chain("a", 12))
    evicting = asyncio.create_task(node.evict(who, space, chain("a", 40)[8:9]))
    await node.until(lambda: node.found(who, space, chain("a", 12)) == 8)
    await freed(node, gate)
    assert await evicting == 4 + 32
    assert node.found(who, space, chain("a", 40)) == 8
    await node.close()


async def test_a_cleared_namespace_stays_empty(start: Start) -> None:
    node, gate = await held(await left(start))
    who = node.attach()
    space = node.space(who)
    await node.put(who, space, chain("a", 5))
    assert await node.store.clear_namespace(who.session, space) == (2, 5)
    await node.put(who, space, chain("new", 3))
    await freed(node, gate)
    assert node.found(who, space, chain("a", 40)) == 0
    assert node.found(who, space, chain("new", 3)) == 3
    assert node.blocks_in("ssd") == 0
    await node.close()
    again = Node(node.config.state.dir.parent)
    await again.open()
    one = again.attach()
    assert again.found(one, again.space(one), chain("a", 40)) == 0
    assert again.found(one, again.space(one), chain("new", 3)) == 3
    await again.close()


async def test_cleared_between_reading_and_adopting(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The records were read with the old epoch: none of them may come in."""
    old = await left(start)
    node = Node(old.config.state.dir.parent)
    node.prepare()
    read = node.ssd.tier.find
    done, go = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def find(**how: object) -> object:
        found = read(**how)
        loop.call_soon_threadsafe(done.set)
        asyncio.run_coroutine_threadsafe(go.wait(), loop).result(20)
        return found

    monkeypatch.setattr(node.ssd.tier, "find", find)
    await node.open(recovered=False)
    await done.wait()
    who = node.attach()
    space = node.space(who)
    await node.store.clear_namespace(who.session, space)
    go.set()
    await node.recovered()
    assert node.found(who, space, chain("a", 40)) == 0
    assert node.blocks_in("ssd") == 0
    node.assert_sound()
    await node.close()


async def test_a_durable_commit_waits(start: Start) -> None:
    node, gate = await held(await left(start))
    who = node.attach()
    space = node.space(who)
    storing = asyncio.create_task(node.put(who, space, chain("d", 3), durable=True))
    await node.until(lambda: node.found(who, space, chain("d", 3)) == 3)
    assert not storing.done()
    await freed(node, gate)
    await storing
    assert node.blocks_in("ssd") == 43
    await node.close()


async def test_nothing_is_demoted_or_dropped_before_it_is_over(start: Start) -> None:
    node, gate = await held(await left(start))
    who = node.attach()
    space = node.space(who)
    await node.put(who, space, chain("b", 60))  # above the high-water mark
    for _ in range(3):
        node.store.keeper.wake()
        await asyncio.sleep(0.01)
    assert node.found(who, space, chain("b", 60)) == 60
    assert not node.moves.moves
    await freed(node, gate)
    await node.until(lambda: node.ledger.used_share(node.ledger.top) <= 0.9)
    assert node.found(who, space, chain("b", 60)) == 60
    await node.close()


async def test_a_stop_meanwhile_loses_nothing(start: Start) -> None:
    old = await left(start)
    node, gate = await held(old)
    who = node.attach()
    evicting = asyncio.create_task(node.evict(who, node.space(who), chain("a", 1)))
    closing = asyncio.create_task(node.store.close(grace_s=5))
    await node.until(lambda: node.store.keeper.recovering._stopping)
    gate.open()
    await closing
    node.closed = True
    with pytest.raises(DaemonUnavailable):
        await evicting
    again = Node(old.config.state.dir.parent)
    await again.open()
    one = again.attach()
    assert again.found(one, again.space(one), chain("a", 40)) == 40
    await again.close()


async def test_a_stop_waits_for_what_is_only_in_memory(start: Start) -> None:
    old = await left(start)
    node, gate = await held(old)
    who = node.attach()
    await node.put(who, node.space(who), chain("new", 8))
    closing = asyncio.create_task(node.store.close(grace_s=20))
    await asyncio.sleep(0)
    gate.open()
    await closing
    node.closed = True
    again = Node(old.config.state.dir.parent)
    await again.open()
    one = again.attach()
    assert again.found(one, again.space(one), chain("new", 8)) == 8
    assert again.found(one, again.space(one), chain("a", 40)) == 40
    await again.close()


async def test_a_tier_that_fails_is_tried_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovering, "_RETRY_S", 3600.0)
    old = await left(start)
    node = Node(old.config.state.dir.parent)
    node.prepare()
    node.ssd.fail_find()
    await node.open(recovered=False)
    who = node.attach()
    space = node.space(who)
    await node.until(lambda: node.tier_state("ssd") == "failed")
    assert node.store.counts(1).state == "serving"
    await node.put(who, space, chain("new", 8))
    assert await node.read(who, space, chain("new", 8)) == 8
    with pytest.raises(TierFailed, match="planned"):
        await node.evict(who, space, chain("new", 8)[7:])
    assert node.found(who, space, chain("new", 8)) == 7
    with pytest.raises(TierFailed):
        await node.put(who, space, chain("durable", 1), durable=True)
    assert node.store.keeper.recovering.retry()
    await node.recovered()
    assert node.tier_state("ssd") == "serving"
    assert node.found(who, space, chain("a", 40)) == 40
    node.assert_sound()
    await node.close()


async def test_epochs_are_right_although_they_were_not_known(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tier could not even be loaded: a namespace was opened, another cleared without it."""
    monkeypatch.setattr(recovering, "_RETRY_S", 3600.0)
    node = await start()
    who = node.attach()
    opened, cleared = node.space(who, "opened"), node.space(who, "cleared")
    for space in (opened, cleared):
        for _ in range(4):
            await node.store.clear_namespace(who.session, space)
        await node.put(who, space, chain("a", 6))
    await node.store.flush(20)
    await node.close()

    again = Node(node.config.state.dir.parent)
    again.prepare()
    load, failing = again.ssd.tier.load, [True]

    def fails() -> None:
        if failing:
            raise TierFailed("planned: not loaded")
        load()

    monkeypatch.setattr(again.ssd.tier, "load", fails)
    await again.open(recovered=False)
    who = again.attach()
    opened, cleared = again.space(who, "opened"), again.space(who, "cleared")
    await again.put(who, opened, chain("b", 3))
    with pytest.raises(TierFailed, match="durably"):
        await again.store.clear_namespace(who.session, cleared)
    await again.put(who, cleared, chain("b", 3))
    failing.clear()
    await again.until(lambda: again.tier_state("ssd") == "failed")
    again.store.keeper.recovering.retry()
    await again.until(lambda: again.tier_state("ssd") == "serving")
    epochs = {use.spec.model: use.epoch for use in again.store.namespaces()}
    assert epochs == {"opened": 5, "cleared": 6}
    assert again.found(who, opened, chain("a", 6)) == 6
    assert again.found(who, cleared, chain("a", 6)) == 0
    for space in (opened, cleared):
        assert again.found(who, space, chain("b", 3)) == 3
    again.assert_sound()
    await again.store.flush(20)
    await again.close()
    third = Node(node.config.state.dir.parent)
    await third.open()
    who = third.attach()
    for model, found in (("opened", 6), ("cleared", 0)):
        assert third.found(who, third.space(who, model), chain("a", 6)) == found
        assert third.found(who, third.space(who, model), chain("b", 3)) == 3
    await third.close()


async def test_what_cannot_be_forgotten_keeps_the_tier_closed(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older copy left in the catalogue would come back once the newer one is evicted."""
    monkeypatch.setattr(recovering, "_RETRY_S", 3600.0)
    old = await left(start)
    node = Node(old.config.state.dir.parent)
    node.prepare()
    forget, failing = node.ssd.tier.forget, [True]

    def fails(*arguments: object, **options: object) -> None:
        if failing:
            raise TierFailed("planned: not forgotten")
        forget(*arguments, **options)

    monkeypatch.setattr(node.ssd.tier, "forget", fails)
    await node.open(recovered=False)
    await node.until(lambda: node.tier_state("ssd") == "failed")
    who = node.attach()
    space = node.space(who)
    assert await node.read(who, space, chain("a", 40)) == 40
    with pytest.raises(TierFailed):
        await node.evict(who, space, chain("a", 1))
    failing.clear()
    node.store.keeper.recovering.retry()
    await node.recovered()
    assert await node.evict(who, space, chain("a", 1)) == 0  # it went then, if not yet durably
    await node.quiet()
    node.assert_sound()
    await node.close()


async def test_a_bug_in_recovery_ends_the_store(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = await left(start)
    node = Node(old.config.state.dir.parent)
    node.prepare()

    def bug(**_: object) -> None:
        raise AssertionError("planned: a bug")

    monkeypatch.setattr(node.ssd.tier, "find", bug)
    await node.open(recovered=False)
    tending = node.store.tending
    assert tending is not None
    with pytest.raises(AssertionError, match="planned: a bug"):
        await tending
    await node.close()


async def test_a_planted_bug_is_caught(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evict that does not wait loses to what comes back: the test above would see it."""

    async def does_not_wait(_: object) -> None:
        return

    node, gate = await held(await left(start))
    monkeypatch.setattr(type(node.store.keeper.recovering), "wait", does_not_wait)
    monkeypatch.setattr(type(node.store.keeper.recovering), "is_over", True)
    who = node.attach()
    space = node.space(who)
    evicted = await node.evict(who, space, chain("a", 40)[30:31])
    monkeypatch.undo()
    await freed(node, gate)
    assert evicted == 0
    assert node.found(who, space, chain("a", 40)) == 40, "the planted bug is no bug any longer"
    await node.close()


async def test_slots_are_whole_after_many_starts(start: Start) -> None:
    """Free slots between those found again are handed out, none twice."""
    node = await left(start, count=20)
    for turn in range(3):
        again = Node(node.config.state.dir.parent)
        await again.open()
        who = again.attach()
        space = again.space(who)
        await again.evict(who, space, chain("a", 20)[15 - turn : 16 - turn])
        await again.put(who, space, chain(turn, 9), durable=True)
        assert again.found(who, space, chain("a", 20)) == 15 - turn
        for n in range(turn + 1):
            assert await again.read(who, space, chain(n, 9)) == 9
        await again.quiet()
        again.assert_sound()
        await again.close()
