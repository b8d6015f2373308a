"""Arenas: a reader stays a reader, sizes stay, revocation is seen; DramTier's segments."""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvtier import native
from kvtier.block import SLOT_BITS, SlotIO, SlotLabel
from kvtier.errors import DeviceUnavailable, InvalidRequest, InvariantViolated, VersionMismatch
from kvtier.testing.conformance import Blocks
from kvtier.tiers.arena import Arena, ArenaLayout, MappedArena
from kvtier.tiers.dram import DramTier
from kvtier.units import HUGE_PAGE_BYTES, MIB, PAGE_BYTES

# What a client process tries with the descriptor it was sent. Prints one word per attempt.
ATTACK = """
import ctypes, mmap, os, sys
fd, size, uid = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
if uid:
    os.setgid(uid)
    os.setuid(uid)
def attempt(name, work):
    try:
        work()
        print(name, "ok")
    except OSError as error:
        print(name, "refused")
def reopen_and_write():
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    os.pwrite(again, b"x", size - 1)
def reopen_and_map():
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    mmap.mmap(again, size, mmap.MAP_SHARED)
def protect():
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p] + [ctypes.c_size_t] * 5
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), 3):
        raise OSError(ctypes.get_errno(), "mprotect")
attempt("read", lambda: mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ))
attempt("map", lambda: mmap.mmap(fd, size, mmap.MAP_SHARED))
attempt("write", lambda: os.pwrite(fd, b"x", size - 1))
attempt("shrink", lambda: os.ftruncate(fd, 4096))
attempt("grow", lambda: os.ftruncate(fd, size + 4096))
attempt("reopen-write", reopen_and_write)
attempt("reopen-map", reopen_and_map)
attempt("mprotect", protect)
"""


def attack(arena: Arena, uid: int) -> dict[str, str]:
    ran = subprocess.run(
        [sys.executable, "-c", ATTACK, str(arena.fd), str(arena.layout.size), str(uid)],
        pass_fds=[arena.fd], capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return dict(line.split() for line in ran.stdout.splitlines())


@pytest.mark.parametrize("uid", [0, 65534], ids=["same uid", "other uid"])
def test_a_reader_cannot_write_nor_resize(uid: int) -> None:
    if uid and os.getuid():
        pytest.skip("needs root to become somebody else")
    arena = Arena("test", MIB, writable=False)
    tried = attack(arena, uid)
    assert tried.pop("read") == "ok"
    assert set(tried.values()) == {"refused"}, tried
    assert os.fstat(arena.fd).st_mode & 0o777 == 0o400
    assert native.checksum([arena.data_address], [MIB]) == [native.checksum_bytes(bytes(MIB))]
    arena.close()


def test_a_writer_cannot_resize_and_seals_are_final() -> None:
    arena = Arena("test", MIB, writable=True)
    tried = attack(arena, 0)
    assert (tried["map"], tried["shrink"], tried["grow"]) == ("ok", "refused", "refused")
    assert os.fstat(arena.fd).st_mode & 0o777 == 0o600
    with pytest.raises(PermissionError):
        fcntl.fcntl(arena.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    arena.close()


@pytest.mark.parametrize("data_bytes", [1, 4096, 4097, MIB, 3 * MIB + 5])
def test_layout_has_a_word_for_every_page_and_nothing_overlaps(data_bytes: int) -> None:
    layout = ArenaLayout.of(data_bytes, page_bytes=HUGE_PAGE_BYTES)
    assert layout.base_offset % PAGE_BYTES == 0
    assert layout.size % HUGE_PAGE_BYTES == 0
    assert layout.word(layout.base_offset) == 512
    last = layout.word(layout.base_offset + data_bytes - 1)
    assert last * 8 + 8 <= layout.base_offset
    for offset in (0, layout.base_offset - 1, layout.base_offset + data_bytes):
        with pytest.raises(InvalidRequest):
            layout.word(offset)


def test_revocation_is_seen_by_those_it_concerns() -> None:
    arena = Arena("test", 4 * PAGE_BYTES, writable=False)
    client = MappedArena(arena.fd, arena.layout.size)
    slots = [arena.base_offset + index * 2 * PAGE_BYTES for index in range(2)]
    assert (client.id, client.revocations()) == (arena.id, 0)

    assert arena.revoke(slots[1], 2 * PAGE_BYTES) == 1
    assert client.revocations() == arena.revocations == 1
    assert [client.generation(slot) for slot in slots] == [0, 1]
    assert arena.generation(slots[1]) == 1

    with pytest.raises(InvalidRequest):
        arena.revoke(slots[1], 3 * PAGE_BYTES)
    assert client.revocations() == 1
    client.close()
    arena.close()


def test_views_are_read_only_and_outlive_close() -> None:
    arena = Arena("test", MIB, writable=False)
    client = MappedArena(arena.fd, arena.layout.size)
    gone: list[bool] = []
    client.on_unmapped(lambda: gone.append(True))
    view = client.view(client.layout.base_offset, 16)
    assert view.readonly
    assert client.address % PAGE_BYTES == 0
    native.copy([arena.data_address], [arena.address], [8])
    client.close()
    client.close()
    assert bytes(view[:8]) == b"KVTARENA"
    assert not gone
    with pytest.raises(ValueError, match="released"):
        client.view(client.layout.base_offset, 16)
    view.release()
    gc.collect()
    assert gone
    arena.close()


def test_a_writable_mapping_is_seen_by_the_daemon() -> None:
    arena = Arena("test", MIB, writable=True)
    client = MappedArena(arena.fd, arena.layout.size, writable=True)
    client.view(client.layout.base_offset, 5)[:] = b"hello"
    assert native.checksum([arena.data_address], [5]) == [native.checksum_bytes(b"hello")]
    for offset, size in ((0, 8), (client.layout.base_offset, MIB + 1), (arena.layout.size, 0)):
        if offset != arena.layout.size:
            with pytest.raises(InvalidRequest):
                client.view(offset, size)
    client.close()
    arena.close()


def test_what_is_no_arena_is_refused() -> None:
    arena = Arena("test", MIB, writable=True)
    size = arena.layout.size
    with pytest.raises(InvalidRequest, match="announced"):
        MappedArena(arena.fd, size - PAGE_BYTES)
    sealed = Arena("test", MIB, writable=False)
    with pytest.raises(DeviceUnavailable):
        MappedArena(sealed.fd, sealed.layout.size, writable=True)
    with mmap.mmap(arena.fd, size) as memory:
        memory[8] = 99
        with pytest.raises(VersionMismatch, match="layout 99"):
            MappedArena(arena.fd, size)
        memory[8] = 1
        memory[24] ^= 1  # its size
        with pytest.raises(InvalidRequest, match="disagrees"):
            MappedArena(arena.fd, size)
        memory[0] = 0
        with pytest.raises(InvalidRequest, match="magic"):
            MappedArena(arena.fd, size)
    arena.close()
    sealed.close()


def test_no_memory_is_said_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    free = Path("/proc/meminfo").read_text().split("HugePages_Free:")[1].split()[0]
    if int(free) < 8:
        with pytest.raises(DeviceUnavailable, match=r"vm\.nr_hugepages"):
            Arena("test", 16 * MIB, writable=False, huge_pages="require")

    def full(address: int, size_bytes: int) -> None:
        raise DeviceUnavailable("Cannot allocate memory")

    fds = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    monkeypatch.setattr(native, "prefault", full)
    with pytest.raises(DeviceUnavailable, match="make the tier smaller"):
        DramTier(2, MIB)
    assert len(os.listdir("/proc/self/fd")) == fds  # noqa: PTH208


# --- DramTier


def test_recycled_segment_is_another_arena_without_old_bytes() -> None:
    steps: list[tuple[int, int]] = []
    tier = DramTier(2, MIB, progress=lambda done, count: steps.append((done, count)))
    assert steps == [(1, 2), (2, 2)]
    blocks = Blocks(tier, 1, 8192)
    tier.write(blocks.items)
    old = tier.arena(0).id
    new = tier.recycle(0)
    assert new.id != old
    assert tier.arena(0) is new
    tier.read(blocks.items)
    assert blocks.items[0].error is not None
    tier.close()
    tier.close()


def test_slots_lie_where_clients_are_told(tmp_path: Path) -> None:
    tier = DramTier(2, MIB, trust="single-tenant")
    arena = tier.arena(1)
    slot, slot_bytes = 1 << SLOT_BITS | 3, 16_384
    client = MappedArena(arena.fd, arena.layout.size, writable=True)
    client.view(arena.base_offset + 3 * slot_bytes, 5)[:] = b"whole"

    item = SlotIO(slot, slot_bytes, 0, SlotLabel(bytes(16), 0, bytes(32), b"", 0, 0, 5))
    tier.checksum_in_place([item])
    assert item.label.checksum == native.checksum_bytes(b"whole")
    assert tier.address(slot, slot_bytes) == arena.data_address + 3 * slot_bytes
    assert tier.revoke(slot, slot_bytes) == 1
    assert client.generation(arena.base_offset + 3 * slot_bytes) == 1
    with pytest.raises(InvariantViolated):
        tier.address(1 << SLOT_BITS | 64, slot_bytes)
    client.close()
    tier.close()
