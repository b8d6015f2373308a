r"""Catalogue: which slot of the SSD tier holds what, in LMDB.

A record's key is its slot number (LMDB integerkey), so a slot can never be claimed twice and
neighbours share pages; its value (packing.py) carries a checksum of its own and repeats the slot
number: LMDB itself returned 132 of 150 flipped bits as good content (reliability.md 1.1).

    open() --> [checked before it is mapped] --> sound: take_listed() or pieces()
                                            \--> damaged: set aside under a dated name, rebuild

Damage that LMDB finds only when it reads is `CatalogueDamaged`: `set_aside`, `open` again, rebuild.
Later it says so until a restart: the pages of a map that is in use cannot be checked.

`metasync=False` may undo the newest transaction in a power cut, never break one; `sync` ends that.
Never `sync=False` or `writemap` (SIGBUS, torn trees). A failed meta page write makes LMDB refuse
everything: then the file is checked and opened again. A failed sync is final until `renew`.

Does not: touch slabs, or know what is durable in them: callers write those first.
"""

from __future__ import annotations

import errno
import logging
import mmap
import threading
import time
from array import array
from collections.abc import Callable, Generator, Iterable
from itertools import islice
from pathlib import Path
from typing import Final

import lmdb

from kvtier.block import SLOT_BITS
from kvtier.errors import TierFailed
from kvtier.testing.failpoints import reach
from kvtier.tiers.base import SlotRecord
from kvtier.tiers.clean import CleanMarker
from kvtier.tiers.evidence import set_aside
from kvtier.tiers.files import Files
from kvtier.tiers.packing import names
from kvtier.tiers.page_checks import Damage
from kvtier.tiers.pages import check_twice
from kvtier.tiers.records import Piece
from kvtier.tiers.shared import Shared
from kvtier.units import GIB, KIB, MIB, format_bytes

# In the main database, beside the one of slots.
_COMPLETE: Final = b"complete"
_RENEWED: Final = b"renewed"
_MAP_BYTES_MIN: Final = 64 * MIB
_MAP_BYTES_MAX: Final = 256 * GIB  # address space, not memory
_BLOCK_BYTES_GUESS: Final = 64 * KIB  # a guess of the smallest common slot; the map grows if wrong
_RECORD_BYTES_GUESS: Final = 512
_DELETES_BYTES: Final = 16 * MIB  # of the map, for those only: deleting writes pages anew, too
_MAP_FLAGS: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
# What LMDB says of a file that is not what it wrote.
_DAMAGE: Final = (
    lmdb.BadDbiError, lmdb.BadTxnError, lmdb.CorruptedError, lmdb.InvalidError,
    lmdb.PageNotFoundError, lmdb.PanicError, lmdb.VersionMismatchError, lmdb.IncompatibleError,
)  # fmt: skip

Work = Callable[["lmdb.Transaction[bytes]"], object]

logger = logging.getLogger(__name__)


class CatalogueDamaged(TierFailed):
    """LMDB found its own file damaged. At a start: set it aside and rebuild; later: restart."""


class Catalogue:
    """The records. Any thread: one transaction at a time, under a lock. Raises TierFailed."""

    def __init__(self, files: Files, directory: Path, capacity_bytes: int) -> None:
        self._files = files
        self._path = directory / "catalogue"
        self._clean = CleanMarker(files, directory)
        wanted = capacity_bytes // _BLOCK_BYTES_GUESS * _RECORD_BYTES_GUESS
        self._map_bytes = min(max(wanted, _MAP_BYTES_MIN), _MAP_BYTES_MAX)
        self._map_bytes_max = _MAP_BYTES_MAX
        # Whoever closes the environment holds both, the first one first. A sync takes its own
        # only: transactions go on meanwhile.
        self._sync_lock = threading.RLock()
        self._lock = threading.Lock()
        self._env: lmdb.Environment | None = None
        self._syncs = Shared(self._sync)
        self._unsynced: TierFailed | None = None
        # A transaction failed: the meta page of the one before may have been lost with it.
        self._doubtful = False
        self._listed: Piece | None = None
        self._distrust = ""
        self.set_aside_count = 0
        self.has_unsynced = False  # a transaction since the last sync began
        self.lists_all = False  # no slot can have a sound header that `open` found no record of

    def distrust(self, reason: str) -> None:
        """The next `open` sets the file aside, whatever its pages look like."""
        self._distrust = reason

    def open(self) -> bool:
        """Opens it; False when slabs must be scanned to fill it, followed by `complete`."""
        exists = (self._path / "data.mdb").exists()
        # Also after a clean end: what rots, rots in silence, and a torn page kills the process.
        problem = self._distrust or (self._problem() if exists else None)
        self._distrust = ""
        # From here until `close` an end of the process is an unclean one.
        self.lists_all = self._clean.take()
        try:
            if exists and problem:
                raise CatalogueDamaged(problem)
            found = self._open_env()
        except CatalogueDamaged as error:
            self.set_aside(str(error))
            found = self._open_env()
        reach("recover.catalogue")
        if not found:
            self._listed = None
            self.lists_all = True  # once it was made anew
        return found

    def _open_env(self) -> bool:
        """Whether the file is complete."""
        with self._sync_lock, self._lock:
            self._env = self._opened()
        found: list[bytes | None] = []
        self._transact(lambda txn: found.append(txn.get(_COMPLETE, db=self._main)))
        return found[-1] is not None

    def complete(self) -> None:
        """All that slabs hold is listed: from now on the catalogue alone is believed."""
        reach("rebuild.listed")
        self._transact(lambda transaction: transaction.put(_COMPLETE, b"1", db=self._main))
        reach("rebuild.done")

    def _problem(self) -> str | None:
        """Why the file cannot be trusted; read without mapping it. Raises TierFailed."""
        self._listed = None
        try:
            found = check_twice(self._path / "data.mdb")
        except OSError as error:
            if error.errno in (errno.EIO, errno.EISDIR):
                return f"cannot be read: {error.strerror or error}"
            raise TierFailed(f"{self._path}: {error.strerror or error}") from error
        if isinstance(found, Damage):
            return str(found)
        self._listed = found
        return None

    def _opened(self) -> lmdb.Environment:
        """Raises CatalogueDamaged, or TierFailed: it is not the file that is wrong."""
        env: lmdb.Environment | None = None
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
            if env is not None:
                env.close()
            if isinstance(error, _DAMAGE):
                raise CatalogueDamaged(f"{self._path}: {error}") from error
            raise TierFailed(f"{self._path}: {error}") from error
        return env

    def set_aside(self, problem: str) -> None:
        """Moves the damaged files out of the way, as evidence; `open` then starts an empty one."""
        self.abandon()
        self._listed = None
        try:
            target = set_aside(self._files, self._path)
        except OSError as error:
            raise TierFailed(f"{self._path}: {error.strerror}") from error
        logger.error(
            "%s is not believed (%s): set aside as %s, rebuilding from slabs",
            self._path, problem, target.name,
        )  # fmt: skip
        self.set_aside_count += 1

    def _transact(self, work: Work, *, beyond_bytes: int = 0) -> None:
        """`work` in one committed transaction, with a larger map if it needs one (`beyond_bytes`
        larger than the limit at most).
        """
        try:
            self._attempt(work, beyond_bytes)
        except lmdb.PanicError:
            with self._sync_lock, self._lock:
                self._doubtful = True
                self._reopen()
            try:
                self._attempt(work, beyond_bytes)
            except lmdb.PanicError as error:
                raise TierFailed(f"{self._path}: {error}") from error

    def _attempt(self, work: Work, beyond_bytes: int) -> None:
        with self._lock:
            while True:
                if self._env is None:
                    raise TierFailed(f"{self._path} is not open")
                try:
                    reach("catalogue.begin")
                    with self._env.begin(write=True, db=self._db) as transaction:
                        work(transaction)
                    reach("catalogue.committed")
                    self.has_unsynced = True
                    return
                except lmdb.MapFullError:
                    self._grow(self._map_bytes_max + beyond_bytes)
                except lmdb.PanicError:
                    raise
                except _DAMAGE as error:
                    raise CatalogueDamaged(self._restart(error)) from error
                except lmdb.Error as error:
                    self._doubtful = True
                    raise TierFailed(f"{self._path}: {error}") from error

    def _restart(self, problem: object) -> str:
        return (
            f"{self._path} is damaged ({problem}): restart the daemon, it rebuilds the catalogue "
            "from slabs"
        )

    def _grow(self, limit_bytes: int) -> None:
        """A larger map, or TierFailed. Hold the lock, outside of a transaction."""
        assert self._env is not None
        wanted = min(self._map_bytes * 2, limit_bytes)
        if wanted <= self._map_bytes:
            raise TierFailed(
                f"{self._path} is full at {format_bytes(self._map_bytes)}: no more blocks are "
                "listed before some are evicted; lower tiers.ssd.size_bytes or store larger blocks"
            )
        try:
            # Tried: LMDB lets go of the old map first, and is lost without the new one.
            mmap.mmap(-1, wanted - self._map_bytes, _MAP_FLAGS, 0).close()
            self._env.set_mapsize(wanted)
        except (OSError, lmdb.Error) as error:
            raise TierFailed(
                f"{self._path}: no address space for a map of {format_bytes(wanted)} ({error}); "
                "raise LimitAS= of the service (ulimit -v) or lower tiers.ssd.size_bytes"
            ) from error
        self._map_bytes = wanted

    def _reopen(self) -> None:
        """LMDB refuses everything until it is opened anew. Hold both locks. Raises TierFailed."""
        logger.error("%s: LMDB gave up after a failed write: opened again", self._path)
        env, self._env = self._env, None
        if env is not None:
            env.close()
        problem = self._problem()
        self._listed = None
        if problem is not None:
            raise CatalogueDamaged(self._restart(problem))
        self._env = self._opened()

    def renew(self) -> None:
        """After a failed sync, when the disk is well again: the file is checked, opened anew, and
        all that it lists is durable. Raises TierFailed: it still fails, or is damaged.
        """
        with self._sync_lock, self._lock:
            if self._unsynced is None:
                return
            self._reopen()
            self._unsynced, self._doubtful = None, True
        try:
            self.sync()
        except TierFailed as error:
            self._unsynced = error
            raise

    def tend(self) -> None:
        """Now and then: slots of readers that are gone are given back, lest the file grow. Raises
        TierFailed.
        """
        with self._lock:
            try:
                if self._env is not None:
                    self._env.reader_check()
            except lmdb.Error as error:
                raise TierFailed(f"{self._path}: {error}") from error

    def put(self, records: Iterable[tuple[bytes, bytes]]) -> None:
        """Stores packed records, all or none; those of the same slots are replaced."""
        items = list(records)
        if self._unsynced is not None:
            raise self._unsynced
        self._transact(lambda txn: [txn.put(key, value) for key, value in items])

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
        self._transact(lambda txn: [txn.delete(key) for key in keys], beyond_bytes=_DELETES_BYTES)

    def delete_segment(self, segment: int) -> None:
        """No record of any slot of this segment, in one transaction."""
        first, end = segment << SLOT_BITS, (segment + 1) << SLOT_BITS

        def work(transaction: lmdb.Transaction[bytes]) -> None:
            with transaction.cursor() as cursor:
                found = cursor.set_range(first.to_bytes(4, "little"))
                while found and int.from_bytes(cursor.key(), "little") < end:
                    found = cursor.delete()

        self._transact(work, beyond_bytes=_DELETES_BYTES)
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
                back what was lost. Nothing more is listed until `renew`.
        """
        self._syncs.run()

    def _sync(self) -> None:
        with self._sync_lock:
            if self._env is None:
                return
            if self._unsynced is not None:
                raise self._unsynced
            if self._doubtful:
                # This one's meta page says all that the lost one said.
                number = time.time_ns().to_bytes(8, "little")
                self._transact(lambda txn: txn.put(_RENEWED, number, db=self._main))
                self._doubtful = False
            env, self.has_unsynced = self._env, False
            try:
                reach("catalogue.sync")
                if env is not None:
                    env.sync(True)
                reach("catalogue.synced")
            except lmdb.Error as error:
                self._unsynced = TierFailed(
                    f"{self._path}: a sync failed ({error}): the tier tries again by itself, and "
                    "at once with `kvtier heal`"
                )
                raise self._unsynced from error

    def abandon(self) -> None:
        """Closes it as it is, without the clean marker: something is wrong with it. Idempotent."""
        with self._sync_lock, self._lock:
            if self._env is not None:
                self._env.close()
                self._env = None

    def close(self, *, clean: bool = True) -> None:
        """Syncs, closes and, when all that went well, leaves the clean marker (if it is `clean`: no
        slot has a sound header without a record). Idempotent.
        """
        if self._env is None:
            return
        try:
            self.sync()
        finally:
            self.abandon()
        reach("catalogue.closed")
        if clean:
            self._clean.leave()
