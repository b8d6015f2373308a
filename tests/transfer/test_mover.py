"""Mover: bounded batches, every move reported exactly once, routes apart from each other."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest_asyncio

from kvtier.block import Move, Route, SlotIO, SlotLabel, TierId
from kvtier.errors import InvariantViolated, KvTierError, TierFailed
from kvtier.transfer.mover import Mover

DOWN = Route(TierId.DRAM, TierId.SSD)
UP = Route(TierId.SSD, TierId.DRAM)


class FakeTier:
    """Notes batches; holds them while `open` is not set; fails slots in `bad`."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.open = threading.Event()
        self.open.set()
        self.reached = threading.Event()
        self.running = self.running_max = 0
        self.bad: set[int] = set()
        self.bug: BaseException | None = None
        self._lock = threading.Lock()

    def write(self, batch: Sequence[SlotIO]) -> None:
        with self._lock:
            self.batches.append(len(batch))
            self.running += 1
            self.running_max = max(self.running_max, self.running)
        self.reached.set()
        assert self.open.wait(20)
        with self._lock:
            self.running -= 1
        if self.bug is not None:
            raise self.bug
        for item in batch:
            if item.slot in self.bad:
                item.error = TierFailed("planned")

    read = write

    def address(self, slot: int, slot_bytes: int) -> int:
        return slot * slot_bytes


class Bench:
    """A mover between two fakes and what it reported."""

    def __init__(self, **options: Any) -> None:
        self.dram, self.ssd = FakeTier(), FakeTier()
        self.reports: list[tuple[int, list[KvTierError]]] = []
        self.batch_ends = 0
        self.registered: list[int] = []
        self.pool = ThreadPoolExecutor(8)
        self.mover = Mover(
            {TierId.DRAM: self.dram, TierId.SSD: self.ssd},  # type: ignore[dict-item]
            self.pool,
            lambda move, errors: self.reports.append((move.id, errors)),
            after_batch=self._after,
            before_write=lambda moves: self.registered.extend(move.id for move in moves),
            **options,
        )

    def _after(self) -> None:
        self.batch_ends += 1

    async def until_idle(self) -> None:
        async with asyncio.timeout(20):
            while not self.mover.is_idle:  # noqa: ASYNC110 - it has no event for that
                await asyncio.sleep(0.001)

    def assert_once(self, ids: Sequence[int]) -> None:
        assert Counter(number for number, _ in self.reports) == Counter(ids)
        for counts in self.mover.counts.values():
            assert counts.queued == counts.in_flight == 0


def moves(route: Route, start: int, count: int, *, shards: int = 1, size: int = 4096) -> list[Move]:
    return [
        Move(
            id=n, namespace_id=1, route=route,
            source_slots=tuple(n * shards + s for s in range(shards)),
            target_slots=tuple(n * shards + s for s in range(shards)),
            source_slot_bytes=size, target_slot_bytes=size,
            labels=tuple(SlotLabel(b"n" * 16, 1, b"k", b"", 0, s, size) for s in range(shards)),
        )
        for n in range(start, start + count)
    ]  # fmt: skip


@pytest_asyncio.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench(batches_max=2, batch_moves_max=8)
    yield bench
    bench.ssd.open.set()
    await bench.mover.close()
    bench.pool.shutdown()


async def test_what_is_not_wanted_when_its_turn_comes_is_not_written(bench: Bench) -> None:
    gone: set[int] = set()
    bench.mover._is_wanted = lambda move: move.id not in gone
    bench.ssd.open.clear()
    bench.mover.submit(moves(DOWN, 0, 1))
    bench.mover.submit(moves(DOWN, 1, 1))  # two batches run: the rest waits
    bench.mover.submit(moves(DOWN, 2, 8))
    gone.update(range(2, 6))
    bench.ssd.open.set()
    await bench.until_idle()
    bench.assert_once(range(10))
    assert {n for n, errors in bench.reports if errors} == gone
    assert all(errors[0].reason == "BLOCKS_GONE" for n, errors in bench.reports if n in gone)
    assert sorted(bench.registered) == [0, 1, 6, 7, 8, 9]
    gone.update(range(10, 14))
    bench.mover.submit(moves(DOWN, 10, 4))  # nothing else runs: they end all the same
    assert bench.mover.is_idle
    before = bench.batch_ends
    await asyncio.sleep(0)
    assert bench.batch_ends > before, "nobody was told"


async def test_batches_are_bounded(bench: Bench) -> None:
    bench.mover.submit(moves(DOWN, 0, 100))
    await bench.until_idle()
    bench.assert_once(range(100))
    assert sum(bench.ssd.batches) == 100
    assert max(bench.ssd.batches) <= 8
    assert bench.ssd.running_max <= 2
    assert bench.batch_ends == len(bench.ssd.batches)
    assert sorted(bench.registered) == list(range(100))


async def test_batches_are_bounded_in_bytes() -> None:
    bench = Bench(batches_max=1, batch_moves_max=64, batch_bytes_max=4 * 4096)
    bench.mover.submit(moves(DOWN, 0, 10, shards=2))
    await bench.until_idle()
    assert max(bench.ssd.batches) == 4  # slots: two moves of two shards
    bench.assert_once(range(10))
    bench.pool.shutdown()


async def test_one_bad_item_fails_its_move_only(bench: Bench) -> None:
    bench.ssd.bad = {5}  # the second shard of move 2
    bench.mover.submit(moves(DOWN, 0, 4, shards=2))
    await bench.until_idle()
    bench.assert_once(range(4))
    assert [n for n, errors in bench.reports if errors] == [2]
    assert bench.mover.counts[DOWN].failed_count == 1


async def test_a_tier_error_fails_the_batch(bench: Bench) -> None:
    bench.ssd.bug = TierFailed("all of it")
    bench.mover.submit(moves(DOWN, 0, 4))
    await bench.until_idle()
    bench.assert_once(range(4))
    assert all(errors for _, errors in bench.reports)
    assert bench.mover.broken is None


async def test_a_bug_is_never_a_success(bench: Bench) -> None:
    bench.ssd.bug = AssertionError("a bug")
    bench.mover.submit(moves(DOWN, 0, 4))
    await bench.until_idle()
    bench.assert_once(range(4))
    assert all(errors for _, errors in bench.reports)
    assert isinstance(bench.mover.broken, AssertionError)


async def test_routes_do_not_wait_for_each_other(bench: Bench) -> None:
    bench.ssd.open.clear()
    bench.mover.submit(moves(DOWN, 0, 20))
    bench.ssd.read = lambda batch: None  # type: ignore[method-assign, assignment]
    bench.mover.submit(moves(UP, 100, 5))
    async with asyncio.timeout(10):
        while len(bench.reports) < 5:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert {n for n, _ in bench.reports} == set(range(100, 105))
    bench.ssd.open.set()
    await bench.until_idle()
    bench.assert_once([*range(20), *range(100, 105)])


async def test_close_reports_queued_and_running_once(bench: Bench) -> None:
    bench.ssd.open.clear()
    bench.mover.submit(moves(DOWN, 0, 50))
    await asyncio.to_thread(bench.ssd.reached.wait, 10)
    closing = asyncio.create_task(bench.mover.close())
    await asyncio.sleep(0)
    queued = [n for n, errors in bench.reports if errors]
    assert queued
    bench.mover.submit(moves(DOWN, 50, 1))  # too late: told at once
    bench.ssd.open.set()
    await closing
    bench.assert_once(range(51))
    assert [n for n, errors in bench.reports if not errors]
    assert bench.mover.is_idle


async def test_cancelling_every_task_disturbs_no_batch(bench: Bench) -> None:
    """As the end of a loop does: a batch is no task, its slots are not ours until it is done."""
    bench.ssd.open.clear()
    bench.mover.submit(moves(DOWN, 0, 4))
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    await asyncio.to_thread(bench.ssd.reached.wait, 10)
    assert not bench.reports, "its slots are still being written"
    bench.ssd.open.set()
    await bench.until_idle()
    bench.assert_once(range(4))


async def test_a_bug_in_the_report_is_not_lost(bench: Bench) -> None:
    def report(move: Move, errors: list[KvTierError]) -> None:
        raise InvariantViolated("the books disagree")

    bench.mover._report = report
    bench.mover.submit(moves(DOWN, 0, 20))
    await bench.until_idle()
    assert isinstance(bench.mover.broken, InvariantViolated)
    assert bench.batch_ends == len(bench.ssd.batches)
