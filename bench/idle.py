"""Memory of an idle daemon without its arenas, against a Python that imported its libraries."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Final

from bench.daemon import Daemon, Setup, attached
from bench.row import Row
from kvtier.units import KIB, MIB

NAME: Final = "idle"
_IMPORTS: Final = "import uvloop, grpc.aio, lmdb, xxhash, google.rpc.status_pb2"


def run(*, quick: bool) -> list[Row]:
    """Resident bytes that are no memfd: libraries, interpreter, books."""
    setup = Setup(dram_bytes=64 * MIB, ssd_bytes=256 * MIB)
    with Daemon(setup) as daemon:
        with daemon.client() as client:
            attached(client, block_bytes=4 * KIB)
        time.sleep(0.2 if quick else 2.0)
        anonymous, resident = daemon.resident_bytes()
    bare = _bare_bytes()
    return [
        Row.of(
            NAME, "resident, without arenas", resident / MIB, "MiB", limit=bare / MIB,
            bar="value <= 120",
        ),
        Row.of(NAME, "of it anonymous (private)", anonymous / MIB, "MiB"),
    ]  # fmt: skip


def _bare_bytes() -> int:
    code = f"{_IMPORTS}; print(open('/proc/self/statm').read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    import resource

    return int(done.stdout.split()[1]) * resource.getpagesize()
