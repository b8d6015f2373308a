"""Damage to a state directory between two lives, as functions of the directory and of dice.

Does not: know what it was that it damaged; chaos_survivor.py finds out what that did.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from kvtier.block import SLOTS_PER_SEGMENT_MAX
from kvtier.errors import BlockCorrupt
from kvtier.tiers.base import SlotRecord
from kvtier.tiers.slab import SLAB_RESERVED_BYTES
from kvtier.tiers.slots import unpack_slot_header

# What the directory holds.
CHAINS: Final = 14  # in each space
GONE: Final = range(4)  # chains that were evicted
AGAIN: Final = range(4, 8)  # chains that were evicted and stored again with other bytes
CLEARED: Final = "b"  # its first chains died with their epoch; AGAIN are of the new one


def _files(state: Path, pattern: str) -> list[Path]:
    """Files to choose from; where there is none, slabs."""
    found = [path for path in state.glob(pattern) if path.is_file()]
    return sorted(found) or sorted(state.glob("slabs/*.slab"))


def _slab(state: Path, rng: random.Random) -> tuple[Path, int, int]:
    """A slab that holds something, its slot size and how many slots it has."""
    slabs = _files(state, "slabs/*.slab")
    while True:
        path = slabs.pop(rng.randrange(len(slabs)))
        slot_bytes = _slot_bytes(path)
        count = (path.stat().st_size - SLAB_RESERVED_BYTES) // max(slot_bytes, 1)
        if slot_bytes >= 8192 and count > 0:
            return path, slot_bytes, count
        if not slabs:  # all heads are damaged already
            return path, 8192, 1


def _flip(path: Path, offset: int, rng: random.Random) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        if byte:
            file.seek(offset)
            file.write(bytes((byte[0] ^ 1 << rng.randrange(8),)))


def flip_slab(state: Path, rng: random.Random) -> None:
    """A bit of a slab: of its own header, of a slot's, or of a payload."""
    path, slot_bytes, count = _slab(state, rng)
    slot = SLAB_RESERVED_BYTES + rng.randrange(count) * slot_bytes
    slab_head = (rng.randrange(48), 4096 + rng.randrange(400), 32768 + rng.randrange(400))
    in_slot = (slot + rng.randrange(216), slot + rng.randrange(slot_bytes))
    _flip(path, rng.choice(slab_head if rng.random() < 0.05 else in_slot), rng)


def flip_catalogue(state: Path, rng: random.Random) -> None:
    """A bit of LMDB's file, more often in what matters: its first pages and headers of pages."""
    path = state / "catalogue" / "data.mdb"
    size = path.stat().st_size
    page = rng.randrange(max(size // 4096, 1)) * 4096
    places = (rng.randrange(8192), page + rng.randrange(64), page + rng.randrange(4096))
    _flip(path, min(rng.choice(places), size - 1), rng)


def flip_small(state: Path, rng: random.Random) -> None:
    """A bit of a small file: the book of namespaces, the version."""
    path = rng.choice([p for p in _files(state, "*") if p.stat().st_size])
    _flip(path, rng.randrange(path.stat().st_size), rng)


def _slot(path: Path, slot_bytes: int, index: int) -> bytes:
    with path.open("rb") as file:
        file.seek(SLAB_RESERVED_BYTES + index * slot_bytes)
        return file.read(slot_bytes)


def _put_slot(path: Path, slot_bytes: int, index: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(SLAB_RESERVED_BYTES + index * slot_bytes)
        file.write(content)


def swap_slots(state: Path, rng: random.Random) -> None:
    """Two slots lie where the other one belongs, of one slab or of two with the same size."""
    path, slot_bytes, count = _slab(state, rng)
    other, other_bytes, _ = _slab(state, rng)
    if other_bytes != slot_bytes:
        other = path
    one, two = rng.randrange(count), rng.randrange(count)
    first, second = _slot(path, slot_bytes, one), _slot(other, slot_bytes, two)
    _put_slot(path, slot_bytes, one, second)
    _put_slot(other, slot_bytes, two, first)


def copy_slot(state: Path, rng: random.Random) -> None:
    """A write went to another slot, too."""
    path, slot_bytes, count = _slab(state, rng)
    content = _slot(path, slot_bytes, rng.randrange(count))
    _put_slot(path, slot_bytes, rng.randrange(count), content)


def replay_slots(state: Path, rng: random.Random) -> None:
    """Writes of the last life were lost by the disk: slots hold what they held before it."""
    old = state.parent.parent / "old" / "state"
    for _ in range(rng.choice((1, 4, 64))):
        path, slot_bytes, count = _slab(state, rng)
        before = old / path.relative_to(state)
        if before.exists():
            index = rng.randrange(count)
            _put_slot(path, slot_bytes, index, _slot(before, slot_bytes, index))


def replay_slab(state: Path, rng: random.Random) -> None:
    """A whole slab is of an earlier time."""
    path = rng.choice(_files(state, "slabs/*.slab"))
    before = state.parent.parent / "old" / "state" / path.relative_to(state)
    if before.exists():
        shutil.copyfile(before, path)


def replay_catalogue(state: Path, _: random.Random) -> None:
    """The catalogue is of an earlier time, and sound."""
    before = state.parent.parent / "old" / "state" / "catalogue" / "data.mdb"
    shutil.copyfile(before, state / "catalogue" / "data.mdb")


def swap_slabs(state: Path, rng: random.Random) -> None:
    """Two slab files have each other's name."""
    one, two = rng.sample(_files(state, "slabs/*.slab"), 2)
    aside = one.with_suffix(".aside")
    one.rename(aside)
    two.rename(one)
    aside.rename(two)


def _any_file(state: Path, rng: random.Random) -> Path:
    pattern = rng.choice(("slabs/*.slab", "catalogue/data.mdb", "*"))
    return rng.choice(_files(state, pattern))


def truncate(state: Path, rng: random.Random) -> None:
    """A file ends early."""
    path = _any_file(state, rng)
    size = path.stat().st_size
    os.truncate(path, rng.choice((0, 1, size // 2, max(size - 1, 0), rng.randrange(size + 1))))


def remove(state: Path, rng: random.Random) -> None:
    """A file is missing."""
    _any_file(state, rng).unlink()


def zero(state: Path, rng: random.Random) -> None:
    """A range of a file is zeros: sectors, pages, or all of it."""
    path = _any_file(state, rng)
    size = path.stat().st_size
    start = rng.randrange(size + 1) // 512 * 512
    length = rng.choice((512, 4096, 65536, size))
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(min(length, size - start)))


def garbage(state: Path, rng: random.Random) -> None:
    """A page of a file is something else's."""
    path = _any_file(state, rng)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(rng.randrange(size + 1) // 4096 * 4096)
        file.write(rng.randbytes(4096))


def replay_old_copies(state: Path, _: random.Random) -> None:
    """Wipes were lost: slots that are free hold the former copy of blocks whose present one lies
    elsewhere; and the catalogue, which would know, is lost, too.
    """
    old = state.parent.parent / "old" / "state"
    present = list(_records(state))
    blocks = {_identity(record) for _, record, _ in present}
    taken = {record.slot for _, record, _ in present}
    for name, record, content in _records(old):
        path = state / name
        if not path.exists() or _slot_bytes(path) != record.slot_bytes:
            continue  # cut anew since: it would lie across others
        if _identity(record) in blocks and record.slot not in taken:
            index = record.slot & SLOTS_PER_SEGMENT_MAX - 1
            _put_slot(path, record.slot_bytes, index, content)
    (state / "catalogue" / "data.mdb").unlink(missing_ok=True)


def _slot_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return int(struct.unpack("<Q", file.read(24).ljust(24, b"\0")[16:])[0])


def _identity(record: SlotRecord) -> tuple[bytes, int, bytes]:
    return record.label.namespace, record.label.shard, record.label.key


def _records(state: Path) -> Iterator[tuple[Path, SlotRecord, bytes]]:
    """Every slot with a sound header: its file's name, what the header says, all its bytes."""
    for path in _files(state, "slabs/*.slab"):
        content = path.read_bytes()
        (slot_bytes,) = struct.unpack_from("<Q", content, 16)
        for start in range(SLAB_RESERVED_BYTES, len(content), slot_bytes or len(content)):
            with contextlib.suppress(BlockCorrupt, struct.error):
                record = unpack_slot_header(memoryview(content), start)
                yield path.relative_to(state), record, content[start : start + slot_bytes]


# The last ones bring back what was: then what is gone may be found again (never other bytes).
KINDS: Final[dict[str, Callable[[Path, random.Random], None]]] = {
    "flip-slab": flip_slab,
    "flip-catalogue": flip_catalogue,
    "flip-small": flip_small,
    "swap-slots": swap_slots,
    "copy-slot": copy_slot,
    "swap-slabs": swap_slabs,
    "truncate": truncate,
    "remove": remove,
    "zero": zero,
    "garbage": garbage,
    "replay-slots": replay_slots,
    "replay-slab": replay_slab,
    "replay-catalogue": replay_catalogue,
    "replay-old-copies": replay_old_copies,
}


def damage(state: Path, kind: str, count: int, rng: random.Random) -> None:
    """`count` times this kind; some lose the catalogue besides, so that slabs are all there is.

    Not with slots of the past: where they take the place of the only newer copy, nothing that is
    left on the disk could tell.
    """
    for _ in range(count):
        KINDS[kind](state, rng)
    if rng.random() < 0.25 and not kind.startswith("replay"):
        (state / "catalogue" / "data.mdb").unlink(missing_ok=True)
