"""A catalogue record as bytes. kernels/cpu/records.cpp reads the same.

Key: the slot number, u32. Value: `RECORD`, `KIND`, key, parent, in native byte order; its first
field is XXH3-64 of all that follows.

Does not: keep records, or judge them.
"""

from __future__ import annotations

import struct
from typing import Final

import xxhash

from kvtier.block import Codec, Fidelity, SlotLabel
from kvtier.tiers.base import SlotRecord

# checksum, slot, position, payload checksum, generation; then the kind: slot_bytes, size, epoch,
# namespace, shard, codec, fidelity, key length, parent length, when it was stored.
RECORD: Final = struct.Struct("=QIIQQ")
KIND: Final = struct.Struct("=IQQ16sHBBBBI")
KIND_AT: Final = RECORD.size
KEY_AT: Final = RECORD.size + KIND.size
CODECS: Final = {int(codec): codec for codec in Codec}
FIDELITIES: Final = {int(fidelity): fidelity for fidelity in Fidelity}


def pack_record(slot: int, slot_bytes: int, label: SlotLabel) -> tuple[bytes, bytes]:
    """Key and value of a record."""
    head = RECORD.pack(0, slot, label.position, label.checksum, label.generation)
    kind = KIND.pack(
        slot_bytes, label.size_bytes, label.epoch, label.namespace, label.shard, label.codec,
        label.fidelity, len(label.key), len(label.parent), label.written_s,
    )  # fmt: skip
    body = b"".join((head[8:], kind, label.key, label.parent))
    return body[:4], xxhash.xxh3_64_intdigest(body).to_bytes(8, "little") + body


def unpack_record(value: bytes) -> SlotRecord:
    """The record whose value this is; its checksum is the caller's affair."""
    _, slot, position, checksum, generation = RECORD.unpack_from(value)
    kind = KIND.unpack_from(value, KIND_AT)
    slot_bytes, size_bytes, epoch, namespace, shard, codec, fidelity, key_length, parent, at = kind
    key_end = KEY_AT + key_length
    label = SlotLabel(
        namespace, epoch, value[KEY_AT:key_end], value[key_end : key_end + parent], position, shard,
        size_bytes, checksum, CODECS[codec], FIDELITIES[fidelity], generation, at,
    )  # fmt: skip
    return SlotRecord(slot, slot_bytes, label)


def names(value: bytes, label: SlotLabel) -> bool:
    """Whether a record's value is of this block, and of this writing of it if that is known."""
    if len(value) < KEY_AT:
        return True
    _, _, _, namespace, shard, _, _, key_length, _, _ = KIND.unpack_from(value, KIND_AT)
    stored = (namespace, shard, value[KEY_AT : KEY_AT + key_length])
    generation = RECORD.unpack_from(value)[4]
    same = stored == (label.namespace, label.shard, label.key)
    return same and label.generation in (0, generation)
