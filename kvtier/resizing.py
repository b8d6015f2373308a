r"""Resizing: the SSD tier gets another size while it serves.

    smaller: its last segments are withheld -> the least valuable blocks are evicted -> what is left
    in them moves to others (copy, catalogue synced, then the books) -> their files are deleted
    larger: the file system must have room -> segments are there; files are made as they are needed

Whole segments, rounded down: what was asked for is never exceeded. A block that is pinned or leased
is never evicted: if those alone do not fit, or the tier fails meanwhile, it keeps its former size
(what was evicted until then is gone). Not kept over a restart: then the configuration decides.

Does not: resize memory, whose arenas clients have mapped.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from kvtier import native
from kvtier.block import SEGMENTS_MAX, Move, SlotIO, TierId
from kvtier.errors import (
    BlockCorrupt,
    DaemonUnavailable,
    InvalidRequest,
    KvTierError,
    LimitReached,
    TierFailed,
    TierFull,
    Unsupported,
)
from kvtier.health import Health
from kvtier.ledger import relocation
from kvtier.ledger.chain import Namespace
from kvtier.ledger.claims import Claim, claims
from kvtier.ledger.ledger import Ledger
from kvtier.ledger.moves import Moves
from kvtier.progress import Progress
from kvtier.recovering import Recovering
from kvtier.scrub_reading import InThread
from kvtier.scrubbing import Scrubbing
from kvtier.sections import SsdConfig
from kvtier.testing.failpoints import reach
from kvtier.tiers.ssd import SsdTier
from kvtier.units import MIB, PAGE_BYTES, Clock, align_up, format_bytes

_BATCH_BLOCKS = 64
_BATCH_BYTES = 8 * MIB
_SLOTS = 4096  # looked at in one turn of the loop
_LOOK_S = 0.1  # how often it looks again when nobody says that something happened
# Without any progress: what is in the way stays there (pins, leases), or nobody erases.
_STUCK_S = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Resized:
    """What a resize did. `configured_bytes` is the size after a restart."""

    former_bytes: int
    size_bytes: int
    configured_bytes: int
    moved_blocks: int
    evicted_blocks: int


class Resizing:
    """Of one daemon's tiers. Event loop only."""

    def __init__(
        self,
        ssd: SsdTier | None,
        ledger: Ledger,
        moves: Moves,
        scrubbing: Scrubbing,
        health: Health,
        recovering: Recovering,
        progress: Progress,
        clock: Clock,
        *,
        config: SsdConfig,
        turn: asyncio.Lock,
        in_thread: InThread,
        wake: Callable[[], None],
        stop_by: Callable[[BaseException], None],
    ) -> None:
        self.config = config
        self._ssd = ssd
        self._ledger = ledger
        self._moves = moves
        self._scrubbing = scrubbing
        self._health = health
        self._recovering = recovering
        self._progress = progress
        self._clock = clock
        self._turn = turn
        self._in_thread = in_thread
        self._wake = wake
        self._stop_by = stop_by
        self._task: asyncio.Task[Resized] | None = None
        self._stopping = False
        self._moved_blocks = 0

    async def resize(self, tier: TierId, size_bytes: int) -> Resized:
        """The tier has this size, in whole segments, when it returns; it goes on when its caller
        is cancelled.

        Raises:
            Unsupported: only the SSD tier can be resized live.
            InvalidRequest: there is no such tier, or it cannot be so small or large.
            TierFull: the file system has no room, or what is pinned or leased does not fit.
            TierFailed: the tier does not serve, or failed meanwhile.
            LimitReached: a resize is under way. DaemonUnavailable: the daemon stops.
        """
        ssd = self._ssd
        if tier is TierId.SSD and ssd is not None:
            count = self._segment_count(ssd, size_bytes)
        elif tier in self._ledger.tiers:
            raise Unsupported(
                f"the {tier.label} tier cannot be resized live, its arenas are mapped by clients: "
                f"set tiers.{tier.label}.size_bytes and restart the daemon"
            )
        else:
            raise InvalidRequest(f"there is no {tier.label} tier")
        if not self._recovering.is_over:
            raise TierFailed(f"the SSD tier is {self._recovering.state}: resize it when it serves")
        self._must_serve()
        if self._task is not None:
            raise LimitReached("a resize is under way; wait for its end")
        self._task = asyncio.get_running_loop().create_task(self._in_turn(ssd, count))
        self._task.add_done_callback(self._ended)
        return await asyncio.shield(self._task)

    def _ended(self, task: asyncio.Task[Resized]) -> None:
        self._task = None
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, KvTierError):
            self._stop_by(error)

    async def close(self) -> None:
        """Ends it wherever it is, because the daemon ends. Idempotent."""
        self._stopping = True
        self._progress.notify()
        if self._task is not None:
            await asyncio.wait([self._task])

    def _segment_count(self, ssd: SsdTier, size_bytes: int) -> int:
        each = ssd.file_bytes
        count = size_bytes // each
        if not 1 <= count <= SEGMENTS_MAX:
            raise InvalidRequest(
                f"{format_bytes(size_bytes)} is no size for the SSD tier: it has 1 to "
                f"{SEGMENTS_MAX} segments of {format_bytes(each)} (tiers.ssd.segment_bytes)"
            )
        guaranteed = sum(
            size for (_, of), size in self._ledger.guaranteed_bytes.items() if of is TierId.SSD
        )
        if guaranteed > count * each:
            raise InvalidRequest(
                f"{format_bytes(guaranteed)} of the SSD tier are guaranteed to tenants "
                "(tenants.ssd_guaranteed_bytes): it cannot be smaller"
            )
        return count

    def _must_serve(self) -> None:
        if self._health.is_closed:
            raise TierFailed(f"the SSD tier is degraded ({self._health.error}): kvtier heal first")
        if self._stopping:
            raise DaemonUnavailable("the daemon is stopping")

    async def _in_turn(self, ssd: SsdTier, count: int) -> Resized:
        async with self._turn:
            self._must_serve()
            return await self._resize(ssd, count)

    async def _resize(self, ssd: SsdTier, count: int) -> Resized:
        slots = self._ledger.slots[TierId.SSD]
        former, evicted = len(slots.segments), self._ledger.evicted_blocks
        self._moved_blocks = 0
        log.info("resize.begun tier=ssd segments=%d of=%d", count, former)
        reach("resize.begin")
        if count < former:
            await self._shrink(ssd, count)
        elif count > former:
            await self._in_thread(functools.partial(self._find_room, ssd, count))
            async with self._scrubbing.turn:
                await self._set_count(ssd, count)
        self._wake()
        done = Resized(
            former * ssd.file_bytes, count * ssd.file_bytes,
            self.config.size_bytes // ssd.file_bytes * ssd.file_bytes,
            self._moved_blocks, self._ledger.evicted_blocks - evicted,
        )  # fmt: skip
        log.info("resize.done tier=ssd %s", done)
        return done

    def _find_room(self, ssd: SsdTier, count: int) -> None:
        """Worker thread."""
        missing, room = ssd.upkeep.missing_bytes(count), ssd.upkeep.room_bytes()
        if missing > room:
            raise TierFull(
                f"{ssd.directory}: {format_bytes(missing)} more are needed, and the file system "
                f"has {format_bytes(max(0, room))} beyond tiers.ssd.min_free_bytes"
            )

    async def _set_count(self, ssd: SsdTier, count: int) -> None:
        await self._in_thread(functools.partial(ssd.resize, count))
        relocation.set_segment_count(self._ledger, TierId.SSD, count)

    # --- smaller

    async def _shrink(self, ssd: SsdTier, count: int) -> None:
        slots = self._ledger.slots[TierId.SSD]
        going = range(count, len(slots.segments))
        async with self._scrubbing.turn:  # it withholds segments, too
            for index in going:
                slots.withhold(index)
        try:
            await self._empty(ssd, going)
            reach("resize.emptied")
            async with self._scrubbing.turn:
                await self._set_count(ssd, count)
        except BaseException:
            for index in going:
                slots.give_back(index)
            self._wake()
            raise
        reach("resize.done")

    async def _empty(self, ssd: SsdTier, going: range) -> None:
        """Goes over these segments again and again until they are empty, a piece at a time."""
        ledger, slots = self._ledger, self._ledger.slots[TierId.SSD]
        room_bytes = int(self.config.high_water * going.start * slots.plan.size_bytes)
        before, since_s = (-1, -1, -1), self._clock.monotonic_s()
        index, at, homeless = going.start, 0, list[Claim]()
        while busy := [i for i in going if slots.segments[i].slot_class is not None]:
            self._must_serve()
            self._moves.shrink_to(TierId.SSD, room_bytes)
            end = min(at + _SLOTS, slots.segments[index].slot_count)
            found, at = claims(ledger, TierId.SSD, index, at, end=end, count_max=2 * _BATCH_BLOCKS)
            moves, unmoved = self._plan(found)
            homeless += unmoved
            if moves:
                await self._move(ssd, moves)
            self._wake()  # whoever erases has something to do
            if at < slots.segments[index].slot_count:
                await asyncio.sleep(0)
                continue
            index, at = next((i for i in busy if i > index), going.start), 0
            if index > going.start:
                continue
            now = (sum(slots.segments[i].used for i in busy), slots.used_bytes, self._moved_blocks)
            now_s = self._clock.monotonic_s()
            if now != before:
                before, since_s = now, now_s
            elif now_s - since_s > _STUCK_S:
                self._give_up(busy, homeless)
            homeless = []
            await self._progress.wait(_LOOK_S)

    def _plan(self, found: list[Claim]) -> tuple[list[Move], list[Claim]]:
        """Moves of these blocks to other segments, as many as one batch is; for those without a
        place, room is made, or they go themselves. Returns the moves, and who can do neither.
        """
        ledger, size_bytes = self._ledger, 0
        moves: list[Move] = []
        unplaced: dict[Namespace, list[Claim]] = {}
        locked: list[Claim] = []
        for claim in found:
            if size_bytes >= _BATCH_BYTES or len(moves) >= _BATCH_BLOCKS:
                return moves, locked  # the others have their turn in the next round
            space = claim.run.space
            if space.locked:
                locked.append(claim)
                continue
            if space in unplaced or not relocation.has_room(ledger, space, TierId.SSD):
                unplaced.setdefault(space, []).append(claim)
                continue
            move = relocation.plan(ledger, self._moves, claim.run, claim.place, TierId.SSD)
            if move is not None:
                moves.append(move)
                size_bytes += move.source_slot_bytes * len(move.source_slots)
        homeless = locked
        for space, lacking in unplaced.items():
            before = ledger.slots[TierId.SSD].used_bytes, ledger.is_erasing
            self._moves.make_room(TierId.SSD, space, len(lacking) * space.shards)
            if ledger.is_erasing or before != (ledger.slots[TierId.SSD].used_bytes, False):
                continue  # something goes: whether it was enough is seen when it has gone
            kept = [claim for claim in lacking if not relocation.drop(ledger, claim, TierId.SSD)]
            homeless += kept
        return moves, homeless

    def _give_up(self, busy: list[int], homeless: list[Claim]) -> None:
        segments = [self._ledger.slots[TierId.SSD].segments[index] for index in busy]
        used = sum(segment.used * (segment.slot_class or ("", 0))[1] for segment in segments)
        why = "somebody still reads or writes there"
        if homeless:
            pinned = sum(claim.run.pins > 0 for claim in homeless)
            locked = sum(bool(claim.run.space.locked) for claim in homeless)
            why = f"{len(homeless)} blocks are leased, pinned ({pinned}) or locked ({locked})"
        raise TierFull(
            f"{format_bytes(used)} of the SSD tier's last {len(busy)} segments cannot go: {why}, "
            "and have no place in a tier of that size; unpin them (kvtier unpin), purge namespaces "
            "whose key is lost, or choose a larger size"
        )

    # --- moving

    async def _move(self, ssd: SsdTier, moves: list[Move]) -> None:
        """All of them end here, one way or the other."""
        errors = await self._in_thread(functools.partial(_copy, ssd, moves))
        reach("resize.copied")
        failed: TierFailed | None = None
        for move, error in zip(moves, errors, strict=True):
            if error is None:
                self._moved_blocks += relocation.finish(self._ledger, self._moves, move)
                continue
            corrupt = isinstance(error, BlockCorrupt)
            self._moves.abort_move(move, source_corrupt=corrupt, written=True)
            if not corrupt:
                failed = TierFailed(str(error))
        self._progress.notify()
        if failed is not None:
            self._health.failed(failed)
            raise failed

    def __repr__(self) -> str:
        return f"<Resizing {'under way' if self._task else 'idle'}>"


def _copy(ssd: SsdTier, moves: list[Move]) -> list[KvTierError | None]:
    """Worker thread. The blocks lie in their new slots, for good, where there is no error."""
    sizes = [align_up(move.labels[0].size_bytes, PAGE_BYTES) for move in moves]
    total = sum(size * len(move.labels) for size, move in zip(sizes, moves, strict=True))
    errors: list[KvTierError | None] = [None] * len(moves)
    with native.AlignedBuffer(total) as buffer:
        address = buffer.address
        reads: list[list[SlotIO]] = []
        for move, size in zip(moves, sizes, strict=True):
            row = []
            for slot, label in zip(move.source_slots, move.labels, strict=True):
                row.append(SlotIO(slot, move.source_slot_bytes, address, label))
                address += size
            reads.append(row)
        _try(ssd.read, [item for row in reads for item in row])
        writes: list[list[SlotIO]] = []
        for index, (move, row) in enumerate(zip(moves, reads, strict=True)):
            errors[index] = next((item.error for item in row if item.error is not None), None)
            places = zip(move.target_slots, row, strict=True)
            writes.append(
                []
                if errors[index]
                else [
                    SlotIO(slot, move.target_slot_bytes, item.address, replace(item.label))
                    for slot, item in places
                ]
            )
        _try(ssd.write, [item for row in writes for item in row])
        for index, row in enumerate(writes):
            errors[index] = errors[index] or next((i.error for i in row if i.error), None)
    try:
        # The former slots are wiped next, which no sync of the catalogue takes back.
        ssd.sync()
    except TierFailed as error:
        return [failed or error for failed in errors]
    return errors


def _try(work: Callable[[list[SlotIO]], None], items: list[SlotIO]) -> None:
    try:
        if items:
            work(items)
    except KvTierError as error:
        for item in items:
            item.error = error
