"""Daemons that die of their catalogue's map, and what the next one does about it."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import FORMAT, START_S, Daemon, fill, holds, keys_of, stored

from kvtier import native
from kvtier.client import Client
from kvtier.errors import KvTierError
from kvtier.tiers.starts import WINDOW_S, read_starts

KEPT = keys_of("kept", 6)


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    daemon = Daemon().start()
    with Client(daemon.socket, deadline_s=5) as client:
        stored(client.open_namespace(model="m", format=FORMAT), KEPT, durable=True)
    try:
        yield daemon
    finally:
        daemon.close()


def die(daemon: Daemon) -> None:
    """As of a sector that cannot be read under the map."""
    daemon.signal(signal.SIGBUS)
    assert daemon.process.wait(START_S) == -signal.SIGBUS


def evidence(daemon: Daemon) -> list[Path]:
    return sorted((daemon.folder / "state" / "ssd").glob("catalogue.damaged-*"))


def assert_serves(daemon: Daemon) -> None:
    """What it had before, and what is new."""
    with Client(daemon.socket, deadline_s=5) as client:
        space = client.open_namespace(model="m", format=FORMAT)
        assert holds(space, KEPT)
        more = keys_of(f"more {daemon.process.pid}", 3)
        stored(space, more, durable=True)
        assert holds(space, more)


needs_library = pytest.mark.skipif(
    native.library() is None, reason=f"no library: {native.capabilities().reason}"
)


@needs_library
def test_after_two_sigbus_the_catalogue_is_set_aside_and_all_is_served(daemon: Daemon) -> None:
    die(daemon)
    daemon.start()
    assert not evidence(daemon)
    assert_serves(daemon)
    die(daemon)
    daemon.start()
    [kept] = evidence(daemon)
    assert (kept / "data.mdb").stat().st_size > 0
    assert "crashes within 600 s; the catalogue is set aside" in daemon.log
    assert_serves(daemon)
    daemon.restart()
    assert evidence(daemon) == [kept]
    assert_serves(daemon)


@needs_library
def test_a_sigbus_of_long_ago_does_not_count(daemon: Daemon) -> None:
    die(daemon)
    path = daemon.folder / "state" / "ssd" / "starts"
    at = path.stat().st_size - 64 + 40
    [died_s] = struct.unpack_from("<Q", path.read_bytes(), at)
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), struct.pack("<Q", died_s - WINDOW_S - 60), at)
    daemon.start()
    die(daemon)
    assert [start.signal for start in read_starts(path)] == [signal.SIGBUS] * 2
    daemon.start()
    assert not evidence(daemon)
    assert_serves(daemon)


def test_without_the_library_starts_that_do_not_get_through_count(daemon: Daemon) -> None:
    assert daemon.stop() == 0
    for _ in range(2):
        daemon.launch(KVTIER_NATIVE="off", KVTIER_FAILPOINT="recover.catalogue")
        assert daemon.process.wait(START_S) == -signal.SIGKILL
    assert not evidence(daemon)
    daemon.start()
    assert len(evidence(daemon)) == 1
    assert_serves(daemon)


def test_when_slabs_cannot_be_read_either_the_tier_starts_empty(daemon: Daemon) -> None:
    assert daemon.stop() == 0
    for point in ("recover.catalogue", "recover.catalogue", "rebuild.scanned"):
        daemon.launch(KVTIER_NATIVE="off", KVTIER_FAILPOINT=point)
        assert daemon.process.wait(START_S) == -signal.SIGKILL
    daemon.start()
    assert "and slabs too: reading those failed as well" in daemon.log
    [slabs] = (daemon.folder / "state" / "ssd").glob("slabs.damaged-*")
    assert list(slabs.glob("*.slab")), "no evidence"
    for _ in range(2):
        with Client(daemon.socket, deadline_s=5) as client:
            space = client.open_namespace(model="m", format=FORMAT)
            assert space.lookup(KEPT).block_count == 0
            more = keys_of(f"more {daemon.process.pid}", 3)
            stored(space, more, durable=True)
        daemon.restart()
        with Client(daemon.socket, deadline_s=5) as client:
            assert holds(client.open_namespace(model="m", format=FORMAT), more)


def test_a_file_torn_under_the_map_kills_once_and_is_made_anew(daemon: Daemon) -> None:
    os.truncate(daemon.folder / "state" / "ssd" / "catalogue" / "data.mdb", 2 * 4096)
    with Client(daemon.socket, deadline_s=5) as client, contextlib.suppress(KvTierError):
        space = client.open_namespace(model="m", format=FORMAT)
        space.store(keys_of("too much", 2), fill, timeout_s=5, durable=True)
    assert daemon.process.wait(START_S) == -signal.SIGBUS, daemon.log
    daemon.start()
    assert len(evidence(daemon)) == 1
    assert_serves(daemon)


_OF_VERSION_9 = """
import sys
from kvtier.tiers import state
state.STATE_VERSION = (9, 0)
from kvtier.cli.main import main
sys.argv = ["kvtier", "serve", "--config", sys.argv[1]]
main()
"""


def test_a_newer_version_gets_its_state_back_after_an_older_one_served() -> None:
    newer = Daemon(command=("-c", _OF_VERSION_9))
    older = Daemon(newer.folder)
    try:
        newer.start()
        with Client(newer.socket, deadline_s=5) as client:
            stored(client.open_namespace(model="m", format=FORMAT), KEPT)
        assert newer.stop() == 0
        older.start()
        assert "state of version 9 is set aside" in older.log
        with Client(older.socket, deadline_s=5) as client:
            space = client.open_namespace(model="m", format=FORMAT)
            assert space.lookup(KEPT).block_count == 0
            stored(space, keys_of("older", 2))
        assert older.stop() == 0
        newer.start()
        with Client(newer.socket, deadline_s=5) as client:
            space = client.open_namespace(model="m", format=FORMAT)
            assert holds(space, KEPT)
            assert space.lookup(keys_of("older", 2)).block_count == 0
    finally:
        older.close()
        newer.close()
