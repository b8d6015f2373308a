r"""Slots of the SSD tier as bytes: their header, and batches of them to and from disk.

Slot header, little endian: 0 magic `KVTSLOT\0`, 8 version u16, 10 codec u8, 11 fidelity u8, 12
shard u16, 14 key length u8, 15 parent length u8, 16 namespace digest 16 bytes, 32 epoch u64, 40
position u32, 44 slot index u32, 48 slab index u32, 52 slot_bytes u32, 56 size_bytes u64, 64
XXH3-64 of the payload u64, 72 generation u64, 80 key 64 bytes, 144 parent 64 bytes, 208 XXH3-64
of bytes [0, 208); zeros to 4096. A wiped slot has a zero page.

Does not: know the catalogue, create files, or make anything durable.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Final

from kvtier import native
from kvtier.block import SLOT_BITS, SLOTS_PER_SEGMENT_MAX, Codec, Fidelity, SlotIO, SlotLabel
from kvtier.errors import BlockCorrupt, TierFailed
from kvtier.tiers.base import SlotRecord
from kvtier.tiers.files import Files
from kvtier.units import PAGE_BYTES, align_up

SLOT_HEADER_BYTES: Final = PAGE_BYTES

_SLOT_MAGIC: Final = b"KVTSLOT\0"
_VERSION: Final = 1
_SLOT: Final = struct.Struct("<8sHBBHBB16sQIIIIQQQ64s64s")
_SUM: Final = struct.Struct("<Q")
_MASK: Final = SLOTS_PER_SEGMENT_MAX - 1


def pack_slot_header(
    page: memoryview, offset: int, slot: int, slot_bytes: int, label: SlotLabel
) -> None:
    """Writes the slot's header at `offset`; the rest of that page must be zero already."""
    head = _SLOT.pack(
        _SLOT_MAGIC, _VERSION, label.codec, label.fidelity, label.shard, len(label.key),
        len(label.parent), label.namespace, label.epoch, label.position, slot & _MASK,
        slot >> SLOT_BITS, slot_bytes, label.size_bytes, label.checksum, label.generation,
        label.key, label.parent,
    )  # fmt: skip
    end = offset + _SLOT.size
    page[offset:end] = head
    _SUM.pack_into(page, end, native.checksum_bytes(head))


def unpack_slot_header(page: memoryview, offset: int) -> SlotRecord:
    """What the header at `offset` says, once its own checksum holds.

    Raises:
        BlockCorrupt: no header, another version, or damaged.
    """
    head = bytes(page[offset : offset + _SLOT.size])
    if head[:8] != _SLOT_MAGIC:
        raise BlockCorrupt("no slot header", damage="header")
    (found,) = _SUM.unpack_from(page, offset + _SLOT.size)
    if native.checksum_bytes(head) != found:
        raise BlockCorrupt("damaged slot header", damage="header")
    (
        _, version, codec, fidelity, shard, key_length, parent_length, namespace, epoch, position,
        index, slab, slot_bytes, size_bytes, checksum, generation, key, parent,
    ) = _SLOT.unpack(head)  # fmt: skip
    if version != _VERSION or key_length > 64 or parent_length > 64:
        raise BlockCorrupt(f"slot header of version {version}", damage="header")
    try:
        kinds = Codec(codec), Fidelity(fidelity)
    except ValueError as error:
        raise BlockCorrupt(f"slot in an unknown codec: {error}", damage="header") from error
    label = SlotLabel(
        namespace, epoch, key[:key_length], parent[:parent_length], position, shard, size_bytes,
        checksum, *kinds, generation,
    )  # fmt: skip
    return SlotRecord(slab << SLOT_BITS | index, slot_bytes, label)


class SlotStaging:
    """Aligned memory for headers, one piece per thread and direction, and for odd payloads."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._local = threading.local()

    def write(self, items: Sequence[SlotIO], fds: list[int], offsets: list[int]) -> None:
        """Writes headers and payloads, not yet durably; a failed item gets its TierFailed.

        Payloads that are not page-aligned whole pages go through a zeroed copy: O_DIRECT wants
        it, and no byte beyond `size_bytes` may reach the disk.
        """
        pages = self._pages("written", len(items))
        headers = []
        for index, item in enumerate(items):
            offset = index * SLOT_HEADER_BYTES
            pack_slot_header(pages.view, offset, item.slot, item.slot_bytes, item.label)
            headers.append(pages.address + offset)
        sizes, payloads, odd = _payloads(items)
        native.copy(
            [payloads[index] for index in odd],
            [items[index].address for index in odd],
            [items[index].label.size_bytes for index in odd],
        )
        errors = self._files.write_slots(fds, offsets, headers, payloads, sizes)
        for buffer in odd.values():
            buffer.close()
        for item, error in zip(items, errors, strict=True):
            if error:
                item.error = TierFailed(f"ssd slot {item.slot:#x}: {os.strerror(error)}")

    def read(self, items: Sequence[SlotIO], fds: list[int], offsets: list[int]) -> int:
        """Reads and verifies; returns how many were corrupt. Each item's `error` says why."""
        pages = self._pages("read", len(items))
        headers = [pages.address + index * SLOT_HEADER_BYTES for index in range(len(items))]
        sizes, payloads, odd = _payloads(items)
        used = [item.label.size_bytes for item in items]
        checksums, errors = self._files.read_slots(fds, offsets, headers, payloads, sizes, used)
        corrupt = 0
        for index, item in enumerate(items):
            if errors[index]:
                reason = os.strerror(errors[index])
                item.error = TierFailed(f"ssd slot {item.slot:#x}: {reason}")
                continue
            try:
                _verify(item, pages.view, index * SLOT_HEADER_BYTES, checksums[index])
            except BlockCorrupt as error:
                item.error = error
                corrupt += 1
        whole = [index for index in odd if items[index].error is None]
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
    items: Sequence[SlotIO],
) -> tuple[list[int], list[int], dict[int, native.AlignedBuffer]]:
    """Bytes and address on their way to disk, and our own buffers for those that need one."""
    sizes, payloads, odd = [], [], {}
    for index, item in enumerate(items):
        size = align_up(item.label.size_bytes, PAGE_BYTES)
        address = item.address
        if address % PAGE_BYTES or size != item.label.size_bytes:
            odd[index] = native.AlignedBuffer(size)
            address = odd[index].address
        sizes.append(size)
        payloads.append(address)
    return sizes, payloads, odd


def _verify(item: SlotIO, pages: memoryview, offset: int, checksum: int) -> None:
    """Raises BlockCorrupt unless header and payload are what the label says, in this place."""
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
        or found.checksum != wanted.checksum
        or found.size_bytes != wanted.size_bytes
        or int(found.codec) != int(wanted.codec)
        or int(found.fidelity) != int(wanted.fidelity)
    ):
        raise BlockCorrupt(f"{here} holds another writing of the block", damage="stale")
    if checksum != wanted.checksum:
        raise BlockCorrupt(f"{here}: the payload's checksum is wrong")
