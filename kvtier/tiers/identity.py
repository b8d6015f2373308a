"""Identity: which state directory this is, and how often it was started.

Generations are `start << 32 | writes since`: no two starts may have one number, or a generation
(and with it a nonce) would be used twice. So the number is durable before the first write of a
start. Slabs carry the id, so that one of another directory is not taken for ours.

File `identity`: 0 magic `KVTIDENT`, 8 id 16 bytes, 24 number of the last start u64, 32 XXH3-64 of
bytes [0, 32); little endian.

Does not: know what else is in the directory.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import struct
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from kvtier import native
from kvtier.errors import TierFailed
from kvtier.tiers.files import Files

START_BITS: Final = 32  # a generation: number of the start, then writes since
_MAGIC: Final = b"KVTIDENT"
_FIELDS: Final = struct.Struct("<8s16sQ")
_SUM: Final = struct.Struct("<Q")

logger = logging.getLogger(__name__)


def read_identity(content: bytes) -> tuple[bytes, int] | None:
    """The id and the number of the last start; None: the file is damaged."""
    head = content[: _FIELDS.size]
    if len(content) == _FIELDS.size + _SUM.size:
        magic, state_id, start = _FIELDS.unpack(head)
        sound = _SUM.unpack_from(content, _FIELDS.size)[0] == native.checksum_bytes(head)
        if magic == _MAGIC and sound:
            return state_id, start
    return None


class Identity:
    """The file. `start` is None while nobody knows the last one. One thread, where not said."""

    def __init__(self, files: Files, path: Path) -> None:
        self._files = files
        self._path = path
        self.state_id = b""
        self.start: int | None = None
        self._next_start = 0
        self._generations = itertools.count(1)
        self._lock = threading.Lock()

    def load(self) -> None:
        """Reads the file; a damaged one counts as missing. Raises TierFailed."""
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise TierFailed(f"{self._path}: {error.strerror}") from error
        known = read_identity(content)
        if known is None:
            logger.warning("%s is damaged: slabs are asked instead", self._path)
        else:
            self.state_id, self.start = known

    def choose(self, in_slabs: Sequence[bytes]) -> None:
        """Without a file: the id that most slabs carry, or a new one. Memory only."""
        if not self.state_id:
            [(self.state_id, _)] = Counter(in_slabs or [secrets.token_bytes(16)]).most_common(1)

    def begin(self, newest_generation: int) -> None:
        """A new start, above that generation and all former starts. A disk that cannot take its
        number now (it may be full) is asked again before the first write.
        """
        self._next_start = max(self.start or 0, newest_generation >> START_BITS) + 1
        self._generations = itertools.count(self._next_start << START_BITS)
        try:
            self.promise()
        except TierFailed as error:
            logger.warning("%s: nothing is written until that succeeds", error)

    def next_generation(self) -> int:
        """Higher than any before. Any thread; `promise` comes first."""
        return next(self._generations)

    def promise(self) -> None:
        """No later start uses generations of this one. Any thread.

        Raises:
            TierFailed: that cannot be promised yet: write nothing.
        """
        with self._lock:
            if self.start == self._next_start:
                return
            head = _FIELDS.pack(_MAGIC, self.state_id, self._next_start)
            try:
                self._files.replace(self._path, head + _SUM.pack(native.checksum_bytes(head)))
            except OSError as error:
                raise TierFailed(f"{self._path}: {error.strerror}") from error
            self.start = self._next_start

    def __repr__(self) -> str:
        return f"<Identity {self.state_id.hex()}, start {self.start}>"
