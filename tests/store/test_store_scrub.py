"""A scrub of the SSD tier: what it drops, what it leaves alone, how it ends and goes on."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stores import Attached, Node, chain

from kvtier.block import SLOT_BITS, Keys, Reason, TierId
from kvtier.errors import InvalidRequest, LimitReached, TierFailed
from kvtier.ledger.claims import pin, unpin
from kvtier.tiers.slab import SLAB_RESERVED_BYTES
from kvtier.tiers.slots import SLOT_HEADER_BYTES
from kvtier.units import MIB

Start = Callable[..., Awaitable[Node]]
RATE = 1024 * MIB


def place(node: Node, space: int, key: bytes) -> tuple[Path, int, int]:
    """The slab's file, the offset of the block's slot in it, and the slot."""
    found = node.ledger.chains.find(node.ledger.spaces[space], key)
    assert found is not None
    [slot] = found[0].slots_of(found[1], TierId.SSD)
    slot_bytes = node.ledger.spaces[space].slot_bytes[TierId.SSD]
    path = node.config.state.dir / "slabs" / f"{slot >> SLOT_BITS:05}.slab"
    return path, SLAB_RESERVED_BYTES + (slot & ((1 << SLOT_BITS) - 1)) * slot_bytes, slot


def overwrite(path: Path, offset: int, content: bytes) -> None:
    fd = os.open(path, os.O_RDWR)
    os.pwrite(fd, content, offset)
    os.fsync(fd)
    os.close(fd)


async def stored(node: Node, count: int = 48) -> tuple[Attached, int, list[bytes]]:
    who = node.attach()
    space = node.space(who)
    keys = chain("scrub", count)
    await node.put(who, space, keys, durable=True)
    await node.quiet()
    return who, space, keys


def scrub(node: Node) -> Any:
    return node.store.keeper.scrubbing


async def ended(node: Node) -> Any:
    await node.until(lambda: scrub(node).use().state == "idle")
    return scrub(node).use()


async def scrubbed(node: Node) -> Any:
    await scrub(node).start(RATE)
    return await ended(node)


async def test_sound_blocks_are_read_and_left_alone(node: Node) -> None:
    who, space, keys = await stored(node)
    order = list(node.ledger.chains.policies[TierId.SSD].order())

    use = await scrubbed(node)

    assert use.block_count == len(keys)
    assert use.read_bytes >= len(keys) * 4096
    assert (use.damaged, use.stray_count, use.detail, use.progress) == ({}, 0, "", 1.0)
    assert use.ended_s > 0
    assert list(node.ledger.chains.policies[TierId.SSD].order()) == order
    assert await node.read(who, space, keys) == len(keys)
    await node.assert_nothing_held()


async def test_damage_is_dropped_by_kind_and_is_a_miss(start: Start) -> None:
    node = await start(dram_blocks=32)
    who, space, keys = await stored(node, 160)
    victims = {"payload": keys[100], "header": keys[120], "misplaced": keys[140]}
    path, offset, _ = place(node, space, victims["payload"])
    overwrite(path, offset + SLOT_HEADER_BYTES, os.urandom(4096))
    path, offset, _ = place(node, space, victims["header"])
    overwrite(path, offset, bytes(4096))
    source, at, _ = place(node, space, keys[7])
    path, offset, _ = place(node, space, victims["misplaced"])
    fd = os.open(source, os.O_RDONLY)
    other = os.pread(fd, 8192, at)
    os.close(fd)
    overwrite(path, offset, other)

    use = await scrubbed(node)

    assert use.damaged == {"payload": 1, "header": 1, "misplaced": 1}
    assert node.store.counts(1).corrupt == use.damaged
    on_ssd = 1 << TierId.SSD
    for key in victims.values():
        found = node.ledger.chains.find(node.ledger.spaces[space], key)
        assert found is None or not found[0].state[found[1]] & on_ssd
    assert await node.read(who, space, keys[:16]) == 16
    await node.assert_nothing_held()


async def test_what_is_lost_everywhere_is_a_miss_with_its_reason(start: Start) -> None:
    node = await start(dram_blocks=32)
    who, space, keys = await stored(node, 160)
    lost = next(
        at for at, key in enumerate(keys)
        if (found := node.ledger.chains.find(node.ledger.spaces[space], key))
        and found[0].state[found[1]] == 1 << TierId.SSD
    )  # fmt: skip
    path, offset, _ = place(node, space, keys[lost])
    overwrite(path, offset + SLOT_HEADER_BYTES, os.urandom(4096))

    await scrubbed(node)

    assert node.why(who, space, keys) == (lost, Reason.CORRUPT)


async def test_a_stray_header_is_wiped(start: Start, tmp_path: Path) -> None:
    """What was erased and came back (a power cut) is not believed by a later rebuild."""
    node = await start(tmp_path / "node")
    who, space, keys = await stored(node)
    path, offset, _ = place(node, space, keys[-1])
    fd = os.open(path, os.O_RDONLY)
    before = os.pread(fd, 8192, offset)
    os.close(fd)
    await node.evict(who, space, keys[-1:])
    await node.quiet()
    overwrite(path, offset, before)

    use = await scrubbed(node)

    assert use.stray_count == 1
    await node.close()
    for file in (tmp_path / "node" / "state" / "catalogue").iterdir():
        file.unlink()
    again = await start(tmp_path / "node")
    who = again.attach()
    assert again.found(who, again.space(who), keys) == len(keys) - 1


async def test_strays_of_a_segment_nobody_uses_go_with_it(node: Node) -> None:
    who, space, keys = await stored(node, 8)
    path, offset, _ = place(node, space, keys[0])
    fd = os.open(path, os.O_RDONLY)
    before = os.pread(fd, 8192, offset)
    os.close(fd)
    await node.evict(who, space, keys[:1])
    await node.quiet()
    assert node.ledger.slots[TierId.SSD].counts().segments_used == 0
    overwrite(path, offset, before)

    assert (await scrubbed(node)).stray_count == 1
    assert (await scrubbed(node)).stray_count == 0
    await node.put(who, space, keys, durable=True)
    assert await node.read(who, space, keys) == 8


async def test_blocks_may_go_while_they_are_read(node: Node) -> None:
    who, space, keys = await stored(node)
    gate = node.ssd.hold("read")
    await scrub(node).start(RATE)
    assert await asyncio.to_thread(gate.reached.wait, 20)

    evicting = asyncio.create_task(node.evict(who, space, keys[:1]))
    await node.until(lambda: node.found(who, space, keys) == 0)
    node.assert_sound()
    gate.open()
    await evicting

    assert (await ended(node)).damaged == {}
    await node.assert_nothing_held()


async def test_unreadable_slots_go_only_if_the_device_is_there(node: Node) -> None:
    who, space, keys = await stored(node)
    node.ssd.fail_read(3)
    node.ssd.fail_read(17)  # its second chance, after the 16 of its segment

    use = await scrubbed(node)

    assert use.damaged == {"unreadable": 1}
    assert await node.read(who, space, keys) == len(keys)  # DRAM has it


async def test_a_device_that_is_gone_costs_nothing(node: Node) -> None:
    _, _, keys = await stored(node)
    node.ssd.fail_read(1, for_ever=True)

    use = await scrubbed(node)

    assert use.detail.startswith("ended early")
    assert use.damaged == {}
    assert node.blocks_in("ssd") == len(keys)
    node.ssd.heal()
    assert (await scrubbed(node)).detail == ""


async def test_only_one_at_a_time_and_it_can_be_stopped(node: Node) -> None:
    await stored(node)
    gate = node.ssd.hold("read")
    await scrub(node).start(RATE)
    with pytest.raises(LimitReached, match="--stop"):
        await scrub(node).start(RATE)
    stopping = asyncio.create_task(scrub(node).stop())
    gate.open()
    assert await stopping
    assert scrub(node).use().detail == "stopped"
    assert not await scrub(node).stop()
    assert (await scrubbed(node)).detail == ""


async def test_it_is_refused_where_it_cannot_be(start: Start) -> None:
    without = await start(ssd_enabled=False)
    with pytest.raises(InvalidRequest, match="no SSD tier"):
        await scrub(without).start()
    node = await start()
    with pytest.raises(InvalidRequest, match="at least"):
        await scrub(node).start(1000)
    node.store.keeper.health.failed(TierFailed("planned"))
    with pytest.raises(TierFailed, match="kvtier heal"):
        await scrub(node).start()


async def test_it_waits_while_the_tier_is_degraded(node: Node) -> None:
    await stored(node)
    gate = node.ssd.hold("read")
    await scrub(node).start(RATE)
    assert await asyncio.to_thread(gate.reached.wait, 20)
    node.store.keeper.health.failed(TierFailed("planned"))
    gate.open()
    await node.until(lambda: scrub(node).use().state == "waiting")
    await node.store.keeper.heal()
    assert (await ended(node)).block_count == 48


async def test_it_begins_by_itself_when_the_interval_is_over(node: Node) -> None:
    _, _, keys = await stored(node)
    keeper = node.store.keeper
    await node.until(lambda: scrub(node).use().next_in_s > 0)
    ssd = replace(node.config.tiers.ssd, scrub_every_s=3600.0, scrub_bytes_per_s=RATE)
    keeper.reconfigure(replace(node.config, tiers=replace(node.config.tiers, ssd=ssd)))
    assert 0 < scrub(node).use().next_in_s <= 3600
    assert scrub(node).use().block_count == 0

    node.clock.ahead_s += 3601

    await node.until(lambda: scrub(node).use().ended_s > 0)
    assert scrub(node).use().block_count == len(keys)


async def test_a_restart_goes_on_where_it_was(start: Start, tmp_path: Path) -> None:
    node = await start(tmp_path / "node")
    _who, _space, _keys = await stored(node, 64)
    await scrub(node).start(RATE)
    notes = scrub(node)._notes
    await ended(node)
    # As if it had been stopped at the second segment.
    notes.started_s, notes.segment, notes.slot = 1.0, 1, 0
    await scrub(node)._save(node.ssd)
    await node.close()

    again = await start(tmp_path / "node")

    await again.until(lambda: scrub(again)._loaded and scrub(again)._notes.started_s == 0)
    assert 64 <= scrub(again).use().block_count < 128


async def test_notes_that_are_damaged_are_of_no_consequence(start: Start, tmp_path: Path) -> None:
    node = await start(tmp_path / "node")
    await stored(node)
    await scrubbed(node)
    await node.close()
    path = tmp_path / "node" / "state" / "scrub"
    for content in (b"", b"[]", b'{"since_s": "x"}', path.read_bytes().replace(b"{", b"[")):
        path.write_bytes(content)
        again = await start(tmp_path / "node")
        await again.until(lambda again=again: scrub(again)._loaded)
        assert scrub(again).use().ended_s == 0
        await again.close()


async def test_pinned_slots_are_given_to_nobody_else(node: Node) -> None:
    _who, space, keys = await stored(node, 4)
    _, _, slot = place(node, space, keys[3])
    holder = pin(node.ledger, TierId.SSD, [slot])
    node.ledger.evict(node.ledger.spaces[space], Keys.of(keys[3:]))
    node.store.keeper.wake()
    assert slot in [s for _, s in node.ledger._doomed]
    unpin(node.ledger, TierId.SSD, [slot], holder)
    node.store.keeper.wake()
    await node.assert_nothing_held()
