"""Which catalogue records count, and the chains that their blocks make.

    pieces of (key, value) --arrange--> stretches of chains, and the slots of what is left out

A record counts when its checksum holds, its slab is cut as it says, its namespace is known in that
very epoch, it is the newest of its block and shard, all shards of its block are there, and its
parents do not run in a circle. `Arranger` finds that out in Python; arrange.py asks the library.

Does not: read the catalogue, or believe that a slot still holds what its record says.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final, NamedTuple

import xxhash

from kvtier import native
from kvtier.block import SLOT_BITS, SLOTS_PER_SEGMENT_MAX, SlotLabel
from kvtier.tiers.base import SlotRecord
from kvtier.tiers.packing import (
    CODECS,
    FIDELITIES,
    KEY_AT,
    KIND,
    KIND_AT,
    RECORD,
    unpack_record,
)

STRETCH_BLOCKS_MAX: Final = 512
KEY_BYTES_MAX: Final = 64
_KEPT, _DAMAGED, _DROPPED, _STALE = range(4)


class Piece(NamedTuple):
    """Records in the order of their keys: keys, lengths of values, values one after another."""

    # Views are of an AlignedBuffer: only such memory has an address.
    keys: bytes | memoryview
    lengths: array[int] | memoryview
    values: bytes | memoryview


class Shape(NamedTuple):
    """What a namespace's records must say to count. Bytes of one shard; 0 = any."""

    epoch: int
    slot_bytes: int
    size_bytes: int
    shards: int


class Stretch(NamedTuple):
    """Consecutive blocks of a chain, parent before child: packed keys; slots and checksums, one a
    shard of each block, and when each was stored. `parent` (b"" = none) and `position` are those
    of the first block.
    """

    namespace: bytes
    parent: bytes
    position: int
    key_size: int
    keys: bytes
    slots: array[int]
    checksums: array[int]
    written: array[int]


@dataclass(slots=True)
class Found:
    """What `arrange` made of the records. Chains written later come later; of a chain, a block
    never comes before its parent.
    """

    block_count: int = 0
    generation_max: int = 0  # of all sound records
    damaged_count: int = 0
    # Slots of records that do not count. Headers of stale ones would count at a rebuild, once what
    # is newer is gone.
    dropped: list[int] = field(default_factory=list)
    stale: list[int] = field(default_factory=list)
    heads: list[tuple[bytes, int, int, bytes]] = field(default_factory=list)
    key_sizes: dict[bytes, int] = field(default_factory=dict)
    shapes: Mapping[bytes, Shape] = field(default_factory=dict)  # those asked for
    keys: bytes | bytearray | memoryview = b""
    slots: array[int] | memoryview = field(default_factory=lambda: array("I"))
    checksums: array[int] | memoryview = field(default_factory=lambda: array("Q"))
    written: array[int] | memoryview = field(default_factory=lambda: array("I"))  # by block
    pieces: Sequence[Piece] = ()
    verdicts: bytes | bytearray = b""

    def stretches(self) -> Iterator[Stretch]:
        """All blocks that came back, a stretch of at most STRETCH_BLOCKS_MAX at a time."""
        key_at = slot_at = block_at = 0
        for namespace, blocks, position, parent in self.heads:
            key_size, shards = self.key_sizes[namespace], self.shapes[namespace].shards
            key_end, slot_end = key_at + blocks * key_size, slot_at + blocks * shards
            yield Stretch(
                namespace,
                parent,
                position,
                key_size,
                bytes(self.keys[key_at:key_end]),
                array("I", self.slots[slot_at:slot_end]),
                array("Q", self.checksums[slot_at:slot_end]),
                array("I", self.written[block_at : block_at + blocks]),
            )
            key_at, slot_at, block_at = key_end, slot_end, block_at + blocks

    def __len__(self) -> int:
        return self.block_count

    def __iter__(self) -> Iterator[SlotRecord]:
        """The records that count, in the order of their slots. Slow: for tests and tools."""
        verdicts = iter(self.verdicts)
        for piece in self.pieces:
            for _, value in items(piece):
                if next(verdicts) == _KEPT:
                    yield unpack_record(value)

    def let_go(self) -> None:
        """Gives the memory of all of it back; it is of no use then. Worker thread."""
        parts = [
            self.keys,
            self.slots,
            self.checksums,
            self.written,
            *(p for piece in self.pieces for p in piece),
        ]
        self.keys, self.slots, self.checksums, self.pieces = b"", array("I"), array("Q"), ()
        self.written = array("I")
        for part in parts:
            if isinstance(part, memoryview):
                native.let_go(part)

    def __repr__(self) -> str:
        return f"<Found {self.block_count} blocks in {len(self.heads)} stretches>"


def items(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """Key and value of each record."""
    ends = accumulate(piece.lengths)
    for key, length, end in zip(_numbers(piece.keys), piece.lengths, ends, strict=True):
        yield key, bytes(piece.values[end - length : end])


def _numbers(keys: bytes | memoryview) -> memoryview:
    return memoryview(keys).cast("I")


def slot_count(segment_bytes: int, slot_bytes: int) -> int:
    """Of a slab cut into slots of that size."""
    return min(segment_bytes // slot_bytes, SLOTS_PER_SEGMENT_MAX) if slot_bytes else 0


_Block = dict[int, int]  # shard -> index of its newest record


def judged(pieces: Sequence[Piece], verdicts: bytearray, found: Found) -> Found:
    """Fills in what the verdicts say."""
    found.pieces, found.verdicts = pieces, verdicts
    found.damaged_count = verdicts.count(_DAMAGED)
    if verdicts.count(_KEPT) < len(verdicts):
        start = 0
        for piece in pieces:
            part = verdicts[start : start + len(piece.lengths)]
            if any(part):
                judged = list(zip(_numbers(piece.keys), part, strict=True))
                found.stale.extend(slot for slot, verdict in judged if verdict == _STALE)
                found.dropped.extend(
                    slot for slot, verdict in judged if verdict in (_DAMAGED, _DROPPED)
                )
            start += len(piece.lengths)
    return found


class Arranger:
    """The twin of kernels/cpu/records.cpp, step by step."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        cuts: Sequence[tuple[int, int]],
        segment_bytes: int,
        shapes: Mapping[bytes, Shape],
    ) -> None:
        self._pieces, self._shapes = pieces, shapes
        self._limits = [(b, g, slot_count(segment_bytes, b)) for b, g in cuts]
        self._verdicts = bytearray(sum(len(piece.lengths) for piece in pieces))
        self._records: dict[int, SlotRecord] = {}
        self._blocks: dict[tuple[bytes, bytes], _Block] = {}
        self._found = Found(shapes=shapes)
        self._slots, self._checksums, self._written = array("I"), array("Q"), array("I")

    def run(self) -> Found:
        every = (item for piece in self._pieces for item in items(piece))
        for index, (stored_key, value) in enumerate(every):
            self._verdicts[index] = self._judge(index, stored_key, value)
        self._keep_newest()
        self._drop_torn()
        self._place()
        return judged(self._pieces, self._verdicts, self._found)

    def _judge(self, index: int, stored_key: int, value: bytes) -> int:
        body = value[8:]
        if len(value) < KEY_AT or body[:4] != stored_key.to_bytes(4, "little"):
            return _DAMAGED
        checksum, slot, _, _, generation = RECORD.unpack_from(value)
        if xxhash.xxh3_64_intdigest(body) != checksum:
            return _DAMAGED
        self._found.generation_max = max(self._found.generation_max, generation)
        kind = KIND.unpack_from(value, KIND_AT)
        slot_bytes, size_bytes, epoch, namespace, shard, codec, fidelity, key_length, parent = kind[
            :9
        ]
        shape = self._shapes.get(namespace)
        segment, at = slot >> SLOT_BITS, slot & (SLOTS_PER_SEGMENT_MAX - 1)
        sound = (
            0 < key_length <= KEY_BYTES_MAX
            and parent <= KEY_BYTES_MAX
            and KEY_AT + key_length + parent == len(value)
            and segment < len(self._limits)
            and codec in CODECS
            and fidelity in FIDELITIES
        )
        if not sound or shape is None:
            return _DROPPED
        cut_bytes, generation_min, slot_count = self._limits[segment]
        if slot_bytes != cut_bytes or generation < generation_min or at >= slot_count:
            return _DROPPED
        fits = shape.slot_bytes in (0, slot_bytes) and shape.size_bytes in (0, size_bytes)
        if epoch != shape.epoch or not fits or shard >= shape.shards:
            return _DROPPED
        self._records[index] = unpack_record(value)
        return _KEPT

    def _keep_newest(self) -> None:
        sizes: dict[bytes, Counter[int]] = {}
        for record in self._records.values():
            sizes.setdefault(record.label.namespace, Counter())[len(record.label.key)] += 1
        for namespace in self._shapes:
            counts = sizes.get(namespace, Counter())
            size = min(counts, key=lambda length: (-counts[length], length), default=0)
            self._found.key_sizes[namespace] = size
        for index, record in list(self._records.items()):
            label = record.label
            if len(label.key) != self._found.key_sizes[label.namespace]:
                self._drop(index)
                continue
            block = self._blocks.setdefault((label.namespace, label.key), {})
            rival = block.setdefault(label.shard, index)
            if rival != index:
                older, newer = sorted((rival, index), key=self._age)
                block[label.shard] = newer
                self._drop(older)

    def _age(self, index: int) -> tuple[int, int]:
        # Of equal generations the first record stays.
        return self._records[index].label.generation, -index

    def _drop(self, index: int) -> None:
        self._verdicts[index] = _STALE

    def _drop_torn(self) -> None:
        for name, block in list(self._blocks.items()):
            if len(block) < self._shapes[name[0]].shards:
                del self._blocks[name]
                for index in block.values():
                    self._drop(index)

    def _place(self) -> None:
        children: dict[tuple[bytes, bytes], list[tuple[bytes, bytes]]] = {}
        starts: list[tuple[bytes, bytes]] = []
        for name in self._blocks:
            above = (name[0], self._speaker(name).parent)
            if above in self._blocks:
                children.setdefault(above, []).append(name)
            else:
                starts.append(name)
        starts.sort(key=lambda name: self._speaker(name).generation)
        keys: list[bytes] = []
        placed: set[tuple[bytes, bytes]] = set()
        for start in starts:
            waiting = [start]
            while waiting:
                first = len(keys)
                name = waiting.pop()
                label = self._speaker(name)
                while True:
                    keys.append(name[1])
                    placed.add(name)
                    self._emit(name)
                    below = children.get(name, [])
                    if len(below) != 1 or len(keys) - first == STRETCH_BLOCKS_MAX:
                        waiting.extend(reversed(below))
                        break
                    name = below[0]
                self._found.heads.append(
                    (label.namespace, len(keys) - first, label.position, label.parent)
                )
        self._found.keys, self._found.block_count = b"".join(keys), len(keys)
        self._found.slots, self._found.checksums = self._slots, self._checksums
        self._found.written = self._written
        for name in self._blocks.keys() - placed:
            for index in self._blocks[name].values():
                self._drop(index)

    def _speaker(self, name: tuple[bytes, bytes]) -> SlotLabel:
        return self._records[self._blocks[name][0]].label

    def _emit(self, name: tuple[bytes, bytes]) -> None:
        block = self._blocks[name]
        labels = [self._records[index].label for index in block.values()]
        self._written.append(min(label.written_s for label in labels))
        for shard in range(len(block)):
            record = self._records[block[shard]]
            self._slots.append(record.slot)
            self._checksums.append(record.label.checksum)
