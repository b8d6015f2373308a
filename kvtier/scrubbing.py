r"""Scrubbing: reads all of the SSD tier, slowly, and drops what is damaged before it is asked for.

    idle --asked, or the interval is over--> running --all read--> idle
                          degraded: waiting --/ \--stopped, or the device cannot be read--> idle

Slot by slot as they lie on disk, at most `bytes_per_s`. The position is kept over restarts, about.

Does not: look at the catalogue (every start does), or at blocks written behind it meanwhile.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvtier.block import TierId
from kvtier.counts import ScrubUse
from kvtier.errors import InvalidRequest, LimitReached, TierFailed
from kvtier.health import Health
from kvtier.ledger.ledger import Ledger
from kvtier.recovering import Recovering
from kvtier.scrub_reading import InThread, Read, ScrubReading
from kvtier.tally import Tally
from kvtier.tiers.scrub_notes import ScrubNotes, begun_s, read_notes, write_notes
from kvtier.tiers.ssd import SsdTier
from kvtier.units import MIB, Clock, format_bytes

RATE_MIN = MIB  # bytes a second
_LOOK_S = 0.5  # how often a waiting scrub looks whether it may go on
_SAVED_S = 30.0
# Between two pieces: a call takes several turns of the loop, and must not find us in each.
_REST_S = 0.002
_AHEAD_S = 0.25  # of its rate, after it had to wait

log = logging.getLogger(__name__)


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
        self._ssd = ssd
        self._ledger = ledger
        self._clock = clock
        self._health = health
        self._recovering = recovering
        self._in_thread = in_thread
        self._wake = wake
        self._stop_by = stop_by
        self._new_reading = functools.partial(
            ScrubReading, ledger=ledger, tally=tally, in_thread=in_thread
        )
        self._reading: ScrubReading | None = None
        self._task: asyncio.Task[None] | None = None
        self._loading: asyncio.Task[None] | None = None
        self._notes = ScrubNotes()
        self._loaded = False
        self._scheduled = False
        self._rate = bytes_per_s
        self._detail = ""
        self._state = "idle"
        self._stopped = asyncio.Event()
        self._given_up = False
        self._next_at_s = 0.0

    @property
    def held_count(self) -> int:
        """Slots that it holds now, to wipe them."""
        return self._reading.held_count if self._reading else 0

    # --- asked for

    async def start(self, bytes_per_s: int = 0) -> None:
        """Begins with the first slot, at that rate (0: the configured one).

        Raises:
            InvalidRequest: there is no SSD tier, or the rate is below RATE_MIN.
            TierFailed: the tier does not serve now.
            LimitReached: a scrub is under way.
        """
        rate = bytes_per_s or self.bytes_per_s
        if self._ssd is None:
            raise InvalidRequest("there is no SSD tier to scrub (tiers.ssd.enabled)")
        if rate < RATE_MIN:
            raise InvalidRequest(
                f"{rate} bytes a second: a scrub reads at least {format_bytes(RATE_MIN)} a second"
            )
        if not self._recovering.is_over:
            raise TierFailed(f"the SSD tier is {self._recovering.state}: scrub when it serves")
        if self._health.is_closed:
            raise TierFailed(f"the SSD tier is degraded ({self._health.error}): kvtier heal first")
        await self._load(self._ssd)
        if self._task is not None:
            raise LimitReached(
                f"a scrub is under way ({self.use().progress:.0%}): see kvtier scrub --status, or "
                "end it with --stop"
            )
        self._begin(self._ssd, rate, scheduled=False, resume=False)

    async def stop(self) -> bool:
        """Ends it where it is; the next one begins anew. False: there was none."""
        if self._task is None:
            return False
        self._given_up = True
        self._stopped.set()
        await asyncio.wait([self._task])
        return True

    async def close(self) -> None:
        """Ends it, because the daemon does; the next start goes on from here. Idempotent."""
        self._stopped.set()
        tasks = [task for task in (self._task, self._loading) if task is not None]
        if tasks:
            await asyncio.wait(tasks)

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
            damaged=dict(notes.damaged),
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
        ssd = self._ssd
        if ssd is None or self._task is not None or not self._recovering.is_over:
            return
        if not self._loaded:
            if self._loading is None:
                self._loading = self._run(self._load(ssd))
        elif self.interval_s and not self._health.is_closed:
            under_way = self._notes.started_s > 0
            if under_way or self._clock.monotonic_s() >= self._next_at_s:
                self._begin(ssd, self.bytes_per_s, scheduled=True, resume=under_way)

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

    async def _load(self, ssd: SsdTier) -> None:
        if self._loaded:
            return
        notes = await self._in_thread(functools.partial(read_notes, _path(ssd)))
        since_s = await self._in_thread(functools.partial(begun_s, ssd.directory))
        self._take(notes or ScrubNotes(since_s=since_s or self._clock.wall_s()))

    def _take(self, notes: ScrubNotes) -> None:
        if not self._loaded:  # else somebody else asked meanwhile
            self._loaded = True
            self._notes = notes
            self._plan_next()

    # --- one of them

    def _begin(self, ssd: SsdTier, rate: int, *, scheduled: bool, resume: bool) -> None:
        now_s = self._clock.wall_s()
        if not resume:
            ended_s = self._notes.ended_s
            self._notes = ScrubNotes(since_s=now_s, started_s=now_s, ended_s=ended_s)
        self._rate, self._scheduled = rate, scheduled
        self._state, self._detail = "running", ""
        self._stopped.clear()
        self._given_up = False
        log.info("scrub.begun scheduled=%s rate=%s/s", scheduled, format_bytes(rate))
        self._task = self._run(self._scrub(ssd))

    def _run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._stop_by(error)

    async def _scrub(self, ssd: SsdTier) -> None:
        notes = self._notes
        begun_s, before_s = self._clock.monotonic_s(), notes.elapsed_s
        reading = self._reading = self._new_reading(ssd)
        await self._save(ssd)
        try:
            whole = await self._read_all(ssd, reading, before_s - begun_s)
            if whole:
                self._count(await reading.finish())
        except TierFailed as error:
            whole, self._given_up, self._detail = False, True, f"ended early: {error}"
            log.warning("scrub.failed %s", error)
        reading.close()
        notes.elapsed_s = before_s + self._clock.monotonic_s() - begun_s
        if whole or self._given_up:  # else the daemon stops, and the next one goes on
            self._detail = self._detail or ("" if whole else "stopped")
            notes.started_s, notes.since_s = 0.0, self._clock.wall_s()
            notes.segment = notes.slot = 0
            if whole:
                notes.ended_s = notes.since_s
            self._plan_next()
        log.info(
            "scrub.ended whole=%s blocks=%d bytes=%d damaged=%d strays=%d seconds=%.1f",
            whole, notes.block_count, notes.read_bytes, sum(notes.damaged.values()),
            notes.stray_count, notes.elapsed_s,
        )  # fmt: skip
        await self._save(ssd)
        self._state, self._task, self._reading = "idle", None, None

    async def _read_all(self, ssd: SsdTier, reading: ScrubReading, offset_s: float) -> bool:
        """Whether it came to the end. What it took is the clock's time and `offset_s`."""
        notes, clock = self._notes, self._clock
        due_s = clock.monotonic_s()
        save_at_s = due_s + _SAVED_S
        while notes.segment < len(self._ledger.slots[TierId.SSD].segments):
            if self._health.is_closed and not self._stopped.is_set():
                await self._wait()
            if self._stopped.is_set():
                return False
            async with self.turn:
                size_bytes = await self._next_piece(reading)
            now_s = clock.monotonic_s()
            notes.elapsed_s = offset_s + now_s
            due_s = max(due_s, now_s - _AHEAD_S) + size_bytes / self._rate
            if now_s >= save_at_s:
                save_at_s = now_s + _SAVED_S
                await self._save(ssd)
            await self._pause(max(due_s - now_s, _REST_S))
        return True

    async def _wait(self) -> None:
        self._state, self._detail = "waiting", "the SSD tier is degraded"
        while self._health.is_closed and not self._stopped.is_set():
            await self._pause(_LOOK_S)
        self._state, self._detail = "running", ""

    async def _next_piece(self, reading: ScrubReading) -> int:
        """Returns how many bytes were read of the disk."""
        notes = self._notes
        if notes.segment >= len(self._ledger.slots[TierId.SSD].segments):
            return 0  # the tier became smaller while others had their turn
        read = await reading.piece(notes.segment, notes.slot)
        if read.end is None:
            notes.segment, notes.slot = notes.segment + 1, 0
        else:
            notes.slot = read.end
        self._count(read)
        return read.disk_bytes

    def _count(self, read: Read) -> None:
        notes = self._notes
        notes.block_count += read.block_count
        notes.read_bytes += read.read_bytes
        notes.stray_count += read.stray_count
        for damage, count in read.damaged.items():
            notes.damaged[damage] = notes.damaged.get(damage, 0) + count
        if read.damaged or read.stray_count:
            self._wake()

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopped.wait()

    async def _save(self, ssd: SsdTier) -> None:
        await self._in_thread(
            functools.partial(write_notes, ssd.upkeep.files, _path(ssd), self._notes)
        )

    def __repr__(self) -> str:
        return f"<Scrubbing {self._state} {self._progress():.0%}, {self._notes}>"


def _path(ssd: SsdTier) -> Path:
    return ssd.directory / "scrub"
