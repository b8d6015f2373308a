"""Writers side by side share a commit; a lone one does not wait, and a failure is everybody's."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvtier.errors import TierFailed
from kvtier.tiers.group_commit import GroupCommit

LONG_S = 30.0


class Log:
    """Commits, and a gate that each of them passes."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Semaphore(0)

    def commit(self, parts: Sequence[int]) -> None:
        self.groups.append(list(parts))
        self.begun.release()
        assert self.gate.wait(LONG_S)


def until(condition: object) -> None:
    assert callable(condition)
    end_s = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.001)


def test_a_lone_writer_does_not_wait() -> None:
    log = Log()
    group = GroupCommit(log.commit, wait_s=LONG_S)
    start_s = time.monotonic()
    with group.writing():
        pass
    group.join(1, 10)
    assert time.monotonic() - start_s < LONG_S / 2
    assert log.groups == [[1]]


def test_those_who_come_while_a_group_is_made_sure_are_the_next_one() -> None:
    log = Log()
    group = GroupCommit(log.commit, wait_s=0)
    log.gate.clear()
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(group.join, 0, 10)
        assert log.begun.acquire(timeout=LONG_S)
        rest = [pool.submit(group.join, number, 10) for number in range(1, 8)]
        until(lambda: "7 gathered" in repr(group))
        assert not first.done()
        log.gate.set()
        for one in (first, *rest):
            one.result(LONG_S)
    assert [sorted(parts) for parts in log.groups] == [[0], [1, 2, 3, 4, 5, 6, 7]]


def test_a_group_waits_for_who_is_writing_and_takes_it_along() -> None:
    log = Log()
    group = GroupCommit(log.commit, wait_s=LONG_S)
    with ThreadPoolExecutor(2) as pool:
        with group.writing():
            first = pool.submit(group.join, 1, 10)
            until(lambda: "1 gathered" in repr(group))
            assert not log.groups
        group.join(2, 10)
        first.result(LONG_S)
    assert sorted(part for parts in log.groups for part in parts) == [1, 2]


@pytest.mark.parametrize(("wait_s", "bytes_max"), [(0.01, 1000), (LONG_S, 10)])
def test_it_waits_no_longer_than_that_and_for_no_more_bytes(wait_s: float, bytes_max: int) -> None:
    log = Log()
    group = GroupCommit(log.commit, wait_s=wait_s, bytes_max=bytes_max)
    with group.writing():  # and never ends
        group.join(1, 10)
        group.join(2, 10)
    assert log.groups == [[1], [2]]


def test_a_group_that_is_full_takes_no_more() -> None:
    log = Log()
    group = GroupCommit(log.commit, wait_s=0, bytes_max=10)
    log.gate.clear()
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(group.join, number, 10) for number in range(4)]
        assert log.begun.acquire(timeout=LONG_S)
        log.gate.set()
        for one in waiting:
            one.result(LONG_S)
    assert sorted(log.groups) == [[0], [1], [2], [3]]


def test_what_a_commit_raises_all_of_its_writers_raise_and_the_next_group_goes_on() -> None:
    log = Log()
    failing = True

    def commit(parts: Sequence[int]) -> None:
        log.commit(parts)
        if failing and 1 in parts:
            raise TierFailed("planned")

    group = GroupCommit(commit, wait_s=LONG_S)
    with ThreadPoolExecutor(2) as pool:
        with group.writing():
            writers = [pool.submit(group.join, number, 10) for number in (1, 2)]
            until(lambda: "2 gathered" in repr(group))
        for one in writers:
            with pytest.raises(TierFailed, match="planned"):
                one.result(LONG_S)
    group.join(3, 10)
    assert log.groups[-1] == [3]


def test_many_writers_lose_nobody() -> None:
    log = Log()
    group = GroupCommit(log.commit, wait_s=0.001, bytes_max=50)

    def write(number: int) -> None:
        with group.writing():
            time.sleep(0)
        group.join(number, 10)

    with ThreadPoolExecutor(16) as pool:
        for done in [pool.submit(write, number) for number in range(2000)]:
            done.result(LONG_S)
    assert sorted(part for parts in log.groups for part in parts) == list(range(2000))
    assert max(map(len, log.groups)) <= 6
