r"""Slots of the SSD tier as bytes: their header, and batches of them to and from disk.

Slot header, little endian: 0 magic `KVTSLOT\0`, 8 version u16, 10 codec u8, 11 fidelity u8, 12
shard u16, 14 key length u8, 15 parent length u8, 16 namespace digest 16 bytes, 32 epoch u64, 40
position u32, 44 slot index u32, 48 slab index u32, 52 slot_bytes u32, 56 size_bytes u64, 64
XXH3-64 of the payload u64, 72 generation u64, 80 key 64 bytes, 144 parent 64 bytes, 208 when it
was stored u32, 212 cipher u8 (0 none, 1 AES-256-GCM), 213 zero, 216 salt of the start 16 bytes, 232
tag 16 bytes, 248 XXH3-64 of bytes [0, 248); zeros to 4096. A wiped slot has a zero page.

Of an encrypted slot bytes [0, 232) are the associated data, with zero for the payload's checksum:
where that stands lies the first half of the tag, since a checksum of the plaintext would tell who
has the same bytes, and one of the ciphertext nothing that the tag does not.

Does not: know the catalogue, create files, or make anything durable.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from kvtier import native
from kvtier.block import SLOT_BITS, SLOTS_PER_SEGMENT_MAX, Codec, Fidelity, SlotIO, SlotLabel
from kvtier.errors import BlockCorrupt, TierFailed
from kvtier.tiers.base import SlotRecord
from kvtier.tiers.cipher import TAG_BYTES, DataKey, Keyring
from kvtier.tiers.files import Files
from kvtier.units import PAGE_BYTES, align_up

SLOT_HEADER_BYTES: Final = PAGE_BYTES

_SLOT_MAGIC: Final = b"KVTSLOT\0"
_VERSION: Final = 1
_SLOT: Final = struct.Struct("<8sHBBHBB16sQIIIIQQQ64s64sIB3x16s")
_CHECKSUM_AT: Final = 64
_GCM: Final = 1
_SUM: Final = struct.Struct("<Q")
_MASK: Final = SLOTS_PER_SEGMENT_MAX - 1
_HEAD_BYTES: Final = _SLOT.size + TAG_BYTES


def _packed(slot: int, slot_bytes: int, label: SlotLabel, checksum: int, salt: bytes) -> bytes:
    """The fields of a header; with a salt those of an encrypted slot."""
    return _SLOT.pack(
        _SLOT_MAGIC, _VERSION, label.codec, label.fidelity, label.shard, len(label.key),
        len(label.parent), label.namespace, label.epoch, label.position, slot & _MASK,
        slot >> SLOT_BITS, slot_bytes, label.size_bytes, checksum, label.generation,
        label.key, label.parent, label.written_s, _GCM if salt else 0, salt,
    )  # fmt: skip


def pack_slot_header(
    page: memoryview,
    offset: int,
    slot: int,
    slot_bytes: int,
    label: SlotLabel,
    salt: bytes = b"",
    tag: bytes = b"",
) -> None:
    """Writes the slot's header at `offset`; the rest of that page must be zero already."""
    head = _packed(slot, slot_bytes, label, label.checksum, salt) + tag.ljust(TAG_BYTES, b"\0")
    end = offset + len(head)
    page[offset:end] = head
    _SUM.pack_into(page, end, native.checksum_bytes(head))


def unpack_slot_header(page: memoryview, offset: int) -> SlotRecord:
    """What the header at `offset` says, once its own checksum holds.

    Raises:
        BlockCorrupt: no header, another version, or damaged.
    """
    head = bytes(page[offset : offset + _HEAD_BYTES])
    if head[:8] != _SLOT_MAGIC:
        raise BlockCorrupt("no slot header", damage="header")
    (found,) = _SUM.unpack_from(page, offset + _HEAD_BYTES)
    if native.checksum_bytes(head) != found:
        raise BlockCorrupt("damaged slot header", damage="header")
    (
        _, version, codec, fidelity, shard, key_length, parent_length, namespace, epoch, position,
        index, slab, slot_bytes, size_bytes, checksum, generation, key, parent, written_s, cipher,
        _,
    ) = _SLOT.unpack_from(head)  # fmt: skip
    if version != _VERSION or key_length > 64 or parent_length > 64:
        raise BlockCorrupt(f"slot header of version {version}", damage="header")
    if cipher not in (0, _GCM):
        raise BlockCorrupt(f"slot with an unknown cipher {cipher}", damage="header")
    try:
        kinds = Codec(codec), Fidelity(fidelity)
    except ValueError as error:
        raise BlockCorrupt(f"slot in an unknown codec: {error}", damage="header") from error
    label = SlotLabel(
        namespace, epoch, key[:key_length], parent[:parent_length], position, shard, size_bytes,
        checksum, *kinds, generation, written_s,
    )  # fmt: skip
    return SlotRecord(slab << SLOT_BITS | index, slot_bytes, label)


class SlotStaging:
    """Aligned memory for headers, one piece per thread and direction, and for odd payloads."""

    def __init__(self, files: Files, keyring: Keyring) -> None:
        self._files = files
        self._keyring = keyring
        self._local = threading.local()

    def write(self, items: Sequence[SlotIO], fds: list[int], offsets: list[int]) -> list[SlotLabel]:
        """Writes headers and payloads, not yet durably; a failed item gets its TierFailed. Returns
        the labels that the headers have: those of encrypted slots differ in their checksum.

        Payloads that are not page-aligned whole pages go through a zeroed copy: O_DIRECT wants
        it, and no byte beyond `size_bytes` may reach the disk. Encrypted ones go through theirs.
        """
        pages = self._pages("written", len(items))
        keys = [self._keyring.key_of(item.label.namespace) for item in items]
        sizes, payloads, odd = _payloads(items, keys)
        copied = [index for index in odd if keys[index] is None]
        native.copy(
            [payloads[index] for index in copied],
            [items[index].address for index in copied],
            [items[index].label.size_bytes for index in copied],
        )
        headers, labels = [], []
        for index, item in enumerate(items):
            offset, label, key = index * SLOT_HEADER_BYTES, item.label, keys[index]
            salt = tag = b""
            if key is not None:
                salt = self._keyring.salt
                aad = _packed(item.slot, item.slot_bytes, label, 0, salt)
                size = label.size_bytes
                tag = key.seal(salt, label.generation, aad, item.address, payloads[index], size)
                label = replace(label, checksum=_half(tag))
            pack_slot_header(pages.view, offset, item.slot, item.slot_bytes, label, salt, tag)
            headers.append(pages.address + offset)
            labels.append(label)
        errors = self._files.write_slots(fds, offsets, headers, payloads, sizes)
        for buffer in odd.values():
            buffer.close()
        for item, error in zip(items, errors, strict=True):
            if error:
                item.error = TierFailed(f"ssd slot {item.slot:#x}: {os.strerror(error)}")
        return labels

    def read(self, items: Sequence[SlotIO], fds: list[int], offsets: list[int]) -> int:
        """Reads and verifies; returns how many were corrupt. Each item's `error` says why."""
        pages = self._pages("read", len(items))
        headers = [pages.address + index * SLOT_HEADER_BYTES for index in range(len(items))]
        keys = [self._keyring.key_of(item.label.namespace) for item in items]
        sizes, payloads, odd = _payloads(items, keys)
        used = [item.label.size_bytes for item in items]
        checksums, errors = self._files.read_slots(fds, offsets, headers, payloads, sizes, used)
        corrupt = 0
        for index, item in enumerate(items):
            if errors[index]:
                reason = os.strerror(errors[index])
                item.error = TierFailed(f"ssd slot {item.slot:#x}: {reason}")
                continue
            try:
                offset, key = index * SLOT_HEADER_BYTES, keys[index]
                may_be_plain = self._keyring.may_be_plain(item.label.namespace)
                if may_be_plain and not _salt(pages.view, offset):
                    key = keys[index] = None  # from before its namespace had a key
                if key is None:
                    _verify(item, pages.view, offset, checksums[index])
                else:
                    _open(item, pages.view, offset, payloads[index], key)
            except BlockCorrupt as error:
                item.error = error
                corrupt += 1
        whole = [index for index in odd if items[index].error is None and keys[index] is None]
        native.copy(
            [items[index].address for index in whole],
            [payloads[index] for index in whole],
            [used[index] for index in whole],
        )
        for buffer in odd.values():
            buffer.close()
        return corrupt

    def wipe(self, fds: list[int], offsets: list[int]) -> list[int]:
        """Zeroes the headers there, not yet durably; an errno per slot."""
        with native.AlignedBuffer(PAGE_BYTES) as zeros:
            pages = [zeros.address] * len(fds)
            return self._files.write_slots(fds, offsets, pages, pages, [0] * len(fds))

    def _pages(self, use: str, count: int) -> native.AlignedBuffer:
        """`count` pages of this thread; those for writing are zero beyond what headers cover."""
        pages: native.AlignedBuffer | None = getattr(self._local, use, None)
        if pages is None or pages.size_bytes < count * SLOT_HEADER_BYTES:
            pages = native.AlignedBuffer(count * SLOT_HEADER_BYTES)
            setattr(self._local, use, pages)
        return pages


def attempt(items: Sequence[SlotIO], step: Callable[[], None]) -> None:
    """Takes a step that all of these items need: if it fails, they all do."""
    try:
        if items:
            step()
    except TierFailed as error:
        for item in items:
            item.error = error


def _payloads(
    items: Sequence[SlotIO], keys: Sequence[object | None]
) -> tuple[list[int], list[int], dict[int, native.AlignedBuffer]]:
    """Bytes and address on their way to disk, and our own buffers for those that need one: also
    for those with a key.
    """
    sizes, payloads, odd = [], [], {}
    for index, item in enumerate(items):
        size = align_up(item.label.size_bytes, PAGE_BYTES)
        address = item.address
        if address % PAGE_BYTES or size != item.label.size_bytes or keys[index] is not None:
            odd[index] = native.AlignedBuffer(size)
            address = odd[index].address
        sizes.append(size)
        payloads.append(address)
    return sizes, payloads, odd


def _open(item: SlotIO, pages: memoryview, offset: int, ciphertext: int, key: DataKey) -> None:
    """Decrypts the slot's bytes to `item.address`, once header and tag are sound and are those of
    what the label says, in this place. Raises BlockCorrupt.
    """
    _, _, found = unpack_slot_header(pages, offset)
    salt, size_bytes, wanted = _salt(pages, offset), item.label.size_bytes, item.label.checksum
    end = offset + _SLOT.size
    aad, tag = bytearray(pages[offset:end]), bytes(pages[end : end + TAG_BYTES])
    aad[_CHECKSUM_AT : _CHECKSUM_AT + _SUM.size] = bytes(_SUM.size)
    if not salt:
        raise BlockCorrupt(f"ssd slot {item.slot:#x} of an encrypted namespace is not encrypted")
    key.open(salt, found.generation, bytes(aad), tag, ciphertext, item.address, size_bytes)
    [checksum] = native.checksum([item.address], [size_bytes])
    # Since a restart only the tag is known: either says which writing of the block it must be.
    known = _half(tag) if wanted == _half(tag) else checksum
    try:
        _verify(item, pages, offset, _half(tag), known)
    except BlockCorrupt:
        ctypes.memset(item.address, 0, size_bytes)
        raise
    item.label.checksum = checksum


def _salt(pages: memoryview, offset: int) -> bytes:
    """Of an encrypted slot; b"" of another."""
    *_, cipher, salt = _SLOT.unpack_from(pages, offset)
    return bytes(salt) if cipher == _GCM else b""


def _half(tag: bytes) -> int:
    (number,) = _SUM.unpack_from(tag)
    return int(number)


def _verify(
    item: SlotIO, pages: memoryview, offset: int, checksum: int, known: int | None = None
) -> None:
    """Raises BlockCorrupt unless header and payload are what the label says, in this place: the
    header has `checksum`, and the label has `known` (None: what the header has).
    """
    slot, slot_bytes, found = unpack_slot_header(pages, offset)
    wanted = item.label
    here = f"ssd slot {item.slot:#x}"
    if (slot, slot_bytes) != (item.slot, item.slot_bytes):
        raise BlockCorrupt(f"{here} holds what belongs to {slot:#x}", damage="misplaced")
    same = (found.namespace, found.key, found.shard)
    if same != (wanted.namespace, wanted.key, wanted.shard):
        raise BlockCorrupt(f"{here} holds another block", damage="misplaced")
    if (
        found.epoch != wanted.epoch
        or (found.checksum if known is None else known) != wanted.checksum
        or found.size_bytes != wanted.size_bytes
        or int(found.codec) != int(wanted.codec)
        or int(found.fidelity) != int(wanted.fidelity)
    ):
        raise BlockCorrupt(f"{here} holds another writing of the block", damage="stale")
    if checksum != found.checksum:
        raise BlockCorrupt(f"{here}: the payload's checksum is wrong")
