"""Starting again with a million blocks on SSD: until a client is answered, and finds all of them.

The catalogue and the slab headers are real, payloads are not there (`synthetic.py`): a restart does
not read any. Both after a clean stop and after SIGKILL; once with nobody asking, once while one
client looks up prefixes of 512 blocks, one after the other, as fast as it is answered.
"""

from __future__ import annotations

import itertools
import time
from typing import Final, NamedTuple

from bench import synthetic
from bench.daemon import Daemon, Setup, attached
from bench.keys import CHAIN_BLOCKS, chain
from bench.latency import histogram
from bench.machine import wait_until_quiet
from bench.row import Row
from kvtier.block import Keys
from kvtier.client import Space
from kvtier.client.admin import AdminClient
from kvtier.units import MIB

NAME: Final = "restart"
_ASK_S: Final = 0.05  # how often it asks whether all is there


class Restart(NamedTuple):
    """Seconds since exec until the first lookup was answered, and until all blocks were there;
    seconds that each lookup in between took.
    """

    first_s: float
    all_s: float
    lookups_s: list[float]


def run(*, quick: bool) -> list[Row]:
    """Seconds from exec; the limit is a daemon that has nothing to find."""
    held = 16 * CHAIN_BLOCKS if quick else 1 << 20
    repeats = 1 if quick else 3
    setup = Setup(
        dram_bytes=64 * MIB,
        # A quarter more, or the full tier would begin to evict at once.
        ssd_bytes=synthetic.ssd_bytes(held) * 5 // 4 + synthetic.SEGMENT_BYTES,
        ssd_segment_bytes=synthetic.SEGMENT_BYTES,
    )
    with Daemon(setup, start=False) as empty:
        floor_s = min(_restarted(empty, 0).all_s for _ in range(repeats))
    rows: list[Row] = []
    with Daemon(setup, start=False) as daemon:
        synthetic.write_state(daemon.state, held, tier_bytes=setup.ssd_bytes)
        for killed, case in ((False, "after a clean stop"), (True, "after a kill")):
            if killed:
                _restarted(daemon, held, killed=True)
            for asks in (False, True):
                found = [_restarted(daemon, held, killed=killed, asks=asks) for _ in range(repeats)]
                name = f"{held} blocks, {case}" + (", asked all the time" if asks else "")
                rows += _rows(name, found, floor_s, quick=quick)
    return rows


def _rows(case: str, found: list[Restart], floor_s: float, *, quick: bool) -> list[Row]:
    first_s, all_s = min(r.first_s for r in found), min(r.all_s for r in found)
    rows = [
        Row.of(NAME, f"{case}: first answer", first_s, "s", limit=floor_s),
        Row.of(
            NAME, f"{case}: all served", all_s, "s", limit=floor_s,
            bar=None if quick else "value <= 7",
        ),
    ]  # fmt: skip
    if found[0].lookups_s:
        # Nothing is left out of a round; of the rounds the best, as everywhere in the bench.
        p99_ms = min(_p99(r.lookups_s) for r in found) * 1e3
        worst_ms = min(max(r.lookups_s) for r in found) * 1e3
        bar = None if quick else "value <= 5"
        rows.append(Row.of(NAME, f"{case}: lookup, p99", p99_ms, "ms", bar=bar))
        rows.append(Row.of(NAME, f"{case}: lookup, slowest", worst_ms, "ms"))
        every = [round(taken * 1e9) for one in found for taken in one.lookups_s]
        for name, count in histogram(every):
            rows.append(Row.of(NAME, f"{case}: lookup, {name}", count, "calls"))
    return rows


def _p99(seconds: list[float]) -> float:
    return sorted(seconds)[len(seconds) * 99 // 100]


def _restarted(daemon: Daemon, held: int, *, killed: bool = False, asks: bool = False) -> Restart:
    """Starts, asks, and ends it in the way that the next start is to find."""
    wait_until_quiet(1.0)
    start_s = time.monotonic()
    daemon.start()
    admin_socket = daemon.directory / "run" / "admin.sock"
    with daemon.client() as client, AdminClient(admin_socket) as admin:
        space = attached(client, block_bytes=synthetic.BLOCK_BYTES)
        space.lookup(chain(0))
        first_s = time.monotonic() - start_s
        keys = [chain(n * (held // CHAIN_BLOCKS or 1) // 16) for n in range(16)] if asks else []
        lookups_s = _until_recovered(space, admin, keys)
        count = held // CHAIN_BLOCKS
        for number in {0, count // 2, count - 1} if count else ():
            found = space.lookup(chain(number))
            assert found.block_count == CHAIN_BLOCKS, found
        seconds = time.monotonic() - start_s
        assert admin.stat().recovered_blocks == held
    if killed:
        daemon.kill()
    else:
        daemon.stop()
    return Restart(first_s, seconds, lookups_s)


def _until_recovered(space: Space, admin: AdminClient, keys: list[Keys]) -> list[float]:
    """Looks up one chain after the other until the SSD tier is back; seconds each took."""
    took_s: list[float] = []
    asked = itertools.cycle(keys)
    while any(tier.state == "recovering" for tier in admin.stat().tiers):
        ask_at_s = time.monotonic() + _ASK_S
        if not keys:
            time.sleep(_ASK_S)
        while keys and (started_s := time.monotonic()) < ask_at_s:
            space.lookup(next(asked))
            took_s.append(time.monotonic() - started_s)
    return took_s
