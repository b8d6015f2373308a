"""Every async verb, cancelled at every one of its suspensions: nothing leaks, all goes on.

A verb is run again and again; the n-th time its task is cancelled when it suspends for the n-th
time. What the tier's threads do is parked once and let go after the cancellation, so that a
cancelled caller meets work that still runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any

import pytest
from stores import Attached, Node, chain

from kvtier.errors import KvTierError

Start = Callable[..., Awaitable[Node]]
SUSPENSIONS_MAX = 60


class CancelledAt:
    """Awaits `work`; cancels its own task as it suspends for the `nth` time."""

    def __init__(self, work: Coroutine[Any, Any, Any], nth: int) -> None:
        self.work, self.nth = work, nth
        self.suspensions = 0
        self.cancelled = False

    def __await__(self) -> Generator[Any, Any, Any]:
        inner = self.work.__await__()
        sent: BaseException | None = None
        while True:
            try:
                waited = inner.throw(sent) if sent is not None else next(inner)
            except StopIteration as stop:
                return stop.value
            sent = None
            self.suspensions += 1
            if self.suspensions == self.nth:
                self.cancelled = True
                task = asyncio.current_task()
                assert task is not None
                asyncio.get_running_loop().call_soon(task.cancel)
            try:
                yield waited
            except BaseException as error:  # noqa: BLE001 - handed on
                sent = error


async def reserve(node: Node, who: Attached, space: int, n: int) -> None:
    """Waits for room: DRAM is full of blocks that must go down first."""
    await node.reserve(who, space, chain(("r", n), 40), deadline_s=5)


async def commit(node: Node, who: Attached, space: int, n: int) -> None:
    await node.put(who, space, chain(("c", n), 8), deadline_s=5)


async def commit_durably(node: Node, who: Attached, space: int, n: int) -> None:
    await node.put(who, space, chain(("d", n), 8), durable=True, deadline_s=5)


async def lease(node: Node, who: Attached, space: int, n: int) -> None:
    """Of blocks on disk."""
    grant = await node.lease(who, space, chain(("old", n % 6), 16), deadline_s=5)
    assert grant.block_count == 16
    node.store.release(who.session, [grant.lease_id])


async def evict(node: Node, who: Attached, space: int, n: int) -> None:
    await node.evict(who, space, chain(("old", 7), 16)[:8])


async def clear(node: Node, who: Attached, space: int, n: int) -> None:
    await node.store.clear_namespace(who.session, node.space(who, "cleared"))


async def flush(node: Node, who: Attached, space: int, n: int) -> None:
    await node.store.flush(5)


async def drain(node: Node, who: Attached, space: int, n: int) -> None:
    try:
        await node.store.drain(5)
    finally:
        node.store.undrain()


VERBS = (reserve, commit, commit_durably, lease, evict, clear, flush, drain)


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)
async def test_cancelled_at_every_suspension(start: Start, verb: Any) -> None:
    node = await start(reservation_ttl_s=1000.0)
    keeper = node.attach()
    space = node.space(keeper)
    for nth in range(1, SUSPENSIONS_MAX):
        for n in range(8):
            await node.put(keeper, space, chain(("old", n), 16))
        await node.put(keeper, node.space(keeper, "cleared"), chain(nth, 4))
        who = node.attach()
        watched = CancelledAt(verb(node, who, space, nth), nth)
        try:
            async with asyncio.timeout(10):
                await run(watched)
        except asyncio.CancelledError:
            pass
        except KvTierError:
            assert watched.cancelled
        node.assert_sound()
        # What it got before it was cancelled belongs to its session, and goes with it.
        node.store.end_session(who.session)
        await node.assert_nothing_held()
        tending = node.store.tending
        assert tending is not None
        assert not tending.done()
        if not watched.cancelled:
            break
    else:
        pytest.fail(f"{verb.__name__} suspends more than {SUSPENSIONS_MAX} times")
    for n in range(8):
        assert await node.read(keeper, space, chain(("old", n), 16)[:8]) in (8, 0)
    await node.put(keeper, space, chain("after", 20), durable=True)
    assert await node.read(keeper, space, chain("after", 20)) == 20
    await node.assert_nothing_held()


async def run(watched: CancelledAt) -> None:
    async def main() -> None:
        await watched

    task = asyncio.get_running_loop().create_task(main())
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()


async def test_a_cancelled_reserve_holds_nothing(start: Start) -> None:
    """Cancelled in the very moment in which room is there: granted to nobody, or not at all."""
    node = await start()
    holder, who = node.attach(), node.attach()
    space = node.space(who)
    for turn in range(20):
        held = await node.reserve(holder, space, chain("h", 64))
        task = asyncio.create_task(node.reserve(who, space, chain(turn, 4)))
        for _ in range(turn % 4):
            await asyncio.sleep(0)
        node.store.abort(holder.session, held.reservation_id)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not who.session.reservations
        await node.assert_nothing_held()


async def test_a_cancelled_evict_erases_no_slot_that_is_written_again(node: Node) -> None:
    """The wiping thread goes on after its caller is gone: its slots are not free until it ends."""
    who = node.attach()
    space = node.space(who)
    await node.put(who, space, chain("a", 16), durable=True)
    gate = node.ssd.hold("erase")
    task = asyncio.create_task(node.evict(who, space, chain("a", 16)[:1]))
    assert await asyncio.to_thread(gate.reached.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert node.ledger.is_erasing
    await node.put(who, space, chain("b", 16), durable=True)
    node.ssd.heal()
    await node.assert_nothing_held()
    for n in range(4):
        await node.put(who, space, chain(n, 32))
    await node.quiet()
    assert await node.read(who, space, chain("b", 16)) == 16
    assert node.found(who, space, chain("a", 16)) == 0
