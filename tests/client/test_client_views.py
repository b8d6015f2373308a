"""Views: zero-copy, read-only, and a lease that lasts as long as anything made of them."""

from __future__ import annotations

import gc
import os
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from daemons import (
    FORMAT,
    LARGE,
    SMALL_DRAM,
    Daemon,
    content,
    eventually,
    eventually_async,
    fill,
    holds,
    keys_of,
    stored,
)

from kvtier.client import AsyncClient, Client, Space
from kvtier.errors import InvalidRequest, LeaseLost, TierFull

Start = Callable[..., Daemon]


def mapping_of(address: int) -> tuple[str, str]:
    """Rights and name of the mapping of this process that an address lies in."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        first, last = (int(number, 16) for number in fields[0].split("-"))
        if first <= address < last:
            return fields[1], fields[5] if len(fields) > 5 else ""
    raise AssertionError("no mapping")


def test_views_are_read_only_and_zero_copy(space: Space, keys: list[bytes]) -> None:
    numpy = pytest.importorskip("numpy")
    stored(space, keys)
    with space.lease(keys) as lease, space.lease(keys) as again:
        views = lease.views
        assert len(views) == 8
        view = views[2]
        assert view.readonly
        assert (view.nbytes, view.format, view.contiguous) == (FORMAT.size_bytes, "B", True)
        with pytest.raises(TypeError):
            view[0] = 1
        # It is the daemon's memory, mapped read-only, and the same for all leases of the block.
        addresses = [numpy.frombuffer(v, numpy.uint8).ctypes.data for v in (view, again.views[2])]
        assert addresses[0] == addresses[1]
        rights, name = mapping_of(addresses[0])
        assert rights == "r--s"
        assert re.search("memfd:kvtier", name)
        assert views[-1] == lease.view(7) == content(keys[7])
        assert [bytes(v) for v in views[1:2]] == [bytes(lease.view(1))]
        del view
        with pytest.raises(InvalidRequest):
            lease.view(8)
        with pytest.raises(IndexError):
            views[8]
        del views


def test_numpy_array_outlives_the_with_block(
    daemon: Daemon, space: Space, keys: list[bytes]
) -> None:
    numpy = pytest.importorskip("numpy")
    with stored(space, keys).lease(keys) as lease:
        array = numpy.frombuffer(lease.view(0), numpy.uint8)[1:].reshape(-1, 1)
    assert not array.flags.writeable
    assert space.lookup(keys).block_count == 8  # a call after leaving: a release would be done
    assert daemon.held() == (1, 0, 1)
    lease.check()
    with pytest.raises(LeaseLost, match="released"):
        _ = lease.views
    assert array.tobytes() == content(keys[0])[1:]

    del array
    eventually(lambda: daemon.held() == (0, 0, 1))
    with pytest.raises(LeaseLost, match="released"):
        lease.check()


def test_torch_tensor_outlives_the_with_block(
    daemon: Daemon, space: Space, keys: list[bytes]
) -> None:
    torch = pytest.importorskip("torch")
    with stored(space, keys).lease(keys) as lease, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has no read-only tensors and says so
        view = lease.view(1)
        tensor = torch.frombuffer(view, dtype=torch.uint8).view(2, -1)[1]
        del view
    assert space.lookup(keys).block_count == 8
    assert daemon.held() == (1, 0, 1)
    assert bytes(tensor.tolist()) == content(keys[1])[FORMAT.size_bytes // 2 :]

    del tensor
    gc.collect()
    eventually(lambda: daemon.held() == (0, 0, 1))


async def test_asyncio_lease_is_released_with_its_last_array(
    daemon: Daemon, keys: list[bytes]
) -> None:
    with Client(daemon.socket) as client:
        stored(client.open_namespace(model="async views", format=FORMAT), keys)
    async with AsyncClient(daemon.socket) as client:
        space = await client.open_namespace(model="async views", format=FORMAT)
        async with space.lease(keys) as lease:
            view = lease.view(0)
        await space.lookup(keys)
        await eventually_async(lambda: daemon.held() == (1, 0, 1))
        assert bytes(view) == content(keys[0])
        del view
        await eventually_async(lambda: daemon.held() == (0, 0, 1))


def test_dropped_lease_is_released(daemon: Daemon, space: Space, keys: list[bytes]) -> None:
    lease = stored(space, keys).lease(keys)
    assert daemon.held() == (1, 0, 1)
    del lease
    eventually(lambda: daemon.held() == (0, 0, 1))


def test_closing_the_client_waits_for_the_last_array(daemon: Daemon, keys: list[bytes]) -> None:
    with Client(daemon.socket) as client:
        space = stored(client.open_namespace(model="closing", format=FORMAT), keys)
        with space.lease(keys) as lease:
            view = lease.view(3)
    with Client(daemon.socket) as other:  # a handshake later the daemon would know of the end
        other.open_namespace(model="closing", format=FORMAT)
        assert daemon.held() == (1, 0, 2)
    assert bytes(view) == content(keys[3])
    lease.check()

    del view
    eventually(lambda: daemon.held() == (0, 0, 0))


def test_lease_taken_back(start: Start) -> None:
    """Everything is leased, room is wanted, and leases are older than `lease_ttl_s`."""
    ttl_s = 3.0
    daemon = start(dram=SMALL_DRAM, limits={"lease_ttl_s": ttl_s, "block_bytes_max": "1MiB"})
    keys = keys_of("taken", 20)
    with Client(daemon.socket, deadline_s=5) as client:
        space = client.open_namespace(model="m", format=LARGE)
        for key in keys[:16]:  # not one chain: a lease keeps all of the run that its blocks are in
            stored(space, [key])
        old = [space.lease(keys[first : first + 1]) for first in range(15)]
        view = old[3].views[0]
        taken_s = time.monotonic()
        eventually(lambda: time.monotonic() - taken_s >= ttl_s)
        young = space.lease(keys[15:16])
        young.check()
        with space.reserve(keys[16:17]) as reservation:  # waits for the room
            assert len(reservation) == 1
            fill(reservation.blocks[0])
            reservation.commit()
        assert daemon.stat().leases_revoked == 15
        young.check()
        with pytest.raises(LeaseLost, match="took the lease back"):
            old[3].check()
        with pytest.raises(LeaseLost, match="took the lease back"), old[4]:
            pass
        with pytest.raises(ZeroDivisionError), old[6]:  # the error of the body is not hidden
            _ = 1 // 0
        del view, old
        # A lease made after it names the new generation: it stands. And nothing was lost.
        with space.lease(keys[:1]) as lease:
            assert bytes(lease.view(0)) == content(keys[0], LARGE.size_bytes)
            lease.check()
        young.release()
        assert all(holds(space, [key]) for key in keys[:17])


def test_withdrawn_arena_is_returned_when_its_last_view_is_gone(start: Start) -> None:
    """Memory goes to another tenant as whole arenas, once no view of the first one is left."""
    daemon = start(
        dram=SMALL_DRAM | {"segment_bytes": "4MiB"},  # one arena in all
        more=f'[[tenants]]\nname = "a"\nuids = [{os.getuid()}]\n'
        '[[tenants]]\nname = "b"\nsocket = "FOLDER/b.sock"\n',
    )
    own = daemon.folder / "b.sock"
    keys = keys_of("withdrawn", 4)
    with Client(daemon.socket, deadline_s=5) as a, Client(own, deadline_s=5) as b:
        space = stored(a.open_namespace(model="m", format=LARGE), keys)
        with space.lease(keys) as lease:
            view = lease.view(0)
        assert space.evict(keys) == 4
        theirs = b.open_namespace(model="m", format=LARGE)
        with pytest.raises(TierFull):
            theirs.store(keys, fill, timeout_s=0.6)
        assert bytes(view) == content(keys[0], LARGE.size_bytes)
        lease.check()
        del view, lease
        stored(theirs, keys)
        assert holds(theirs, keys)
        assert space.lookup(keys).block_count == 0


def test_lease_of_nothing(space: Space) -> None:
    with space.lease([b"z" * 32]) as lease:
        assert (len(lease), lease.ready) == (0, True)
        with pytest.raises(LeaseLost, match="nothing"):
            _ = lease.views
        lease.check()


def test_a_view_costs_no_call(daemon: Daemon, space: Space, keys: list[bytes]) -> None:
    with stored(space, keys).lease(keys) as lease, daemon.stopped():
        began_s = time.monotonic()
        assert [bytes(view) for view in lease.views] == [content(key) for key in keys]
        lease.check()
        assert time.monotonic() - began_s < 1
