"""A life of a store: checks what the last life left against the oracle, then works until killed.

`live` is random load in three spaces; `script` does every kind of thing once, in order, so that
each failpoint is met. What they print is told in chaos_oracle.py; a line that begins with PROBLEM
is a broken promise. Both run in a nursery's child.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import chaos_bugs
import uvloop
from chaos_oracle import BLOCKS
from stores import FORMAT, Attached, Node, chain

from kvtier.block import BlockFormat, TierId
from kvtier.errors import LimitReached
from kvtier.testing import failpoints

# Another slot size, odd and larger: what was cut for one must be cut anew for the other.
FORMATS = {"a": FORMAT, "b": FORMAT, "c": BlockFormat(1, 1, 1, "float16", 16, opaque_bytes=11000)}
MINE_MAX = 24


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def run(work: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work)


def node_of(directory: str, *, tight: bool) -> Node:
    """A store with room for everything, or one whose SSD tier (16 segments) is soon full."""
    return Node(Path(directory), dram_blocks=96, ssd_blocks=512 if tight else 32768)


async def check(node: Node, who: Attached, oracle: dict[str, Any]) -> None:
    """`oracle`: space -> chain -> [least, most] blocks that may be found."""
    for name, chains in oracle.items():
        space = node.space(who, name, FORMATS[name])
        for one, (least, most) in chains.items():
            keys = chain(one, BLOCKS)
            found = node.found(who, space, keys)
            try:
                count = await node.read(who, space, keys)
            except AssertionError as error:
                say("PROBLEM", name, one, error)
                continue
            # A kill within an evict may leave records of wiped slots: found, but a miss when read.
            if found != count and least == most:
                say("PROBLEM", name, one, "found", found, "but could read", count)
            if not least <= count <= most:
                say("PROBLEM", name, one, count, "blocks, not", least, "to", most)
    if problems := node.store.check():
        say("PROBLEM", problems)


class Worker:
    """Stores, reads, evicts, clears in one space, one thing after the other."""

    def __init__(self, node: Node, rng: random.Random, name: str, life: str, *, tight: bool):
        self.node, self.rng, self.name, self.life = node, rng, name, life
        self.tight = tight
        self.who = node.attach()
        self.space = node.space(self.who, name, FORMATS[name])
        self.mine: dict[str, int] = {}  # chain -> how many blocks of it there are
        self.number = 0

    async def work(self) -> None:
        """Until the process ends."""
        acts = (
            self.put, self.durable, self.evict, self.read, self.clear, self.flush, self.again,
            self.purge,
        )  # fmt: skip
        while True:
            act = self.rng.choices(acts, (4, 3, 2, 3, 0.4, 0.6, 1, 0.1))[0]
            await act()
            self.node.assert_sound()
            await asyncio.sleep(0)

    async def put(self, one: str = "", *, durable: bool = False) -> None:
        if not one:
            if len(self.mine) >= MINE_MAX:
                await self.evict(start=0)
            one = f"{self.name}-{self.life}-{self.number}"
            self.number += 1
        say("begin", self.name, one)
        await self.node.put(self.who, self.space, chain(one, BLOCKS), durable=durable)
        say("done", self.name, one, "durable" if durable else "plain")
        self.mine[one] = BLOCKS

    async def durable(self) -> None:
        await self.put(durable=True)

    async def again(self) -> None:
        """What was evicted, in part or all of it, is stored once more."""
        gone = [one for one, count in self.mine.items() if count < BLOCKS]
        if gone:
            await self.put(self.rng.choice(gone), durable=self.rng.random() < 0.5)

    async def evict(self, start: int | None = None) -> None:
        if not self.mine:
            return
        one = self.rng.choice(list(self.mine))
        start = self.rng.randrange(BLOCKS) if start is None else start
        say("evict", self.name, one, start)
        await self.node.evict(self.who, self.space, chain(one, BLOCKS)[start : start + 1])
        say("evicted", self.name, one, start)
        self.mine[one] = min(self.mine[one], start)
        if not self.mine[one] and self.rng.random() < 0.7:
            del self.mine[one]

    async def read(self) -> None:
        """All of a chain of this life is there, and sound: nobody but us makes it go."""
        if not self.mine:
            return
        one = self.rng.choice(list(self.mine))
        try:
            count = await self.node.read(self.who, self.space, chain(one, BLOCKS))
        except AssertionError as error:
            say("PROBLEM", self.name, one, error)
            return
        wanted = self.mine[one]
        if count > wanted or (count < wanted and not self.tight):
            say("PROBLEM", self.name, one, count, "blocks, stored in this life were", wanted)

    async def clear(self) -> None:
        say("clear", self.name)
        await self.node.store.clear_namespace(self.who.session, self.space)
        say("cleared", self.name)
        self.mine.clear()

    async def purge(self) -> None:
        keys = [key for one in self.mine for key in chain(one, BLOCKS)]
        say("purge", self.name)
        await self.node.store.purge(self.space, 30.0)
        say("purged", self.name)
        self.mine.clear()
        if count := self.node.plaintext_of(keys):
            say("PROBLEM", self.name, "is purged, and the disk has bytes of", count, "blocks")

    async def flush(self) -> None:
        say("flush", self.name)
        _, left = await self.node.store.flush(0.1)
        if left == 0:
            say("flushed", self.name)


async def _live(directory: str, seed: str, life: str, oracle: str, *, tight: bool) -> None:
    chaos_bugs.early()
    node = await node_of(directory, tight=tight).open()
    chaos_bugs.late(node)
    await check(node, node.attach(), json.loads(Path(oracle).read_text()))  # noqa: ASYNC240
    say("ready")
    rng = random.Random(f"{seed}/{life}")
    async with asyncio.TaskGroup() as group:
        for name in FORMATS:
            worker = Worker(node, random.Random(rng.random()), name, life, tight=tight)
            group.create_task(worker.work())


def live(directory: str, seed: str, life: str, oracle: str, tight: bool) -> None:
    """Random load until killed."""
    run(_live(directory, seed, life, oracle, tight=tight))


async def _only_check(directory: str, oracle: str, *, tight: bool) -> None:
    node = await node_of(directory, tight=tight).open()
    await check(node, node.attach(), json.loads(Path(oracle).read_text()))  # noqa: ASYNC240
    await node.close()
    say("checked")


def only_check(directory: str, oracle: str, tight: bool) -> None:
    """What is there, and a clean end."""
    run(_only_check(directory, oracle, tight=tight))


async def _script(directory: str, life: str, oracle: str, *, tight: bool) -> None:
    node = await node_of(directory, tight=tight).open()
    rng = random.Random(life)
    who = node.attach()
    await check(node, who, json.loads(Path(oracle).read_text()))  # noqa: ASYNC240
    say("ready")
    workers = [Worker(node, rng, name, life, tight=tight) for name in FORMATS]
    for turn in range(3):
        for worker in workers:
            for _ in range(12 if tight else 4):
                await worker.put()
            await worker.durable()
            await worker.evict()
            await worker.read()
            await worker.flush()
            if turn == 1:
                await worker.clear()
    await errands(node, workers)
    await node.close()
    say("closed")


async def errands(node: Node, workers: list[Worker]) -> None:
    """What only an operator asks for: a scrub, and a tier that becomes smaller and larger again.
    There is room for all blocks, above and below: none may go for it.
    """
    keeper, slots = node.store.keeper, node.ledger.slots[TierId.SSD]
    worker = workers[0]
    space = node.space(worker.who, "filler")
    in_use = slots.counts().segments_used
    filler = chain(f"filler-{worker.life}", 16 * (in_use // 2 + 4))
    await node.put(worker.who, space, filler, durable=True)
    await worker.durable()
    await node.evict(worker.who, space, filler[:1])
    await node.quiet()
    before, after = len(slots.segments), slots.counts().segments_used * 5 // 4 + 2
    with suppress(LimitReached):  # one that the last life began goes on
        await keeper.scrubbing.start(1 << 30)
    if after < before:
        await keeper.resizing.resize(TierId.SSD, after * node.ssd.file_bytes)
        await keeper.resizing.resize(TierId.SSD, before * node.ssd.file_bytes)
    await node.until(lambda: keeper.scrubbing.use().state == "idle")
    if keeper.scrubbing.use().damaged:
        say("PROBLEM", "scrub", keeper.scrubbing.use())
    await worker.read()
    for worker in workers:
        await worker.purge()


def script(directory: str, life: str, oracle: str, tight: bool) -> None:
    """Everything once, in order, and a clean end, unless a failpoint ends it before."""
    failpoints.arm(os.environ.get("KVTIER_FAILPOINT", ""))
    run(_script(directory, life, oracle, tight=tight))


__all__ = ["live", "only_check", "script"]
