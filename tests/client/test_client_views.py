"""Views: zero-copy, read-only, and a lease that lasts as long as anything made of them."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator

import pytest
from conftest import FORMAT
from fake_daemon import FakeDaemon

from kvtier.client import AsyncClient, Client, Space
from kvtier.errors import InvalidRequest, LeaseLost

Eventually = Callable[[Callable[[], object]], None]


@pytest.fixture
def client(daemon: FakeDaemon) -> Iterator[Client]:
    with Client(daemon.path, deadline_s=2) as client:
        yield client


@pytest.fixture
def space(client: Client, keys: list[bytes], payload: dict[bytes, bytes]) -> Space:
    space = client.open_namespace(model="m", format=FORMAT)

    def fill(block) -> None:  # type: ignore[no-untyped-def]
        block.view[:] = payload[block.key]

    space.store(keys, fill)
    return space


def slot_start(daemon: FakeDaemon, namespace_id: int, key: bytes) -> int:
    arena = daemon.arenas[namespace_id]
    return arena.base_offset + daemon.blocks[namespace_id, key] * FORMAT.size_bytes


def test_views_are_read_only_and_zero_copy(
    daemon: FakeDaemon, space: Space, keys: list[bytes]
) -> None:
    with space.lease(keys) as lease:
        views = lease.views
        assert len(views) == 8
        view = views[2]
        assert view.readonly
        assert (view.nbytes, view.format, view.contiguous) == (FORMAT.size_bytes, "B", True)
        with pytest.raises(TypeError):
            view[0] = 1
        # What the daemon writes there now is what the view shows: no copy was made.
        daemon.arenas[space.namespace_id]._map[slot_start(daemon, space.namespace_id, keys[2])] = 99
        assert view[0] == 99
        assert views[-1] == lease.view(7)
        assert [bytes(v) for v in views[1:2]] == [bytes(lease.view(1))]
        with pytest.raises(InvalidRequest):
            lease.view(8)
        with pytest.raises(IndexError):
            views[8]


def test_numpy_array_outlives_the_with_block(
    daemon: FakeDaemon, space: Space, keys: list[bytes], eventually: Eventually
) -> None:
    numpy = pytest.importorskip("numpy")
    with space.lease(keys) as lease:
        array = numpy.frombuffer(lease.view(0), numpy.uint8)[1:].reshape(-1, 1)
    assert not array.flags.writeable
    time.sleep(0.05)
    assert lease.lease_id in daemon.leases
    lease.check()
    with pytest.raises(LeaseLost, match="released"):
        _ = lease.views
    assert (array == 1).all()

    del array
    eventually(lambda: not daemon.leases)
    with pytest.raises(LeaseLost, match="released"):
        lease.check()


def test_torch_tensor_outlives_the_with_block(
    daemon: FakeDaemon, space: Space, keys: list[bytes], eventually: Eventually
) -> None:
    torch = pytest.importorskip("torch")
    with space.lease(keys) as lease, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has no read-only tensors and says so
        view = lease.view(1)
        tensor = torch.frombuffer(view, dtype=torch.uint8).view(2, -1)[1]
        del view
    time.sleep(0.05)
    assert lease.lease_id in daemon.leases
    assert bool((tensor == 2).all())

    del tensor
    gc.collect()
    eventually(lambda: not daemon.leases)


async def test_asyncio_lease_is_released_with_its_last_array(
    daemon: FakeDaemon, space: Space, keys: list[bytes]
) -> None:
    import asyncio

    async with AsyncClient(daemon.path) as client:
        theirs = await client.open_namespace(model="m", format=FORMAT)
        async with theirs.lease(keys) as lease:
            view = lease.view(0)
        assert lease.lease_id in daemon.leases
        del view
        for _ in range(200):
            await asyncio.sleep(0.01)
            if not daemon.leases:
                break
        assert not daemon.leases


def test_dropped_lease_is_released(
    daemon: FakeDaemon, space: Space, keys: list[bytes], eventually: Eventually
) -> None:
    lease = space.lease(keys)
    assert daemon.leases
    del lease
    eventually(lambda: not daemon.leases)
    daemon.below = {keys[0]}
    lease = space.lookup(keys, lease=True).lease  # never waited for: no views, no mapping
    assert daemon.leases
    del lease
    eventually(lambda: not daemon.leases)


def test_closing_the_client_waits_for_the_last_array(
    daemon: FakeDaemon, keys: list[bytes], payload: dict[bytes, bytes], eventually: Eventually
) -> None:
    with Client(daemon.path, deadline_s=2) as client:
        space = client.open_namespace(model="m", format=FORMAT)
        space.store(keys, lambda block: block.view.__setitem__(slice(None), payload[block.key]))
        with space.lease(keys) as lease:
            view = lease.view(3)
    time.sleep(0.05)
    assert len(daemon.sessions) == 1
    assert lease.lease_id in daemon.leases
    assert bytes(view) == payload[keys[3]]

    del view
    eventually(lambda: not daemon.sessions)


def test_lease_taken_back(daemon: FakeDaemon, space: Space, keys: list[bytes]) -> None:
    other, lease = space.lease(keys[4:]), space.lease(keys[:4])
    lease.check()
    daemon.take_back(space.namespace_id, keys[2])
    other.check()  # another slot of the same arena: this lease stands
    with pytest.raises(LeaseLost, match="took the lease back"):
        lease.check()
    with pytest.raises(LeaseLost, match="took the lease back"), lease:
        pass
    assert list(daemon.leases) == [other.lease_id]
    # A lease made after it names the new generation: it stands.
    with space.lease(keys) as lease:
        lease.check()


def test_error_in_the_body_is_not_hidden(
    daemon: FakeDaemon, space: Space, keys: list[bytes]
) -> None:
    lease = space.lease(keys)
    daemon.take_back(space.namespace_id, keys[0])
    with pytest.raises(ZeroDivisionError), lease:
        _ = 1 // 0
    assert not daemon.leases


def test_withdrawn_arena_is_returned_when_its_last_view_is_gone(
    daemon: FakeDaemon, space: Space, keys: list[bytes], eventually: Eventually
) -> None:
    (session,) = daemon.sessions.values()
    with space.lease(keys) as lease:
        view = lease.view(0)
        arena_id = daemon.withdraw(space.namespace_id)
        time.sleep(0.05)
        assert session.returned == []
        assert view[0] == 1
        del view
    del lease
    eventually(lambda: session.returned == [arena_id])


def test_lease_of_nothing(space: Space) -> None:
    with space.lease([b"z" * 32]) as lease:
        assert (len(lease), lease.ready) == (0, True)
        with pytest.raises(LeaseLost, match="nothing"):
            _ = lease.views
        lease.check()


def test_arena_that_never_comes(
    daemon: FakeDaemon, space: Space, keys: list[bytes], eventually: Eventually
) -> None:
    daemon.silent_arenas = True
    found = space.lookup(keys, lease=True)
    assert found.lease is None
    assert found.reason == "daemon_down"
    eventually(lambda: not daemon.leases)
