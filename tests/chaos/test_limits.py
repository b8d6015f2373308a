"""The disk is full, or memory or descriptors are short: a clear error, and the daemon lives on."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from daemons import (
    LARGE,
    Attached,
    Daemon,
    content,
    eventually,
    fill,
    holds,
    keys_of,
    read,
    stored,
)

from kvtier.client import Client, Space
from kvtier.errors import KvTierError
from kvtier.units import MIB

Start = Callable[..., Daemon]
DISK_BYTES = 24 * MIB
HEAL_S = 60.0


# --- disk


@pytest.fixture(params=["tmpfs", "ext4"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB (ext4: 48, of which its journal takes some)."""
    where = tmp_path / "disk"
    where.mkdir()
    if request.param == "tmpfs":
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "kvtier-test", str(where)]
    else:
        image = tmp_path / "image"
        with image.open("wb") as file:
            file.truncate(2 * DISK_BYTES)
        if shutil.which("mkfs.ext4") is None:
            pytest.skip("no mkfs.ext4")
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
        command = ["mount", "-o", "loop", str(image), str(where)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"may not mount {request.param}: {mounted.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", "--lazy", str(where)], check=True)


FILLER = """
import os, sys
with open(sys.argv[1], "wb", buffering=0) as file:
    try:
        while True:
            file.write(os.urandom(65536))
    except OSError as error:
        print(error)
    try:
        while True:
            file.write(b"x")
    except OSError as error:
        print(error)
"""


def fill_disk(where: Path) -> Path:
    """Another program takes every byte that is left."""
    path = where / "somebody-else"
    subprocess.run([sys.executable, "-c", FILLER, str(path)], check=True, capture_output=True)
    return path


def store_durably(space: Space, seed: str, count: int) -> bool:
    """Whether the daemon said that they are durable. A KvTierError is the other answer."""
    try:
        space.store(keys_of(seed, count), fill, durable=True, timeout_s=60)
    except KvTierError:
        return False
    return True


def test_a_full_disk_costs_the_tier_and_nothing_else(start: Start, small_disk: Path) -> None:
    daemon = start(
        state={"dir": str(small_disk / "state")},
        dram={"size_bytes": "8MiB", "segment_bytes": "1MiB"},
        # More than the disk has.
        ssd={"size_bytes": "64MiB", "segment_bytes": "2MiB", "min_free_bytes": 0},
    )
    with Client(daemon.socket, deadline_s=5, timeout_s=30) as client:
        space = client.open_namespace(model="m", format=LARGE)
        assert store_durably(space, "before", 8)
        filler = fill_disk(small_disk)
        durable = [f"full-{n}" for n in range(12) if store_durably(space, f"full-{n}", 8)]
        assert len(durable) < 12, "the disk was not full"
        # Memory serves, whatever is asked of it.
        for number in range(12):
            stored(space, keys_of(f"plain-{number}", 8))
            assert holds(space, keys_of(f"plain-{number}", 8))
        for seed in ("before", *durable):
            assert holds(space, keys_of(seed, 8)), seed
        assert daemon.admin.check().ok
        filler.unlink()
        number = 0
        until_s = time.monotonic() + HEAL_S
        while not store_durably(space, f"healed-{number}", 8):
            assert time.monotonic() < until_s, daemon.log
            number += 1
    daemon.kill()
    daemon.start()
    with Client(daemon.socket, deadline_s=5, timeout_s=30) as client:
        space = client.open_namespace(model="m", format=LARGE)
        for seed in ("before", *durable, f"healed-{number}"):
            assert holds(space, keys_of(seed, 8)), seed


def test_it_starts_on_a_full_disk(start: Start, small_disk: Path) -> None:
    options = {
        "state": {"dir": str(small_disk / "state")},
        "ssd": {"size_bytes": "64MiB", "segment_bytes": "2MiB", "min_free_bytes": 0},
    }
    daemon = start(**options)
    with Client(daemon.socket, deadline_s=5, timeout_s=30) as client:
        assert store_durably(client.open_namespace(model="m", format=LARGE), "before", 8)
    daemon.kill()
    fill_disk(small_disk)
    daemon.start()
    with Client(daemon.socket, deadline_s=5, timeout_s=30) as client:
        space = client.open_namespace(model="m", format=LARGE)
        assert holds(space, keys_of("before", 8))
        stored(space, keys_of("after", 4))
        assert holds(space, keys_of("after", 4))


# --- memory

LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
sys.argv = ["kvtier", "serve", "--config", sys.argv[2]]
runpy.run_module("kvtier", run_name="__main__")
"""


def test_a_start_without_enough_memory_says_so(start: Start) -> None:
    command = ("-c", LIMITED, str(2048 * MIB))
    daemon = start(ready=False, command=command, dram={"size_bytes": "3GiB"})
    assert daemon.process.wait(60) not in (0, 70), daemon.log
    last = daemon.log.strip().splitlines()[-1]
    assert "memory" in last.lower() or "size_bytes" in last, daemon.log
    assert "Traceback" not in daemon.log


def _size_bytes(pid: int) -> int:
    """Address space of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def test_a_lack_of_memory_refuses_sessions_and_ends_nothing(start: Start) -> None:
    daemon = start(limits={"write_arena_bytes": "64MiB", "block_bytes_max": "1MiB"})
    pid = daemon.process.pid
    with Client(daemon.socket, deadline_s=5, timeout_s=30) as client:
        space = client.open_namespace(model="m", format=LARGE)
        stored(space, keys_of("before", 8))
        eventually(lambda: daemon.stat().lease_count == 0)
        old = resource.prlimit(pid, resource.RLIMIT_AS)
        # The arena that is made ahead, one more, and what small things take.
        resource.prlimit(pid, resource.RLIMIT_AS, (_size_bytes(pid) + 100 * MIB, old[1]))
        answers = [Attached(daemon.session_socket) for _ in range(4)]
        assert any(not answer.token for answer in answers)
        for answer in answers:
            if not answer.token:
                assert answer.packet.refusal.message, answer.packet
        stored(space, keys_of("meanwhile", 8))
        assert holds(space, keys_of("before", 8))
        for answer in answers:
            answer.close()
        resource.prlimit(pid, resource.RLIMIT_AS, old)
        with Client(daemon.socket, deadline_s=5, timeout_s=30) as other:
            assert holds(other.open_namespace(model="m", format=LARGE), keys_of("meanwhile", 8))


# --- descriptors


def test_a_lack_of_descriptors_refuses_clients_and_ends_nothing(start: Start) -> None:
    daemon = start(dram={"size_bytes": "8MiB", "segment_bytes": "1MiB"})
    pid = daemon.process.pid
    with Client(daemon.socket, deadline_s=5, timeout_s=30) as client:
        space = client.open_namespace(model="m", format=LARGE)
        stored(space, keys_of("before", 8))
        old = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        # Two descriptors each: the client's write arena and the spare one, made meanwhile.
        eventually(lambda: _write_arenas(pid) == 4)
        # Room for two clients and a half: socket, pidfd, arena; slabs and leases need some, too.
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (daemon.descriptors() + 10, old[1]))
        peers = [_try_to_attach(daemon) for _ in range(6)]
        assert None in peers
        # A copy of an arena's descriptor may lack, too: then this session ends, and the next
        # call of the client begins another, if it can. An error, or the right bytes.
        for number in range(6):
            with suppress(KvTierError):
                stored(space, keys_of(f"meanwhile-{number}", 8))
                held = read(space, keys_of(f"meanwhile-{number}", 8))
                assert held in (
                    [],
                    [content(k, space.view_bytes) for k in keys_of(f"meanwhile-{number}", 8)],
                )
        assert daemon.running, daemon.log
        for peer in peers:
            if peer is not None:
                peer.close()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, old)
    with Client(daemon.socket, deadline_s=5, timeout_s=30) as other:
        space = other.open_namespace(model="m", format=LARGE)
        stored(space, keys_of("after", 8))
        assert holds(space, keys_of("after", 8))


def _write_arenas(pid: int) -> int:
    """How many descriptors of write arenas the process has."""
    found = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found += "-write-" in str(link.readlink())
    return found


def _try_to_attach(daemon: Daemon) -> Attached | None:
    """None: refused, or not even answered within a second."""
    try:
        attached = Attached(daemon.session_socket)
    except (OSError, TimeoutError):
        return None
    if not attached.token:
        attached.close()
        return None
    return attached
