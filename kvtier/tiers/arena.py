"""Arena: one memfd of slots that clients map, sealed so that a reader stays a reader.

    [0, 4096)                      header: magic, layout version u32, arena id u64, size u64,
                                   base offset u64, data bytes u64; revocations u64 at 64
    [4096, base_offset)            generation words: one u64 per 4096 bytes of data
    [base_offset, + data_bytes)    slots; `base_offset` is a multiple of 4096
    [.., size)                     padding to a huge page, where huge pages are used

All integers are little endian. Every `offset` of this file counts bytes from the start of the
arena, as `SegmentView.base_offset + index * slot_bytes` does; `size` counts all of the memfd.

Taking a lease back: `revoke` raises the revocation counter first, then the generation word of the
slot's first page, both before the slot is written again. A reader that finds the counter as it was
at the grant knows that nothing was taken back; if it moved, the slot's word tells.

Seals (measured, reliability.md 2.4): a reader's arena gets SHRINK, GROW, FUTURE_WRITE and SEAL
after we mapped it writable, and mode 0400; a writable one SHRINK, GROW and SEAL, and mode 0600.

Does not: know slots, tenants or who maps it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import secrets
import struct
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Self

from kvtier import native
from kvtier.block import ARENA_HEADER_BYTES, ARENA_MAGIC, MEMORY_LAYOUT_VERSION
from kvtier.errors import DeviceUnavailable, InvalidRequest, VersionMismatch
from kvtier.units import HUGE_PAGE_BYTES, PAGE_BYTES, align_up, div_ceil, format_bytes

_HEADER: Final = struct.Struct("<8sIIQQQQ")  # magic, version, 0, id, size, base offset, data bytes
_REVOCATIONS_WORD: Final = 8  # at byte 64: a cache line that nothing else shares
_WORD_BYTES: Final = 8
_F_SEAL_FUTURE_WRITE: Final = 0x0010  # not in fcntl of Python 3.11
_FIXED_SIZE: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@dataclass(frozen=True, slots=True)
class ArenaLayout:
    """Where things lie in an arena: the only place that calculates it. Bytes."""

    data_bytes: int
    base_offset: int
    size: int

    @classmethod
    def of(cls, data_bytes: int, *, page_bytes: int = PAGE_BYTES) -> Self:
        """The layout for this much data, the whole rounded up to `page_bytes`."""
        words = align_up(div_ceil(data_bytes, PAGE_BYTES) * _WORD_BYTES, PAGE_BYTES)
        base_offset = ARENA_HEADER_BYTES + words
        return cls(data_bytes, base_offset, align_up(base_offset + data_bytes, page_bytes))

    def word(self, offset: int) -> int:
        """Index, in u64 from the arena's start, of the generation word for a data offset.

        Raises:
            InvalidRequest: `offset` is not in the data area.
        """
        if not self.base_offset <= offset < self.base_offset + self.data_bytes:
            raise InvalidRequest(f"offset {offset} is outside of the arena's data")
        return (ARENA_HEADER_BYTES // _WORD_BYTES) + (offset - self.base_offset) // PAGE_BYTES

    def check_range(self, offset: int, size: int) -> None:
        """Raises InvalidRequest when `[offset, offset + size)` is not all data."""
        end = self.base_offset + self.data_bytes
        if not (self.base_offset <= offset and 0 <= size <= end - offset):
            raise InvalidRequest(f"bytes {offset} to {offset + size} are not in the arena's data")


class Arena:
    """The daemon's side: made, mapped writable, prefaulted, sealed. Any thread; `close` once.

    `writable`: clients may write (a session's write arena; all under single-tenant trust).
    `id` is random: unique for this boot. `fd` is what clients are sent; it stays ours.

    Raises:
        DeviceUnavailable: the memory (or, with huge_pages="require", the huge pages) is not to be
            had; says what to change. Nothing is left behind.
    """

    def __init__(
        self, kind: str, data_bytes: int, *, writable: bool, huge_pages: str = "auto"
    ) -> None:
        assert data_bytes > 0

        self.kind = kind
        self.writable = writable
        self.id = secrets.randbits(63) | 1
        self._lock = threading.Lock()
        wishes = {"off": (False,), "auto": (True, False), "require": (True,)}[huge_pages]
        for index, huge in enumerate(wishes):
            try:
                self._create(data_bytes, huge=huge)
                break
            except DeviceUnavailable:
                if index + 1 == len(wishes):
                    raise

    def _create(self, data_bytes: int, *, huge: bool) -> None:
        page_bytes = HUGE_PAGE_BYTES if huge else PAGE_BYTES
        self.huge = huge
        self.layout = ArenaLayout.of(data_bytes, page_bytes=page_bytes)
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        if huge:
            flags |= os.MFD_HUGETLB | (21 << os.MFD_HUGE_SHIFT)  # 2**21 bytes
        fd = -1
        try:
            fd = os.memfd_create(f"kvtier-{self.kind}-{self.id:x}", flags)
            os.ftruncate(fd, self.layout.size)
            self._map = mmap.mmap(fd, self.layout.size, mmap.MAP_SHARED)
        except (OSError, ValueError) as error:
            if fd >= 0:
                os.close(fd)
            raise self._unavailable(error) from error
        self.fd = fd
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._words = memoryview(self._map).cast("Q")
        try:
            self._prepare()
        except (DeviceUnavailable, OSError) as error:
            self.close()
            raise self._unavailable(error) from error

    def _prepare(self) -> None:
        """Every page has its memory, is kept out of core dumps, and the seals are on."""
        self._map.madvise(mmap.MADV_DONTDUMP)
        if not self.huge:
            with contextlib.suppress(OSError):  # kernels without huge pages for shared memory
                self._map.madvise(mmap.MADV_HUGEPAGE)
        native.prefault(self.address, self.layout.size)
        layout = self.layout
        fields = (MEMORY_LAYOUT_VERSION, 0, self.id, layout.size, layout.base_offset)
        _HEADER.pack_into(self._map, 0, ARENA_MAGIC, *fields, layout.data_bytes)
        seals = _FIXED_SIZE if self.writable else _FIXED_SIZE | _F_SEAL_FUTURE_WRITE
        os.fchmod(self.fd, 0o600 if self.writable else 0o400)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)

    def _unavailable(self, error: Exception) -> DeviceUnavailable:
        wanted = format_bytes(self.layout.size)
        pages = "huge pages" if self.huge else "memory"
        remedy = (
            "raise vm.nr_hugepages or set huge_pages to auto or off"
            if self.huge
            else "make the tier smaller, raise the memory limit (cgroup, ulimit -n for files)"
        )
        return DeviceUnavailable(
            f"no {pages} for an arena of {wanted} ({self.kind}): {error}; {remedy}"
        )

    @property
    def base_offset(self) -> int:
        """Bytes from the start of the arena to slot index 0."""
        return self.layout.base_offset

    @property
    def data_bytes(self) -> int:
        """Bytes of slots."""
        return self.layout.data_bytes

    @property
    def data_address(self) -> int:
        """Where slot index 0 lies in this process."""
        return self.address + self.layout.base_offset

    @property
    def revocations(self) -> int:
        """How many times a slot of this arena was taken back from readers."""
        return self._words[_REVOCATIONS_WORD]

    def generation(self, offset: int) -> int:
        """The word of the page at `offset`. Raises InvalidRequest outside of the data."""
        return self._words[self.layout.word(offset)]

    def revoke(self, offset: int, size: int) -> int:
        """Tells readers of the slot `[offset, offset + size)` that it is no longer theirs.

        Call before the slot is written again. Any thread. Returns the slot's new generation.

        Raises:
            InvalidRequest: not all of the slot is data. Nothing was changed.
        """
        self.layout.check_range(offset, size)
        word = self.layout.word(offset)
        with self._lock:
            self._words[_REVOCATIONS_WORD] += 1
            self._words[word] += 1
            return self._words[word]

    def close(self) -> None:
        """Unmaps and closes. The memory is free once no client maps it either."""
        self._words.release()
        self._map.close()
        os.close(self.fd)

    def __repr__(self) -> str:
        form = ", writable" if self.writable else ""
        return f"<Arena {self.id:x} {self.kind} {format_bytes(self.layout.data_bytes)}{form}>"


class MappedArena:
    """The client's side of an arena it was sent. Does not take `fd`: the caller closes it.

    `address`: where the arena starts in this process, to pin it or to copy without views.
    Views stay good after `close`, until the last one of them is gone. Any thread.

    Raises:
        VersionMismatch: another memory layout. InvalidRequest: not an arena, or not of this size.
        DeviceUnavailable: the kernel does not map it (sealed against writing, no address space).
    """

    def __init__(self, fd: int, size: int, *, writable: bool = False) -> None:
        real = os.fstat(fd).st_size
        if size < ARENA_HEADER_BYTES or real != size:
            raise InvalidRequest(f"an arena of {size} bytes was announced, the file has {real}")
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        try:
            self._map = mmap.mmap(fd, size, mmap.MAP_SHARED, access)
        except (OSError, ValueError) as error:
            raise DeviceUnavailable(
                f"{size} bytes of an arena cannot be mapped: {error}"
            ) from error
        with contextlib.suppress(OSError):
            self._map.madvise(mmap.MADV_DONTDUMP)
        self.writable = writable
        self.size = size
        try:
            self._read_header()
        except BaseException:
            self._map.close()
            raise
        self._bytes = memoryview(self._map)
        self._words = self._bytes.cast("Q")
        self.address = _address_of(self._map)

    def _read_header(self) -> None:
        magic, version, _, arena_id, size, base_offset, data_bytes = _HEADER.unpack_from(self._map)
        if magic != ARENA_MAGIC:
            raise InvalidRequest("the descriptor is not an arena: its magic is wrong")
        if version != MEMORY_LAYOUT_VERSION:
            raise VersionMismatch(
                f"the arena has memory layout {version}, this library {MEMORY_LAYOUT_VERSION}; "
                "use a client of the daemon's version"
            )
        expected = ArenaLayout.of(data_bytes)
        if size != self.size or base_offset != expected.base_offset or expected.size > size:
            raise InvalidRequest("the arena's header disagrees with its size")
        self.id: int = arena_id
        self.layout = ArenaLayout(data_bytes, base_offset, size)

    def view(self, offset: int, size: int) -> memoryview:
        """The bytes `[offset, offset + size)`: read-only unless the mapping is writable.

        Raises:
            InvalidRequest: not all of it is data.
        """
        self.layout.check_range(offset, size)
        return self._bytes[offset : offset + size]

    def on_unmapped(self, callback: Callable[[], object]) -> None:
        """Calls `callback` once when the mapping is really gone, in whatever thread drops it."""
        weakref.finalize(self._map, callback).atexit = False

    def revocations(self) -> int:
        """How many times a slot of this arena was taken back so far."""
        return self._words[_REVOCATIONS_WORD]

    def generation(self, offset: int) -> int:
        """The word of the page at `offset`. Raises InvalidRequest outside of the data."""
        return self._words[self.layout.word(offset)]

    def close(self) -> None:
        """Unmaps now if no view is in use, else when the last one is gone. Idempotent.

        `view`, `generation` and `revocations` raise ValueError from here on.
        """
        self._words.release()
        self._bytes.release()
        mapping = self.__dict__.pop("_map", None)
        if mapping is not None:
            with contextlib.suppress(BufferError):  # somebody holds a view; it keeps the mapping
                mapping.close()

    def __repr__(self) -> str:
        form = "writable" if self.writable else "read-only"
        return f"<MappedArena {self.id:x} {format_bytes(self.layout.data_bytes)} {form}>"


def _address_of(mapping: mmap.mmap) -> int:
    """Where a mapping starts, also a read-only one (ctypes' from_buffer wants writable ones)."""
    buffer = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(mapping), ctypes.byref(buffer), 0)
    address = int(buffer.address or 0)
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    return address


class _PyBuffer(ctypes.Structure):
    """Py_buffer of the C API, of which only `buf` is read; room for all of it."""

    _fields_ = (("address", ctypes.c_void_p), ("rest", ctypes.c_uint8 * 128))
