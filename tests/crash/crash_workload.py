"""A seeded life of an SSD tier, one call after the other, told as marks in a file.

    crash_workload.py DIRECTORY MARKS SEED STEPS     (traced by crash_recording)

Each mark is one line, written at once: what is begun and what was answered. KVTIER_CRASH_PLANT
names a bug that is put into the production code first. Blocks are written again under the same key
only after they were forgotten, as the ledger does.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crash_plants

from kvtier.block import SLOT_BITS, SlotIO, SlotLabel
from kvtier.native import AlignedBuffer
from kvtier.tiers.base import SlotRecord
from kvtier.tiers.files import Files
from kvtier.tiers.slots import SLOT_HEADER_BYTES
from kvtier.tiers.ssd import SsdTier
from kvtier.units import KIB

SEGMENTS = 3
SEGMENT_BYTES = 48 * KIB
PAYLOAD_BYTES = (4 * KIB, 8 * KIB)  # slots of 8 and 12 KiB: 6 and 4 a segment
SPACES = tuple(hashlib.blake2b(bytes([i]), digest_size=16).digest() for i in range(2))


def open_tier(directory: Path) -> SsdTier:
    # One slot at a time, by this thread: what is recorded is one thread's calls. Slots of a batch
    # are in no order anyway before their sync: images with any of them are made.
    files = Files(depth=1)
    return SsdTier(
        directory, SEGMENTS, SEGMENT_BYTES, direct_io="off", min_free_bytes=0, files=files
    )


def descriptor(space: int) -> bytes:
    return json.dumps({"space": space}).encode()


def key_of(space: int, name: int) -> bytes:
    return hashlib.sha256(f"{space}/{name}".encode()).digest()


def payload(space: int, name: int, version: int, size_bytes: int) -> bytes:
    unit = hashlib.sha256(f"{space}/{name}/{version}".encode()).digest()
    return unit * (size_bytes // len(unit))  # so that every sector begins with a unit


def label(space: int, epoch: int, name: int, size_bytes: int) -> SlotLabel:
    parent = key_of(space, name - 1) if name % 4 else b""
    return SlotLabel(SPACES[space], epoch, key_of(space, name), parent, name % 4, 0, size_bytes)


class Life:
    """What the workload keeps in mind of its own tier: where which block lies."""

    def __init__(self, directory: Path, marks: int, seed: int) -> None:
        self.directory = directory
        self.marks = marks
        self.rng = random.Random(seed)
        self.tier = open_tier(directory)
        self.tier.recover()
        self.cut = [0] * SEGMENTS  # payload size of each segment's slots
        self.free: list[set[int]] = [set() for _ in range(SEGMENTS)]
        self.placed: dict[tuple[int, int], SlotRecord] = {}
        self.epochs = [0, 0]
        self.versions: dict[tuple[int, int], int] = {}
        self.memory = AlignedBuffer(64 * KIB)
        for space in range(2):
            self.acknowledged("register", self._register(space), space=space, epoch=0)

    def _register(self, space: int) -> Callable[[], None]:
        epoch = self.epochs[space]
        return lambda: self.tier.register_namespace(SPACES[space], descriptor(space), epoch)

    def mark(self, kind: str, **facts: Any) -> None:
        os.write(self.marks, json.dumps({"kind": kind, **facts}).encode() + b"\n")

    def acknowledged(self, kind: str, work: Callable[[], None], **facts: Any) -> None:
        self.mark("begin", act=kind, **facts)
        work()
        self.mark("done", act=kind, **facts)

    # --- acts

    def write(self) -> None:
        segment = self.rng.randrange(SEGMENTS)
        if not self.cut[segment] or (
            self.rng.random() < 0.3 and not self._placed_in(segment) and self.rng.random() < 0.5
        ):
            self._recut(segment, self.rng.choice(PAYLOAD_BYTES))
        size_bytes = self.cut[segment]
        slot_bytes = size_bytes + SLOT_HEADER_BYTES
        count = min(len(self.free[segment]), self.rng.randint(1, 3))
        items, names = [], []
        for at, index in enumerate(self.rng.sample(sorted(self.free[segment]), count)):
            space = self.rng.randrange(2)
            absent = [name for name in range(12) if (space, name) not in self.placed]
            absent = [name for name in absent if (space, name) not in names]
            if not absent:
                continue
            name = self.rng.choice(absent)
            names.append((space, name))
            version = self.versions[space, name] = self.versions.get((space, name), 0) + 1
            content = payload(space, name, version, size_bytes)
            self.memory.view[at * size_bytes : (at + 1) * size_bytes] = content
            slot = segment << SLOT_BITS | index
            address = self.memory.address + at * size_bytes
            items.append(
                SlotIO(
                    slot, slot_bytes, address, label(space, self.epochs[space], name, size_bytes)
                )
            )
        if not items:
            return
        facts = [
            [space, name, self.versions[space, name], self.epochs[space]] for space, name in names
        ]
        self.acknowledged("write", lambda: self.tier.write(items), blocks=facts)
        for item, place in zip(items, names, strict=True):
            assert item.error is None, item.error
            self.free[segment].discard(item.slot & ((1 << SLOT_BITS) - 1))
            self.placed[place] = SlotRecord(item.slot, item.slot_bytes, item.label)

    def _placed_in(self, segment: int) -> list[tuple[int, int]]:
        return [p for p, record in self.placed.items() if record.slot >> SLOT_BITS == segment]

    def _recut(self, segment: int, size_bytes: int) -> None:
        self.cut[segment] = size_bytes
        self.free[segment] = set(range(SEGMENT_BYTES // (size_bytes + SLOT_HEADER_BYTES)))

    def sync(self) -> None:
        self.acknowledged("sync", self.tier.sync)

    def erase(self, *, durable: bool) -> None:
        if not self.placed:
            return
        chosen = self.rng.sample(sorted(self.placed), min(len(self.placed), 2))
        records = [self.placed[place] for place in chosen]
        facts = [[space, name, self.versions[space, name]] for space, name in chosen]
        kind = "evict" if durable else "drop"
        self.acknowledged(kind, lambda: self.tier.erase(records, durable=durable), blocks=facts)
        self._forget(chosen)

    def _forget(self, places: list[tuple[int, int]]) -> None:
        for place in places:
            slot = self.placed.pop(place).slot
            self.free[slot >> SLOT_BITS].add(slot & ((1 << SLOT_BITS) - 1))

    def clear(self) -> None:
        space = self.rng.randrange(2)
        self.epochs[space] += 1
        epoch = self.epochs[space]
        self.acknowledged(
            "clear", lambda: self.tier.set_epoch(SPACES[space], epoch), space=space, epoch=epoch
        )
        gone = [place for place in self.placed if place[0] == space]
        records = [self.placed[place] for place in gone]
        self.tier.erase(records, durable=False)
        self._forget(gone)

    def recycle(self) -> None:
        segment = self.rng.randrange(SEGMENTS)
        gone = self._placed_in(segment)
        facts = [[space, name, self.versions[space, name]] for space, name in gone]
        self.acknowledged("recycle", lambda: self.tier.recycle(segment), blocks=facts)
        self._forget(gone)

    def purge(self) -> None:
        """Clear, and nothing of it is left on the disk; the next block is of a namespace anew."""
        space = self.rng.randrange(2)
        self.epochs[space] += 1
        facts = {"space": space, "epoch": self.epochs[space]}
        gone = [place for place in self.placed if place[0] == space]
        records = [self.placed[place] for place in gone]
        self._forget(gone)
        self.acknowledged("purge", lambda: self._purge(space, records), **facts)
        self.acknowledged("register", self._register(space), **facts)

    def _purge(self, space: int, records: list[SlotRecord]) -> None:
        self.tier.erase(records, durable=False)
        _, suspects = self.tier.purge(SPACES[space], self.epochs[space])
        for segment in suspects:
            self.tier.scour(segment, sorted(self.free[segment]) if self.cut[segment] else None)
        self.tier.naming.scoured(SPACES[space])

    def resize(self) -> None:
        """The last slab goes, and another one comes, which may be cut in another way."""
        gone = self._placed_in(SEGMENTS - 1)
        facts = [[space, name, self.versions[space, name]] for space, name in gone]
        self.acknowledged("recycle", lambda: self.tier.upkeep.take_away(SEGMENTS - 1), blocks=facts)
        self._forget(gone)
        self.cut[SEGMENTS - 1] = 0
        self.acknowledged("grow", lambda: self.tier.upkeep.add(SEGMENTS))

    def restart(self) -> None:
        """A clean stop and start: the clean marker and the catalogue's second life."""
        self.acknowledged("close", self.tier.close)
        self.tier = open_tier(self.directory)
        self.tier.recover()
        self.mark("done", act="open")

    def step(self) -> None:
        acts: list[tuple[int, Callable[[], None]]] = [
            (50, self.write),
            (20, self.sync),
            (10, lambda: self.erase(durable=True)),
            (5, lambda: self.erase(durable=False)),
            (4, self.clear),
            (4, self.recycle),
            (2, self.purge),
            (2, self.resize),
            (2, self.restart),
        ]
        weights = [weight for weight, _ in acts]
        self.rng.choices([act for _, act in acts], weights)[0]()


def main() -> None:
    directory, marks, seed, steps = sys.argv[1:]
    crash_plants.plant(os.environ.get("KVTIER_CRASH_PLANT", ""))
    fd = os.open(marks, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    life = Life(Path(directory), fd, int(seed))
    for _ in range(int(steps)):
        life.step()
    life.mark("end")
    os._exit(0)  # a power cut needs no good-bye


if __name__ == "__main__":
    main()
