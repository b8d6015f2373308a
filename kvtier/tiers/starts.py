r"""Starts: how the last starts of a state directory ended, to break a loop of crashes.

LMDB maps its file: a sector that cannot be read under the map is a SIGBUS, which no code of this
process survives. A start's verdict on what it finds:

    CATALOGUE  the catalogue is believed (once its pages were checked)
    SLABS      it is set aside, as evidence, and made anew from slabs: two starts ended, at most
               `WINDOW_S` apart, by SIGBUS, SIGSEGV or SIGABRT
    NOTHING    slabs are not read either but set aside, too, and the tier starts empty: a start
               with the verdict SLABS ended so, too, before all was recovered

The dying process says which signal it was (kernels/cpu/signals.cpp). Without the library nobody
does: then each start counts that neither recovered all nor ended in order.

File `starts`: 16 entries of 64 bytes, the newest last. Little endian: 0 started (s since 1970) u64,
8 verdict u8, 9 who saw signals u8, 16 XXH3-64 of [0, 16); 24 phase u8; 32 signal u32, inverse u32,
s since 1970 u64.

Does not: verify anything. A file that cannot be read or written only means that nothing is known.
"""

from __future__ import annotations

import ctypes
import logging
import os
import struct
import time
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Final, NamedTuple

from kvtier import native
from kvtier.tiers.files import Files

WINDOW_S: Final = 600
_ENTRIES_MAX: Final = 16
_ENTRY_BYTES: Final = 64
_BEGUN: Final = struct.Struct("<QBB6x")
_SUM: Final = struct.Struct("<Q")
_END: Final = struct.Struct("<IIQ")
_SUM_AT, _PHASE_AT, _END_AT = 16, 24, 32
_RECOVERED, _ENDED = 1, 2  # phases; 0 before
_NOBODY, _LIBRARY = 0, 1  # who would write down the signal

logger = logging.getLogger(__name__)


class Verdict(IntEnum):
    """What of a state directory is believed at a start."""

    CATALOGUE = 0
    SLABS = 1
    NOTHING = 2


class Start(NamedTuple):
    """One start, as the file has it. `signal` is 0 where none was seen, times are s since 1970."""

    started_s: int
    verdict: Verdict
    watched: bool
    recovered: bool
    ended: bool  # in order
    signal: int
    signal_s: int

    @property
    def crashed_s(self) -> int | None:
        """When it ended in a way that the map may be the cause of; None if it did not."""
        if self.signal:
            return self.signal_s
        return None if self.watched or self.recovered or self.ended else self.started_s


def read_starts(path: Path) -> list[Start]:
    """What the file says, oldest first; what is damaged is left out. Raises OSError."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    entries = [content[at : at + _ENTRY_BYTES] for at in range(0, len(content), _ENTRY_BYTES)]
    return [start for start in map(_unpack, entries[-_ENTRIES_MAX:]) if start is not None]


def _unpack(entry: bytes) -> Start | None:
    if len(entry) < _ENTRY_BYTES:
        return None
    started_s, verdict, watcher = _BEGUN.unpack_from(entry)
    sound = native.checksum_bytes(entry[:_SUM_AT]) == _SUM.unpack_from(entry, _SUM_AT)[0]
    if not sound or verdict > Verdict.NOTHING:
        return None
    number, inverse, signal_s = _END.unpack_from(entry, _END_AT)
    if number ^ inverse != 0xFFFFFFFF:
        number = signal_s = 0
    phase = entry[_PHASE_AT]
    return Start(
        started_s, Verdict(verdict), watcher == _LIBRARY, phase >= _RECOVERED, phase >= _ENDED,
        number, signal_s,
    )  # fmt: skip


def verdict_on(starts: Sequence[Start]) -> Verdict:
    """What the next start believes after these. Those before an earlier verdict count no more."""
    since = max((i for i, start in enumerate(starts) if start.verdict), default=0)
    counted = starts[since:]
    if not counted or counted[-1].crashed_s is None:
        return Verdict.CATALOGUE
    last = counted[-1]
    if last.verdict and not last.recovered:
        return Verdict.NOTHING
    times = [start.crashed_s for start in counted if start.crashed_s is not None]
    # Also a wall clock that was set back between the two makes them near: no harm, only work.
    if len(times) > 1 and abs(times[-1] - times[-2]) <= WINDOW_S:
        return Verdict.SLABS
    return Verdict.CATALOGUE


class StartLog:
    """The file, and this process's entry in it; if not `on`, neither. One thread at a time. Never
    raises.
    """

    def __init__(self, files: Files, path: Path, *, on: bool) -> None:
        self._on = on
        self._files = files
        self._path = path
        self._fd = -1
        self._at = 0

    def begin(self) -> Verdict:
        """This start has begun, durably, and its end will be seen. Again: nothing happens."""
        verdict = Verdict.CATALOGUE
        if not self._on:
            return verdict
        self._on = False
        try:
            known = read_starts(self._path)
            verdict = verdict_on(known)
            content = b"".join(map(_pack, known))[-(_ENTRIES_MAX - 1) * _ENTRY_BYTES :]
            now = Start(int(time.time()), verdict, native.library() is not None, False, False, 0, 0)
            self._files.replace(self._path, content + _pack(now))
            self._fd = self._files.open(self._path, os.O_WRONLY)
            self._at = len(content)
            library = native.library()
            if library is not None:
                fd, at = ctypes.c_int32(self._fd), ctypes.c_uint64(self._at + _END_AT)
                if library.kvt_signals_record(fd, at):
                    logger.warning("signals that kill this process are not recorded")
        except OSError as error:
            logger.warning("%s: %s; a loop of crashes would not be noticed", self._path, error)
        if verdict:
            slabs = ", and slabs too: reading those failed as well" * (verdict - Verdict.SLABS)
            logger.error(
                "%s: crashes within %d s; the catalogue is set aside%s", self._path, WINDOW_S, slabs
            )
        return verdict

    def recovered(self) -> None:
        """All that is on disk was read."""
        self._note(_RECOVERED)

    def end(self) -> None:
        """This start ends in order. Idempotent."""
        if self._fd < 0:
            return
        self._note(_ENDED)
        library = native.library()
        if library is not None:
            library.kvt_signals_leave()
        self._files.close(self._fd)
        self._fd = -1

    def _note(self, phase: int) -> None:
        # No sync: a process that dies takes nothing with it that it has written, and a power cut
        # is no crash of ours.
        if self._fd >= 0:
            try:
                self._files.write(self._fd, memoryview(bytes([phase])), self._at + _PHASE_AT)
            except OSError as error:
                logger.warning("%s: %s", self._path, error)


def _pack(start: Start) -> bytes:
    head = _BEGUN.pack(start.started_s, start.verdict, _LIBRARY if start.watched else _NOBODY)
    phase = _ENDED if start.ended else _RECOVERED if start.recovered else 0
    inverse = start.signal ^ 0xFFFFFFFF if start.signal else 0
    entry = head + _SUM.pack(native.checksum_bytes(head)) + bytes([phase])
    entry = entry.ljust(_END_AT, b"\0") + _END.pack(start.signal, inverse, start.signal_s)
    return entry.ljust(_ENTRY_BYTES, b"\0")
