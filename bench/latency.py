"""Rounds of timed calls, side by side: what is measured and its floor see the same machine.

Does not: judge.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from bench.machine import wait_until_quiet

PATIENCE_S = 0.3  # a round is short and there are many: one of them is quiet


@dataclass(frozen=True)
class Spread:
    """Microseconds: the least median and the least p99 of all rounds, and the greatest of all."""

    p50_us: float
    p99_us: float
    max_us: float


def spread(rounds: list[list[int]]) -> Spread:
    """Of rounds of nanoseconds. The best round: other people's work only ever makes it slower."""
    ranked = [sorted(one) for one in rounds]
    return Spread(
        min(one[len(one) // 2] for one in ranked) / 1e3,
        min(one[len(one) * 99 // 100] for one in ranked) / 1e3,
        max(one[-1] for one in ranked) / 1e3,
    )


def histogram(times: list[int]) -> list[tuple[str, int]]:
    """How many of these nanoseconds lie in each power of two of microseconds, by its upper end."""
    counts = Counter(max(0, (time_ns // 1000).bit_length()) for time_ns in times)
    return [
        (f"under {1 << power} us", counts[power]) for power in range(min(counts), max(counts) + 1)
    ]


def measure(
    cases: Mapping[str, Callable[[int], object]],
    after: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    calls: int,
) -> dict[str, Spread]:
    """Calls each case `rounds` times `calls` times, in turn; `case(n)` is call number n.

    `after[name]()` is called after each call and not timed.
    """
    times: dict[str, list[list[int]]] = {name: [] for name in cases}
    clock = time.perf_counter_ns
    for _ in range(rounds):
        for name, call in cases.items():
            wait_until_quiet(PATIENCE_S)
            end = after.get(name)
            taken = []
            for number in range(calls):
                start = clock()
                call(number)
                taken.append(clock() - start)
                if end is not None:
                    end()
            times[name].append(taken)
    return {name: spread(one) for name, one in times.items()}


async def measure_async(
    cases: Mapping[str, Callable[[int], Awaitable[object]]],
    after: Mapping[str, Callable[[], Awaitable[object]]],
    *,
    rounds: int,
    calls: int,
) -> dict[str, Spread]:
    """As `measure`, awaiting. `after[name]()` is awaited after each call and not timed."""
    times: dict[str, list[list[int]]] = {name: [] for name in cases}
    clock = time.perf_counter_ns
    for _ in range(rounds):
        for name, call in cases.items():
            wait_until_quiet(PATIENCE_S)
            end = after.get(name)
            taken = []
            for number in range(calls):
                start = clock()
                await call(number)
                taken.append(clock() - start)
                if end is not None:
                    await end()
            times[name].append(taken)
    return {name: spread(one) for name, one in times.items()}
