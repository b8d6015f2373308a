"""What an SSD tier finds at start: its catalogue, in order; made anew from slabs where it is lost.

Threads hold the interpreter for a fraction of a millisecond at a time: clients are served then.

Does not: decide what becomes of what was found, or write slabs.
"""

from __future__ import annotations

import logging
import time
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import starmap
from pathlib import Path
from typing import Final, TypeVar

from kvtier.block import SLOT_BITS, NamespaceSpec, SegmentPlan
from kvtier.errors import DaemonUnavailable, KvTierError, TierFailed
from kvtier.testing.failpoints import reach
from kvtier.tiers.arrange import arrange
from kvtier.tiers.base import SlotRecord
from kvtier.tiers.catalogue import Catalogue, CatalogueDamaged
from kvtier.tiers.evidence import set_aside
from kvtier.tiers.files import Files
from kvtier.tiers.identity import Identity
from kvtier.tiers.packing import pack_record
from kvtier.tiers.records import Found, Piece, Shape
from kvtier.tiers.slab import Slab
from kvtier.tiers.starts import Verdict
from kvtier.tiers.state import Names, NamespaceBook

T = TypeVar("T")
logger = logging.getLogger(__name__)
_SCAN_THREADS: Final = 8
_PIECE_RECORDS: Final = 512
_STRAY_SLOTS: Final = 64  # headers of one read
_PUT_RECORDS: Final = 1024  # of one transaction


def obey(verdict: Verdict, catalogue: Catalogue, files: Files, folder: Path) -> None:
    """After repeated crashes the catalogue is not believed; after more, the slabs in `folder`
    neither: they are set aside, as evidence (the last such). Raises TierFailed.
    """
    if verdict:
        catalogue.distrust("repeated crashes")
    if verdict is not Verdict.NOTHING or not any(folder.glob("*.slab")):
        return
    try:
        target = set_aside(files, folder, kept_max=1)
        folder.mkdir(mode=0o700)
        files.sync_directory(folder.parent)
    except OSError as error:
        raise TierFailed(f"{folder}: {error.strerror}") from error
    logger.error(
        "%s are set aside as %s, which takes their space beyond tiers.ssd.size_bytes until the "
        "tier needs it, or you remove it", folder, target.name,
    )  # fmt: skip


def open_slabs(slabs: Sequence[Slab], identity: Identity, book: NamespaceBook) -> None:
    """Reads what slabs and the small files say, the former where the latter are lost. Again after
    an error. Raises TierFailed.
    """
    book.load()
    identity.load()
    for slab in slabs:
        if slab.fd < 0 and slab.open_existing():
            slab.resize()
    identity.choose([slab.state_id for slab in slabs if slab.slot_bytes])
    for slab in slabs:
        slab.belong_to(identity.state_id)
        book.merge(slab.names)


def read_catalogue(
    catalogue: Catalogue,
    slabs: Sequence[Slab],
    names: Names,
    plan: SegmentPlan,
    stopping: Callable[[], bool],
) -> Found:
    """Opens the catalogue, fills it from slabs if it must be, and puts what it lists in order.

    Raises:
        TierFailed: it cannot be read. DaemonUnavailable: `stopping` said so.
    """
    try:
        return _read(catalogue, slabs, names, plan, stopping)
    except CatalogueDamaged as error:
        catalogue.set_aside(str(error))
        return _read(catalogue, slabs, names, plan, stopping)


def _read(
    catalogue: Catalogue,
    slabs: Sequence[Slab],
    names: Names,
    plan: SegmentPlan,
    stopping: Callable[[], bool],
) -> Found:
    if not catalogue.open():
        _rebuild(catalogue, slabs, stopping)
    listed = catalogue.take_listed()
    _go_on(stopping)
    pieces = _pieces(catalogue, stopping) if listed is None else [listed]
    reach("recover.records")
    cuts = [(slab.slot_bytes, slab.cut_generation) for slab in slabs]
    return arrange(pieces, cuts, plan.size_bytes, _shapes(names, plan))


def _pieces(catalogue: Catalogue, stopping: Callable[[], bool]) -> list[Piece]:
    """Where the records were not taken from the file itself."""
    pieces: list[Piece] = []
    with closing(catalogue.pieces(_PIECE_RECORDS)) as listed:
        for piece in listed:
            _go_on(stopping)
            pieces.append(Piece(*piece))
            time.sleep(0)  # whoever waits for the interpreter gets it now, not half a ms later
    return pieces


def _go_on(stopping: Callable[[], bool]) -> None:
    if stopping():
        raise DaemonUnavailable("the daemon is stopping: what it recovers comes at the next start")


def _shapes(names: Names, plan: SegmentPlan) -> dict[bytes, Shape]:
    """What records of each namespace must say. What we cannot read is the caller's to drop."""
    shapes: dict[bytes, Shape] = {}
    for digest, (epoch, descriptor, _, _) in names.items():
        try:
            shape = NamespaceSpec.from_json(descriptor).format
        except (KvTierError, TypeError, ValueError, KeyError):
            shapes[digest] = Shape(epoch, 0, 0, 1)
            continue
        slot_bytes = plan.slot_bytes(shape.shard_bytes)
        shapes[digest] = Shape(epoch, slot_bytes, shape.shard_bytes, shape.shards)
    return shapes


def _rebuild(catalogue: Catalogue, slabs: Sequence[Slab], stopping: Callable[[], bool]) -> None:
    """Fills an empty catalogue from slot headers; after a kill meanwhile it starts again.

    What is older or foreign goes when the records are read.
    """
    found = list(_in_slabs(slabs, lambda slab: list(slab.scan(stopping))))
    reach("rebuild.scanned")
    for records in found:
        for at in range(0, len(records), _PUT_RECORDS):
            _go_on(stopping)
            catalogue.put(starmap(pack_record, records[at : at + _PUT_RECORDS]))
    catalogue.complete()


def newest_in_slabs(slabs: Sequence[Slab], stopping: Callable[[], bool]) -> int:
    """The highest generation in any slot's header, listed or not. Reads all headers."""
    return max(_in_slabs(slabs, lambda slab: slab.newest(stopping)), default=0)


def strays_in_slabs(slabs: Sequence[Slab], found: Found, stopping: Callable[[], bool]) -> list[int]:
    """Slots whose header a rebuild would believe though no record names them, or none that is left.
    Reads the headers of all slots but those that count. Raises DaemonUnavailable: `stopping` said
    so.
    """
    listed, dropped = array("I"), frozenset(found.dropped)
    for piece in found.pieces:
        listed.frombytes(piece.keys)  # in ascending order, as the catalogue has them

    def work(slab: Slab) -> list[int]:
        base = slab.index << SLOT_BITS
        first, end = bisect_left(listed, base), bisect_left(listed, base + (1 << SLOT_BITS))
        known = {slot - base for slot in listed[first:end] if slot not in dropped}
        others = [index for index in range(slab.slot_count) if index not in known]
        strays: list[int] = []
        for at in range(0, len(others), _STRAY_SLOTS):
            _go_on(stopping)
            headers = slab.here(others[at : at + _STRAY_SLOTS])
            strays += [record.slot for record in headers if not _is_cleared(record, found.shapes)]
            time.sleep(0)
        return strays

    return [slot for strays in _in_slabs(slabs, work) for slot in strays]


def _is_cleared(record: SlotRecord, shapes: Mapping[bytes, Shape]) -> bool:
    shape = shapes.get(record.label.namespace)
    return shape is not None and record.label.epoch < shape.epoch


def _in_slabs(slabs: Sequence[Slab], work: Callable[[Slab], T]) -> Iterator[T]:
    with ThreadPoolExecutor(_SCAN_THREADS, "kvtier-scan") as pool:
        yield from pool.map(work, [slab for slab in slabs if slab.fd >= 0])
