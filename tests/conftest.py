"""Fixtures: real daemons, whose books must agree and where nothing may be left after a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from daemons import FORMAT, Daemon, keys_of

from kvtier.client import Client, Space


@pytest.fixture(scope="module")
def module_daemon() -> Iterator[Daemon]:
    """One daemon for the tests of a module; tests ask for `daemon`."""
    daemon = Daemon()
    try:
        yield daemon.start()
        assert daemon.stop() == 0, daemon.log
        assert " ERROR " not in daemon.log
    finally:
        daemon.close()


@pytest.fixture
def daemon(module_daemon: Daemon) -> Iterator[Daemon]:
    """A daemon that other tests of the module use, too: leave it running."""
    assert module_daemon.running, module_daemon.log
    yield module_daemon
    module_daemon.assert_sound()


@pytest.fixture
def start() -> Iterator[Callable[..., Daemon]]:
    """Starts daemons of this test alone; arguments as of `Daemon`. `ready=False`: no waiting.

    Those that still run when the test ends must be sound, too.
    """
    daemons: list[Daemon] = []

    def run(*arguments: Any, ready: bool = True, **options: Any) -> Daemon:
        daemons.append(Daemon(*arguments, **options))
        return daemons[-1].start() if ready else daemons[-1].launch()

    yield run
    try:
        for daemon in daemons:
            if daemon.running:
                daemon.assert_sound()
    finally:
        for daemon in daemons:
            daemon.close()


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    """A client of the module's daemon."""
    with Client(daemon.socket, deadline_s=5) as client:
        yield client


@pytest.fixture
def space(client: Client, request: pytest.FixtureRequest) -> Space:
    """An empty namespace of this test."""
    return client.open_namespace(model=request.node.name, format=FORMAT)


@pytest.fixture
def keys(request: pytest.FixtureRequest) -> list[bytes]:
    """Eight keys."""
    return keys_of(request.node.name, 8)
