"""Longest restorable prefix of a chain, over runs instead of blocks.

A presence test of one key is one dict probe; the whole prefix is found by a binary search for a
boundary (key i ready, key i+1 not), then a walk back over runs that compares packed keys and looks
for a lost block with one memory search each. A gap sends the search to the part before it. So a
512-block hit costs a handful of probes and comparisons, whatever was stored in which order.

Does not: change anything.
"""

from __future__ import annotations

from array import array
from functools import lru_cache
from itertools import groupby

from kvtier.block import Keys, TierId, TierRun
from kvtier.ledger.chain import RUN_BLOCKS_MAX, Namespace, Run

# (run, first place, end place): consecutive blocks of an answer.
Span = tuple[Run, int, int]

# State byte -> fastest tier that has the block.
_FASTEST = bytes((state & -state).bit_length() - 1 if state else 255 for state in range(256))
# Gaps searched by halving before giving up on cleverness: a chain full of holes is walked.
_GAPS_MAX = 16


def is_ready(space: Namespace, runs: dict[int, Run], key: bytes) -> bool:
    """Whether some tier has the block."""
    locator = space.index.parts[key[0]].get(key)
    if locator is None:
        return False
    return runs[locator // RUN_BLOCKS_MAX].state[locator % RUN_BLOCKS_MAX] != 0


def prefix(space: Namespace, runs: dict[int, Run], keys: Keys, count: int) -> list[Span]:
    """Spans of the longest prefix, of at most `count` blocks, that is ready without a gap."""
    high = count
    for _ in range(_GAPS_MAX):
        last = _boundary(space, runs, keys, high)
        if last < 0:
            return []
        spans, gap = back_to(space, runs, keys, 0, last)
        if gap < 0:
            return spans
        high = gap
    first_lost = 0
    while first_lost < high and is_ready(space, runs, keys[first_lost]):
        first_lost += 1
    return back_to(space, runs, keys, 0, first_lost - 1)[0]


def _boundary(space: Namespace, runs: dict[int, Run], keys: Keys, high: int) -> int:
    """An index that is ready while the next is not (or is `high`); -1 = none was found."""
    if high and is_ready(space, runs, keys[high - 1]):
        return high - 1
    low, high = -1, high - 1
    while high - low > 1:
        middle = (low + high) // 2
        if is_ready(space, runs, keys[middle]):
            low = middle
        else:
            high = middle
    return low


def back_to(
    space: Namespace, runs: dict[int, Run], keys: Keys, first: int, last: int
) -> tuple[list[Span], int]:
    """Spans of blocks first..last, in order, and -1; or no spans and the index of the last gap."""
    spans: list[Span] = []
    packed, size, parts = keys.packed, keys.size, space.index.parts
    at = last
    while at >= first:
        key = packed[at * size : (at + 1) * size]
        locator = parts[key[0]].get(key)
        if locator is None:
            return [], at
        run, place = runs[locator // RUN_BLOCKS_MAX], locator % RUN_BLOCKS_MAX
        count = min(place, at - first) + 1
        start = place - count + 1
        chain = packed[(at - count + 1) * size : (at + 1) * size]
        if run.keys[start * size : (place + 1) * size] != chain:
            # Same key under another parent: not a chain of hashes. Take what matches, singly.
            count, start = 1, place
        lost = run.state.rfind(0, start, place + 1)
        if lost >= 0:
            return [], at - (place - lost)
        spans.append((run, start, place + 1))
        at -= count
    spans.reverse()
    return spans, -1


def window(space: Namespace, runs: dict[int, Run], keys: Keys, count: int, needed: int) -> int:
    """Longest length <= count whose last `needed` blocks (or all, if fewer) are ready."""
    end, ready = count, 0
    for at in range(count - 1, -1, -1):
        if not is_ready(space, runs, keys[at]):
            end, ready = at, 0
            continue
        ready += 1
        if ready >= needed:
            return end
    return end


def tier_runs(spans: list[Span]) -> tuple[TierRun, ...]:
    """Which tier is the fastest for each stretch of the spans."""
    found: list[list[int]] = []
    for run, start, end in spans:
        fastest = run.state[start:end].translate(_FASTEST)
        if fastest.count(fastest[0]) == len(fastest):
            stretches = [(fastest[0], len(fastest))]
        else:
            stretches = [(tier, len(list(part))) for tier, part in groupby(fastest)]
        for tier, count in stretches:
            if found and found[-1][0] == tier:
                found[-1][1] += count
            else:
                found.append([tier, count])
    return tuple(TierRun(TierId(tier), count) for tier, count in found)


def all_in(run: Run, start: int, end: int, tier: TierId) -> bool:
    """Whether every block of the span has a copy in the tier."""
    if run.held[tier] == len(run):
        return True
    bit = 1 << tier
    return all(state & bit for state in run.state[start:end])


def cut_spans(spans: list[Span], count: int) -> list[Span]:
    """The first `count` blocks of the spans."""
    kept: list[Span] = []
    for run, start, end in spans:
        if count <= 0:
            break
        kept.append((run, start, min(end, start + count)))
        count -= end - start
    return kept


def length(spans: list[Span]) -> int:
    """How many blocks they are."""
    return sum(end - start for _, start, end in spans)


@lru_cache(maxsize=512)
def segments_of(slots: bytes) -> frozenset[int]:
    """Segments that these packed little-endian u32 slot numbers lie in. Kept for the last tables:
    the workers of one engine, and the turns of one conversation, ask for the same ones.
    """
    halves = array("H")
    halves.frombytes(slots)
    # The upper half of each u32 comes second; its upper 12 bits are the segment.
    return frozenset(half >> 4 for half in set(halves[1::2]))
