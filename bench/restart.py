"""Starting again with a million blocks on SSD: until a client finds all of them.

The catalogue and the slab headers are real, payloads are not there (`synthetic.py`): a restart does
not read any. Both after a clean stop and after SIGKILL (the catalogue is verified then).
"""

from __future__ import annotations

import time
from typing import Final

from bench import synthetic
from bench.daemon import Daemon, Setup, attached
from bench.keys import CHAIN_BLOCKS, chain
from bench.machine import wait_until_quiet
from bench.row import Row
from kvtier.client.admin import AdminClient
from kvtier.units import MIB

NAME: Final = "restart"


def run(*, quick: bool) -> list[Row]:
    """Seconds from exec to the first full hit; the limit is a daemon that has nothing to find."""
    held = 16 * CHAIN_BLOCKS if quick else 1 << 20
    repeats = 1 if quick else 2
    setup = Setup(
        dram_bytes=64 * MIB,
        # A quarter more, or the full tier would begin to evict at once.
        ssd_bytes=synthetic.ssd_bytes(held) * 5 // 4 + synthetic.SEGMENT_BYTES,
        ssd_segment_bytes=synthetic.SEGMENT_BYTES,
    )
    with Daemon(setup, start=False) as empty:
        floor_s = min(_restarted(empty, 0, killed=False) for _ in range(repeats))
    with Daemon(setup, start=False) as daemon:
        synthetic.write_state(daemon.state, held, tier_bytes=setup.ssd_bytes)
        clean_s = min(_restarted(daemon, held, killed=False) for _ in range(repeats))
        _restarted(daemon, held, killed=True)
        killed_s = min(_restarted(daemon, held, killed=True) for _ in range(repeats))
    bar = None if quick else "value <= 7"
    return [
        Row.of(NAME, f"{held} blocks, after a clean stop", clean_s, "s", limit=floor_s, bar=bar),
        Row.of(NAME, f"{held} blocks, after a kill", killed_s, "s", limit=floor_s, bar=bar),
    ]


def _restarted(daemon: Daemon, held: int, *, killed: bool) -> float:
    """Starts, asks, and ends it in the way that the next start is to find."""
    wait_until_quiet(1.0)
    start_s = time.monotonic()
    daemon.start()
    with daemon.client() as client:
        space = attached(client, block_bytes=synthetic.BLOCK_BYTES)
        count = held // CHAIN_BLOCKS
        assert _recovered(daemon) == held
        for number in {0, count // 2, count - 1} if count else ():
            found = space.lookup(chain(number))
            assert found.block_count == CHAIN_BLOCKS, found
        seconds = time.monotonic() - start_s
    if killed:
        daemon.kill()
    else:
        daemon.stop()
    return seconds


def _recovered(daemon: Daemon) -> int:
    with AdminClient(daemon.directory / "run" / "admin.sock") as admin:
        return admin.stat().recovered_blocks
