r"""Slab: one preallocated file of slots on disk, and what it says of itself.

    [0, 4096)            slab header
    [4096, 32768)        namespaces, copy A \ written in turn, so that a torn write
    [32768, 61440)       namespaces, copy B / leaves the other one
    [65536, + segment)   slots: header page, then payload rounded up to 4096 (slots.py)

The first three: slab_head.py.

Does not: know the catalogue, or which slots hold a block that still counts.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from kvtier import native
from kvtier.block import SLOT_BITS, SLOTS_PER_SEGMENT_MAX, SlotIO
from kvtier.errors import BlockCorrupt, DaemonUnavailable, TierFailed
from kvtier.testing.failpoints import reach
from kvtier.tiers.base import SlotRecord
from kvtier.tiers.evidence import give_way
from kvtier.tiers.files import Files
from kvtier.tiers.slab_head import (
    NAMES_BYTES,
    NAMES_OFFSETS,
    SlabHead,
    pack_names,
    unpack_head,
    unpack_names,
)  # fmt: skip
from kvtier.tiers.slots import SLOT_HEADER_BYTES, unpack_slot_header
from kvtier.tiers.state import Named, Names
from kvtier.units import KIB, PAGE_BYTES, format_bytes

SLAB_RESERVED_BYTES: Final = 64 * KIB

_SCAN_SLOTS: Final = 256
_ZEROS_BYTES: Final = 1024 * KIB
_MASK: Final = SLOTS_PER_SEGMENT_MAX - 1

logger = logging.getLogger(__name__)


class Slab:
    """One slab file. `prepare` and `list_names` one at a time (they lock), the rest any thread.

    `slot_bytes` is 0 until it was cut; `names` is what the file lists, `fd` -1 until opened;
    `has_former`: free slots may hold bytes of namespaces that are not listed any longer.
    """

    def __init__(
        self, files: Files, path: Path, index: int, segment_bytes: int, *, direct: bool
    ) -> None:
        self.path = path
        self.index = index
        self.size_bytes = SLAB_RESERVED_BYTES + segment_bytes
        self.fd = -1
        self.slot_bytes = 0
        self.cut_generation = 0
        self.state_id = bytes(16)
        self.names: Names = {}
        self.has_former = False
        self.sync_failures = 0
        self.lock = threading.Lock()
        self._files = files
        self._flags = os.O_RDWR | (os.O_DIRECT if direct else 0)
        self._revision = 0
        self._other_names: Names = {}  # of the other copy
        self._other_unknown = False
        self._sync_lock = threading.Lock()

    def offset(self, slot: int) -> int:
        """Where this slot's header starts in the file."""
        return SLAB_RESERVED_BYTES + (slot & _MASK) * self.slot_bytes

    def open_existing(self) -> bool:
        """Opens the file and reads its header and namespaces; False when there is no file.

        Raises TierFailed. A slab with an unreadable header counts as not cut.
        """
        try:
            self.fd = self._files.open(self.path, self._flags)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self.failed(error) from error
        with native.AlignedBuffer(SLAB_RESERVED_BYTES) as head:
            try:
                if self._files.read(self.fd, head.view, 0) == SLAB_RESERVED_BYTES:
                    self._read_head(bytes(head.view))
            except OSError as error:
                self.close()
                raise self.failed(error) from error
        return True

    def _read_head(self, head: bytes) -> None:
        cut = unpack_head(head)
        if cut is not None:
            # Wherever the file comes from: not to be used again.
            self.cut_generation = cut.cut_generation
            if cut.number == self.index:
                self.slot_bytes, self.state_id = cut.slot_bytes, cut.state_id
        copies = [head[offset : offset + NAMES_BYTES] for offset in NAMES_OFFSETS]
        found = sorted((unpack_names(copy) for copy in copies), key=lambda copy: copy.revision)
        other, newest = found
        self._revision, self.names = newest.revision, newest.names
        self._other_names = other.names
        unsound = any(copy.strip(b"\0") and not unpack_names(copy).revision for copy in copies)
        self._other_unknown = unsound
        self.has_former = newest.has_former or (unsound and not newest.revision)

    def belong_to(self, state_id: bytes) -> None:
        """A file that was cut in another state directory holds nothing of ours: it counts as not
        cut. What it will be cut into from now on is ours.
        """
        if self.slot_bytes and self.state_id != state_id:
            logger.warning("%s is of another state directory: what it holds is not used", self.path)
            self.slot_bytes, self.names = 0, {}
        self.state_id = state_id

    def create(self, *, min_free_bytes: int) -> None:
        """Makes and preallocates the file, durably. Hold `lock`.

        Raises:
            TierFailed: no space (or less than `min_free_bytes` would stay). No file is left.
        """
        folder = self.path.parent
        try:
            give_way(self._files, folder.parent, folder.name, self.size_bytes + min_free_bytes)
        except OSError as error:
            raise self.failed(error) from error
        free = self._files.free_bytes(folder)
        if free - self.size_bytes < min_free_bytes:
            raise TierFailed(
                f"{self.path.parent}: no space for a slab of {format_bytes(self.size_bytes)}: "
                f"{format_bytes(free)} free, of which {format_bytes(min_free_bytes)} stay unused"
            )
        try:
            reach("slab.create")
            fd = self._files.open(self.path, self._flags | os.O_CREAT)
            try:
                reach("slab.open")
                self._files.allocate(fd, self.size_bytes)
                reach("slab.allocated")
                self._files.sync(fd)
                self._files.sync_directory(self.path.parent)
            except OSError:
                self._files.close(fd)
                self._files.unlink(self.path)
                raise
        except OSError as error:
            raise self.failed(error) from error
        self.fd = fd
        reach("slab.created")

    def resize(self) -> None:
        """Brings an existing file to the planned size. Hold `lock`. Raises TierFailed."""
        try:
            size = self._files.size_bytes(self.fd)
            if size > self.size_bytes:
                reach("slab.shrink")
                self._files.truncate(self.fd, self.size_bytes)
            elif size < self.size_bytes:
                self._files.allocate(self.fd, self.size_bytes)
        except OSError as error:
            raise self.failed(error) from error

    def cut(self, slot_bytes: int, generation: int) -> None:
        """From now on slots have this size and those of older generations are dead.

        Hold `lock`. Durable with the next `sync`. Raises TierFailed: nothing was changed for us.
        """
        head = SlabHead(self.index, slot_bytes, generation, self.state_id)
        reach("slab.unnamed")
        self._write(0, head.pack(), PAGE_BYTES)
        reach("slab.cut")
        self.slot_bytes, self.cut_generation = slot_bytes, generation

    def list_names(self, names: Mapping[bytes, Named], *, has_former: bool | None = None) -> None:
        """Lists exactly these namespaces in the file. Hold `lock`. Durable with the next `sync`.

        Raises:
            TierFailed: they do not fit, or the disk failed; the former list stays.
        """
        has_former = self.has_former if has_former is None else has_former
        revision = self._revision + 1
        page = pack_names(revision, names, has_former=has_former)
        if page is None:
            raise TierFailed(f"{self.path}: {len(names)} namespaces do not fit into one slab")
        self._write(NAMES_OFFSETS[revision % 2], page, NAMES_BYTES)
        reach("slab.named")
        self._other_names, self._other_unknown = self.names, False
        self._revision, self.names, self.has_former = revision, dict(names), has_former

    def forget_names(self) -> None:
        """Lists none: all slots are dead. What they hold is still there. As `list_names`."""
        self.list_names({}, has_former=self.has_former or any(n.plain for n in self.names.values()))

    def mentions(self, digest: bytes) -> bool:
        """Whether either copy of the list may have an entry of this namespace."""
        return digest in self.names or digest in self._other_names or self._other_unknown

    def may_hold(self, digest: bytes) -> bool:
        """Whether a free slot may hold bytes of this namespace that are not encrypted."""
        return self.fd >= 0 and (self.has_former or self.mentions(digest))

    def _write(self, offset: int, content: bytes, size_bytes: int) -> None:
        with native.AlignedBuffer(size_bytes) as page:
            page.view[: len(content)] = content
            try:
                self._files.write(self.fd, page.view, offset)
            except OSError as error:
                raise self.failed(error) from error

    def zero(self, start: int, end: int) -> None:
        """These bytes of the file are zero, not yet durably. Raises TierFailed."""
        with native.AlignedBuffer(min(_ZEROS_BYTES, end - start) or PAGE_BYTES) as zeros:
            for offset in range(start, end, _ZEROS_BYTES):
                try:
                    with zeros.view[: min(_ZEROS_BYTES, end - offset)] as part:
                        self._files.write(self.fd, part, offset)
                except OSError as error:
                    raise self.failed(error) from error

    def sync(self, failures_before: int) -> None:
        """What was written since `sync_failures` was `failures_before` is durable.

        Raises:
            TierFailed: this sync or one meanwhile failed: the kernel tells only one of us, and
                none of those writes may be believed, however a later sync ends.
        """
        with self._sync_lock:
            try:
                self._files.sync(self.fd)
            except OSError as error:
                self.sync_failures += 1
                raise self.failed(error) from error
            if self.sync_failures != failures_before:
                raise TierFailed(f"{self.path}: a sync of these bytes failed")

    def remove(self) -> None:
        """The file is gone, durably with the next sync of its directory. Nothing of it may be in
        use. Hold `lock`. Raises TierFailed: it may be there still, but is closed.
        """
        with self._sync_lock:
            self.close()
        self.slot_bytes, self.names = 0, {}
        try:
            reach("slab.remove")
            self._files.unlink(self.path)
        except OSError as error:
            raise self.failed(error) from error

    @property
    def slot_count(self) -> int:
        """How many slots it is cut into; 0: none."""
        if self.slot_bytes < 2 * PAGE_BYTES:
            return 0
        return (self.size_bytes - SLAB_RESERVED_BYTES) // self.slot_bytes

    def here(self, indexes: Sequence[int]) -> list[SlotRecord]:
        """What the headers of these slots say that a rebuild would believe. At most 256."""
        assert len(indexes) <= _SCAN_SLOTS

        if self.fd < 0 or not self.slot_count:
            return []
        with native.AlignedBuffer(_SCAN_SLOTS * SLOT_HEADER_BYTES) as pages:
            found = self._sound(indexes, pages)
        return [record for index, record in found if self._is_here(record, index)]

    def scan(self, stopping: Callable[[], bool]) -> Iterator[SlotRecord]:
        """Every slot with a sound header of this cut, from the headers alone.

        Raises:
            DaemonUnavailable: `stopping` said so.
        """
        for index, record in self._headers(stopping):
            if self._is_here(record, index):
                yield record

    def newest(self, stopping: Callable[[], bool]) -> int:
        """The highest generation in any slot's header, whether it counts or not. As `scan`."""
        generations = (record.label.generation for _, record in self._headers(stopping))
        return max(generations, default=0)

    def _headers(self, stopping: Callable[[], bool]) -> Iterator[tuple[int, SlotRecord]]:
        """The sound headers, with the index of the slot they lie in."""
        count = self.slot_count
        with native.AlignedBuffer(_SCAN_SLOTS * SLOT_HEADER_BYTES) as pages:
            for first in range(0, count, _SCAN_SLOTS):
                if stopping():
                    raise DaemonUnavailable("the daemon is stopping")
                yield from self._sound(range(first, min(first + _SCAN_SLOTS, count)), pages)

    def _sound(
        self, indexes: Sequence[int], pages: native.AlignedBuffer
    ) -> list[tuple[int, SlotRecord]]:
        n = len(indexes)
        headers = [pages.address + i * SLOT_HEADER_BYTES for i in range(n)]
        offsets = [self.offset(index) for index in indexes]
        zeros = [0] * n
        _, errors = self._files.read_slots([self.fd] * n, offsets, headers, headers, zeros, zeros)
        found = []
        for i, index in enumerate(indexes):
            if errors[i]:
                continue  # unreadable here is unreadable later: not a block any more
            with contextlib.suppress(BlockCorrupt):
                found.append((index, unpack_slot_header(pages.view, i * SLOT_HEADER_BYTES)))
        return found

    def _is_here(self, record: SlotRecord, index: int) -> bool:
        return (
            record.slot == self.index << SLOT_BITS | index
            and record.slot_bytes == self.slot_bytes
            and record.label.generation >= self.cut_generation
        )

    def failed(self, error: OSError) -> TierFailed:
        """The error as one of ours, naming the file."""
        return TierFailed(f"{self.path}: {error.strerror or error}")

    def close(self) -> None:
        if self.fd >= 0:
            self._files.close(self.fd)
            self.fd = -1

    def __repr__(self) -> str:
        state = f"slots of {format_bytes(self.slot_bytes)}" if self.slot_bytes else "not cut"
        return f"<Slab {self.path.name} {state}, {len(self.names)} namespaces>"


def places(
    items: Sequence[SlotIO | SlotRecord], slabs: Sequence[Slab]
) -> tuple[list[int], list[int]]:
    """File descriptor and offset of each item's slot."""
    offsets = [slab.offset(item.slot) for item, slab in zip(items, slabs, strict=True)]
    return [slab.fd for slab in slabs], offsets


def remove_strays(files: Files, slabs: Sequence[Slab], directory: Path) -> None:
    """Removes files of segments that the plan no longer has: the tier was made smaller.

    Raises:
        TierFailed: one cannot be removed.
    """
    known = {slab.path.name for slab in slabs}
    for path in directory.glob("*.slab"):
        if path.name not in known:
            logger.warning("%s is beyond the tier's size: removed", path)
            try:
                files.unlink(path)
            except OSError as error:
                raise TierFailed(f"{path}: {error.strerror}") from error
