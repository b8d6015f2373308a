"""Clients are killed with all they hold: everything is back at once, and nothing is left open."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from chaos_plan import TIMEOUT_S, count_of
from daemons import ENVIRONMENT, FORMAT, Daemon, eventually, holds, keys_of, line_of, stored

from kvtier.client import Client

pytestmark = pytest.mark.timeout(TIMEOUT_S)
SWARM = Path(__file__).with_name("chaos_swarm.py")
PLANTED = Path(__file__).with_name("planted_daemon.py")
BATCH, FULL = 50, 5
BACK_S = 1.0  # what each batch keeps to on an idle machine: here, one of them must
LATEST_S = 10.0


@contextmanager
def swarm(daemon: Daemon, light: int, full: int, name: str) -> Iterator[list[int]]:
    """Pids of clients that hold leases and half-written reservations."""
    command = [sys.executable, str(SWARM), str(daemon.folder), str(light), str(full), name]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    pids: list[int] = []
    try:
        pids = [int(pid) for pid in line_of(process).split()]
        yield pids
    finally:
        for pid in pids:
            # Zombies until their parent ends: the pid is nobody else's yet.
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.communicate()


def kill_all(daemon: Daemon, count: int, name: str, within_s: float = LATEST_S) -> float:
    """So many clients die; seconds until nothing of theirs is left, which is asserted."""
    full = min(FULL, count)
    with swarm(daemon, count - full, full, name) as pids:
        leases, reservations, sessions = daemon.held()
        assert (leases, reservations, sessions) == (count, count, count)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        killed_s = time.monotonic()
        eventually(lambda: daemon.held() == (0, 0, 0), within_s)
        return time.monotonic() - killed_s


def prepared(daemon: Daemon) -> None:
    with Client(daemon.socket, deadline_s=5) as client:
        stored(client.open_namespace(model="swarm", format=FORMAT), keys_of("held", 4))
    eventually(lambda: daemon.held() == (0, 0, 0))


LIMITS = {"write_arena_bytes": "1MiB", "block_bytes_max": "1MiB"}


def test_killed_clients_give_everything_back() -> None:
    daemon = Daemon(limits=LIMITS)
    try:
        prepared(daemon.start())
        kill_all(daemon, 8, "first")  # what is made once is made: descriptors, threads
        baseline = daemon.descriptors()
        used = {tier.tier: tier.block_count for tier in daemon.stat().tiers}
        total = count_of(500)
        times = []
        for first in range(0, total, BATCH):
            times.append(kill_all(daemon, min(BATCH, total - first), f"batch-{first}"))
            eventually(lambda: daemon.descriptors() <= baseline)
        # Half-written blocks were never blocks.
        assert {tier.tier: tier.block_count for tier in daemon.stat().tiers} == used
        with Client(daemon.socket, deadline_s=5) as client:
            assert holds(client.open_namespace(model="swarm", format=FORMAT), keys_of("held", 4))
        daemon.assert_sound()
        eventually(lambda: daemon.descriptors() <= baseline)
        summary = {"clients": total, "back_s": [round(back_s, 3) for back_s in times]}
        print(json.dumps(summary))  # noqa: T201
        assert min(times) <= BACK_S, summary
        assert daemon.stop() == 0, daemon.log
    finally:
        daemon.close()


@pytest.mark.parametrize("bug", ["lease-not-returned", "reservation-not-returned"])
def test_a_planted_leak_is_found(bug: str) -> None:
    daemon = Daemon(command=(str(PLANTED), bug), limits=LIMITS)
    try:
        prepared(daemon.start())
        with pytest.raises(AssertionError, match="in time"):
            kill_all(daemon, 6, "leak", within_s=3.0)
    finally:
        daemon.close()
