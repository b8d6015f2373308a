"""The catalogue's LMDB file, checked without mapping it, and its records in one go.

LMDB follows whatever page, offset and length it finds: a file that was torn or has rotted kills the
process (SIGBUS, its own asserts), or fails some later transaction. What passes here does neither,
whatever is then read, put and deleted; and every record has the checksum it was written with.

The library does it in C++ (kernels/cpu/pages.cpp), 0.05 s a million records; without it
page_checks.py does, in Python.

Does not: open the catalogue, or read what the records say.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from array import array
from pathlib import Path
from typing import Final

from kvtier import native
from kvtier.tiers.page_checks import Checker, Damage, Damaged
from kvtier.tiers.records import Piece

logger = logging.getLogger(__name__)
_READ_BYTES: Final = 64 * 1024 * 1024


def check_file(path: Path) -> Piece | Damage:
    """All records of a sound data file (an empty one is sound: LMDB starts anew), or why LMDB must
    not map it. 0.3 s a million records, without the interpreter's lock; 4 s
    without the library. Raises OSError.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        with native.AlignedBuffer(size or 1) as file:
            _read(fd, file.view[:size])
            library = native.library()
            if library is None:
                return _in_python(file.view[:size])
            return _in_library(library, _PagesStruct(file.address, size))
    finally:
        os.close(fd)


def check_twice(path: Path) -> Piece | Damage:
    """As `check_file`, again where the device failed once: that may pass, and is no damage."""
    try:
        return check_file(path)
    except OSError as error:
        logger.warning("%s: %s; tried again", path, error.strerror or error)
        return check_file(path)


def _read(fd: int, into: memoryview) -> None:
    with into:
        done = 0
        while done < len(into):
            with into[done : done + _READ_BYTES] as part:
                count = os.preadv(fd, [part], done)
            if not count:
                raise OSError(errno.EIO, "the file became shorter")
            done += count


class _PagesStruct(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in ("file", "size", "entries", "value_bytes", "problem", "page")
    )


def _in_library(library: ctypes.CDLL, pages: _PagesStruct) -> Piece | Damage:
    if library.kvt_pages_check(ctypes.byref(pages)):
        if not pages.problem:
            raise OSError(errno.ENOMEM, "no memory to check it")
        return Damage(int(pages.problem), int(pages.page))
    entries, value_bytes = int(pages.entries), int(pages.value_bytes)
    sizes = 4 * entries, 4 * entries, value_bytes
    keys, lengths, values = (native.AlignedBuffer(size or 4) for size in sizes)
    into = [ctypes.c_void_p(memory.address) for memory in (keys, lengths, values)]
    if library.kvt_pages_list(ctypes.byref(pages), *into):
        raise OSError(errno.ENOMEM, "no memory to list it")
    return Piece(
        keys.view[: 4 * entries],
        lengths.view[: 4 * entries].cast("I"),
        values.view[:value_bytes],
    )


def _in_python(file: memoryview) -> Piece | Damage:
    with file:
        checker = Checker(file)
        try:
            checker.run()
        except Damaged as found:
            return found.damage
        values = checker.values
        return Piece(b"".join(checker.keys), array("I", map(len, values)), b"".join(values))
