"""Lives before and after damage (chaos_damage.py). They run in a nursery's child.

`prepare` makes a directory with everything in it, and an older image of it; `survive` opens a
damaged copy, reads all there was and goes on working. Content has a version, so that an older one
of the same key is told from the right one.

    v1 stored --> old --> some evicted, one space cleared, some stored again as v2 --> new
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import chaos_bugs
from chaos_damage import AGAIN, CHAINS, CLEARED, GONE
from chaos_life import FORMATS, run, say
from chaos_oracle import BLOCKS
from stores import Attached, Node, chain, payload


def _node(directory: Path) -> Node:
    return Node(directory, dram_blocks=128, ssd_blocks=4096)


def _keys(space: str, number: int) -> list[bytes]:
    return chain(f"{space}{number}", BLOCKS)


async def _put(node: Node, who: Attached, space: int, keys: Sequence[bytes], version: int) -> None:
    done = 0
    while done < len(keys):
        above = keys[done - 1] if done else b""
        grant = await node.reserve(who, space, keys[done:], parent=above, position=done)
        if grant.table is not None:
            node.fill(who, grant, keys[done:], shard=version)
            await node.store.commit(who.session, grant.reservation_id, None, durable=True)
        done += grant.covered_count


async def _contents(
    node: Node, who: Attached, space: int, keys: Sequence[bytes], version: int
) -> tuple[int, int]:
    """(how many blocks of the chain there are, how many of them have wrong bytes)."""
    grant = await node.lease(who, space, keys)
    if grant.table is None:
        return 0, 0
    size = grant.table.size_bytes
    found = who.contents(grant.table)
    node.store.release(who.session, [grant.lease_id])
    right = [payload(key, size, version) for key in keys[: grant.block_count]]
    return grant.block_count, sum(a != b for a, b in zip(found, right, strict=True))


def version_of(number: int) -> int:
    return 2 if number in AGAIN else 1


def is_gone(space: str, number: int) -> bool:
    """Whether it must never be found: evicted, or of a cleared epoch and not stored since."""
    return number in GONE or (space == CLEARED and number not in AGAIN)


# --- the directory as it was


async def _prepare(place: Path, *, clean: bool) -> None:
    node = await _node(place / "new").open()
    who = node.attach()
    spaces = {name: node.space(who, name, form) for name, form in FORMATS.items()}
    for name, space in spaces.items():
        # In turns, those that go and those that stay: so that no slab is free, and cut anew.
        for number in sorted(range(CHAINS), key=lambda number: number % 8):
            await _put(node, who, space, _keys(name, number), 1)
    await node.store.flush(10.0)
    await node.close()
    shutil.copytree(place / "new", place / "old")
    node = await _node(place / "new").open()
    who = node.attach()
    spaces = {name: node.space(who, name, form) for name, form in FORMATS.items()}
    await node.store.clear_namespace(who.session, spaces[CLEARED])
    for name, space in spaces.items():
        for number in (*GONE, *AGAIN):
            await node.evict(who, space, _keys(name, number)[:1])
    # For a while their slots are others': what is stored again lies elsewhere, and where it lay
    # is free in the end.
    fillers = {name: [chain(f"{name}-filler-{n}", BLOCKS) for n in range(8)] for name in FORMATS}
    for name, space in spaces.items():
        for keys in fillers[name]:
            await _put(node, who, space, keys, 1)
    for name, space in spaces.items():
        for number in AGAIN:
            await _put(node, who, space, _keys(name, number), 2)
    for name, space in spaces.items():
        for keys in fillers[name]:
            await node.evict(who, space, keys[:1])
    if clean:
        await node.close()
    say("prepared")
    os._exit(0)  # without a clean marker, unless closed


def prepare(place: str, clean: bool) -> None:
    """Makes `place/new` and, of an earlier time, `place/old`."""
    run(_prepare(Path(place), clean=clean))


# --- the life after it


async def _survive(directory: Path, *, gone_stays: bool) -> None:
    chaos_bugs.early()
    node = await _node(directory).open()
    who = node.attach()
    total = 0
    spaces = {name: node.space(who, name, form) for name, form in FORMATS.items()}
    for name, space in spaces.items():
        for number in range(CHAINS):
            version = version_of(number)
            count, wrong = await _contents(node, who, space, _keys(name, number), version)
            total += count
            if wrong:
                say("PROBLEM", name, number, wrong, "of", count, "blocks have wrong bytes")
            if gone_stays and count and is_gone(name, number):
                say("PROBLEM", name, number, count, "blocks came back")
    for name, space in spaces.items():
        # What is stored from now on is as good as ever.
        keys = chain(f"{name}-after", BLOCKS)
        await _put(node, who, space, keys, 1)
        if await _contents(node, who, space, keys, 1) != (BLOCKS, 0):
            say("PROBLEM", name, "what is stored afterwards is not there")
    if problems := node.store.check():
        say("PROBLEM", problems)
    await node.close()
    say("blocks", total)


def survive(directory: str, gone_stays: bool) -> None:
    """Reads everything; says how many blocks came back."""
    run(_survive(Path(directory), gone_stays=gone_stays))
