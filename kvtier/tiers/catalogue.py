r"""Catalogue: which slot of the SSD tier holds what, in LMDB.

A record's key is its slot number (LMDB integerkey), so a slot can never be claimed twice and
neighbours share pages; its value (packing.py) carries a checksum of its own and repeats the slot
number: LMDB itself returned 132 of 150 flipped bits as good content (reliability.md 1.1).

    open() --> [checked before it is mapped] --> sound: take_listed() or pieces()
                                            \--> damaged: set aside under a dated name, rebuild

Damage that LMDB finds only when it reads is `CatalogueDamaged`: `set_aside`, `open` again, rebuild.

`metasync=False` may undo the newest transaction in a power cut, never break one; `sync` ends that.
Never `sync=False` or `writemap` (SIGBUS, torn trees).

Does not: touch slabs, or know what is durable in them: callers write those first.
"""

from __future__ import annotations

import logging
import shutil
import struct
import threading
import time
from array import array
from collections.abc import Callable, Generator, Iterable
from itertools import islice
from pathlib import Path
from typing import Final

import lmdb
import lmdb.verify

from kvtier.block import SLOT_BITS
from kvtier.errors import TierFailed
from kvtier.testing.failpoints import reach
from kvtier.tiers.base import SlotRecord
from kvtier.tiers.files import Files
from kvtier.tiers.packing import names
from kvtier.tiers.pages import sound_records
from kvtier.tiers.records import Piece
from kvtier.tiers.shared import Shared
from kvtier.units import GIB, KIB, MIB

_COMPLETE: Final = b"complete"  # in the main database, beside the one of slots
_MAP_BYTES_MIN: Final = 64 * MIB
_MAP_BYTES_MAX: Final = 256 * GIB  # address space, not memory
_BLOCK_BYTES_GUESS: Final = 64 * KIB  # a guess of the smallest common slot; the map grows if wrong
_RECORD_BYTES_GUESS: Final = 512

_SET_ASIDE_MAX: Final = 3  # copies kept as evidence; the oldest goes first
# What LMDB says of a file that is not what it wrote.
_DAMAGE: Final = (
    lmdb.BadDbiError, lmdb.BadTxnError, lmdb.CorruptedError, lmdb.InvalidError,
    lmdb.PageNotFoundError, lmdb.PanicError, lmdb.VersionMismatchError, lmdb.IncompatibleError,
)  # fmt: skip

logger = logging.getLogger(__name__)


class CatalogueDamaged(TierFailed):
    """LMDB found its own file damaged. At a start: set it aside and rebuild; later: restart."""


class Catalogue:
    """The records. Any thread: one transaction at a time, under a lock. Raises TierFailed."""

    def __init__(self, files: Files, directory: Path, capacity_bytes: int) -> None:
        self._files = files
        self._path = directory / "catalogue"
        self._clean = directory / "clean"
        wanted = capacity_bytes // _BLOCK_BYTES_GUESS * _RECORD_BYTES_GUESS
        self._map_bytes = min(max(wanted, _MAP_BYTES_MIN), _MAP_BYTES_MAX)
        self._lock = threading.Lock()
        self._env: lmdb.Environment | None = None
        self._syncs = Shared(self._sync)
        self._unsynced: TierFailed | None = None
        self._listed: Piece | None = None

    def open(self) -> bool:
        """Opens it; False when slabs must be scanned to fill it, followed by `complete`."""
        fresh = not (self._path / "data.mdb").exists()
        if not fresh:
            # Also after a clean end: what rots, rots in silence, and a torn page kills the process.
            problem = self._problem() or self._try_open()
            if problem is not None:
                self.set_aside(problem)
                fresh = True
        if fresh:
            self._listed = None
            self._forget_clean()
            problem = self._try_open()
            if problem is not None:
                raise TierFailed(f"{self._path}: {problem}")
        else:
            self._forget_clean()
        reach("recover.catalogue")
        found: list[bytes | None] = []
        self._transact(lambda txn: found.append(txn.get(_COMPLETE, db=self._main)))
        if found[-1] is None:
            self._listed = None
        return found[-1] is not None

    def complete(self) -> None:
        """All that slabs hold is listed: from now on the catalogue alone is believed."""
        reach("rebuild.listed")
        self._transact(lambda transaction: transaction.put(_COMPLETE, b"1", db=self._main))
        reach("rebuild.done")

    def _problem(self) -> str | None:
        """Why the file cannot be trusted; read without mapping it."""
        try:
            self._listed = sound_records(self._path / "data.mdb")
            if self._listed is not None:
                return None
            problems = lmdb.verify.verify(str(self._path))  # type: ignore[no-untyped-call]
        except (lmdb.verify.VerifyError, OSError, ValueError, struct.error) as error:
            return str(error)
        return str(problems[0]) if problems else None

    def _try_open(self) -> str | None:
        try:
            self._path.mkdir(mode=0o700, exist_ok=True)
            size = self._path / "data.mdb"
            if size.exists():
                self._map_bytes = max(self._map_bytes, size.stat().st_size * 2)
            env = lmdb.open(
                str(self._path), map_size=self._map_bytes, mode=0o600, metasync=False, max_dbs=1,
                readahead=False,
            )  # fmt: skip
            self._main = env.open_db(None)
            self._db = env.open_db(b"slots", integerkey=True)
            env.reader_check()
        except (lmdb.Error, OSError) as error:
            return str(error)
        self._env = env
        return None

    def set_aside(self, problem: str) -> None:
        """Moves the damaged files out of the way, as evidence; `open` then starts an empty one."""
        if self._env is not None:
            self._env.close()
            self._env = None
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        target = self._path.with_name(f"catalogue.damaged-{stamp}")
        for number in range(1, 1000):
            if not target.exists():
                break
            target = self._path.with_name(f"catalogue.damaged-{stamp}-{number}")
        logger.error(
            "%s is damaged (%s): set aside as %s, rebuilding from slabs",
            self._path, problem, target.name,
        )  # fmt: skip
        try:
            reach("aside.begin")
            self._files.rename(self._path, target)
            reach("aside.done")
            for old in sorted(target.parent.glob("catalogue.damaged-*"))[:-_SET_ASIDE_MAX]:
                shutil.rmtree(old)
        except OSError as error:
            raise TierFailed(f"{self._path}: {error.strerror}") from error

    def _forget_clean(self) -> None:
        """From here until `close` an end of the process is an unclean one."""
        try:
            self._files.unlink(self._clean)
            self._files.sync_directory(self._clean.parent)
            reach("recover.unclean")
        except OSError as error:
            raise TierFailed(f"{self._clean}: {error.strerror}") from error

    def _transact(self, work: Callable[[lmdb.Transaction[bytes]], object]) -> None:
        """`work` in one committed transaction, with a larger map if it needs one."""
        with self._lock:
            if self._env is None:
                raise TierFailed(f"{self._path} is not open")
            while True:
                try:
                    reach("catalogue.begin")
                    with self._env.begin(write=True, db=self._db) as transaction:
                        work(transaction)
                    reach("catalogue.committed")
                    return
                except lmdb.MapFullError as error:
                    if self._map_bytes >= _MAP_BYTES_MAX:
                        raise TierFailed(f"{self._path}: {error}") from error
                    self._map_bytes *= 2
                    self._env.set_mapsize(self._map_bytes)
                except _DAMAGE as error:
                    raise CatalogueDamaged(
                        f"{self._path} is damaged ({error}): restart the daemon, it rebuilds the "
                        "catalogue from slabs"
                    ) from error
                except lmdb.Error as error:
                    raise TierFailed(f"{self._path}: {error}") from error

    def put(self, records: Iterable[tuple[bytes, bytes]]) -> None:
        """Stores packed records, all or none; those of the same slots are replaced."""
        items = list(records)
        if self._unsynced is not None:
            raise self._unsynced

        def work(transaction: lmdb.Transaction[bytes]) -> None:
            for key, value in items:
                transaction.put(key, value)

        self._transact(work)

    def matching(self, records: Iterable[SlotRecord]) -> list[SlotRecord]:
        """Those whose slot still holds (or nobody says it does not hold) that very block."""
        found: list[SlotRecord] = []

        def work(transaction: lmdb.Transaction[bytes]) -> None:
            found.clear()
            for record in records:
                value = transaction.get(record.slot.to_bytes(4, "little"))
                if value is None or names(value, record.label):
                    found.append(record)

        self._transact(work)
        return found

    def delete(self, slots: Iterable[int]) -> None:
        """No record of these slots, in one transaction."""
        keys = [slot.to_bytes(4, "little") for slot in slots]

        def work(transaction: lmdb.Transaction[bytes]) -> None:
            for key in keys:
                transaction.delete(key)

        self._transact(work)

    def delete_segment(self, segment: int) -> None:
        """No record of any slot of this segment, in one transaction."""
        first, end = segment << SLOT_BITS, (segment + 1) << SLOT_BITS

        def work(transaction: lmdb.Transaction[bytes]) -> None:
            with transaction.cursor() as cursor:
                found = cursor.set_range(first.to_bytes(4, "little"))
                while found and int.from_bytes(cursor.key(), "little") < end:
                    found = cursor.delete()

        self._transact(work)
        reach("slab.emptied")

    def take_listed(self) -> Piece | None:
        """All records as they were when `open` checked the file, once; None: ask for `pieces`."""
        listed, self._listed = self._listed, None
        return listed

    def pieces(self, count: int) -> Generator[tuple[bytes, array[int], bytes], None, None]:
        """All records in the order of their slots, so many at a time: keys, lengths of values,
        values one after another. Changes made meanwhile are not seen. One thread; end it (or close
        it) before the catalogue is closed.
        """
        with self._lock:
            if self._env is None:
                raise TierFailed(f"{self._path} is not open")
            transaction = self._env.begin(db=self._db)
        try:
            with transaction, transaction.cursor() as cursor:
                items = cursor.iternext(keys=True, values=True)
                # Nothing here is done in Python for each record: a million are half a second.
                while part := list(islice(items, count)):
                    keys, values = zip(*part, strict=True)
                    yield b"".join(keys), array("I", map(len, values)), b"".join(values)
        except _DAMAGE as error:
            raise CatalogueDamaged(f"{self._path} is damaged ({error})") from error
        except lmdb.Error as error:
            raise TierFailed(f"{self._path}: {error}") from error

    def sync(self) -> None:
        """All transactions so far survive a power cut. Callers at the same time share one.

        Raises:
            TierFailed: it failed, now or before: the kernel tells once, and no later sync brings
                back what was lost. Nothing more is listed until a restart.
        """
        self._syncs.run()

    def _sync(self) -> None:
        with self._lock:
            if self._env is None:
                return
            if self._unsynced is not None:
                raise self._unsynced
            try:
                reach("catalogue.sync")
                self._env.sync(True)
                reach("catalogue.synced")
            except lmdb.Error as error:
                self._unsynced = TierFailed(
                    f"{self._path}: a sync failed ({error}); restart the daemon when the disk is "
                    "well again"
                )
                raise self._unsynced from error

    def abandon(self) -> None:
        """Closes it as it is, without the clean marker: something is wrong with it. Idempotent."""
        with self._lock:
            if self._env is not None:
                self._env.close()
                self._env = None

    def close(self) -> None:
        """Syncs, closes and, when all that went well, leaves the clean marker. Idempotent."""
        if self._env is None:
            return
        self.sync()
        with self._lock:
            self._env.close()
            self._env = None
            reach("catalogue.closed")
        try:
            self._files.replace(self._clean, b"")
        except OSError as error:
            raise TierFailed(f"{self._clean}: {error.strerror}") from error
