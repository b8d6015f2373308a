"""The ledger alone with a million blocks: bytes each, microseconds of a lookup, longest pause.

In a process of its own, with the garbage collector as the daemon sets it. A pause is the CPU time
of one verb, as the event loop would be busy with it: other people's work on the machine does not
count. Blocks are committed through reservations, as the daemon does it, into one DRAM tier; the
demotions, leases and evictions then run with an SSD tier below.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from bench.keys import CHAIN_BLOCKS, chain
from bench.row import Row
from kvtier.block import BlockFormat, Keys, NamespaceSpec, SegmentPlan, TierId
from kvtier.ledger.chain import Namespace
from kvtier.ledger.filling import Filling
from kvtier.ledger.ledger import Ledger
from kvtier.ledger.moves import Moves
from kvtier.server.daemon import GC_THRESHOLDS
from kvtier.units import GIB, KIB

NAME: Final = "ledger"
_BLOCK_BYTES: Final = 4 * KIB
_SSD_HEADER_BYTES: Final = 4 * KIB
_NOBODY: Final = 1


def run(*, quick: bool) -> list[Row]:
    """Bytes each, lookup, the longest turn of every verb."""
    blocks = 32 * CHAIN_BLOCKS if quick else 1 << 20
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_measure, args=(blocks, 1 if quick else 7, theirs))
    child.start()
    theirs.close()
    found: dict[str, float] = ours.recv()
    child.join()
    bars = {} if quick else {"bytes": "value <= 400", "lookup": "value <= 0.3"}
    rows = [
        Row.of(NAME, f"memory of {blocks} blocks, each", found.pop("bytes"), "B",
               bar=bars.get("bytes")),
        Row.of(NAME, f"lookup of 512 of {blocks}, a block", found.pop("lookup"), "us",
               limit=found.pop("probe"), bar=bars.get("lookup")),
    ]  # fmt: skip
    bar = None if quick else "value <= 5"
    rows += [Row.of(NAME, f"longest {verb}", ms, "ms", bar=bar) for verb, ms in found.items()]
    return rows


def _measure(blocks: int, rounds: int, answer: Any) -> None:
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    answer.send(_Books(blocks).measure(rounds))


class _Books:
    """A ledger of `blocks` blocks and the longest turn of each verb so far, in nanoseconds."""

    def __init__(self, blocks: int) -> None:
        segments = -(-blocks * 5 // 4 * _BLOCK_BYTES // (GIB // 4)) + 1
        plans = [
            SegmentPlan(TierId.DRAM, segments, GIB // 4),
            SegmentPlan(TierId.SSD, segments * 2, GIB // 4, _SSD_HEADER_BYTES),
        ]
        self.longest: dict[str, int] = {}
        self.ledger = Ledger(plans)
        self.filling = Filling(self.ledger)
        self.moves = Moves(self.ledger)
        shape = BlockFormat(1, 1, 1, "bfloat16", 16, opaque_bytes=_BLOCK_BYTES)
        self.space = self.ledger.open_namespace(NamespaceSpec("bench", shape))
        self.blocks = blocks
        self._gc_start = 0
        gc.callbacks.append(self._on_collection)

    def _on_collection(self, phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            self._gc_start = time.thread_time_ns()
        else:
            self._note("garbage collection", time.thread_time_ns() - self._gc_start)

    def _note(self, verb: str, taken: int) -> None:
        self.longest[verb] = max(self.longest.get(verb, 0), taken)

    def timed(self, verb: str, work: Callable[[], Any]) -> Any:
        """The result of `work`; its CPU time counts for `verb`."""
        start = time.thread_time_ns()
        result = work()
        self._note(verb, time.thread_time_ns() - start)
        return result

    def measure(self, rounds: int) -> dict[str, float]:
        """All figures by name: bytes, us, then ms of each verb."""
        self.timed("reserve of 512", lambda: None)
        before = _resident_bytes()
        for number in range(self.blocks // CHAIN_BLOCKS):
            self._store(chain(number))
        each = (_resident_bytes() - before) / self.blocks
        asked = [chain(n) for n in range(0, self.blocks // CHAIN_BLOCKS, 7)]
        lookup = min(self._lookups(asked) for _ in range(rounds))
        probe = min(_probes(asked, self.space) for _ in range(rounds))
        self._hold(asked)
        self._move_down()
        self._forget(asked)
        self.ledger.check(held=self.filling.held_slots())
        found = {"bytes": each, "lookup": lookup, "probe": probe}
        return found | {verb: taken / 1e6 for verb, taken in self.longest.items()}

    def _store(self, keys: Keys) -> None:
        offer = self.timed(
            "reserve of 512",
            lambda: self.filling.reserve(
                self.space, keys, parent=b"", position=0, shard=0, session_id=_NOBODY,
                count_max=len(keys), now_s=0.0, deadline_s=60.0,
            ),
        )  # fmt: skip
        entries = self.filling.begin_commit(offer.reservation, None)
        sums = list(range(len(entries)))
        commit = self.filling.finish_commit
        self.timed("commit of 512", lambda: commit(offer.reservation, entries, sums))

    def _lookups(self, asked: list[Keys]) -> float:
        """Microseconds a block."""
        start = time.thread_time_ns()
        for keys in asked:
            found, _, _ = self.ledger.lookup([(self.space, keys)])
            assert found[0].block_count == len(keys)
        return (time.thread_time_ns() - start) / 1e3 / sum(map(len, asked))

    def _hold(self, asked: list[Keys]) -> None:
        for keys in asked:
            query = [(self.space, keys)]
            found, spans, _ = self.timed("lookup of 512", lambda q=query: self.ledger.lookup(q))  # type: ignore[misc]
            lease = self.timed(
                "lease of 512",
                lambda k=keys, f=found, s=spans: self.ledger.lease(  # type: ignore[misc]
                    self.space, k, f[0].block_count, 0, s[0],
                    session_id=_NOBODY, tenant="default", group="", now_s=0.0,
                ),
            )  # fmt: skip
            self.timed("release of 512", lambda le=lease: self.ledger.release(le.id))  # type: ignore[misc]

    def _move_down(self) -> None:
        """One tenth of DRAM leaves it, in turns as the keeper takes them."""
        used = self.ledger.slots[TierId.DRAM].used_bytes
        target = used * 9 // 10
        while self.ledger.slots[TierId.DRAM].used_bytes > target:
            moves = self.timed(
                "plan of demotions", lambda: self.moves.shrink_to(TierId.DRAM, target)
            )
            if not moves:
                break
            for at in range(0, len(moves), 64):
                batch = moves[at : at + 64]
                self.timed("finish of 64 moves", lambda b=batch: self._finish(b))  # type: ignore[misc]

    def _finish(self, moves: list[Any]) -> None:
        for move in moves:
            self.moves.finish_move(move)

    def _forget(self, asked: list[Keys]) -> None:
        for keys in asked[:: max(1, len(asked) // 50)]:
            done = False
            while not done:
                evict = functools.partial(self.ledger.evict_some, self.space, keys)
                done = self.timed("evict turn", evict)[1]
            self.ledger.erased(self.ledger.take_erasures())
        self.timed(f"clear of {self.space.block_count}", lambda: self.ledger.clear(self.space))
        while self.timed("reap turn", self.ledger.reap):
            erasures = self.ledger.take_erasures()
            for part in _parts(erasures, 1024):
                self.timed("1024 erasures", lambda p=part: self.ledger.erased(p))  # type: ignore[misc]
        self.ledger.erased(self.ledger.take_erasures())


def _parts(things: list[Any], size: int) -> Iterator[list[Any]]:
    return (things[at : at + size] for at in range(0, len(things), size))


def _probes(asked: list[Keys], space: Namespace) -> float:
    """Microseconds a block of the plainest way there is: asking a dict for every key."""
    start = time.thread_time_ns()
    for keys in asked:
        for key in keys.split():
            assert key in space.index
    return (time.thread_time_ns() - start) / 1e3 / sum(map(len, asked))


def _resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
