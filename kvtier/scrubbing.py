r"""Scrubbing: reads all of the SSD tier, slowly, and drops what is damaged before anybody asks for it.

    idle --asked, or the interval is over--> running --all read--> idle
                          degraded: waiting --/ \--stopped, or the device cannot be read--> idle

Slot by slot as they lie on disk, at most `bytes_per_s`. Each copy is pinned while it is read, like
a move's source, and that is no use of its block: the order of eviction stays. A damaged copy is
lost (the block too, if it has no other), its slot erased. A slot that cannot be read is damaged
only if others can be: a device that is gone must not cost all that is on it. Where no block is, a
header that a rebuild would believe is wiped. The position is kept over restarts, about.

Does not: look at the catalogue (every start does), or at blocks written behind it meanwhile.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from kvtier import native
from kvtier.block import SLOT_BITS, SlotIO, TierId
from kvtier.counts import ScrubUse
from kvtier.errors import BlockCorrupt, InvalidRequest, KvTierError, LimitReached, TierFailed
from kvtier.health import Health
from kvtier.ledger.claims import claims, lose, pin, unpin
from kvtier.ledger.ledger import Ledger
from kvtier.recovering import Recovering
from kvtier.tally import Tally, damage_of
from kvtier.testing.failpoints import reach
from kvtier.tiers.base import SlotRecord
from kvtier.tiers.scrub_notes import ScrubNotes, read_notes, write_notes
from kvtier.tiers.slots import SLOT_HEADER_BYTES
from kvtier.tiers.ssd import SsdTier
from kvtier.tiers.upkeep import HEADERS_MAX
from kvtier.units import MIB, PAGE_BYTES, Clock, align_up, format_bytes

T = TypeVar("T")
RATE_MIN = MIB  # bytes a second
# Of one read: little enough for a promotion that waits behind it, and for the loop.
_BATCH_BYTES = 4 * MIB
_BATCH_BLOCKS = 64
_LOOK_S = 0.5  # how often a waiting scrub looks whether it may go on
_SAVED_S = 30.0
_AHEAD_S = 0.25  # of its rate, after it had to wait
_UNREADABLE_MAX = 16  # in a row: it is the device, not a slot
_LOGGED_MAX = 100

log = logging.getLogger(__name__)


class InThread(Protocol):
    """Runs blocking work in a worker thread."""

    def __call__(self, work: Callable[[], T]) -> asyncio.Future[T]: ...


class Scrubbing:
    """The scrub of one SSD tier. Event loop only.

    Whoever takes segments away holds `turn`. `wake` is called when blocks were dropped, `stop_by`
    with what must stop the daemon.
    """

    def __init__(
        self,
        ssd: SsdTier | None,
        ledger: Ledger,
        tally: Tally,
        clock: Clock,
        *,
        bytes_per_s: int,
        interval_s: float,
        health: Health,
        recovering: Recovering,
        in_thread: InThread,
        wake: Callable[[], None],
        stop_by: Callable[[BaseException], None],
    ) -> None:
        self.bytes_per_s = bytes_per_s
        self.interval_s = interval_s
        self.turn = asyncio.Lock()
        self.held_count = 0  # slots taken from the ledger to be wiped
        self._ssd = ssd
        self._ledger = ledger
        self._tally = tally
        self._clock = clock
        self._health = health
        self._recovering = recovering
        self._in_thread = in_thread
        self._wake = wake
        self._stop_by = stop_by
        self._task: asyncio.Task[None] | None = None
        self._notes = ScrubNotes()
        self._loaded = False
        self._scheduled = False
        self._rate = bytes_per_s
        self._detail = ""
        self._state = "idle"
        self._stopped = asyncio.Event()
        self._next_at_s = 0.0
        self._unreadable: list[SlotIO] = []
        self._buffer: native.AlignedBuffer | None = None

    # --- asked for

    async def start(self, bytes_per_s: int | None = None) -> None:
        """Begins with the first slot.

        Raises:
            InvalidRequest: there is no SSD tier, or the rate is below RATE_MIN.
            TierFailed: the tier does not serve now.
            LimitReached: a scrub is under way.
        """
        rate = self.bytes_per_s if bytes_per_s is None else bytes_per_s
        if self._ssd is None:
            raise InvalidRequest("there is no SSD tier to scrub: tiers.ssd.enabled")
        if rate < RATE_MIN:
            raise InvalidRequest(
                f"{rate} bytes a second: a scrub reads at least {format_bytes(RATE_MIN)} a second"
            )
        if not self._recovering.is_over:
            raise TierFailed(f"the SSD tier is {self._recovering.state}: scrub when it serves")
        if self._health.is_closed:
            raise TierFailed(f"the SSD tier is degraded ({self._health.error}): kvtier heal first")
        await self._load()
        if self._task is not None:
            raise LimitReached(
                f"a scrub is under way ({self.use().progress:.0%}): see kvtier scrub --status, or "
                "end it with --stop"
            )
        self._begin(rate, scheduled=False, resume=False)

    async def stop(self) -> bool:
        """Ends it where it is; the next one begins anew. False: there was none."""
        if self._task is None:
            return False
        self._detail = "stopped"
        self._stopped.set()
        await asyncio.wait([self._task])
        return True

    async def close(self) -> None:
        """Ends it, because the daemon does; the next start goes on from here. Idempotent."""
        if self._task is not None:
            self._stopped.set()
            await asyncio.wait([self._task])

    def use(self) -> ScrubUse:
        """What there is to say of it."""
        notes, running = self._notes, self._state != "idle"
        due = self.interval_s and self._loaded and not running
        now_s = self._clock.monotonic_s()
        return ScrubUse(
            state=self._state,
            detail=self._detail,
            scheduled=self._scheduled and running,
            progress=self._progress() if running else float(notes.ended_s > 0),
            bytes_per_s=self._rate if running else 0,
            elapsed_s=notes.elapsed_s,
            block_count=notes.block_count,
            read_bytes=notes.read_bytes,
            damaged_count=notes.damaged_count,
            stray_count=notes.stray_count,
            ended_s=notes.ended_s,
            next_in_s=max(self._next_at_s - now_s, 0.001) if due else 0.0,
        )

    def _progress(self) -> float:
        segments = self._ledger.slots[TierId.SSD].segments
        if self._notes.segment >= len(segments):
            return 1.0
        part = self._notes.slot / max(segments[self._notes.segment].slot_count, self._notes.slot, 1)
        return (self._notes.segment + part) / len(segments)

    # --- by itself

    def tick(self) -> None:
        """Four times a second: begins what is due, and goes on with what a restart cut short."""
        if self._ssd is None or self._task is not None or not self._recovering.is_over:
            return
        if not self._loaded:
            self._run(self._load())
        elif self.interval_s and not self._health.is_closed:
            under_way = self._notes.started_s > 0
            if under_way or self._clock.monotonic_s() >= self._next_at_s:
                self._begin(self.bytes_per_s, scheduled=True, resume=under_way)

    def reconfigure(self, *, bytes_per_s: int, interval_s: float) -> None:
        """A scheduled scrub takes the new rate at once, one that was asked for keeps its own."""
        if self._scheduled:
            self._rate = bytes_per_s
        self.bytes_per_s, self.interval_s = bytes_per_s, interval_s
        self._plan_next()

    def _plan_next(self) -> None:
        # Wall time only counts what passed while no daemon ran: a clock that jumps may make the
        # next scrub early, or late by one interval.
        passed_s = self._clock.wall_s() - self._notes.since_s
        left_s = min(max(self.interval_s - passed_s, 0.0), self.interval_s)
        self._next_at_s = self._clock.monotonic_s() + left_s

    async def _load(self) -> None:
        if self._loaded:
            return
        assert self._ssd is not None
        notes = await self._in_thread(functools.partial(read_notes, self._path))
        if self._loaded:
            return  # somebody else asked meanwhile
        self._loaded = True
        self._notes = notes or ScrubNotes()
        if notes is None:
            self._notes.since_s = self._clock.wall_s()
            await self._save()
        self._plan_next()

    @property
    def _path(self) -> Any:
        assert self._ssd is not None
        return self._ssd.directory / "scrub"

    async def _save(self) -> None:
        assert self._ssd is not None
        files = self._ssd.upkeep.files
        await self._in_thread(functools.partial(write_notes, files, self._path, self._notes))

    # --- one of them

    def _begin(self, rate: int, *, scheduled: bool, resume: bool) -> None:
        now_s = self._clock.wall_s()
        if not resume:
            ended_s = self._notes.ended_s
            self._notes = ScrubNotes(since_s=now_s, started_s=now_s, ended_s=ended_s)
        self._rate, self._scheduled = rate, scheduled
        self._state, self._detail = "running", ""
        self._stopped.clear()
        self._unreadable = []
        log.info("scrub.begun scheduled=%s rate=%s/s", scheduled, format_bytes(rate))
        self._run(self._scrub())

    def _run(self, work: Any) -> None:
        self._task = asyncio.get_running_loop().create_task(work)
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._stop_by(error)

    async def _scrub(self) -> None:
        begun_s, before_s = self._clock.monotonic_s(), self._notes.elapsed_s
        try:
            whole = await self._read_all(lambda: before_s + self._clock.monotonic_s() - begun_s)
            if whole:
                await self._drop_unreadable()
        except TierFailed as error:
            whole, self._detail = False, f"ended early: {error}"
            log.warning("scrub.failed %s", error)
        notes = self._notes
        notes.elapsed_s = before_s + self._clock.monotonic_s() - begun_s
        if whole or self._detail:  # else the daemon stops, and the next one goes on
            notes.started_s, notes.since_s = 0.0, self._clock.wall_s()
            notes.segment = notes.slot = 0
            if whole:
                notes.ended_s = notes.since_s
            self._plan_next()
        if self._buffer is not None:
            self._buffer.close()
            self._buffer = None
        log.info(
            "scrub.ended whole=%s blocks=%d bytes=%d damaged=%d strays=%d seconds=%.1f",
            whole, notes.block_count, notes.read_bytes, notes.damaged_count, notes.stray_count,
            notes.elapsed_s,
        )  # fmt: skip
        await self._save()
        self._state = "idle"

    async def _read_all(self, elapsed_s: Callable[[], float]) -> bool:
        """Whether it came to the end."""
        notes, clock = self._notes, self._clock
        due_s = clock.monotonic_s()
        save_at_s = due_s + _SAVED_S
        while notes.segment < len(self._ledger.slots[TierId.SSD].segments):
            while self._health.is_closed and not self._stopped.is_set():
                self._state, self._detail = "waiting", "the SSD tier is degraded"
                await self._pause(_LOOK_S)
                if not self._health.is_closed:
                    self._state, self._detail = "running", ""
            if self._stopped.is_set():
                return False
            async with self.turn:
                size_bytes = await self._window()
            notes.elapsed_s = elapsed_s()
            now_s = clock.monotonic_s()
            due_s = max(due_s, now_s - _AHEAD_S) + size_bytes / self._rate
            if now_s >= save_at_s:
                save_at_s = now_s + _SAVED_S
                await self._save()
            await self._pause(due_s - now_s)
        return True

    async def _pause(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopped.wait()

    async def _window(self) -> int:
        """The next slots: reads those that hold blocks, and the headers of the others. Returns how
        many bytes that were.
        """
        notes, slots = self._notes, self._ledger.slots[TierId.SSD]
        assert self._ssd is not None
        if notes.segment >= len(slots.segments):
            return 0  # the tier became smaller while others had their turn
        segment = slots.segments[notes.segment]
        cut = self._ssd.upkeep.slot_bytes(segment.index)
        slot_bytes = segment.slot_class[1] if segment.slot_class else cut
        count = slots.slots_per_segment(slot_bytes) if slot_bytes else 0
        if notes.slot >= count:
            notes.segment, notes.slot = notes.segment + 1, 0
            return 0
        found, end = claims(
            self._ledger, TierId.SSD, segment.index, notes.slot,
            end=min(count, notes.slot + HEADERS_MAX),
            count_max=max(1, min(_BATCH_BLOCKS, _BATCH_BYTES // slot_bytes)),
        )  # fmt: skip
        in_use, first = segment.in_use, segment.index << SLOT_BITS
        empty = [first | at for at in range(notes.slot, end) if not in_use or not in_use[at]]
        items = [
            SlotIO(claim.slot, slot_bytes, 0, self._ledger.label(claim.run, claim.place, claim.shard))
            for claim in found
        ]
        taken = [item.slot for item in items]
        holder = pin(self._ledger, TierId.SSD, taken)
        reach("scrub.pinned")
        try:
            strays = await self._in_thread(
                functools.partial(self._look, items, empty if cut == slot_bytes else [])
            )
        finally:
            unpin(self._ledger, TierId.SSD, taken, holder)
        notes.slot = end
        notes.block_count += sum(item.label.shard == 0 for item in items)
        size_bytes = sum(SLOT_HEADER_BYTES + item.label.size_bytes for item in items)
        notes.read_bytes += size_bytes
        await self._judge(items)
        if strays:
            await self._wipe(strays)
        self._wake()
        return size_bytes + SLOT_HEADER_BYTES * len(empty)

    def _look(self, items: list[SlotIO], empty: list[int]) -> list[SlotRecord]:
        """Worker thread. Each item gets its error; returns the headers that should not be there."""
        assert self._ssd is not None
        wanted = sum(align_up(item.label.size_bytes, PAGE_BYTES) for item in items)
        if wanted and (self._buffer is None or self._buffer.size_bytes < wanted):
            if self._buffer is not None:
                self._buffer.close()
            self._buffer = native.AlignedBuffer(wanted)
        at = 0
        for item in items:
            assert self._buffer is not None
            item.address = self._buffer.address + at
            at += align_up(item.label.size_bytes, PAGE_BYTES)
        self._read(items)
        # Once more: a device that was busy with something else gets a second chance.
        self._read([item for item in items if isinstance(item.error, TierFailed)])
        return self._ssd.upkeep.strays(empty)

    def _read(self, items: Sequence[SlotIO]) -> None:
        assert self._ssd is not None
        try:
            if items:
                self._ssd.read(items)
        except KvTierError as error:
            for item in items:
                item.error = error

    # --- what was found

    async def _judge(self, items: Sequence[SlotIO]) -> None:
        for item in items:
            if item.error is None or isinstance(item.error, BlockCorrupt):
                row, self._unreadable = self._unreadable, []
                for other in (*row, item):
                    self._drop(other)
                continue
            self._unreadable.append(item)
            if len(self._unreadable) >= _UNREADABLE_MAX:
                raise TierFailed(
                    f"{len(self._unreadable)} slots in a row cannot be read, and none of them was "
                    f"dropped: look at the device ({item.error})"
                )

    async def _drop_unreadable(self) -> None:
        """At the end. Raises TierFailed when it is the device, not these slots."""
        if self._unreadable:
            assert self._ssd is not None
            await self._in_thread(self._ssd.probe)
            for item in self._unreadable:
                self._drop(item)
            self._wake()

    def _drop(self, item: SlotIO) -> None:
        if item.error is None:
            return
        lost = lose(self._ledger, TierId.SSD, item.slot, item.label)
        if lost is None:
            return  # it went meanwhile
        damage = damage_of(item.error)
        self._tally.corrupt[damage] += 1
        self._notes.damaged_count += 1
        if self._notes.damaged_count <= _LOGGED_MAX:
            log.warning(
                "scrub.damaged namespace=%d key=%s slot=%#x damage=%s: dropped",
                lost[0].id, lost[1].hex(), item.slot, damage,
            )  # fmt: skip

    async def _wipe(self, strays: Sequence[SlotRecord]) -> None:
        """Headers where no block is: they would be believed if the catalogue were lost. The slots
        are held meanwhile, or the whole segment where nothing of it is in use.
        """
        assert self._ssd is not None
        slots, index = self._ledger.slots[TierId.SSD], strays[0].slot >> SLOT_BITS
        if slots.segments[index].slot_class is None:
            if not slots.withhold(index):
                return
            try:
                await self._in_thread(functools.partial(self._ssd.recycle, index))
            finally:
                slots.give_back(index)
            self._notes.stray_count += len(strays)
            return
        held = slots.hold(record.slot for record in strays)
        self.held_count = len(held)
        try:
            # Again, now that nobody can be writing there.
            again = await self._in_thread(functools.partial(self._ssd.upkeep.strays, held))
            wiped = [record.slot for record in again]
            await self._in_thread(
                functools.partial(self._ssd.upkeep.forget, wiped, wipe=True)
            )
        finally:
            slots.release(held)
            self.held_count = 0
        self._notes.stray_count += len(wiped)

    def __repr__(self) -> str:
        return f"<Scrubbing {self._state} {self._progress():.0%}, {self._notes}>"
