"""Recovers disk images in child processes and asks the oracle about what came back.

A child that dies (SIGBUS, SIGABRT) died of the image it had: that is a violation like any other.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import tempfile
import traceback
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import crash_plants
from crash_disk import SECTOR_BYTES, Disk, Image
from crash_oracle import Block, Oracle
from crash_recording import Event, record
from crash_workload import (
    SEGMENT_BYTES,
    SEGMENTS,
    SPACES,
    descriptor,
    key_of,
    label,
    open_tier,
    payload,
)

from kvtier.block import SLOT_BITS, SlotIO
from kvtier.native import AlignedBuffer
from kvtier.tiers.base import SlotRecord
from kvtier.tiers.slots import SLOT_HEADER_BYTES
from kvtier.tiers.ssd import SsdTier
from kvtier.units import KIB

_STATES_AT_ONCE = 400  # an image is half a MiB
_AFTERMATHS = 8  # one state of so many is lived on from
# What may be lost beside the cut itself: the slabs alone must be enough.
LOSSES = (("catalogue/",), ("namespaces",), ("catalogue/", "namespaces"))


@dataclass
class State:
    """One image, the oracle of that point, and how to find it again."""

    number: int
    name: str
    image: Image
    oracle: Oracle


@dataclass
class Verdict:
    """Of one recording."""

    states: int = 0
    problems: list[str] = field(default_factory=list)


def states(events: list[Event], seed: int) -> Iterator[State]:
    """Every distinct state of a recording, with a quarter of them once more after a loss."""
    rng = random.Random(seed)
    disk, oracle = Disk(), Oracle()
    seen: set[bytes] = set()
    for number, event in enumerate(events):
        if event.kind == "mark":
            oracle.take(event.mark)
        else:
            disk.take(event)
        frozen: Oracle | None = None
        for image in disk.images(rng):
            lost: tuple[str, ...] = rng.choice(LOSSES) if rng.random() < 0.25 else ()
            left = {p: c for p, c in image.items() if not p.startswith(lost)} if lost else image
            digest = _digest(left, number if event.kind == "mark" else -1)
            if digest not in seen:
                seen.add(digest)
                frozen = frozen or deepcopy(oracle)
                name = f"event {number}, lost {lost or 'nothing'}"
                yield State(len(seen), name, left, frozen)


def _digest(image: Image, mark: int) -> bytes:
    hasher = hashlib.blake2b(digest_size=16)
    hasher.update(repr(mark).encode())
    for path, content in sorted(image.items()):
        hasher.update(path.encode() + b"\0" + content)
    return hasher.digest()


def check_recording(
    seed: int, steps: int, *, folder: Path, plant: str = "", states_max: int
) -> Verdict:
    """Records a life and recovers the states it may leave, in two children at once; of more than
    `states_max` the first ones.
    """
    directory = folder / f"life-{seed}"
    writing = plant if plant in crash_plants.WRITING else ""
    reading = plant if plant in crash_plants.READING else ""
    events = record(directory, folder / f"marks-{seed}", seed, steps, writing)
    todo = islice(states(events, seed), states_max)
    verdict = Verdict()
    while part := list(islice(todo, _STATES_AT_ONCE)):
        verdict.states += len(part)
        children = [
            Child(part[half::2], folder / f"image-{seed}-{half}", reading) for half in (0, 1)
        ]
        for child in children:
            child.start()
        for child in children:
            verdict.problems += child.finish()
    shutil.rmtree(directory)
    return verdict


def check(seed: int, states_wanted: int, *, steps: int, folder: Path, plant: str = "") -> Verdict:
    """Lives of one seed after the other until so many states were recovered."""
    total = Verdict()
    while total.states < states_wanted:
        left = states_wanted - total.states
        one = check_recording(seed, steps, folder=folder, plant=plant, states_max=left)
        total.states += one.states
        total.problems += [f"seed {seed}: {problem}" for problem in one.problems]
        seed += 1
    return total


class Child:
    """A forked process that recovers states, one after the other; forked anew when it dies."""

    def __init__(self, todo: list[State], directory: Path, plant: str) -> None:
        self._todo = todo
        self._directory = directory
        self._plant = plant
        self._next = 0
        self._pid = 0
        self._report = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in finish

    def start(self) -> None:
        self._pid = os.fork()
        if self._pid == 0:
            status = 1
            try:
                self._work()
                status = 0
            finally:  # the end of a forked child: it must never return into its parent's code
                if status:
                    self._say("PROBLEM child: " + traceback.format_exc().replace("\n", " | "))
                os._exit(status)

    def _say(self, line: str) -> None:
        os.write(self._report.fileno(), (line + "\n").encode())

    def _work(self) -> None:
        crash_plants.plant(self._plant)
        for number in range(self._next, len(self._todo)):
            self._say(f"BEGIN {number}")
            for problem in recover(self._todo[number], self._directory):
                self._say(f"PROBLEM {self._todo[number].name}: {problem}")

    def finish(self) -> list[str]:
        """Every violation. A state that killed the child is one; the rest goes on without it."""
        problems: list[str] = []
        while True:
            _, status = os.waitpid(self._pid, 0)
            if os.waitstatus_to_exitcode(status) == 0:
                break
            begun = self._lines("BEGIN ")
            number = int(begun[-1]) if begun else -1
            code = os.waitstatus_to_exitcode(status)
            how = signal.Signals(-code).name if code < 0 else f"status {code}"
            if number < self._next:
                problems.append(f"a child ended by {how} before it recovered anything")
                break
            problems.append(f"{self._todo[number].name}: recovery ended by {how}")
            self._next = number + 1
            self.start()
        problems += self._lines("PROBLEM ")
        self._report.close()
        shutil.rmtree(self._directory, ignore_errors=True)
        return problems

    def _lines(self, start: str) -> list[str]:
        self._report.seek(0)
        return [line[len(start) : -1] for line in self._report if line.startswith(start)]


def recover(state: State, directory: Path) -> list[str]:
    """Puts the image down, lets the production code recover it twice, and compares."""
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "slabs").mkdir(parents=True)
    for path, content in state.image.items():
        (directory / path).parent.mkdir(exist_ok=True)
        (directory / path).write_bytes(content)
    found, epochs, problems = _life(directory)
    problems += state.oracle.problems(found, epochs, names="namespaces" in state.image)
    problems += state.oracle.remains(_on_disk(state.image))
    again, epochs_again, more = _life(directory)
    problems += more
    if (again, epochs_again) != (found, epochs):
        problems.append(f"a second recovery differs: {found} then {again}")
    if state.number % _AFTERMATHS == 0:
        problems += aftermath(directory)
    return problems


def aftermath(directory: Path) -> list[str]:
    """Blocks that did not come back are stored again, all is evicted for good, and the catalogue is
    lost: nothing may be there. What a cut left in a slot that nothing names would be.
    """
    tier = open_tier(directory)
    try:
        records = list(tier.recover())
        there = {record.label.key for record in records}
        absent = [place for key, place in _BLOCKS.items() if key not in there]
        epochs = {digest: epoch for digest, _, epoch in tier.namespaces()}
        for space, digest in enumerate(SPACES):
            tier.register_namespace(digest, descriptor(space), epochs.get(digest, 0))
        with AlignedBuffer(8 * KIB) as memory:
            items = []
            for (slot, slot_bytes), (space, name) in zip(
                _free(tier, records), absent, strict=False
            ):
                what = label(space, epochs.get(SPACES[space], 0), name, 4 * KIB)
                items.append(SlotIO(slot, slot_bytes, memory.address, what))
            tier.write(items)
        stored = [SlotRecord(item.slot, item.slot_bytes, item.label) for item in items]
        tier.erase([*records, *stored], durable=True)
    finally:
        tier.close()
    shutil.rmtree(directory / "catalogue")
    found, _, problems = _life(directory)
    return [*problems, *(f"block {place} is back after all were evicted" for place in found)]


def _free(tier: SsdTier, records: list[SlotRecord]) -> Iterator[tuple[int, int]]:
    """Every other slot that no record names, with its size: in the rest lies what lay there."""
    used = {record.slot for record in records}
    for segment in range(SEGMENTS):
        slot_bytes = tier.upkeep.slot_bytes(segment) or 4 * KIB + SLOT_HEADER_BYTES
        for index in range(0, SEGMENT_BYTES // slot_bytes, 2):
            if (slot := segment << SLOT_BITS | index) not in used:
                yield slot, slot_bytes


def _life(directory: Path) -> tuple[dict[Block, int], dict[int, int], list[str]]:
    """What can be read after a start, and whether writing goes on with later generations."""
    problems = []
    tier = open_tier(directory)
    try:
        records = tier.recover()
        epochs = {SPACES.index(digest): epoch for digest, _, epoch in tier.namespaces()}
        found: dict[Block, int] = {}
        with AlignedBuffer(16 * KIB) as memory:
            for record in records:
                place = _block_of(record.label.key)
                io = SlotIO(record.slot, record.slot_bytes, memory.address, record.label)
                tier.read([io])
                if io.error is None and place is not None:
                    content = bytes(memory.view[: record.label.size_bytes])
                    if place in found:
                        problems.append(f"block {place} is claimed twice")
                    found[place] = _version(place, content)
                elif place is None:
                    problems.append(f"a block with a key nobody wrote: {record.label.key.hex()}")
        tier.check()
    finally:
        tier.close()
    return found, epochs, problems


_BLOCKS = {key_of(space, name): (space, name) for space in range(2) for name in range(12)}
_VERSIONS: dict[bytes, tuple[Block, int]] = {}


def _block_of(key: bytes) -> Block | None:
    return _BLOCKS.get(key)


def _version(place: Block, content: bytes) -> int:
    """Which version of the block this is, -1 if none."""
    block, version = _versions().get(content[:64], (None, -1))
    whole = block == place and content == payload(*place, version, len(content))
    return version if whole else -1


def _versions() -> dict[bytes, tuple[Block, int]]:
    if not _VERSIONS:
        for block in _BLOCKS.values():
            for version in range(1, 200):
                _VERSIONS[payload(*block, version, 64)] = (block, version)
    return _VERSIONS


def _on_disk(image: Image) -> set[tuple[Block, int]]:
    """Which versions of blocks some sector of a slab is of."""
    slabs = [content for path, content in image.items() if path.startswith("slabs/")]
    starts = (slab[at : at + 64] for slab in slabs for at in range(0, len(slab), SECTOR_BYTES))
    versions = _versions()
    return {versions[start] for start in starts if start in versions}
