"""Shared: who is served by which run, with threads held in place."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvtier.errors import TierFailed
from kvtier.tiers.shared import Shared

WAIT_S = 20.0


class Slow:
    """Work that is held in its first run until let go."""

    def __init__(self, errors: list[TierFailed | None]) -> None:
        self.runs = 0
        self.begun = threading.Event()
        self.go = threading.Event()
        self.errors = errors

    def __call__(self) -> None:
        self.runs += 1
        self.begun.set()
        assert self.go.wait(WAIT_S)
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error


def waiting(shared: Shared, pool: ThreadPoolExecutor, count: int) -> list[object]:
    """`count` callers that have all asked while a run is under way."""
    asked = threading.Barrier(count + 1)

    def call() -> None:
        asked.wait(WAIT_S)
        shared.run()

    futures = [pool.submit(call) for _ in range(count)]
    asked.wait(WAIT_S)
    return list(futures)


def test_those_who_come_while_it_runs_share_the_next_one() -> None:
    work = Slow([])
    shared = Shared(work)
    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(shared.run)
        assert work.begun.wait(WAIT_S)
        others = waiting(shared, pool, 8)
        work.go.set()
        for future in (first, *others):
            future.result(WAIT_S)  # type: ignore[attr-defined]
    # Never served by the run that began before they asked; late ones may need a run of their own.
    assert 2 <= work.runs <= 9


def test_a_failure_is_told_to_all_who_waited_for_that_run() -> None:
    work = Slow([TierFailed("planned")])
    shared = Shared(work)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(shared.run)
        assert work.begun.wait(WAIT_S)
        work.go.set()
        with pytest.raises(TierFailed, match="planned"):
            first.result(WAIT_S)
    shared.run()  # the next one is another run
    assert work.runs == 2


def test_a_bug_in_the_work_is_no_success_for_those_who_wait() -> None:
    begun, go, runs = threading.Event(), threading.Event(), []

    def work() -> None:
        runs.append(1)
        begun.set()
        assert go.wait(WAIT_S)
        raise AssertionError("a bug")

    shared = Shared(work)
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(shared.run) for _ in range(2)]
        assert begun.wait(WAIT_S)
        go.set()
        for future in futures:
            assert isinstance(future.exception(WAIT_S), AssertionError | TierFailed)
    assert runs
