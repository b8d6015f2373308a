"""A store on failing I/O: everything is done once while the Nth call of a kind fails.

For each N, until the workload runs clean: no wrong byte, memory serves, the books agree; what was
acknowledged is there after the next start; the tier heals. Runs in a nursery's child.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from chaos_files import ERRORS, FailingFiles, Plan, failing_lmdb
from chaos_life import run, say
from chaos_oracle import BLOCKS
from stores import Attached, Node, chain

from kvtier.errors import KvTierError

HEAL_S = 30.0
OLD = ("old-0", "old-1", "old-2")  # durable before anything fails


def _node(directory: Path, files: FailingFiles | None = None) -> Node:
    return Node(directory, dram_blocks=64, ssd_blocks=2048, files=files)


async def _template(directory: Path) -> None:
    node = await _node(directory).open()
    who = node.attach()
    space = node.space(who)
    for one in OLD:
        await node.put(who, space, chain(one, BLOCKS), durable=True)
    await node.close()


class Case:
    """One workload with one planned fault; `least` and `most` blocks of each chain may be there."""

    def __init__(self, directory: Path, plan: Plan) -> None:
        self.plan, self.directory = plan, directory
        self.files = FailingFiles()
        self.least = dict.fromkeys(OLD, BLOCKS)
        self.most = dict.fromkeys(OLD, BLOCKS)
        self.in_memory: set[str] = set()
        self.node: Any = None

    def problem(self, *words: object) -> None:
        say("PROBLEM", self.plan, *words)

    async def run(self) -> bool:
        """Whether the fault struck at all."""
        self.files.arm(self.plan)
        node = self.node = _node(self.directory, self.files)
        try:
            with failing_lmdb(self.files):
                await node.open()
        except KvTierError as error:
            # A start may fail here (the daemon tries again), not break what is on disk.
            say("start", self.plan, type(error).__name__)
            self.files.arm(None)
            with suppress(KvTierError):
                node.ssd.close()  # as the daemon does
        else:
            await self.work(node)
        self.files.arm(None)
        struck = self.files.struck_ever
        if self.files.was_stuck:
            self.problem("nothing was answered while the disk was slow")
        await self.look_again()
        return struck

    async def work(self, node: Node) -> None:
        who = node.attach()
        space = node.space(who)
        answering = asyncio.create_task(self.answer(node))
        try:
            await self.everything(node, who, space)
            self.files.arm(None)
            await self.heal(node, who, space)
        finally:
            answering.cancel()
            waiting, self.files.waiting = self.files.waiting or [], None
            for answered in waiting:
                answered.set()
        if problems := node.store.check():
            self.problem(problems)
        try:
            await node.close()
        except KvTierError as error:
            say("close", self.plan, type(error).__name__)

    async def answer(self, node: Node) -> None:
        """While the disk is slow, a block in memory (a lease keeps it there) is read."""
        who = node.attach()
        space = node.space(who, "beside")
        keys = chain("beside", 1)
        await node.put(who, space, keys)
        lease = await node.lease(who, space, keys)
        assert lease.block_count == 1
        self.files.waiting = []
        while True:
            if self.files.waiting:
                waiting = list(self.files.waiting)
                if await node.read(who, space, keys) == 1:
                    for answered in waiting:
                        answered.set()
                        self.files.waiting.remove(answered)
            await asyncio.sleep(0.002)

    async def everything(self, node: Node, who: Attached, space: int) -> None:
        for turn in range(3):
            await self.put(node, who, space, f"plain-{turn}")
            await self.put_durably(node, who, space, f"durable-{turn}")
        await self.evict(node, who, space, "durable-0", 3)
        await self.evict(node, who, space, "plain-0", 0)
        for number in range(8):  # more than memory holds: all of the above is only below
            await self.put(node, who, space, f"push-{number}")
        for one in list(self.most):
            await self.read(node, who, space, one)
        other = node.space(who, "other")
        await self.put(node, who, other, "cleared")
        with suppress(KvTierError):
            await node.store.clear_namespace(who.session, other)
        with suppress(KvTierError):
            await node.store.flush(2.0)

    async def put(self, node: Node, who: Attached, space: int, one: str) -> None:
        """What was stored is there at once, whatever the disk does."""
        self.least[one], self.most[one] = 0, BLOCKS
        await node.put(who, space, chain(one, BLOCKS))
        await self.read(node, who, space, one, BLOCKS)

    async def put_durably(self, node: Node, who: Attached, space: int, one: str) -> None:
        """Where that is refused, the blocks are in memory all the same."""
        self.least[one], self.most[one] = 0, BLOCKS
        try:
            await node.put(who, space, chain(one, BLOCKS), durable=True)
        except KvTierError:
            await self.read(node, who, space, one, BLOCKS)
        else:
            self.least[one] = BLOCKS

    async def evict(self, node: Node, who: Attached, space: int, one: str, start: int) -> None:
        self.least[one] = min(self.least[one], start)
        with suppress(KvTierError):
            await node.evict(who, space, chain(one, BLOCKS)[start : start + 1])
            self.most[one] = start
        # Told or not, in this life it is hidden.
        if (found := node.found(who, space, chain(one, BLOCKS))) > start:
            self.problem(one, found, "blocks are still there after an evict from", start)

    async def read(self, node: Node, who: Attached, space: int, one: str, least: int = 0) -> int:
        try:
            count = await node.read(who, space, chain(one, BLOCKS))
        except AssertionError as error:
            self.problem(one, error)
            return 0
        if count < least:
            self.problem(one, count, "blocks are there of", least, "that were just stored")
        if count < self.least[one] and self.plan.operation.startswith("read"):
            self.least[one] = count  # what cannot be read is gone
        return count

    async def heal(self, node: Node, who: Attached, space: int) -> None:
        """Once nothing fails any longer, blocks can be made durable again."""
        until_s = time.monotonic() + HEAL_S
        number = 0
        while True:
            one = f"healed-{number}"
            self.least[one], self.most[one] = 0, BLOCKS
            with suppress(KvTierError):
                await node.put(who, space, chain(one, BLOCKS), durable=True)
                self.least[one] = BLOCKS
                break
            number += 1
            node.clock.ahead_s += 10.0
            if time.monotonic() > until_s:
                self.problem("the tier did not heal")
                break
            await asyncio.sleep(0.02)

    async def look_again(self) -> None:
        """The next life, on a sound disk."""
        node = await _node(self.directory).open()
        who = node.attach()
        space = node.space(who)
        for one, most in self.most.items():
            try:
                count = await node.read(who, space, chain(one, BLOCKS))
            except AssertionError as error:
                self.problem(one, error)
                continue
            if not self.least[one] <= count <= most:
                self.problem(one, count, "blocks, not", self.least[one], "to", most)
        await node.put(who, space, chain("after", BLOCKS), durable=True)
        if await node.read(who, space, chain("after", BLOCKS)) != BLOCKS:
            self.problem("what is stored afterwards is not there")
        if problems := node.store.check():
            self.problem(problems)
        await node.close()


async def _fail(place: Path, operation: str, how: str, numbers: list[int]) -> None:
    template = place / "template"
    if not template.exists():
        await _template(template)
    for for_ever in (False, True):
        for nth in numbers:
            plan = Plan(operation, how, nth, for_ever)
            say("case", plan, f"{time.monotonic():.2f}")
            shutil.rmtree(place / "now", ignore_errors=True)
            shutil.copytree(template, place / "now")
            if not await Case(place / "now", plan).run():
                say("clean", plan)
                break


def fail(place: str, operation: str, how: str, numbers: list[int]) -> None:
    """This kind of fault at each of these calls, once and for ever."""
    run(_fail(Path(place), operation, how, numbers))


__all__ = ["ERRORS", "fail"]
