"""The wall clock jumps by an hour, either way: no lease or reservation expires or lives on.

Needs libfaketime (Debian: `apt-get install faketime`); `.ci/run` installs it.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from daemons import LARGE, SMALL_DRAM, Daemon, eventually, fill, holds, keys_of, stored

from kvtier.client import Client
from kvtier.errors import LeaseLost, ReservationExpired

_PLACES = ("*/faketime/libfaketimeMT.so.1", "faketime/libfaketimeMT.so.1")
FAKETIME = next((found for place in _PLACES for found in Path("/usr/lib").glob(place)), None)
pytestmark = pytest.mark.skipif(FAKETIME is None, reason="libfaketime is not installed")

Start = Callable[..., Daemon]
JUMPS = pytest.mark.parametrize("jump_s", [3600, -3600])


class Wall:
    """The wall clock of a daemon that runs under libfaketime."""

    def __init__(self, tmp_path: Path) -> None:
        self._file = tmp_path / "offset"
        self._file.write_text("+0")
        self.variables = {
            "LD_PRELOAD": str(FAKETIME),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "TZ": "UTC",
        }

    def jump(self, daemon: Daemon, seconds: int) -> None:
        """From now on; returns when the daemon's own log has the new time."""
        seen = len(daemon.log)
        self._file.write_text(f"{seconds:+d}")
        daemon.signal(signal.SIGHUP)
        eventually(lambda: "config.reloaded" in daemon.log[seen:])
        [stamp] = re.findall(r"(\S+ \S+),\d+ INFO \S+ config.reloaded", daemon.log[seen:])
        told = datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC).timestamp()
        assert abs(told - time.time() - seconds) < 300, "the daemon did not see the jump"


def begun(start: Start, wall: Wall, **sections: dict[str, object]) -> Daemon:
    daemon = start(ready=False, **sections)
    daemon.kill()
    daemon.launch(**wall.variables)
    eventually(lambda: daemon.stat(), 30)
    return daemon


@JUMPS
def test_nothing_expires_by_a_jump(start: Start, tmp_path: Path, jump_s: int) -> None:
    wall = Wall(tmp_path)
    limits = {"lease_ttl_s": 60.0, "reservation_ttl_s": 60.0}
    daemon = begun(start, wall, dram=SMALL_DRAM, limits=limits)
    with Client(daemon.socket, deadline_s=5) as client:
        space = client.open_namespace(model="m", format=LARGE)
        keys = keys_of("held", 4)
        stored(space, keys)
        with space.lease(keys) as lease:
            reservation = space.reserve(keys_of("room", 4), timeout_s=10)
            for block in reservation.blocks:
                fill(block)
            wall.jump(daemon, jump_s)
            # Room is wanted: overdue leases would be taken back now.
            stored(space, keys_of("more", 40))
            stat = daemon.stat()
            assert (stat.lease_count, stat.reservation_count, stat.leases_revoked) == (1, 1, 0)
            assert 0 <= stat.lease_oldest_s < 60
            assert 0 <= stat.reservation_oldest_s < 60
            lease.check()
            assert [bytes(v[:32]) for v in lease.views] == keys
            assert reservation.commit(timeout_s=10).stored_count == 4
        assert holds(space, keys_of("room", 4))
        assert not daemon.stat().sessions[0].lease_count


@JUMPS
def test_nothing_lives_on_by_a_jump(start: Start, tmp_path: Path, jump_s: int) -> None:
    wall = Wall(tmp_path)
    limits = {"reservation_ttl_s": 1.0, "lease_ttl_s": 1.0}
    daemon = begun(start, wall, dram=SMALL_DRAM, limits=limits)
    with Client(daemon.socket, deadline_s=5) as client:
        space = client.open_namespace(model="m", format=LARGE)
        reservation = space.reserve(keys_of("room", 2), timeout_s=10)
        wall.jump(daemon, jump_s)
        eventually(lambda: daemon.stat().reservation_count == 0)
        with pytest.raises(ReservationExpired):
            reservation.commit(timeout_s=10)
        stored(space, keys_of("held", 16))
        lease = space.lease(keys_of("held", 16))
        assert len(lease) == 16
        wall.jump(daemon, -jump_s)
        stored(space, keys_of("more", 4))  # there is only room where the lease lies
        assert daemon.stat().leases_revoked == 1
        with pytest.raises(LeaseLost):
            lease.check()
        lease.release()
    assert daemon.stat().uptime_s < 300
