"""Mover: runs moves. One queue a route, batches in worker threads, one report a batch.

A batch is one call of one tier (`write` below or `read` above), so that a worker thread runs no
Python per block while it holds the interpreter's lock. Which of the two depends on where memory
is: a memory tier has addresses, the other side is told to write from or read to them.

    submit(moves) -> queue of the route -> batch -> worker thread -> report(move, errors)

Every move submitted is reported exactly once, also when the mover closes.

Does not: decide (the ledger planned) or keep books (the store tells the ledger).
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol, cast

from kvtier.block import Move, Route, SlotIO, TierId
from kvtier.errors import BlocksGone, DaemonUnavailable, KvTierError, TierFailed
from kvtier.testing.failpoints import reach
from kvtier.tiers.base import Tier
from kvtier.units import MIB

Report = Callable[[Move, list[KvTierError]], None]


class MemoryTier(Tier, Protocol):
    """A tier whose slots have addresses in this process."""

    def address(self, slot: int, slot_bytes: int) -> int:
        """Where the slot's bytes start."""
        ...


@dataclass(slots=True)
class RouteCounts:
    """What one route did since the start. `busy_s` is time in which at least a batch ran."""

    move_count: int = 0
    size_bytes: int = 0
    failed_count: int = 0
    in_flight: int = 0
    queued: int = 0
    busy_s: float = 0.0

    @property
    def bytes_per_s(self) -> float:
        """Mean rate while busy; 0 when nothing has run."""
        return self.size_bytes / self.busy_s if self.busy_s > 0 else 0.0


class Mover:
    """Runs moves between the tiers given. Event loop only; `close` before the executor ends.

    `report(move, errors)` is called on the loop, once a move: no errors = the target holds the
    bytes. `after_batch()` follows the reports of a batch.
    `before_write(moves)` is called in the worker thread before bytes are written below. A move that
    is not `is_wanted` when its turn comes is reported with BlocksGone, and nothing is written.
    """

    def __init__(
        self,
        tiers: dict[TierId, Tier],
        executor: Executor,
        report: Report,
        *,
        after_batch: Callable[[], None],
        before_write: Callable[[Sequence[Move]], None],
        is_wanted: Callable[[Move], bool] = lambda _: True,
        batches_max: int = 2,
        batch_moves_max: int = 512,
        batch_bytes_max: int = 64 * MIB,
    ) -> None:
        self._tiers = tiers
        self._executor = executor
        self._report = report
        self._after_batch = after_batch
        self._before_write = before_write
        self._is_wanted = is_wanted
        self._batches_max = batches_max
        self._batch_moves_max = batch_moves_max
        self._batch_bytes_max = batch_bytes_max
        self._queues: dict[Route, deque[Move]] = {}
        self._batches: set[asyncio.Future[None]] = set()
        self._running: dict[Route, int] = {}
        self._busy_since: dict[Route, float] = {}
        self._closing = False
        #: What a worker thread raised that no tier may raise: the daemon must stop.
        self.broken: BaseException | None = None
        self.counts: dict[Route, RouteCounts] = {}

    def submit(self, moves: Sequence[Move]) -> None:
        """Queues moves (bounded by the ledger's `moves_in_flight_max`) and starts batches."""
        for move in moves:
            if self._closing:
                self._report(move, [DaemonUnavailable("the daemon is stopping")])
                continue
            queue = self._queues.setdefault(move.route, deque())
            queue.append(move)
            self.counts.setdefault(move.route, RouteCounts()).queued += 1
        for route in self._queues:
            self._start(route)

    def _start(self, route: Route) -> None:
        queue = self._queues[route]
        while queue and self._running.get(route, 0) < self._batches_max:
            batch = self._next_batch(queue)
            if not batch:
                break
            if not self._running.get(route):
                self._busy_since[route] = time.monotonic()
            self._running[route] = self._running.get(route, 0) + 1
            counts = self.counts[route]
            counts.queued -= len(batch)
            counts.in_flight += len(batch)
            items, owners = self._items(route, batch)
            job = asyncio.get_running_loop().run_in_executor(
                self._executor, self._work, route, batch, items
            )
            self._batches.add(job)
            # Not a task: nobody can cancel it, and its slots are not ours until the thread is done.
            job.add_done_callback(functools.partial(self._ended, route, batch, items, owners))

    def _next_batch(self, queue: deque[Move]) -> list[Move]:
        batch: list[Move] = []
        size_bytes = 0
        # Two batches side by side keep the device busy while the loop does the books: share out.
        share = max(1, min(self._batch_moves_max, -(-len(queue) // self._batches_max)))
        while queue and len(batch) < share and size_bytes < self._batch_bytes_max:
            move = queue.popleft()
            if not self._is_wanted(move):
                self._pass_over(move)
                continue
            size_bytes += len(move.labels) * move.source_slot_bytes
            batch.append(move)
        return batch

    def _pass_over(self, move: Move) -> None:
        self.counts[move.route].queued -= 1
        self._report(move, [BlocksGone("the block went away before it was moved")])
        # Whoever waits for its end must hear of it, though no batch ends.
        asyncio.get_running_loop().call_soon(self._after_batch)

    def _ended(
        self,
        route: Route,
        batch: list[Move],
        items: list[SlotIO],
        owners: list[int],
        job: asyncio.Future[None],
    ) -> None:
        self._batches.discard(job)
        self._look_for_damage(job, items)
        try:
            self._finish(route, batch, items, owners)
        except AssertionError as bug:  # InvariantViolated is one
            # Nobody awaits a callback: the one who watches `broken` must hear of it.
            self.broken = self.broken or bug
        self._after_batch()
        self._start(route)

    def _look_for_damage(self, job: asyncio.Future[None], items: list[SlotIO]) -> None:
        """Of a job that ended by a bug nothing is known: none of its moves may count as done."""
        error = job.exception()
        if error is None:
            return
        self.broken = self.broken or error
        for item in items:
            item.error = item.error or TierFailed(f"the batch broke: {error!r}")

    def _items(self, route: Route, batch: list[Move]) -> tuple[list[SlotIO], list[int]]:
        items: list[SlotIO] = []
        owners: list[int] = []
        writing = self._is_memory(route.source)
        memory = cast("MemoryTier", self._tiers[route.source if writing else route.target])
        for index, move in enumerate(batch):
            places = zip(move.source_slots, move.target_slots, move.labels, strict=True)
            for source, target, label in places:
                if writing:
                    address = memory.address(source, move.source_slot_bytes)
                    items.append(SlotIO(target, move.target_slot_bytes, address, label))
                else:
                    address = memory.address(target, move.target_slot_bytes)
                    items.append(SlotIO(source, move.source_slot_bytes, address, label))
                owners.append(index)
        return items, owners

    def _is_memory(self, tier: TierId) -> bool:
        return tier is not TierId.SSD

    def _work(self, route: Route, batch: list[Move], items: list[SlotIO]) -> None:
        """Worker thread."""
        try:
            reach("move.begin")
            if self._is_memory(route.source):
                self._before_write(batch)
                self._tiers[route.target].write(items)
            else:
                self._tiers[route.source].read(items)
            reach("move.written")
        except KvTierError as error:
            for item in items:
                item.error = error

    def _finish(
        self, route: Route, batch: list[Move], items: list[SlotIO], owners: list[int]
    ) -> None:
        errors: list[list[KvTierError]] = [[] for _ in batch]
        counts = self.counts[route]
        for item, owner in zip(items, owners, strict=True):
            if item.error is not None:
                errors[owner].append(item.error)
            else:
                counts.size_bytes += item.label.size_bytes
        self._running[route] -= 1
        if not self._running[route]:
            counts.busy_s += time.monotonic() - self._busy_since.pop(route)
        counts.in_flight -= len(batch)
        for move, failures in zip(batch, errors, strict=True):
            counts.move_count += 1
            counts.failed_count += bool(failures)
            self._report(move, failures)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is queued or running."""
        return not self._batches and not any(self._queues.values())

    async def close(self) -> None:
        """Waits for running batches; reports queued moves as not done."""
        self._closing = True
        for queue in self._queues.values():
            while queue:
                move = queue.popleft()
                self.counts[move.route].queued -= 1
                self._report(move, [DaemonUnavailable("the daemon is stopping")])
        if self._batches:
            await asyncio.wait(list(self._batches))

    def __repr__(self) -> str:
        routes = ", ".join(
            f"{route}: {c.in_flight} running, {c.queued} queued" for route, c in self.counts.items()
        )
        return f"<Mover {routes or 'idle'}>"
