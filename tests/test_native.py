"""Copy, checksum, slot I/O and prefault: the library and the Python path must not differ."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash

from kvtier import native
from kvtier.errors import DeviceUnavailable
from kvtier.native import HEADER_BYTES, AlignedBuffer

SIZES = [0, 1, 3, 4, 8, 9, 15, 16, 17, 127, 128, 129, 240, 241, 255, 256, 257, 1023, 1024, 1025]
SIZES += [2048, 2049, 4095, 4096, 4097, 32 * 1024, 32 * 1024 + 1, 65 * 1024 - 1, 2 * 1024**2 + 7]
MIB = 1024**2
PATHS = ["python", "sse2", "avx2", "avx512"]
if platform.machine() not in ("x86_64", "AMD64"):
    PATHS = ["python", "generic"]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test with the Python path and with each instruction set the library has here."""
    name: str = request.param
    if name == "python":
        monkeypatch.setattr(native, "_backend", native._Python())
        yield name
        return
    if not isinstance(native._backend, native._Library):
        pytest.skip(f"no native library: {native.capabilities().reason}")
    library = native._backend.library
    best = native.capabilities().isa
    error = library.kvt_select_isa(name.encode())
    if error:
        pytest.skip(f"{name}: {os.strerror(error)} on this CPU")
    yield name
    assert library.kvt_select_isa(best.encode()) == 0


def pattern(size_bytes: int, seed: int = 1) -> bytes:
    """Reproducible bytes without a period that divides a block."""
    return (xxhash.xxh3_128_digest(bytes([seed])) * (size_bytes // 15 + 2))[seed:][:size_bytes]


def filled(content: bytes, lead: int = 0) -> AlignedBuffer:
    buffer = AlignedBuffer(lead + len(content) + 64)
    buffer.view[lead : lead + len(content)] = content
    return buffer


def test_capabilities_name_what_runs(path: str) -> None:
    assert native.capabilities().native == (path != "python")
    assert native.capabilities().isa == path


@pytest.mark.parametrize("lead", [0, 1, 64])
def test_checksums_equal_xxhash(path: str, lead: int) -> None:
    contents = [pattern(size) for size in SIZES]
    sources = [filled(content, lead) for content in contents]

    checksums = native.checksum([source.address + lead for source in sources], SIZES)

    assert checksums == [xxhash.xxh3_64_intdigest(content) for content in contents]
    assert checksums == [native.checksum_bytes(content) for content in contents]


# A small batch goes through the cache, a big one around it; unaligned targets never around it.
@pytest.mark.parametrize("sizes", [SIZES[:-1], SIZES], ids=["cached", "streamed"])
@pytest.mark.parametrize(("source_lead", "target_lead"), [(0, 0), (5, 0), (0, 9), (5, 9)])
def test_copies_are_exact(path: str, sizes: list[int], source_lead: int, target_lead: int) -> None:
    contents = [pattern(size, seed=3) for size in sizes]
    sources = [filled(content, source_lead) for content in contents]
    source_addresses = [source.address + source_lead for source in sources]

    for with_checksum in (True, False):
        targets = [filled(b"\xee" * (size + 32), target_lead) for size in sizes]
        target_addresses = [target.address + target_lead for target in targets]
        if with_checksum:
            checksums = native.copy_checksum(target_addresses, source_addresses, sizes)
            assert checksums == [xxhash.xxh3_64_intdigest(content) for content in contents]
        else:
            native.copy(target_addresses, source_addresses, sizes)
        for target, content in zip(targets, contents, strict=True):
            assert target.view[:target_lead] == bytes(target_lead)
            end = target_lead + len(content)
            assert target.view[target_lead:end] == content
            assert target.view[end : end + 32] == b"\xee" * 32


@pytest.mark.parametrize("target_lead", [0, 8], ids=["streamed", "cached"])
def test_checksum_is_of_what_was_stored_while_the_source_changes(
    path: str, target_lead: int
) -> None:
    size = 2 * MIB
    source, target = AlignedBuffer(size), AlignedBuffer(size + 64)
    stop = threading.Event()

    def scribble() -> None:
        value = 0
        while not stop.is_set():
            value = (value + 1) % 256
            ctypes.memset(source.address, value, size)  # without the GIL

    scribbler = threading.Thread(target=scribble)
    scribbler.start()
    try:
        address = target.address + target_lead
        for _ in range(40):
            checksum = native.copy_checksum([address], [source.address], [size])
            stored = target.view[target_lead : target_lead + size]
            assert checksum == [xxhash.xxh3_64_intdigest(stored)]
    finally:
        stop.set()
        scribbler.join()


def test_many_threads_at_once(path: str) -> None:
    contents = [pattern(300_000 + seed, seed) for seed in range(1, 5)]
    sources = [filled(content) for content in contents]
    sizes = [len(content) for content in contents]
    source_addresses = [source.address for source in sources]
    expected = [xxhash.xxh3_64_intdigest(content) for content in contents]
    results: list[list[int]] = []

    def work() -> None:
        targets = [AlignedBuffer(size) for size in sizes]
        addresses = [target.address for target in targets]
        for _ in range(20):
            checksums = native.copy_checksum(addresses, source_addresses, sizes)
            results.append(checksums)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 80


def test_empty_batch(path: str) -> None:
    native.copy([], [], [])
    assert native.checksum([], []) == []
    assert native.copy_checksum([], [], []) == []
    assert native.slots_write([], [], [], [], []) == []
    assert native.slots_read([], [], [], [], [], []) == ([], [])


def open_direct(file: Path) -> int:
    """With O_DIRECT where the file system has it (tmpfs may not)."""
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    except OSError:
        return os.open(file, os.O_RDWR | os.O_CREAT, 0o600)


@pytest.mark.parametrize("depth", [0, 1, 3, 1000])
@pytest.mark.parametrize("payload_sizes", [[4096, 0, 2 * MIB], [8192, 12288, 4096] * 30])
def test_slots_come_back(path: str, tmp_path: Path, payload_sizes: list[int], depth: int) -> None:
    fd = open_direct(tmp_path / "slab")
    count, stride = len(payload_sizes), HEADER_BYTES + 2 * MIB
    offsets = [i * stride for i in range(count)]
    headers = [filled(pattern(HEADER_BYTES, seed=i + 1)) for i in range(count)]
    payloads = [filled(pattern(size, seed=i + 7)) for i, size in enumerate(payload_sizes)]
    sizes = [max(0, size - 100) for size in payload_sizes]
    fds = [fd] * count

    errors = native.slots_write(
        fds, offsets, [h.address for h in headers], [p.address for p in payloads], payload_sizes,
        depth=depth,
    )  # fmt: skip
    assert errors == [0] * count

    got_headers = [AlignedBuffer(HEADER_BYTES) for _ in range(count)]
    got_payloads = [AlignedBuffer(max(1, size)) for size in payload_sizes]
    checksums, errors = native.slots_read(
        fds,
        offsets,
        [h.address for h in got_headers],
        [p.address for p in got_payloads],
        payload_sizes,
        sizes,
        depth=depth,
    )
    assert errors == [0] * count
    for i in range(count):
        assert got_headers[i].view == headers[i].view[:HEADER_BYTES]
        size = payload_sizes[i]
        assert got_payloads[i].view[:size] == payloads[i].view[:size]
        assert checksums[i] == xxhash.xxh3_64_intdigest(payloads[i].view[: sizes[i]])
    os.close(fd)


@pytest.mark.parametrize("file_bytes", [0, 100, 4096, 4096 + 512, 8192, 12287])
def test_file_that_ends_inside_a_slot_is_an_error_of_that_slot(
    path: str, tmp_path: Path, file_bytes: int
) -> None:
    short, whole = open_direct(tmp_path / "short"), open_direct(tmp_path / "whole")
    os.ftruncate(short, file_bytes)
    os.ftruncate(whole, 12288)
    buffers = [AlignedBuffer(3 * 4096) for _ in range(2)]

    checksums, errors = native.slots_read(
        [short, whole],
        [0, 0],
        [buffer.address for buffer in buffers],
        [buffer.address + HEADER_BYTES for buffer in buffers],
        [8192, 8192],
        [8192, 8192],
    )

    assert errors == [errno.EIO, 0]
    assert checksums == [0, xxhash.xxh3_64_intdigest(bytes(8192))]
    os.close(short)
    os.close(whole)


def test_bad_descriptor_and_bad_size_fail_their_own_slot(path: str, tmp_path: Path) -> None:
    fd = open_direct(tmp_path / "slab")
    buffer = AlignedBuffer(2 * 4096)
    headers, payloads = [buffer.address] * 3, [buffer.address + HEADER_BYTES] * 3

    errors = native.slots_write([fd, -1, fd], [0, 0, 8192], headers, payloads, [4096] * 3, depth=2)
    assert errors == [0, errno.EBADF, 0]

    checksums, errors = native.slots_read(
        [fd, -1, fd], [0, 0, 8192], headers, payloads, [4096] * 3, [4096, 4096, 4097], depth=3
    )
    assert errors == [0, errno.EBADF, errno.EINVAL]
    assert checksums == [xxhash.xxh3_64_intdigest(bytes(4096)), 0, 0]
    os.close(fd)


def test_full_device_is_an_errno(path: str) -> None:
    fd = os.open("/dev/full", os.O_RDWR)
    buffer = AlignedBuffer(2 * 4096)

    errors = native.slots_write([fd], [0], [buffer.address], [buffer.address + 4096], [4096])

    assert errors == [errno.ENOSPC]
    os.close(fd)


def test_short_write_is_continued_then_reported(path: str, tmp_path: Path) -> None:
    """A file size limit first cuts a write short, then refuses the rest with EFBIG."""
    fd = os.open(tmp_path / "slab", os.O_RDWR | os.O_CREAT, 0o600)
    buffer = filled(pattern(3 * 4096))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
    try:
        errors = native.slots_write([fd], [0], [buffer.address], [buffer.address + 4096], [8192])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert errors == [errno.EFBIG]
    assert os.fstat(fd).st_size == 6000
    assert (tmp_path / "slab").read_bytes() == buffer.view[:6000]
    os.close(fd)


def resident_bytes(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def test_prefault_populates_and_keeps_contents(path: str) -> None:
    fd = os.memfd_create("kvtier-test")
    os.ftruncate(fd, MIB)
    memory = mmap.mmap(fd, MIB)
    memory[5000:5005] = b"hello"
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert resident_bytes(fd) == 4096

    native.prefault(address + 10, MIB - 20)

    assert resident_bytes(fd) == MIB
    assert memory[5000:5005] == b"hello"
    native.prefault(address, 0)
    os.close(fd)


@pytest.mark.parametrize("populate", [True, False], ids=["populate", "old kernel"])
def test_prefault_beyond_what_exists_is_an_error_not_a_signal(
    path: str, populate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not populate:
        if path != "python":
            pytest.skip("the library's own fallback needs a kernel before 5.14")
        monkeypatch.setattr(native, "_MADV_POPULATE_WRITE", 9999)
    fd = os.memfd_create("kvtier-test")
    os.ftruncate(fd, 8 * 4096)
    memory = mmap.mmap(fd, 8 * 4096)
    memory[0:2] = b"ab"
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    native.prefault(address, 8 * 4096)
    os.ftruncate(fd, 4 * 4096)  # a write to page 4 would now be a SIGBUS

    with pytest.raises(DeviceUnavailable, match=r"EFAULT.*smaller tier"):
        native.prefault(address, 8 * 4096)

    assert memory[0:2] == b"ab"
    os.close(fd)


def test_prefault_of_unmapped_memory_is_an_error(path: str) -> None:
    with pytest.raises(DeviceUnavailable):
        native.prefault(4096, 4096)


def test_aligned_buffer_lives_until_closed() -> None:
    with AlignedBuffer(10_000) as buffer:
        assert buffer.address % 4096 == 0
        assert bytes(buffer.view) == bytes(10_000)
        ctypes.memset(buffer.address + 7, 9, 1)
        assert buffer.view[7] == 9
    with pytest.raises(ValueError, match="released"):
        buffer.view[0]


def test_environment_forces_the_python_path() -> None:
    program = "import kvtier.native as n; print(n.capabilities())"
    environment = {**os.environ, "KVTIER_NATIVE": "off"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert "native=False, isa='python', reason='KVTIER_NATIVE=off'" in done.stdout


def test_a_library_of_another_abi_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.capabilities().native:
        pytest.skip(f"no native library: {native.capabilities().reason}")
    monkeypatch.setattr(native, "ABI_VERSION", 999)

    backend, reason = native._load()

    assert not backend.native
    assert "wants 999: rebuild it" in reason


def test_importing_kvtier_loads_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys, kvtier; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(done.stdout.split())
    assert "kvtier" in loaded
    assert not loaded & {"cupy", "google.protobuf", "grpc", "lmdb", "numpy", "torch", "xxhash"}
    assert "kvtier.native" not in loaded
