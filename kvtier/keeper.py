"""Keeper: what the store does behind the verbs: room, moves, erasures, flush, expiry.

One background task tends the books: woken by every commit, finished move and release, and four
times a second by the clock. Everything it does in one turn is bounded, so that a lookup waits for
a millisecond at most.

Does not: answer clients (store.py) or run moves itself (transfer/mover.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any, TypeVar

from kvtier.ageing import Ageing
from kvtier.block import (
    SLOT_BITS,
    EventKind,
    Found,
    Keys,
    Move,
    Reason,
    SlotIO,
    SlotLabel,
    TierId,
)
from kvtier.config import Config
from kvtier.durability import Durability
from kvtier.erasing import Erasing
from kvtier.errors import (
    BlocksGone,
    DaemonUnavailable,
    InvariantViolated,
    KvTierError,
    TierFailed,
)  # fmt: skip
from kvtier.health import Health
from kvtier.housekeeping import Housekeeping
from kvtier.ledger.chain import Namespace
from kvtier.ledger.claims import is_there
from kvtier.ledger.filling import Filling
from kvtier.ledger.holdings import Entry, Reservation
from kvtier.ledger.ledger import Ledger
from kvtier.ledger.moves import Moves
from kvtier.ledger.search import Span, all_in
from kvtier.progress import EventRing, Progress
from kvtier.purging import Purging
from kvtier.recovering import Recovering
from kvtier.recycling import Recycling
from kvtier.resizing import Resizing
from kvtier.rules import encrypted_by
from kvtier.scrubbing import Scrubbing
from kvtier.sections import SsdConfig
from kvtier.session import Session
from kvtier.tally import (
    Rates,
    Tally,
    bytes_in_and_out,
    damage_of,
)
from kvtier.testing.failpoints import reach
from kvtier.tiers.base import Tier
from kvtier.tiers.dram import DramTier
from kvtier.tiers.ssd import SsdTier
from kvtier.transfer.mover import Mover
from kvtier.units import Clock

T = TypeVar("T")
log = logging.getLogger(__name__)
_TICK_S = 0.25
# Before anything was measured: what a PCIe 4 drive and two memory channels do. A guess, replaced
# by the first moves.
_BYTES_PER_S = {TierId.DRAM: 10e9, TierId.SSD: 2e9}
_PROMOTE_MOVES_MAX = 512


class Keeper:
    """The ledger, the tiers and the mover of one daemon, kept in step. Event loop only."""

    def __init__(self, config: Config, dram: DramTier, ssd: SsdTier | None, clock: Clock) -> None:
        self.config = config
        self.dram = dram
        self.ssd = ssd
        self.single_tenant = config.server.trust == "single-tenant"
        self.sessions: dict[int, Session] = {}
        self.draining, self.bypassed = False, config.server.bypass
        self.tally, self.progress = Tally(), Progress()
        self.events = EventRing(
            config.server.watch_events_max,
            # Microseconds of wall time: no daemon stores a million times a second for its life.
            first_revision=int(clock.wall_s() * 1e6),
        )
        self.revoked: dict[int, int] = {}  # slot -> generation, where it is not 0
        self.on_reservation_over: Callable[[Reservation], None] = lambda _: None
        lower: dict[TierId, Tier] = {} if ssd is None else {TierId.SSD: ssd}
        tiers: dict[TierId, Tier] = {dram.plan.tier: dram, **lower}
        limits = config.limits
        self.ledger = Ledger(
            [tier.plan for tier in tiers.values()],
            policy=config.policy.name,
            namespaces_max=limits.namespaces_max,
            placeholders_max=limits.placeholders_max,
        )
        self._guarantee()
        self.filling = Filling(self.ledger)
        self.moves = Moves(self.ledger, in_flight_max=limits.moves_in_flight_max)
        # Copies of clients' stores must not wait behind a slow disk: pools of their own.
        self._copy_pool = ThreadPoolExecutor(config.server.copy_threads, "kvtier-copy")
        self._io_pool = ThreadPoolExecutor(config.server.io_threads, "kvtier-io")
        self.mover = Mover(
            tiers,
            self._io_pool,
            self._moved,
            after_batch=self.wake,
            before_write=self._register,
            is_wanted=functools.partial(is_there, self.ledger),
            batches_max=config.batches_max,
        )
        self.recycling = Recycling(
            dram, self.ledger.slots[self.ledger.top], self.in_thread, self.wake, self._recycled
        )
        self.recovering = Recovering(
            ssd, self.ledger, self.tally, clock, in_thread=self.in_thread,
            set_epoch=self._set_epoch, wake=self.wake, stop_by=self.stop_by,
        )  # fmt: skip
        self.durability = Durability(
            ssd, self.ledger, self.moves, self.mover, self.progress, clock, self.in_thread,
            self.recovering,
        )  # fmt: skip
        self.erasing = Erasing(
            ssd, self.ledger, self.moves, self.progress, self.in_thread, self.recovering
        )
        self.ageing = Ageing(self.ledger, clock, config.rule)
        self._clock, self.started_s = clock, clock.monotonic_s()
        self.rates, self._woken = Rates(), asyncio.Event()
        self._tending: asyncio.Task[None] | None = None
        self._sweeping: asyncio.Task[None] | None = None
        self._broken: BaseException | None = None
        self._epochs = threading.Lock()
        self._begin_upkeep(config.tiers.ssd)
        self._starving = False
        self._shrinking: set[TierId] = set()  # above the high-water mark, not yet at the low one

    def _begin_upkeep(self, section: SsdConfig) -> None:
        self.housekeeping = Housekeeping(
            self.ssd, self.ledger, self._clock, self.in_thread, section
        )
        turn = asyncio.Lock()  # a resize and a purge both take segments out of use
        self.health = Health(
            self.ssd, self.ledger, self._clock, self.in_thread, errors_max=section.errors_max
        )
        self.scrubbing = Scrubbing(
            self.ssd, self.ledger, self.tally, self._clock,
            bytes_per_s=section.scrub_bytes_per_s, interval_s=section.scrub_every_s,
            health=self.health, recovering=self.recovering, in_thread=self.in_thread,
            wake=self.wake, stop_by=self.stop_by,
        )  # fmt: skip
        self.resizing = Resizing(
            self.ssd, self.ledger, self.moves, self.scrubbing, self.health, self.recovering,
            self.progress, self._clock, config=section, turn=turn, in_thread=self.in_thread,
            wake=self.wake, stop_by=self.stop_by,
        )  # fmt: skip
        self.purging = Purging(
            self.ssd, self.ledger, self.filling, self.moves, self.progress, self._clock,
            in_thread=self.in_thread, erasing=self.erasing, recovering=self.recovering,
            scrubbing=self.scrubbing, turn=turn,
            cleared=functools.partial(self.tell, EventKind.CLEARED),
        )  # fmt: skip

    def _guarantee(self) -> None:
        guaranteed = self.ledger.guaranteed_bytes
        for tenant in self.config.tenants:
            guaranteed[tenant.name, TierId.DRAM] = tenant.dram_guaranteed_bytes
            guaranteed[tenant.name, TierId.SSD] = tenant.ssd_guaranteed_bytes

    def reconfigure(self, config: Config) -> None:
        """Takes over what may change live; the rest of `config` must be as it was."""
        if config.server.bypass != self.config.server.bypass:
            self.bypassed = config.server.bypass
        self.config = config
        self.moves.in_flight_max = config.limits.moves_in_flight_max
        ssd = config.tiers.ssd
        self.health.errors_max = ssd.errors_max
        self.scrubbing.reconfigure(bytes_per_s=ssd.scrub_bytes_per_s, interval_s=ssd.scrub_every_s)
        self.resizing.config = ssd
        self.housekeeping.reconfigure(ssd)
        self.ageing.rule = config.rule
        self.ageing.renew()
        if self.ssd is not None:
            self.ssd.keyring.wanted = encrypted_by(config)
        self.wake()

    def now_s(self) -> float:
        """Monotonic seconds."""
        return self._clock.monotonic_s()

    def in_thread(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Runs blocking work of a tier in a worker thread."""
        return asyncio.get_running_loop().run_in_executor(self._io_pool, work)

    def copy_in(self, items: Sequence[SlotIO]) -> asyncio.Future[None]:
        """Copies and checksums a client's blocks into DRAM slots in a worker thread."""
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._copy_pool, self.dram.write, items)

    # --- starting

    @classmethod
    async def open(
        cls, config: Config, *, dram: DramTier, ssd: SsdTier | None, clock: Clock
    ) -> Keeper:
        """Starts tending, and bringing back what the SSD tier has (`recovering`)."""
        keeper = cls(config, dram, ssd, clock)
        await keeper.recovering.begin()
        keeper.ageing.learn_spaces()
        keeper._tending = asyncio.get_running_loop().create_task(keeper._tend())
        return keeper

    # --- tending

    def tell(
        self, kind: EventKind, space: Namespace, *, keys: Sequence[bytes] = (), parent: bytes = b""
    ) -> None:
        """Tells watchers, of what went away before first."""
        self.tell_gone()
        tier = self.ledger.top if kind is EventKind.STORED else None
        self.events.add(kind, space, keys=keys, tier=tier, parent=parent)

    def tell_gone(self) -> None:
        """Tells watchers of blocks that are in no tier any longer, whatever the reason."""
        for space, gone in groupby(self.ledger.take_gone(), key=lambda item: item[0]):
            self.events.add(EventKind.REMOVED, space, keys=[key for _, key in gone])

    def wake(self) -> None:
        """There may be something to do, and something to be had."""
        self.tell_gone()
        self._woken.set()
        self.progress.notify()

    def stop_by(self, bug: BaseException) -> None:
        """Ends the tending task, and so the daemon: the books cannot be believed any longer."""
        self._broken = self._broken or bug
        self.wake()

    async def _tend(self) -> None:
        tick_at_s = self.now_s() + _TICK_S
        while True:
            # Not wait_for: before Python 3.12 it swallows a cancellation that meets a wake-up.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, tick_at_s - self.now_s())):
                    await self._woken.wait()
            self._woken.clear()
            broken = self._broken or self.mover.broken
            if broken is not None:
                raise broken
            if self.now_s() >= tick_at_s:
                tick_at_s = self.now_s() + _TICK_S
                self._tick()
            used_bytes = self.ledger.slots[self.ledger.top].used_bytes
            self._hold_water_marks()
            if self.ledger.reap():
                self._woken.set()
            if self.ledger.slots[self.ledger.top].used_bytes < used_bytes:
                self.progress.notify()
            # Beside this task: a slow disk must not keep the clock from ending what is over.
            if self._sweeping is None or self._sweeping.done():
                if self._sweeping is not None:
                    self._sweeping.result()
                self._sweeping = asyncio.get_running_loop().create_task(self._sweep())
            # Waiting for what is set already lets nobody else run.
            await asyncio.sleep(0)

    async def _sweep(self) -> None:
        """Erases and recycles what is to be; has the tending task look again if more came."""
        try:
            if self.health.is_due and self.recovering.is_over:
                await self.health.reopen()
            if not self.health.is_closed:
                await self.erasing.run()
                if self.recovering.is_over:
                    await self.housekeeping.run()
        except TierFailed as error:
            self.health.failed(error)
        try:
            await self.recycling.run()
        except TierFailed as error:
            log.warning("tier.failed %s", error)
        if self.ledger.is_erasing and not self.health.is_closed:
            self._woken.set()  # more came meanwhile

    @property
    def tending(self) -> asyncio.Task[None] | None:
        """The background task; its end by an exception must stop the daemon."""
        return self._tending

    def _tick(self) -> None:
        now_s = self.now_s()
        # Under single-tenant trust a client may still write where it reserved: only its end
        # (session) gives such slots back.
        for reservation in () if self.single_tenant else self.filling.expire(now_s):
            self.on_reservation_over(reservation)
        self.filling.expire_partials(now_s)
        self.scrubbing.tick()
        self.housekeeping.watch()
        if self.ageing.tick(is_recovered=self.recovering.is_over):
            self.wake()
        self.rates.update(now_s, bytes_in_and_out(self.tally, self.mover, self.ledger))
        if self._starving:
            self._starving = False
            self._revoke_overdue(now_s)
            self.progress.notify()

    def _hold_water_marks(self) -> None:
        if not self.recovering.is_over:
            return  # what is above them waits for the tier below
        for tier in self.ledger.tiers:
            section = self.config.tiers.dram if tier is not TierId.SSD else self.config.tiers.ssd
            low_bytes = int(section.low_water * self.ledger.slots[tier].capacity_bytes)
            if self.ledger.used_share(tier) > section.high_water:
                self._shrinking.add(tier)
            if tier in self._shrinking:
                self._shrink(tier, low_bytes)

    def _shrink(self, tier: TierId, used_bytes: int) -> None:
        """A turn's part of it. Over when the low-water mark is reached, or nothing more gives."""
        before = self.moves.excess_bytes(tier, used_bytes)
        self.mover.submit(self.moves.shrink_to(tier, used_bytes))
        excess = self.moves.excess_bytes(tier, used_bytes)
        if excess <= 0 or (excess == before and not self.moves.is_full):
            self._shrinking.discard(tier)
        elif excess < before:
            self._woken.set()

    def make_room(self, space: Namespace, block_count: int) -> bool:
        """Starts making room for that many blocks in DRAM; wakes waiters when there is some.
        Returns whether there is room for one now.
        """
        top, tenant = self.ledger.top, space.tenant
        slots, slot_bytes = self.ledger.slots[top], space.slot_bytes[top]
        before = slots.available(tenant, slot_bytes)
        moves = self.moves.make_room(top, space, block_count * space.shards)
        self.mover.submit(moves)
        after = slots.available(tenant, slot_bytes)
        if after > before:
            # Only then: two who wait for something else must not keep each other awake.
            self.progress.notify()
        self._woken.set()
        return self._seek_room(space)

    def _recycled(self, segment: int) -> None:
        """The segment's arena is new: its generation words are 0 again."""
        self.revoked = {s: g for s, g in self.revoked.items() if s >> SLOT_BITS != segment}

    def _revoke_overdue(self, now_s: float) -> None:
        """Room is wanted and leases stand longer than `limits.lease_ttl_s`: takes them back. The
        slots' generation words change before anything else may be written there.
        """
        ttl_s = self.config.limits.lease_ttl_s
        for lease in list(self.ledger.leases.values()):
            if now_s - lease.started_s < ttl_s:
                continue
            slot_bytes = lease.space.slot_bytes[self.ledger.top]
            for slot in lease.slots or ():
                self.revoked[slot] = self.dram.revoke(slot, slot_bytes)
            for session_id in lease.holders:
                self.sessions[session_id].leases.discard(lease.id)
            self.ledger.release(lease.id)
            self.tally.leases_revoked += 1

    # --- moves

    def promote(self, space: Namespace, spans: list[Span]) -> None:
        """Starts bringing these blocks to DRAM, as far as there is room now."""
        moves = self.moves.promote(space, spans, _PROMOTE_MOVES_MAX)
        self.mover.submit(moves)
        if not moves and not all(all_in(*span, self.ledger.top) for span in spans):
            self._seek_room(space)
        self._woken.set()

    def _seek_room(self, space: Namespace) -> bool:
        """Whether there is room for a block; if not, overdue leases and other tenants' idle
        arenas are asked for.
        """
        slots = self.ledger.slots[self.ledger.top]
        if slots.available(space.tenant, space.slot_bytes[self.ledger.top]) >= space.shards:
            return True
        self._starving = True
        self.recycling.start(space.tenant, self.sessions)
        return False

    def _register(self, moves: Sequence[Move]) -> None:
        """Worker thread: descriptors are on disk before the first block that needs them."""
        assert self.ssd is not None
        for namespace_id in {move.namespace_id for move in moves}:
            space = self.ledger.spaces[namespace_id]
            if space.digest not in self.recovering.registered:
                self.ssd.register_namespace(space.digest, space.spec.to_json(), space.epoch)
                self.recovering.registered.add(space.digest)

    def _moved(self, move: Move, errors: list[KvTierError]) -> None:
        if not errors:
            if self.moves.finish_move(move) and move.route.target is not self.ledger.top:
                self.durability.copied_down += 1
                self.health.succeeded()
        elif move.route.target is self.ledger.top:
            # A copy that cannot be read is a miss from now on, whatever the reason; but a daemon
            # that is stopping reads nothing and loses nothing.
            lost = any(not _was_not_tried(error) for error in errors)
            if lost:
                self.tally.corrupt[damage_of(errors[0])] += 1
            self.moves.abort_move(move, source_corrupt=lost)
        else:
            tried = not _was_not_tried(errors[0])
            self.moves.abort_move(move, source_corrupt=False, written=tried)
            if tried:
                self.health.failed(errors[0])

    async def heal(self) -> str:
        """Probes the SSD tier at once, or reads it again where that failed at start; its state
        before. Raises TierFailed: it stays as it was.
        """
        if not self.recovering.is_over:
            before = self.recovering.state
            self.recovering.retry()
            await self.recovering.wait()
            return before
        before = "degraded" if self.health.is_closed else "serving"
        await self.health.reopen(probe=True)
        self.wake()
        return before

    # --- epochs

    async def begin_epoch(self, space: Namespace) -> None:
        """The namespace's new epoch is on stable storage when this returns. Raises TierFailed."""
        self.wake()
        if self.ssd is not None:
            self.recovering.cleared(space)
            await self.in_thread(functools.partial(self._set_epoch, self.ssd, space))
            self.wake()

    def _set_epoch(self, ssd: SsdTier, space: Namespace) -> None:
        """Worker thread. Registered or not: a first batch may be registering the old epoch now."""
        with self._epochs:  # of two clears at once the later epoch is written last
            epoch = space.epoch
            reach("epoch.begin")
            ssd.register_namespace(space.digest, space.spec.to_json(), epoch)
            ssd.set_epoch(space.digest, epoch)
            reach("epoch.done")
            self.recovering.registered.add(space.digest)

    # --- stopping

    async def close(self, *, grace_s: float) -> None:
        """Flushes within the grace, waits for bytes in flight, closes the tiers in order."""
        self.draining = True
        self.progress.notify()
        await self.resizing.close()
        await self.scrubbing.close()
        if self._tending is not None and not self._tending.done():
            try:
                await self.durability.flush(grace_s)
            except TierFailed as error:
                log.warning("flush.failed %s", error)
            await self.recovering.stop()
            self._tending.cancel()
            await asyncio.wait([self._tending])
        self.durability.stopping = True
        self.progress.notify()
        reach("close.begin")
        await self.mover.close()
        if self._sweeping is not None:
            await asyncio.wait([self._sweeping])
        if self.ssd is not None and self.recovering.is_over:
            try:
                await self.erasing.run()
            except TierFailed as error:
                log.warning("erase.failed %s", error)
        reach("close.erased")
        await asyncio.get_running_loop().run_in_executor(None, self._close_tiers)
        reach("close.done")

    def _close_tiers(self) -> None:
        self._copy_pool.shutdown()
        self._io_pool.shutdown()
        if self.ssd is not None:
            self.ssd.close()
        self.dram.close()

    # --- answers

    def is_bypassed(self, asked: Sequence[tuple[Namespace, Keys]]) -> bool:
        """Whether lookups and stores of these namespaces are switched off."""
        return self.bypassed or any(
            space.bypassed or space.locked or space.purging for space, _ in asked
        )

    def predicted(self, space: Namespace, found: Found) -> Found:
        """The answer with its predicted load time; cut where loading costs more than prefill."""
        size_bytes, prefill = space.size_bytes, space.prefill_tokens_per_s
        load_ms, count = 0.0, 0
        for index, run in enumerate(found.runs):
            run_ms = run.block_count * size_bytes / self._rate(run.tier) * 1000
            if prefill and space.needed_blocks is None:
                prefill_ms = run.block_count * space.block_tokens / prefill * 1000
                if run_ms > prefill_ms:
                    reason = Reason.SLOWER_THAN_PREFILL
                    return Found(count, found.runs[:index], load_ms, reason)
            load_ms += run_ms
            count += run.block_count
        return Found(found.block_count, found.runs, load_ms, found.reason, found.first_needed)

    def load_ms(self, space: Namespace, found: Found) -> float:
        """Predicted time to have all of the answer in DRAM and copied out."""
        size_bytes = space.size_bytes
        return sum(r.block_count * size_bytes / self._rate(r.tier) * 1000 for r in found.runs)

    def _rate(self, tier: TierId) -> float:
        for route, counts in self.mover.counts.items():
            if route.source is tier and route.target is self.ledger.top and counts.bytes_per_s:
                return counts.bytes_per_s
        return _BYTES_PER_S.get(tier, 10e9)

    def label(self, space: Namespace, entry: Entry, shard: int) -> SlotLabel:
        """What a block being committed is said to be."""
        return SlotLabel(
            space.digest, space.epoch, entry.key, entry.parent, entry.position, shard,
            space.shard_bytes,
        )  # fmt: skip

    def check(self, sessions: Iterable[Session]) -> list[str]:
        """Runs every invariant check; the problems found, as sentences."""
        problems: list[str] = []
        held = self.filling.held_slots()
        held[TierId.SSD] = held.get(TierId.SSD, 0) + self.scrubbing.held_count
        for tier, count in self.moves.held_slots().items():
            held[tier] = held.get(tier, 0) + count
        held[TierId.SSD] = held.get(TierId.SSD, 0) + self.purging.held_slots
        checks: list[Callable[[], Any]] = [lambda: self.ledger.check(held=held), self.dram.check]
        if self.ssd is not None:
            checks.append(self.ssd.check)
        checks.extend(session.room.check for session in sessions if session.room is not None)
        for check in checks:
            try:
                check()
            except InvariantViolated as error:
                problems.append(str(error))
        return problems


def _was_not_tried(error: KvTierError) -> bool:
    return isinstance(error, DaemonUnavailable | BlocksGone)
