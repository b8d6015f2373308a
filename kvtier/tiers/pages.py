"""The catalogue's file, checked without mapping it, and its records in one go.

What is not sure here may be sound all the same: `lmdb.verify` decides then, slowly, in Python.

Does not: open the catalogue, or read what the records say.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

from kvtier import native
from kvtier.tiers.records import Piece

_READ_BYTES: Final = 64 * 1024 * 1024


class _PagesStruct(ctypes.Structure):
    _fields_ = tuple((n, ctypes.c_uint64) for n in ("file", "size", "entries", "value_bytes"))


def sound_records(path: Path) -> Piece | None:
    """All records of the data file, which LMDB can map without harm; None when that is not sure,
    or there is no library. 0.2 s a million, without the interpreter's lock. Raises OSError.
    """
    library = native.library()
    if library is None:
        return None
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        with native.AlignedBuffer(size or 1) as file:
            if not _read(fd, file.view[:size]):
                return None
            return _list(library, _PagesStruct(file.address, size))
    finally:
        os.close(fd)


def _read(fd: int, into: memoryview) -> bool:
    with into:
        done = 0
        while done < len(into):
            with into[done : done + _READ_BYTES] as part:
                count = os.preadv(fd, [part], done)
            if not count:
                return False
            done += count
    return True


def _list(library: ctypes.CDLL, pages: _PagesStruct) -> Piece | None:
    if library.kvt_pages_check(ctypes.byref(pages)):
        return None
    entries, value_bytes = int(pages.entries), int(pages.value_bytes)
    sizes = 4 * entries, 4 * entries, value_bytes
    keys, lengths, values = (native.AlignedBuffer(size or 4) for size in sizes)
    into = [ctypes.c_void_p(memory.address) for memory in (keys, lengths, values)]
    if library.kvt_pages_list(ctypes.byref(pages), *into):
        return None
    return Piece(
        keys.view[: 4 * entries],
        lengths.view[: 4 * entries].cast("I"),
        values.view[:value_bytes],
    )
