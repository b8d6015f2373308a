"""The SSD tier becomes smaller and larger while it serves."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from stores import BLOCK_BYTES, Attached, Node, chain

from kvtier.block import SLOT_BITS, BlockFormat, TierId
from kvtier.errors import (
    DaemonUnavailable,
    InvalidRequest,
    LimitReached,
    TierFailed,
    TierFull,
    Unsupported,
)
from kvtier.sections import TenantConfig
from kvtier.tiers.slab import SLAB_RESERVED_BYTES

Start = Callable[..., Awaitable[Node]]
SSD = TierId.SSD


def size_of(node: Node, segments: int) -> int:
    return segments * int(node.ssd.file_bytes)


def slabs(node: Node) -> set[int]:
    return {int(path.stem) for path in (node.config.state.dir / "slabs").iterdir()}


async def resize(node: Node, segments: int):  # type: ignore[no-untyped-def]
    return await node.store.keeper.resizing.resize(SSD, size_of(node, segments))


async def filled(
    node: Node, chains: int, *, blocks: int = 16, name: str = "r"
) -> tuple[Attached, int, list[list[bytes]]]:
    """Chains of one segment each."""
    who = node.attach()
    space = node.space(who)
    made = [chain(f"{name}{number}", blocks) for number in range(chains)]
    for keys in made:
        await node.put(who, space, keys, durable=True)
    await node.quiet()
    return who, space, made


async def whole(node: Node, who: Attached, space: int, made: list[list[bytes]]) -> int:
    """How many chains are there whole, bit for bit."""
    return sum([await node.read(who, space, keys) == len(keys) for keys in made])


async def test_smaller_moves_what_fits(start: Start, tmp_path: Path) -> None:
    node = await start(tmp_path / "node", ssd_blocks=512)  # 32 segments
    who, space, made = await filled(node, 24)
    for keys in made[:20]:  # the first segments are free again
        await node.evict(who, space, keys)
    await node.quiet()

    done = await resize(node, 8)

    assert (done.moved_blocks, done.evicted_blocks) == (64, 0)
    assert done.size_bytes == size_of(node, 8)
    assert max(slabs(node)) < 8
    assert await whole(node, who, space, made[20:]) == 4
    await node.assert_nothing_held()
    await filled(node, 3, name="new")
    assert max(slabs(node)) < 8
    await node.close()
    # Another start: the configuration decides, and all is there.
    again = await start(tmp_path / "node", ssd_blocks=512)
    assert len(again.ledger.slots[SSD].segments) == 32
    who = again.attach()
    assert await whole(again, who, again.space(who), made[20:]) == 4
    assert await whole(again, who, again.space(who), made[:20]) == 0


async def test_smaller_evicts_the_oldest_and_not_more(start: Start) -> None:
    node = await start(ssd_blocks=512, dram_blocks=32)
    who, space, made = await filled(node, 24)

    done = await resize(node, 16)

    held = node.blocks_in("ssd")
    high = node.config.tiers.ssd.high_water
    assert held * 2 * BLOCK_BYTES <= 16 * node.ledger.slots[SSD].plan.size_bytes
    assert held >= int(16 * 16 * high) - 32, "more went than had to"
    assert done.moved_blocks > 0
    assert max(slabs(node)) < 16
    assert await whole(node, who, space, made[-10:]) == 10, "the youngest stay"
    await node.assert_nothing_held()


async def test_larger_is_there_at_once(start: Start, tmp_path: Path) -> None:
    node = await start(tmp_path / "node", ssd_blocks=64, dram_blocks=32)
    await filled(node, 3)
    stray = node.config.state.dir / "slabs" / "00005.slab"
    stray.write_bytes(b"of another time")

    done = await resize(node, 40)

    assert (done.former_bytes, done.size_bytes) == (size_of(node, 4), size_of(node, 40))
    assert not stray.exists()
    who, space, made = await filled(node, 30, name="more")
    assert node.blocks_in("ssd") >= 30 * 16
    assert await whole(node, who, space, made) == 30
    assert max(slabs(node)) >= 30
    back = await resize(node, 4)
    assert back.evicted_blocks > 0
    assert max(slabs(node)) < 4
    await node.assert_nothing_held()


async def test_larger_stays_if_the_configuration_says_so(start: Start, tmp_path: Path) -> None:
    node = await start(tmp_path / "node", ssd_blocks=64, dram_blocks=32)
    await resize(node, 32)
    _, _, made = await filled(node, 20)
    await node.close()
    again = await start(tmp_path / "node", ssd_blocks=512, dram_blocks=32)
    who = again.attach()
    assert await whole(again, who, again.space(who), made) == 20
    await again.close()
    # And if it does not, what is beyond it is gone, and the rest is sound.
    small = await start(tmp_path / "node", ssd_blocks=64, dram_blocks=32)
    who = small.attach()
    assert 1 <= await whole(small, who, small.space(who), made) <= 4
    assert max(slabs(small)) < 4


async def test_larger_needs_room_on_the_disk(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    node = await start(ssd_blocks=64)
    await filled(node, 2)
    monkeypatch.setattr(node.ssd.upkeep, "room_bytes", lambda: size_of(node, 3) - 1)
    with pytest.raises(TierFull, match="min_free_bytes"):
        await resize(node, 5)  # two files are there
    assert len(node.ledger.slots[SSD].segments) == 4
    monkeypatch.undo()
    await resize(node, 5)


async def test_other_slot_sizes_move_too(start: Start) -> None:
    node = await start(ssd_blocks=512, dram_blocks=128)
    who = node.attach()
    large = node.space(who, "large", BlockFormat(1, 1, 1, "float16", 16, opaque_bytes=11000))
    first = chain("large", 8)
    _, space, made = await filled(node, 20)
    await node.put(who, large, first, durable=True)
    for keys in made[:18]:
        await node.evict(who, space, keys)
    await node.quiet()

    done = await resize(node, 4)

    assert done.moved_blocks == 40
    assert await node.read(who, large, first) == 8
    assert await whole(node, who, space, made[18:]) == 2


async def test_pinned_blocks_move_and_do_not_go(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtier.resizing._STUCK_S", 0.3)
    node = await start(ssd_blocks=256, dram_blocks=32)
    who, space, made = await filled(node, 12)
    for keys in made[6:10]:
        assert node.store.pin(who.session, node.query(space, keys)) == 16

    done = await resize(node, 6)
    assert done.evicted_blocks > 0
    assert await whole(node, who, space, made[6:10]) == 4

    with pytest.raises(TierFull, match="pinned"):
        await resize(node, 3)
    assert len(node.ledger.slots[SSD].segments) == 6
    assert await whole(node, who, space, made[6:10]) == 4
    await node.assert_nothing_held()
    await filled(node, 1, name="still")  # it takes blocks as before

    for keys in made[6:10]:
        node.store.unpin(who.session, node.query(space, keys))
    assert (await resize(node, 3)).size_bytes == size_of(node, 3)


async def test_a_failing_device_ends_it_and_nothing_is_lost(start: Start) -> None:
    node = await start(ssd_blocks=512)
    who, space, made = await filled(node, 20)
    for keys in made[:16]:
        await node.evict(who, space, keys)
    await node.quiet()
    node.ssd.fail_write(5)

    with pytest.raises(TierFailed, match="planned"):
        await resize(node, 8)

    assert node.tier_state("ssd") == "degraded"
    with pytest.raises(TierFailed, match="heal"):
        await resize(node, 8)
    await node.store.keeper.heal()
    assert await whole(node, who, space, made[16:]) == 4
    await resize(node, 8)
    assert await whole(node, who, space, made[16:]) == 4
    await node.assert_nothing_held()


async def test_damage_found_on_the_way_is_dropped(start: Start) -> None:
    node = await start(ssd_blocks=512, dram_blocks=32)
    who, space, made = await filled(node, 20)
    for keys in made[:16]:
        await node.evict(who, space, keys)
    await node.quiet()
    last = node.ledger.chains.find(node.ledger.spaces[space], made[16][15])
    assert last is not None
    [slot] = last[0].slots_of(last[1], SSD)
    path = node.config.state.dir / "slabs" / f"{slot >> SLOT_BITS:05}.slab"
    with path.open("r+b") as file:
        file.seek(SLAB_RESERVED_BYTES + (slot & ((1 << SLOT_BITS) - 1)) * 2 * BLOCK_BYTES + 5000)
        file.write(b"damaged")
        os.fsync(file.fileno())

    done = await resize(node, 8)

    assert done.moved_blocks == 63
    assert await whole(node, who, space, made[17:]) == 3
    found = node.ledger.chains.find(node.ledger.spaces[space], made[16][15])
    assert found is None or not found[0].state[found[1]] & 1 << SSD


async def test_stores_and_evicts_go_on_meanwhile(start: Start) -> None:
    node = await start(ssd_blocks=512, dram_blocks=96)
    who, space, made = await filled(node, 24)
    going = asyncio.create_task(resize(node, 12))
    await node.evict(who, space, made[23])
    more = chain("meanwhile", 16)
    await node.put(who, space, more, durable=True)
    await node.read(who, space, made[22])
    done = await going

    assert done.size_bytes == size_of(node, 12)
    assert node.found(who, space, made[23]) == 0
    assert await node.read(who, space, more) == 16
    await node.assert_nothing_held()


async def test_a_scrub_goes_on_meanwhile(start: Start) -> None:
    node = await start(ssd_blocks=512)
    _, _, _ = await filled(node, 24)
    scrub = node.store.keeper.scrubbing
    for segments in (12, 32, 6, 20):
        if scrub.use().state == "idle":
            await scrub.start(1 << 30)
        await resize(node, segments)
    await node.until(lambda: scrub.use().state == "idle")
    assert (scrub.use().damaged, scrub.use().detail) == ({}, "")
    await node.assert_nothing_held()


async def test_one_at_a_time_and_it_outlives_its_caller(start: Start) -> None:
    node = await start(ssd_blocks=512)
    await filled(node, 24)
    gate = node.ssd.hold("write")
    going = asyncio.create_task(resize(node, 8))
    assert await asyncio.to_thread(gate.reached.wait, 20)
    with pytest.raises(LimitReached):
        await resize(node, 9)
    going.cancel()
    gate.open()
    await node.until(lambda: len(node.ledger.slots[SSD].segments) == 8)
    await node.assert_nothing_held()


async def test_a_stop_ends_it(start: Start, tmp_path: Path) -> None:
    node = await start(tmp_path / "node", ssd_blocks=512)
    _, _, made = await filled(node, 24)
    gate = node.ssd.hold("write")
    going = asyncio.create_task(resize(node, 8))
    assert await asyncio.to_thread(gate.reached.wait, 20)
    closing = asyncio.create_task(node.close())
    gate.open()
    await closing
    with pytest.raises(DaemonUnavailable):
        await going
    again = await start(tmp_path / "node", ssd_blocks=512)
    who = again.attach()
    # Those that were evicted for it may be gone; no other, and no wrong byte.
    assert await whole(again, who, again.space(who), made[-6:]) == 6


async def test_what_cannot_be_is_refused(start: Start) -> None:
    tenants = (TenantConfig(name="default", uids=(0,), ssd_guaranteed_bytes=64 * BLOCK_BYTES),)
    node = await start(ssd_blocks=512, tenants=tenants)
    keeper = node.store.keeper
    with pytest.raises(InvalidRequest, match="guaranteed"):
        await resize(node, 1)
    with pytest.raises(InvalidRequest, match="1 to 4096 segments"):
        await keeper.resizing.resize(SSD, 100)
    with pytest.raises(InvalidRequest, match="1 to 4096 segments"):
        await resize(node, 5000)
    with pytest.raises(Unsupported, match=r"tiers\.dram\.size_bytes and restart"):
        await keeper.resizing.resize(TierId.DRAM, 1 << 30)
    with pytest.raises(InvalidRequest, match="no cxl tier"):
        await keeper.resizing.resize(TierId.CXL, 1 << 30)
    assert (await resize(node, 32)).moved_blocks == 0  # as it was
    assert replace(node.config.tiers.ssd) == keeper.resizing.config
