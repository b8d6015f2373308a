"""A purge: nothing of the namespace is anywhere when it answers, and others have what they had."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from stores import Node, chain, payload, reached

from kvtier.errors import BlocksGone, BlocksHeld, EpochEnded, TierFailed
from kvtier.sections import NamespaceConfig

Start = Callable[..., Awaitable[Node]]

ENCRYPTED: dict[str, Any] = {
    "namespaces": (NamespaceConfig(model="m", encrypt=True),),
    "master": b"m" * 32,
}
KINDS = pytest.mark.parametrize("options", [{}, ENCRYPTED], ids=["plain", "encrypted"])


@pytest.fixture(autouse=True)
def _library(request: pytest.FixtureRequest) -> None:
    if "encrypted" in request.node.name:
        pytest.importorskip("cryptography")


async def filled(node: Node) -> tuple[Any, int, int, list[bytes], list[bytes]]:
    """A client; blocks of a namespace to purge, on SSD, in memory, and freed; and a neighbour's."""
    who = node.attach()
    mine, other = node.space(who), node.space(who, "n")
    keys, kept = chain("k", 40), chain("o", 20)
    await node.put(who, mine, keys[:32], durable=True)
    await node.put(who, other, kept, durable=True)
    await node.put(who, mine, keys[32:], parent=keys[31])
    gone = chain("gone", 4)
    await node.put(who, mine, gone, durable=True)
    await node.evict(who, mine, gone[:1])
    return who, mine, other, keys + gone, kept


@KINDS
async def test_nothing_is_left(start: Start, options: dict[str, Any]) -> None:
    node = await start(**options)
    who, mine, other, keys, kept = await filled(node)
    assert (node.plaintext_of(keys) > 0) is not bool(options)
    done = await node.store.purge(mine, 10)
    assert done.block_count == 40
    assert done.key_destroyed is bool(options)
    assert (done.wiped_bytes == 0) is bool(options)
    assert node.plaintext_of(keys) == 0
    assert node.found(who, mine, keys) == 0
    assert node.blocks_in("ssd") == 20
    assert await node.read(who, other, kept) == 20
    await node.quiet()
    node.assert_sound()

    again = chain("again", 8)
    await node.put(who, mine, again, durable=True)
    assert await node.read(who, mine, again) == 8
    assert (node.plaintext_of(again) == 0) is bool(options)


@KINDS
@pytest.mark.parametrize("lost", ["nothing", "catalogue", "namespaces", "both"])
async def test_nothing_comes_back(start: Start, options: dict[str, Any], lost: str) -> None:
    node = await start(**options)
    _, mine, _, keys, kept = await filled(node)
    await node.store.purge(mine, 10)
    await node.close()
    state = node.config.state.dir
    if lost in ("catalogue", "both"):
        shutil.rmtree(state / "catalogue")
    if lost in ("namespaces", "both"):
        (state / "namespaces").unlink()
    node = await start(within=state.parent, **options)
    who = node.attach()
    assert node.found(who, node.space(who), keys) == 0
    assert await node.read(who, node.space(who, "n"), kept) == 20
    assert node.blocks_in("ssd") == 20
    assert node.plaintext_of(keys) == 0
    await node.put(who, node.space(who), keys[:8], durable=True)
    assert await node.read(who, node.space(who), keys[:8]) == 8


async def test_who_reads_is_waited_for_or_named(node: Node) -> None:
    who, mine, _, keys, _ = await filled(node)
    grant = await node.lease(who, mine, keys[:8])
    with pytest.raises(BlocksHeld, match=r"1 leases of namespace 1 are held by test \(pid \d+\)"):
        await node.store.purge(mine, 0.2)
    assert grant.table is not None
    assert who.contents(grant.table) == [payload(key) for key in keys[:8]]
    assert node.found(who, mine, keys[:40]) == 40, "nothing was changed"

    purge = asyncio.create_task(node.store.purge(mine, 20))
    await node.until(lambda: node.ledger.space(mine).purging)
    assert node.found(who, mine, keys) == 0, "nobody may begin to read"
    with pytest.raises(BlocksGone):
        await node.reserve(who, mine, chain("late", 1))
    assert not purge.done()
    node.store.release(who.session, [grant.lease_id])
    assert (await purge).block_count == 40
    assert node.plaintext_of(keys) == 0


@KINDS
async def test_writes_that_race_with_it_leave_nothing(
    start: Start, options: dict[str, Any]
) -> None:
    node = await start(**options)
    who = node.attach()
    mine = node.space(who)
    moving, copying, held = chain("moving", 8), chain("copying", 4), chain("held", 4)
    await node.put(who, mine, moving)
    committing = await node.reserve(who, mine, copying)
    node.fill(who, committing, copying)
    opened = await node.reserve(who, mine, held)
    node.fill(who, opened, held)
    ssd_gate, dram_gate = node.ssd.hold("write"), node.dram.hold("write")
    flushing = asyncio.create_task(node.store.flush(20))
    commit = asyncio.create_task(
        node.store.commit(who.session, committing.reservation_id, None, durable=False)
    )
    await reached(ssd_gate)
    await reached(dram_gate)

    purge = asyncio.create_task(node.store.purge(mine, 20))
    await node.until(lambda: node.ledger.space(mine).epoch > 1)
    node.dram.heal()
    with pytest.raises(EpochEnded):
        await commit
    assert not purge.done(), "a write is under way"
    node.ssd.heal()
    await purge
    await flushing
    with pytest.raises(EpochEnded):
        await node.store.commit(who.session, opened.reservation_id, None, durable=True)
    for keys in (moving, copying, held):
        assert node.found(who, mine, keys) == 0
        assert node.plaintext_of(keys) == 0
    assert node.blocks_in("ssd") == node.blocks_in("dram") == 0
    await node.assert_nothing_held()


@KINDS
async def test_a_disk_that_fails_is_told_of(start: Start, options: dict[str, Any]) -> None:
    node = await start(**options)
    who, mine, _, keys, _ = await filled(node)
    node.ssd.fail_erase(for_ever=True)
    with pytest.raises(TierFailed):
        await node.store.purge(mine, 10)
    assert node.found(who, mine, keys) == 0
    node.ssd.heal()
    await node.store.purge(mine, 10)
    assert node.plaintext_of(keys) == 0
    await node.quiet()


async def test_a_namespace_that_is_only_in_memory(start: Start) -> None:
    node = await start(ssd_enabled=False)
    who = node.attach()
    space = node.space(who)
    await node.put(who, space, chain("a", 4))
    done = await node.store.purge(space, 1)
    assert (done.block_count, done.key_destroyed, done.wiped_bytes) == (4, False, 0)
    assert node.found(who, space, chain("a", 4)) == 0


async def test_encrypted_under_another_key_everything_misses(
    tmp_path: Path, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    node = await start(**ENCRYPTED)
    _, _, _, keys, kept = await filled(node)
    await node.close()
    place = node.config.state.dir.parent
    other = ENCRYPTED | {"master": b"x" * 32}
    node = await start(within=place, **other)
    who = node.attach()
    mine = node.space(who)
    assert node.found(who, mine, keys) == 0
    assert (await node.lease(who, mine, keys)).table is None
    assert (await node.reserve(who, mine, chain("new", 2))).table is None
    assert await node.read(who, node.space(who, "n"), kept) == 20
    counts = node.store.counts(10)
    [locked] = [use for use in counts.namespaces if use.locked]
    assert (locked.block_count, locked.encrypted, counts.corrupt_count) == (40, True, 0)
    [ssd] = [use for use in counts.tiers if use.tier.label == "ssd"]
    assert "1 namespaces are encrypted under another key" in ssd.detail
    await node.close()
    assert "encrypted under another key" in caplog.text

    node = await start(within=place, **ENCRYPTED)
    who = node.attach()
    assert await node.read_pieces(who, node.space(who), keys[:40]) == 40
    await node.close()
    node = await start(within=place, **other)
    who = node.attach()
    await node.store.purge(node.space(who), 10)
    await node.put(who, node.space(who), keys[:4], durable=True)
    assert await node.read(who, node.space(who), keys[:4]) == 4
    caplog.clear()
