"""arrange: puts catalogue records in order in one call of the library, or in Python without it.

A million records are 0.4 s in the library, without the interpreter's lock; in Python twenty times
that, with the same result.

Does not: say what counts (records.py does, and its twin kernels/cpu/records.cpp).
"""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Mapping, Sequence
from typing import Final

from kvtier import native
from kvtier.block import SLOT_BITS
from kvtier.errors import TierFailed
from kvtier.tiers.packing import CODECS, FIDELITIES
from kvtier.tiers.records import (
    KEY_BYTES_MAX,
    Arranger,
    Found,
    Piece,
    Shape,
    judged,
    slot_count,
)

_STRETCH: Final = struct.Struct("=IIII64s")  # namespace, blocks, position, parent length, parent
_INPUTS: Final = (
    "pieces", "piece_count", "stored_key", "value_len", "value", "segments", "slot_bytes",
    "generation_min", "slot_count", "spaces", "digest", "epoch", "space_slot_bytes", "space_size",
    "space_shards", "slot_bits", "codecs", "fidelities",
)  # fmt: skip
_OUTPUTS: Final = ("verdict", "keys", "slots", "checksums", "written", "stretches", "key_size")
_RESULTS: Final = ("stretch_count", "block_count", "generation_max")


class _RecordsStruct(ctypes.Structure):
    # Pointers as numbers: what they point to is kept alive by `_arrange_natively`.
    _fields_ = tuple((name, ctypes.c_uint64) for name in (*_INPUTS, *_OUTPUTS, *_RESULTS))


def arrange(
    pieces: Sequence[Piece],
    cuts: Sequence[tuple[int, int]],
    segment_bytes: int,
    shapes: Mapping[bytes, Shape],
) -> Found:
    """`cuts[segment]` is the slab's (slot_bytes, cut generation). Any thread. Raises TierFailed:
    no memory for it.
    """
    if native.library() is None:
        return Arranger(pieces, cuts, segment_bytes, shapes).run()
    return _arrange_natively(pieces, cuts, segment_bytes, shapes)


def _arrange_natively(
    pieces: Sequence[Piece],
    cuts: Sequence[tuple[int, int]],
    segment_bytes: int,
    shapes: Mapping[bytes, Shape],
) -> Found:
    library = native.library()
    assert library is not None
    kept: list[object] = []  # whatever the struct points into

    def words(values: Sequence[int]) -> int:
        column = array("Q", values)
        kept.append(column)
        return column.buffer_info()[0]

    def at(content: bytes | array[int] | memoryview) -> int:
        kept.append(content)
        return _address(content)

    digests = sorted(shapes)
    ordered = [shapes[digest] for digest in digests]
    total = sum(len(piece.lengths) for piece in pieces)
    verdicts = bytearray(total)
    # Untouched pages of these cost nothing.
    keys, stretches, slots, checksums, written = (
        native.AlignedBuffer(total * size or 8) for size in (KEY_BYTES_MAX, _STRETCH.size, 4, 8, 4)
    )
    key_sizes = array("Q", bytes(8 * len(digests)))
    given = _RecordsStruct(
        pieces=len(pieces),
        piece_count=words([len(piece.lengths) for piece in pieces]),
        stored_key=words([at(piece.keys) for piece in pieces]),
        value_len=words([at(piece.lengths) for piece in pieces]),
        value=words([at(piece.values) for piece in pieces]),
        segments=len(cuts),
        slot_bytes=words([slot_bytes for slot_bytes, _ in cuts]),
        generation_min=words([generation for _, generation in cuts]),
        slot_count=words([slot_count(segment_bytes, slot_bytes) for slot_bytes, _ in cuts]),
        spaces=len(digests),
        digest=at(b"".join(digests)),
        epoch=words([shape.epoch for shape in ordered]),
        space_slot_bytes=words([shape.slot_bytes for shape in ordered]),
        space_size=words([shape.size_bytes for shape in ordered]),
        space_shards=words([shape.shards for shape in ordered]),
        slot_bits=SLOT_BITS,
        codecs=sum(1 << codec for codec in CODECS),
        fidelities=sum(1 << fidelity for fidelity in FIDELITIES),
        verdict=_address(verdicts),
        keys=keys.address,
        slots=slots.address,
        checksums=checksums.address,
        written=written.address,
        stretches=stretches.address,
        key_size=key_sizes.buffer_info()[0],
    )
    if library.kvt_records_arrange(ctypes.byref(given)):
        raise TierFailed(f"no memory to put {total} records in order")
    heads = [
        (digests[space], blocks, position, parent[:length])
        for space, blocks, position, length, parent in _STRETCH.iter_unpack(
            stretches.view[: given.stretch_count * _STRETCH.size]
        )
    ]
    sizes = dict(zip(digests, key_sizes, strict=True))
    stretches.close()
    return judged(pieces, verdicts, Found(
        given.block_count, given.generation_max, 0, [], [], heads, sizes, shapes,
        keys.view, slots.view.cast("I"), checksums.view.cast("Q"), written.view.cast("I"),
    ))  # fmt: skip


def _address(memory: bytes | bytearray | array[int] | memoryview) -> int:
    if isinstance(memory, array):
        return memory.buffer_info()[0]
    if isinstance(memory, bytes):
        return ctypes.cast(ctypes.c_char_p(memory), ctypes.c_void_p).value or 0
    return ctypes.addressof(ctypes.c_char.from_buffer(memory)) if len(memory) else 0
