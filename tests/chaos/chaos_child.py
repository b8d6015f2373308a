"""A life of a store: checks what the last life left against the oracle, then works until killed.

    chaos_child.py DIRECTORY SEED LIFE ORACLE.json [only-check]

Lines on stdout (a file: they survive the kill) say what is begun and what was answered:
`begin S C`, `done S C durable|plain`, `evict S C FROM`, `evicted S C FROM`, `clear S`, `cleared S`,
`ready`, `PROBLEM ...`. S is a space, C a chain. `KVTIER_CHAOS_PLANT` plants a bug to be caught.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "store"))

import uvloop
from stores import Attached, Node, chain

import kvtier.tiers.slots

BLOCKS = 8


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


async def check(node: Node, who: Attached, oracle: dict[str, Any]) -> None:
    """`oracle`: space -> chain -> [least, most] blocks that may be found."""
    for name, chains in oracle.items():
        space = node.space(who, name)
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


async def work(node: Node, rng: random.Random, name: str, life: int) -> None:
    """Stores, reads, evicts, clears in one space, one thing after the other."""
    who = node.attach()
    space = node.space(who, name)
    mine: list[str] = []
    number = 0
    clears = 0.0 if os.environ.get("KVTIER_CHAOS_PLANT") else 0.6
    while True:
        action = rng.choices(("put", "durable", "evict", "read", "clear"), (4, 3, 2, 2, clears))[0]
        one = rng.choice(mine) if mine else ""
        if action in ("put", "durable"):
            one = f"{name}-{life}-{number}"
            number += 1
            say("begin", name, one)
            await node.put(who, space, chain(one, BLOCKS), durable=action == "durable")
            say("done", name, one, "durable" if action == "durable" else "plain")
            mine.append(one)
        elif action == "evict" and one:
            start = rng.randrange(BLOCKS)
            say("evict", name, one, start)
            await node.evict(who, space, chain(one, BLOCKS)[start : start + 1])
            say("evicted", name, one, start)
        elif action == "read" and one:
            await node.read(who, space, chain(one, BLOCKS))
        elif action == "clear":
            say("clear", name)
            await node.store.clear_namespace(who.session, space)
            say("cleared", name)
            mine.clear()
        node.assert_sound()


def plant(node: Node, what: str) -> None:
    """Bugs that the harness must find."""
    if what == "flip":
        kvtier.tiers.slots._verify = lambda *_: None  # type: ignore[assignment]
        for slab in node.config.state.dir.glob("slabs/*.slab"):
            with slab.open("r+b") as file:
                for offset in range(65536 + 4096, slab.stat().st_size, 8192):
                    file.seek(offset + 100)
                    byte = file.read(1)
                    file.seek(offset + 100)
                    file.write(bytes((byte[0] ^ 1,)))
    elif what == "evict":

        async def forgetful(*_: object) -> None:
            """Answers before anything is durable, and wipes nothing."""

        node.store.keeper.erase_for_good = forgetful  # type: ignore[method-assign]
        node.store.keeper._erase_pending = forgetful  # type: ignore[method-assign]


async def main() -> None:
    directory, seed, life = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    oracle = json.loads(Path(sys.argv[4]).read_text())  # noqa: ASYNC240
    node = Node(directory, ssd_blocks=16384)
    planted = os.environ.get("KVTIER_CHAOS_PLANT", "")
    if planted == "flip":
        plant(node, planted)
    await node.open()
    if planted == "evict":
        plant(node, planted)
    await check(node, node.attach(), oracle)
    say("ready")
    if sys.argv[5:] == ["only-check"]:
        await node.close()
        return
    rng = random.Random(f"{seed}/{life}")
    async with asyncio.TaskGroup() as group:
        for name in "abc":
            group.create_task(work(node, random.Random(rng.random()), name, life))


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
