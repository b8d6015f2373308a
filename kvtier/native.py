"""The loops that touch bytes: copy, checksum, slot reads and writes, in C++ if it is there.

Each function takes a batch and makes one call into `_native_cpu.so` (built from `kernels/`), which
runs without the GIL; any thread may call any function, any number at once. Without the library
(no compiler at install, another platform, `KVTIER_NATIVE=off`) the same functions run in Python
with the same results, slower; `capabilities()` says which it is and why.

Memory is named by address and size in bytes. The caller guarantees that it is mapped, that it
stays mapped until the call returns, and that a target and a source do not overlap. Checksums are
XXH3-64 with seed 0. Sequences of one call have one length.

Does not: know about GPUs, codecs, or what the bytes mean.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import xxhash

from kvtier.errors import DeviceUnavailable

HEADER_BYTES: Final = 4096
ABI_VERSION: Final = 4

_MADV_POPULATE_WRITE: Final = 23  # Linux 5.14; not in the mmap module of Python 3.11
_IOVECS_MAX: Final = 1024
_LET_GO_BYTES: Final = 4 * 1024 * 1024


@dataclass(frozen=True)
class Capabilities:
    """What runs the functions of this module, and if it is not the library, why not."""

    native: bool
    isa: str
    reason: str


class AlignedBuffer:
    """Zeroed, page-aligned memory of our own, for headers and O_DIRECT staging.

    `address` and `view` are good until `close()`; slices of `view` must be gone by then.
    """

    def __init__(self, size_bytes: int) -> None:
        assert size_bytes > 0

        self.size_bytes = size_bytes
        self._map = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.view = memoryview(self._map)
        anchor = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(anchor)

    def close(self) -> None:
        """Gives the memory back. Raises BufferError while a slice of `view` is still in use."""
        let_go(self.view)
        self.view.release()
        self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<AlignedBuffer {self.size_bytes} bytes at {self.address:#x}>"


def let_go(view: memoryview) -> None:
    """Gives the memory of an AlignedBuffer back; what it held is gone, zeros are read. A part at a
    time: all at once, a large one would keep everybody from running for tens of milliseconds.
    """
    memory = view.obj
    if isinstance(memory, mmap.mmap):
        for start in range(0, len(memory), _LET_GO_BYTES):
            memory.madvise(mmap.MADV_DONTNEED, start, min(_LET_GO_BYTES, len(memory) - start))


def capabilities() -> Capabilities:
    """How this process runs the functions below; for `kvtier stat` and the log at start."""
    return Capabilities(native=_backend.native, isa=_backend.isa, reason=_reason)


def library() -> ctypes.CDLL | None:
    """The library itself, for modules that call functions of their own in it; None = Python."""
    return _backend.library


def copy(targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int]) -> None:
    """Copies `sizes[i]` bytes from address `sources[i]` to `targets[i]`.

    A batch over 1 MiB is written around the CPU cache. `sizes` are bytes.
    """
    assert len(targets) == len(sources) == len(sizes)
    _backend.copy(targets, sources, sizes)


def checksum(sources: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """The XXH3-64 of `sizes[i]` bytes at address `sources[i]`."""
    assert len(sources) == len(sizes)
    return _backend.checksum(sources, sizes)


def copy_checksum(
    targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int]
) -> list[int]:
    """`copy` and `checksum` in one pass over the sources.

    What is returned is of the bytes stored in the targets, also when another process changes a
    source meanwhile.
    """
    assert len(targets) == len(sources) == len(sizes)
    return _backend.copy_checksum(targets, sources, sizes)


def slots_write(
    fds: Sequence[int],
    offsets: Sequence[int],
    headers: Sequence[int],
    payloads: Sequence[int],
    payload_sizes: Sequence[int],
    *,
    depth: int = 1,
) -> list[int]:
    """Writes slots: 4096 bytes from `headers[i]`, then `payload_sizes[i]` from `payloads[i]`.

    Blocks until written, not until durable (that is `fdatasync`). Offsets and sizes are bytes;
    for a file opened with O_DIRECT, addresses, offsets and sizes must be multiples of 4096. Up to
    `depth` slots (64 at most; without the library one) are under way at once, in any order.

    Returns:
        An errno per slot, 0 when all of it was written; EIO when a write made no progress. A
        failed slot may be partly written. One slot's failure does not stop the others.
    """
    assert len(fds) == len(offsets) == len(headers) == len(payloads) == len(payload_sizes)
    return _backend.slots_write(depth, fds, offsets, headers, payloads, payload_sizes)


def slots_read(
    fds: Sequence[int],
    offsets: Sequence[int],
    headers: Sequence[int],
    payloads: Sequence[int],
    payload_sizes: Sequence[int],
    sizes: Sequence[int],
    *,
    depth: int = 1,
) -> tuple[list[int], list[int]]:
    """Reads slots: 4096 bytes to `headers[i]`, then `payload_sizes[i]` bytes to `payloads[i]`.

    `sizes[i]` is how much of the payload is content rather than padding. Alignment and `depth` as
    for `slots_write`. Reads only; the caller compares checksums.

    Returns:
        The XXH3-64 of the first `sizes[i]` payload bytes, and an errno per slot: 0, or why the
        slot cannot be used (EIO: the file ends before the slot; EINVAL: `sizes[i]` exceeds
        `payload_sizes[i]`). With an errno the checksum is 0 and the memory holds anything.
    """
    assert len(fds) == len(offsets) == len(headers) == len(payloads) == len(payload_sizes)
    assert len(fds) == len(sizes)
    return _backend.slots_read(depth, fds, offsets, headers, payloads, payload_sizes, sizes)


def prefault(address: int, size_bytes: int) -> None:
    """Gives every page of `[address, address + size_bytes)` its memory now; contents are kept.

    Afterwards a write there cannot raise SIGBUS for lack of memory. Measured in a VM: 1 to 2 s a
    GiB; ranges can be done by several threads. A cgroup at its memory limit is killed by the
    kernel rather than told.

    Raises:
        DeviceUnavailable: the memory is not to be had; some pages may have been populated.
    """
    error = _backend.prefault(address, size_bytes)
    if error != 0:
        raise DeviceUnavailable(
            f"{size_bytes} bytes of memory could not be populated: {os.strerror(error)} "
            f"({errno.errorcode.get(error, error)}). Configure a smaller tier, free memory or huge "
            "pages (vm.nr_hugepages), or raise the limit that was hit (MemoryMax=, "
            "size of the tmpfs)"
        )


def checksum_bytes(buffer: bytes | bytearray | memoryview | mmap.mmap) -> int:
    """The XXH3-64 of one contiguous buffer: for headers and records. For bulk use `checksum`."""
    return xxhash.xxh3_64_intdigest(buffer)


class _Python:
    """The batch functions without the library. Arguments were checked to have one length."""

    native = False
    library: ctypes.CDLL | None = None

    @property
    def isa(self) -> str:
        return "python"

    def copy(self, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int]) -> None:
        for target, source, size in zip(targets, sources, sizes, strict=True):
            ctypes.memmove(target, source, size)

    def checksum(self, sources: Sequence[int], sizes: Sequence[int]) -> list[int]:
        pairs = zip(sources, sizes, strict=True)
        return [xxhash.xxh3_64_intdigest(_view(source, size)) for source, size in pairs]

    def copy_checksum(
        self, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int]
    ) -> list[int]:
        self.copy(targets, sources, sizes)
        return self.checksum(targets, sizes)

    def slots_write(self, depth: int, *columns: Sequence[int]) -> list[int]:
        return [_transfer_all(os.pwritev, *slot) for slot in zip(*columns, strict=True)]

    def slots_read(self, depth: int, *columns: Sequence[int]) -> tuple[list[int], list[int]]:
        checksums, errors = [], []
        for *slot, size in zip(*columns, strict=True):
            error = errno.EINVAL if size > slot[4] else _transfer_all(os.preadv, *slot)
            checksums.append(0 if error else xxhash.xxh3_64_intdigest(_view(slot[3], size)))
            errors.append(error)
        return checksums, errors

    def prefault(self, address: int, size_bytes: int) -> int:
        start = address // mmap.PAGESIZE * mmap.PAGESIZE
        end = -(-(address + size_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        if size_bytes == 0:
            return 0
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        if madvise(start, end - start, _MADV_POPULATE_WRITE) == 0:
            return 0
        error = ctypes.get_errno()
        return _touch_pages(range(start, end, mmap.PAGESIZE)) if error == errno.EINVAL else error


class _Library(_Python):
    """The batch functions in `_native_cpu.so`."""

    native = True

    def __init__(self, path: Path) -> None:
        """Raises OSError (not loadable) or AttributeError (not ours)."""
        self.library: ctypes.CDLL = ctypes.CDLL(str(path))
        self.library.kvt_isa.restype = ctypes.c_char_p
        self.library.kvt_abi_version.restype = ctypes.c_uint32
        self.abi_version: int = self.library.kvt_abi_version()
        count, pointer = ctypes.c_size_t, ctypes.c_void_p
        for name, arrays in _ARRAYS.items():
            getattr(self.library, name).argtypes = (count, *[pointer] * arrays)
        for name, arrays in _SLOT_ARRAYS.items():
            getattr(self.library, name).argtypes = (count, ctypes.c_uint32, *[pointer] * arrays)
        self.library.kvt_prefault.argtypes = (pointer, ctypes.c_uint64, pointer)

    @property
    def isa(self) -> str:
        name: bytes = self.library.kvt_isa()
        return name.decode()

    def copy(self, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int]) -> None:
        words = ctypes.c_uint64 * len(sizes)
        self.library.kvt_copy(len(sizes), words(*targets), words(*sources), words(*sizes))

    def checksum(self, sources: Sequence[int], sizes: Sequence[int]) -> list[int]:
        words = ctypes.c_uint64 * len(sizes)
        checksums = words()
        self.library.kvt_checksum(len(sizes), words(*sources), words(*sizes), checksums)
        return list(checksums)

    def copy_checksum(
        self, targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int]
    ) -> list[int]:
        words = ctypes.c_uint64 * len(sizes)
        checksums = words()
        self.library.kvt_copy_checksum(
            len(sizes), words(*targets), words(*sources), words(*sizes), checksums
        )
        return list(checksums)

    def slots_write(self, depth: int, *columns: Sequence[int]) -> list[int]:
        fds, *others = columns
        words, ints = ctypes.c_uint64 * len(fds), ctypes.c_int32 * len(fds)
        errors = ints()
        arrays = [words(*column) for column in others]
        self.library.kvt_slots_write(len(fds), depth, ints(*fds), *arrays, errors)
        return list(errors)

    def slots_read(self, depth: int, *columns: Sequence[int]) -> tuple[list[int], list[int]]:
        fds, *others = columns
        words, ints = ctypes.c_uint64 * len(fds), ctypes.c_int32 * len(fds)
        checksums, errors = words(), ints()
        arrays = [words(*column) for column in others]
        self.library.kvt_slots_read(len(fds), depth, ints(*fds), *arrays, checksums, errors)
        return list(checksums), list(errors)

    def prefault(self, address: int, size_bytes: int) -> int:
        error = ctypes.c_int32()
        self.library.kvt_prefault(address, size_bytes, ctypes.byref(error))
        return error.value


# How many arrays each batch function of kernels/include/kvtier/native.h takes after the count.
_ARRAYS: Final = {
    "kvt_checksum": 3,
    "kvt_copy": 3,
    "kvt_copy_checksum": 4,
}
_SLOT_ARRAYS: Final = {"kvt_slots_write": 6, "kvt_slots_read": 8}  # after count and depth


def _view(address: int, size_bytes: int) -> memoryview:
    return memoryview((ctypes.c_char * size_bytes).from_address(address)).cast("B")


def _transfer_all(
    transfer: Callable[[int, list[memoryview], int], int],
    fd: int,
    offset: int,
    header: int,
    payload: int,
    payload_size: int,
) -> int:
    """All of header and payload, however many calls it takes; 0 or an errno."""
    parts = [_view(header, HEADER_BYTES), _view(payload, payload_size)]
    total, done = HEADER_BYTES + payload_size, 0
    while done < total:
        left = [parts[0][done:], parts[1][max(0, done - HEADER_BYTES) :]]
        try:
            moved = transfer(fd, [part for part in left if part], offset + done)
        except OSError as error:
            # After a short transfer (file end) O_DIRECT finds our next offset unaligned.
            unaligned = error.errno == errno.EINVAL and done > 0
            return errno.EIO if unaligned else error.errno or errno.EIO
        if moved == 0:
            return errno.EIO
        done += moved
    return 0


def _touch_pages(addresses: range) -> int:
    """Writes to each page what it holds, through a pipe: a fault is an errno, not a SIGBUS."""
    reader, writer = os.pipe()
    try:
        for first in range(0, len(addresses), _IOVECS_MAX):
            words = [_view(address, 1) for address in addresses[first : first + _IOVECS_MAX]]
            if os.writev(writer, words) != len(words) or os.readv(reader, words) != len(words):
                return errno.EFAULT
    except OSError as error:
        return error.errno or errno.EFAULT
    finally:
        os.close(reader)
        os.close(writer)
    return 0


def _load() -> tuple[_Python, str]:
    """The library beside this file or in the package if it is there and fits, else why not."""
    if os.environ.get("KVTIER_NATIVE", "").lower() == "off":
        return _Python(), "KVTIER_NATIVE=off"
    if sys.maxsize < 2**32:
        return _Python(), "the library needs a 64-bit Python"
    # An editable install has two folders: this source tree (where a developer's own build lies,
    # so it goes first) and the one in site-packages with what pip built.
    folders = [str(Path(__file__).parent), *sys.modules[__package__].__path__]
    for folder in folders:
        path = Path(folder) / "_native_cpu.so"
        if not path.exists():
            continue
        try:
            library = _Library(path)
        except (OSError, AttributeError) as error:
            return _Python(), f"{path} cannot be used: {error}"
        if library.abi_version == ABI_VERSION:
            return library, ""
        return _Python(), (
            f"{path} has ABI {library.abi_version}, this kvtier wants {ABI_VERSION}: rebuild it"
        )
    return _Python(), "_native_cpu.so was not built; install kvtier where a C++ compiler is"


_backend, _reason = _load()
