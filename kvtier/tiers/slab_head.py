r"""What a slab file says of itself, as bytes: its header, and the namespaces its slots are of.

Slab header, little endian: 0 magic `KVTSLAB\0`, 8 version u32, 12 slab index u32, 16 slot_bytes
u64, 24 cut generation u64 (slots of older generations are dead), 32 id of the state directory, 16
bytes, 48 XXH3-64 of bytes [0, 48).

Namespaces: 0 magic `KVTNAMES`, 8 revision u64, 16 length u32, 20 flags u32 (1: free slots may hold
bytes of namespaces that are not listed), 24 XXH3-64 of [8, 24) and what follows, 32 zlib of, for
each: digest 16 bytes, epoch u64, lengths of descriptor u32 and wrapped key u16, flags u16 (1: not
all slots are encrypted), descriptor, wrapped key.

Does not: read or write files.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from kvtier import native
from kvtier.tiers.state import Named, Names
from kvtier.units import KIB, PAGE_BYTES

NAMES_BYTES: Final = 28 * KIB
NAMES_OFFSETS: Final = (4 * KIB, 32 * KIB)

_SLAB_MAGIC: Final = b"KVTSLAB\0"
_NAMES_MAGIC: Final = b"KVTNAMES"
_VERSION: Final = 1
_SLAB: Final = struct.Struct("<8sIIQQ16s")
_NAMES: Final = struct.Struct("<8sQII")
_NAME: Final = struct.Struct("<16sQIHH")
_FORMER: Final = 1
_PLAIN: Final = 1
_SUM: Final = struct.Struct("<Q")
_NAMES_START: Final = _NAMES.size + _SUM.size
_NAMES_RAW_BYTES_MAX: Final = 16 * 1024 * KIB  # of one slab, unpacked


class SlabHead(NamedTuple):
    """What a slab file says of itself."""

    number: int
    slot_bytes: int
    cut_generation: int
    state_id: bytes

    def pack(self) -> bytes:
        """The header page, but its zeros."""
        head = _SLAB.pack(_SLAB_MAGIC, _VERSION, *self)
        return head + _SUM.pack(native.checksum_bytes(head))


def unpack_head(head: bytes) -> SlabHead | None:
    """None where there is no sound header."""
    if len(head) < _SLAB.size + _SUM.size:
        return None
    magic, version, *fields = _SLAB.unpack_from(head)
    (checksum,) = _SUM.unpack_from(head, _SLAB.size)
    sound = native.checksum_bytes(head[: _SLAB.size]) == checksum
    return SlabHead(*fields) if (magic, version, sound) == (_SLAB_MAGIC, _VERSION, True) else None


def read_head(path: Path) -> SlabHead | None:
    """For those who only look: None where there is no sound header. Raises OSError."""
    with path.open("rb") as file:
        return unpack_head(file.read(PAGE_BYTES))


class NamesCopy(NamedTuple):
    """One of the two copies of the list."""

    revision: int  # 0: unwritten or damaged
    names: Names
    has_former: bool


def pack_names(revision: int, names: Mapping[bytes, Named], *, has_former: bool) -> bytes | None:
    """One copy; None when so many do not fit."""
    raw = b"".join(
        _NAME.pack(digest, epoch, len(text), len(key), _PLAIN * plain) + text + key
        for digest, (epoch, text, key, plain) in names.items()
    )
    packed = zlib.compress(raw)
    if len(packed) + _NAMES_START > NAMES_BYTES or len(raw) > _NAMES_RAW_BYTES_MAX:
        return None
    head = _NAMES.pack(_NAMES_MAGIC, revision, len(packed), _FORMER * has_former)
    return head + _SUM.pack(native.checksum_bytes(head[8:] + packed)) + packed


def unpack_names(area: bytes) -> NamesCopy:
    """One copy of the list."""
    magic, revision, length, flags = _NAMES.unpack_from(area)
    (checksum,) = _SUM.unpack_from(area, _NAMES.size)
    packed = area[_NAMES_START : _NAMES_START + length]
    if magic != _NAMES_MAGIC or native.checksum_bytes(area[8 : _NAMES.size] + packed) != checksum:
        return NamesCopy(0, {}, False)
    raw = zlib.decompressobj().decompress(packed, _NAMES_RAW_BYTES_MAX)
    names: Names = {}
    offset = 0
    while offset < len(raw):
        digest, epoch, text_bytes, key_bytes, entry_flags = _NAME.unpack_from(raw, offset)
        text = offset + _NAME.size
        offset = text + text_bytes + key_bytes
        key = raw[text + text_bytes : offset]
        plain = bool(entry_flags & _PLAIN)
        names[digest] = Named(epoch, raw[text : text + text_bytes], key, plain)
    return NamesCopy(revision, names, bool(flags & _FORMER))
